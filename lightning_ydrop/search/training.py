"""One training of a search: the network of a configuration, with given patterns."""

import fnmatch
import math
import shutil
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, LambdaCallback, Timer

from lightning_ydrop.callbacks.exact_resume import ExactResume
from lightning_ydrop.callbacks.last_epoch import LastEpoch
from lightning_ydrop.callbacks.patterns import PatternCallback, may_build_later
from lightning_ydrop.errors import ConfigurationError, NoEffectWarning, describe
from lightning_ydrop.layers.patterns import Pattern
from lightning_ydrop.search.cli import SearchCLI
from lightning_ydrop.search.places import find_places
from lightning_ydrop.search.quiet import quiet
from lightning_ydrop.search.reports import PlaceReport
from lightning_ydrop.search.settings import SearchSettings
from lightning_ydrop.search.space import PatternSpace
from lightning_ydrop.search.workers import TrialError

# Called with the epoch and its reward after each validation; true if the training should stop.
Report = Callable[[int, float], bool]


@dataclass(frozen=True)
class Outcome:
    """What a training reached.

    Attributes:
        reward: What the search maximises; NaN where the training diverged.
        metrics: All numbers of the last validation.
        stopped_at: The epoch at which it was stopped early, if it was.

    """

    reward: float
    metrics: dict[str, float]
    stopped_at: int | None


