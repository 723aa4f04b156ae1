"""The command line of a search: LightningCLI, for any LightningModule and DataModule."""

import json
from pathlib import Path
from typing import Any, Literal

import lightning as L
from jsonargparse.typing import PositiveInt
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from lightning.pytorch.loggers.logger import DummyLogger

from lightning_ydrop.search.quiet import UNWRITTEN, quiet
from lightning_ydrop.search.settings import SearchSettings

SamplerName = Literal["random", "tpe", "table", "transformer"]
DESCRIPTION = "Search for the dropout patterns of a network (AutoDropout, arXiv 2101.01761)."
# What of the configuration says where a search runs, and changes nothing that it finds.
WHERE = ("trials", "workers", "storage", "study", "out", "config")


class SearchCLI(LightningCLI):
    """LightningCLI with the settings of a search, for any LightningModule and DataModule.

    Args:
        args: As for LightningCLI: a list of arguments, or a configuration.

    """

    def __init__(self, args: ArgsType) -> None:
        self._trainer_arguments: dict[str, Any] = {}
        self._trial_callbacks: list[Callback] = []
        with quiet():
            super().__init__(
                save_config_callback=None,
                seed_everything_default=0,
                parser_kwargs={"prog": "python -m lightning_ydrop.search fit", "description": DESCRIPTION},
                args=args,
                run=False,
            )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what a search needs beside a model, data and a Trainer."""
        parser.add_class_arguments(SearchSettings, "search")
        parser.add_argument(
            "--sampler",
            type=SamplerName,
            default="transformer",
            help="what chooses patterns: random, tpe (Optuna's), or a controller that learns: table or transformer",
        )
        parser.add_argument("--trials", type=PositiveInt, default=100, help="trainings that the study is to have")
        parser.add_argument("--workers", type=PositiveInt, default=1, help="processes that train at the same time")
        parser.add_argument(
            "--storage", type=str | None, default=None, help="a journal file, in --out by default, or postgresql://..."
        )
        parser.add_argument("--study", type=str | None, default=None, help="its name; SAMPLER-SEED by default")
        parser.add_argument("--out", type=str, default="runs/search", help="folder for checkpoints and pictures")

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Make the Trainer of one training, whose logger keeps nothing: callbacks and models may ask for one."""
        given = self.config_init["trainer"].get("callbacks") or []
        callbacks = [*(given if isinstance(given, list) else [given]), *self._trial_callbacks]
        quiet = {"logger": DummyLogger(), "enable_progress_bar": False, "enable_model_summary": False}
        return super().instantiate_trainer(**{**quiet, **self._trainer_arguments, **kwargs, "callbacks": callbacks})

    def make(self, seed: int, callbacks: list[Callback], **trainer_arguments: Any) -> None:
        """Make model, data and Trainer anew, with weights by a seed."""
        self._trial_callbacks, self._trainer_arguments = callbacks, trainer_arguments
        L.seed_everything(seed, workers=True, verbose=False)
        self.instantiate_classes()

    @property
    def settings(self) -> SearchSettings:
        """The settings of the search."""
        settings: SearchSettings = self.config_init["search"]
        return settings

    @property
    def seed(self) -> int:
        """The seed of the search, from which those of its trainings are made."""
        return int(self.config["seed_everything"] or 0)

    @property
    def study_name(self) -> str:
        """The name of the study."""
        return self.config["study"] or f"{self.config['sampler']}-{self.seed}"

    @property
    def storage(self) -> str:
        """The storage: the path of a journal file, or the URL of a database."""
        return self.config["storage"] or str(self.out / "studies.journal")

    @property
    def out(self) -> Path:
        """The folder for checkpoints and pictures."""
        return Path(self.config["out"]).expanduser()

    @property
    def folder(self) -> Path:
        """Where the study keeps checkpoints."""
        return self.out / self.study_name

    def search_logger(self) -> Logger | None:
        """Give the Trainer's logger, to which the progress of the search goes. Single trainings log nothing."""
        loggers = self.config_init["trainer"].get("logger")
        logger = loggers[0] if isinstance(loggers, list) and loggers else loggers
        return logger if isinstance(logger, Logger) else None

    def identity(self) -> dict[str, Any]:
        """Give the configuration without what says where it runs."""
        with quiet():
            text = self.parser.dump(self.config, skip_none=False, format="json")
        content: dict[str, Any] = _readable(json.loads(text))
        for name in WHERE:
            content.pop(name, None)
        return content


def _readable(content: Any) -> Any:
    """Leave out values that jsonargparse can't write: the defaults of their class are taken again."""
    if isinstance(content, dict):
        unwritten = {name for name, each in content.items() if isinstance(each, str) and each.startswith(UNWRITTEN)}
        return {name: _readable(each) for name, each in content.items() if name not in unwritten}
    return [_readable(each) for each in content] if isinstance(content, list) else content