class _Rewards(Callback):
    """Notes the reward of each validation, and stops the training if it is told to."""

    def __init__(self, settings: SearchSettings, report: Report | None) -> None:
        self._settings = settings
        self._report = report
        self.by_epoch: dict[int, float] = {}
        self.stopped_at: int | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Report again what an interrupted training had reached: this trial is another one."""
        if self._report is not None and trainer.is_global_zero:
            for epoch, reward in self.by_epoch.items():
                if math.isfinite(reward):
                    self._report(epoch, reward)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note the reward."""
        metric = trainer.callback_metrics.get(self._settings.metric)
        if trainer.sanity_checking or metric is None:
            return
        reward = self._settings.reward(float(metric))
        self.by_epoch[trainer.current_epoch] = reward
        if self._report is None:
            return
        first = trainer.is_global_zero and math.isfinite(reward)
        should_stop = first and self._report(trainer.current_epoch, reward)
        is_last = trainer.current_epoch + 1 == trainer.max_epochs  # then there is nothing to stop
        if trainer.strategy.broadcast(should_stop) and not is_last:
            self.stopped_at = trainer.current_epoch
            trainer.should_stop = True

    def state_dict(self) -> dict[str, Any]:
        """Keep the rewards in checkpoints."""
        return {"by_epoch": self.by_epoch, "stopped_at": self.stopped_at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them from a checkpoint."""
        self.by_epoch, self.stopped_at = state_dict["by_epoch"], state_dict["stopped_at"]


class Training:
    """Trains the network of a configuration.

    Args:
        cli: The configuration.

    Attributes:
        num_processes: How many processes a training of the configuration takes.

    Raises:
        ConfigurationError: If its Trainer never ends or never validates, or has patterns of its own.

    """

    def __init__(self, cli: SearchCLI) -> None:
        trainer: Any = cli.trainer
        if trainer.max_epochs == trainer.max_steps == -1 and not any(isinstance(c, Timer) for c in trainer.callbacks):
            raise ConfigurationError(
                "A search was started with a Trainer that has no last epoch.",
                "A trial trains to the end, and then gives its reward.",
                "Pass --trainer.max_epochs, --trainer.max_steps or --trainer.max_time.",
            )
        if trainer.limit_val_batches == 0 or (trainer.check_val_every_n_epoch or 1) > (trainer.max_epochs or -1) > 0:
            raise ConfigurationError(
                "A search was started with a Trainer that never validates.",
                "The reward of a trial is what validation logs.",
                "Leave --trainer.limit_val_batches above 0, and --trainer.check_val_every_n_epoch within the epochs.",
            )
        if any(isinstance(callback, PatternCallback) for callback in trainer.callbacks):
            raise ConfigurationError(
                "A search was started with a Trainer that has a PatternCallback.",
                "The patterns of each trial are those that the search draws.",
                "Leave the callback out, and name the values to try in search.conv and search.token.",
            )
        self.cli = cli
        self.settings = cli.settings
        self.num_processes = cli.trainer.world_size

    def space(self) -> PatternSpace:
        """Find the places of the network, and what to try there.

        Raises:
            ConfigurationError: If the network has no places, or the settings name others.

        """
        report = self._places()
        names = list(report.places)
        if not names:
            raise ConfigurationError(
                f"A search was started with the model {type(self.cli.model).__name__}.",
                f"It has no place for a pattern. {report}",
                "Pass a network with batch normalisation, convolutions or attention.",
            )
        for wanted in self.settings.places or ():
            if not fnmatch.filter(names, wanted):
                raise ConfigurationError(
                    f"SearchSettings(places={list(self.settings.places or ())}) was given, and {wanted!r} is no place.",
                    f"The places of {type(self.cli.model).__name__} are {', '.join(map(repr, names))}.",
                    "Name some of these, or leave `places` out for all.",
                )
        chosen = [
            name for name in names if any(fnmatch.fnmatchcase(name, each) for each in self.settings.places or ["*"])
        ]
        kinds = {name: place.kind for name, place in report.places.items()}
        searched, unsearched = (
            {name: kind for name, kind in kinds.items() if (name in chosen) is wanted} for wanted in (True, False)
        )
        return PatternSpace(searched, self.settings.conv, self.settings.token, unsearched)

    def dry_run(self, patterns: Mapping[str, Pattern]) -> None:
        """Train and validate one batch with patterns, and check that the metric is logged.

        Raises:
            ConfigurationError: If it is not.

        """
        self._make(self.cli.seed, patterns, [], **_on_one_device(), fast_dev_run=1)
        try:
            with quiet(), warnings.catch_warnings():
                warnings.simplefilter("ignore", NoEffectWarning)  # below, it is an error
                self.cli.trainer.fit(self.cli.model, self.cli.datamodule)
        except ConfigurationError as error:
            given, allowed, remedy = error.args
            others = [place for place in patterns if repr(place) not in given]
            raise ConfigurationError(
                f"A search was started, and training with {describe(dict(patterns))} failed. {given}",
                allowed,
                f"{remedy} A search leaves places out by naming the others, here with search.places={others}, and "
                "values with, for example, search.conv.size=[0, 0.25].",
            ) from error
        self._check_that_all_are_called(patterns)
        logged = self._logged_in_validation()
        if self.settings.metric not in logged:
            raise ConfigurationError(
                f"SearchSettings(metric={self.settings.metric!r}) was given, and the model does not log it there.",
                f"In validation {type(self.cli.model).__name__} logs {', '.join(map(repr, logged)) or 'nothing'}.",
                "Name one of these, or log the metric in validation_step.",
            )

    def _check_that_all_are_called(self, patterns: Mapping[str, Pattern]) -> None:
        callbacks: list[Callback] = self.cli.trainer.callbacks  # type: ignore[attr-defined]
        idle = {place for each in callbacks if isinstance(each, PatternCallback) for place in each.idle_places}
        if idle:
            raise ConfigurationError(
                f"A search was started, and training did not call {', '.join(map(repr, sorted(idle)))}.",
                "What is never called in training mode drops nothing, whatever its pattern is.",
                f"Name the other places: search.places={[place for place in patterns if place not in idle]}.",
            )

    def _logged_in_validation(self) -> list[str]:
        """Validate one batch, and list what is logged then. After a training, what that logs is there too."""
        self._make(self.cli.seed, {}, [], **_on_one_device(), fast_dev_run=1)
        try:
            with quiet():
                self.cli.trainer.validate(self.cli.model, self.cli.datamodule, verbose=False)
        except MisconfigurationException:  # of a model without validation
            return []
        return sorted(self.cli.trainer.callback_metrics)

    def untrained(self) -> float:
        """Give the reward of the network before its training."""
        self._make(self.cli.seed, {}, [], **_on_one_device())
        with quiet():
            self.cli.trainer.validate(self.cli.model, self.cli.datamodule, verbose=False)
        return self.settings.reward(float(self.cli.trainer.callback_metrics.get(self.settings.metric, math.nan)))

    def __call__(
        self, patterns: Mapping[str, Pattern], seed: int, folder: Path, report: Report | None = None
    ) -> Outcome:
        """Train to the end, from the last epoch on where a training was interrupted.

        Args:
            patterns: By place.
            seed: Of weights, batches and masks.
            folder: Where the checkpoint of the last epoch lies meanwhile.
            report: Called after each validation.

        Returns:
            What the training reached. On other ranks than the first, the same.

        """
        rewards = _Rewards(self.settings, report)
        kept = {"default_root_dir": str(folder), "enable_checkpointing": True}
        self._make(seed, patterns, [rewards, ExactResume(), LastEpoch(str(folder))], **kept)
        trainer = self.cli.trainer
        with quiet():
            trainer.fit(self.cli.model, self.cli.datamodule, ckpt_path=_last_of(folder))
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        values = list(rewards.by_epoch.values())
        # Of validations alone: by the end, training may have logged another number under this name.
        if self.settings.measured == "best":
            reward = max((value for value in values if math.isfinite(value)), default=math.nan)
        else:
            reward = values[-1] if values else math.nan
        if trainer.is_global_zero:
            shutil.rmtree(folder, ignore_errors=True)
        if not values:
            raise TrialError(
                f"The training ended without a validation that logs {self.settings.metric!r}. "
                "A reward takes at least one: look at max_epochs, check_val_every_n_epoch and limit_val_batches."
            )
        return Outcome(reward if math.isfinite(reward) else math.nan, metrics, rewards.stopped_at)

    def test(self) -> dict[str, float]:
        """Test the network that was trained last.

        Returns:
            What it logs in its test.

        """
        with quiet():
            (tested,) = self.cli.trainer.test(self.cli.model, self.cli.datamodule, verbose=False)
        return {name: float(value) for name, value in tested.items()}

    def _make(
        self, seed: int, patterns: Mapping[str, Pattern], callbacks: list[Callback], **trainer_arguments: Any
    ) -> None:
        masks = [PatternCallback(patterns, self.settings.warmup)] if patterns else []
        with quiet():
            self.cli.make(seed, [*masks, *callbacks], **trainer_arguments)

    def _places(self) -> PlaceReport:
        """Find the places of a network. One that may be built when a fit begins is fitted to one batch for that."""
        if not may_build_later(self.cli.model):
            return find_places(self.cli.model, self.settings.per_block)
        found: list[PlaceReport] = []
        per_block = self.settings.per_block
        finder = LambdaCallback(on_fit_start=lambda _, module: found.append(find_places(module, per_block)))
        self._make(self.cli.seed, {}, [finder], **_on_one_device(), fast_dev_run=1)
        with quiet():
            self.cli.trainer.fit(self.cli.model, self.cli.datamodule)
        return found[0]


def _on_one_device() -> dict[str, Any]:
    return {"devices": 1, "num_nodes": 1, "strategy": "auto"}


def _last_of(folder: Path) -> str | None:
    """Find the checkpoint of an interrupted training. One that was killed while it was written is no ZIP file."""
    last = folder / "last.ckpt"
    return str(last) if zipfile.is_zipfile(last) else None
