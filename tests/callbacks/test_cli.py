import inspect
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from torch import Tensor, nn

from lightning_ydrop import ConductanceDropout, ConfigurationError, YDropCallback
from tests.networks import perceptron

X = torch.randn(32, 12, generator=torch.Generator().manual_seed(0))
Y = torch.arange(32) % 5
QUIET = [
    *("--trainer.accelerator=cpu", "--trainer.max_epochs=2", "--trainer.logger=false"),
    *("--trainer.enable_checkpointing=false", "--trainer.enable_progress_bar=false"),
    "--trainer.enable_model_summary=false",
]
ADD = "--trainer.callbacks+=lightning_ydrop.YDropCallback"

Run = Callable[..., LightningCLI]


class Model(LightningModule):
    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.body = perceptron(dropout=lambda: ConductanceDropout(p))

    def forward(self, x: Tensor) -> Any:
        return self.body(x)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch["x"]), batch["y"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Batches:
    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter([{"x": X[:16], "y": Y[:16]}, {"x": X[16:], "y": Y[16:]}])

    def __len__(self) -> int:
        return 2


class Data(LightningDataModule):
    def train_dataloader(self) -> Any:
        return Batches()


class YDropCLI(LightningCLI):
    """The recipe for `--ydrop.elasticity=...`: one line, and no class of ours."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(YDropCallback, "ydrop")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a program with a LightningCLI, as from a shell."""
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning calls it by an older name

    def run(
        *arguments: str, cli: type[LightningCLI] = LightningCLI, model: type[LightningModule] | None = None
    ) -> LightningCLI:
        # Not by `args=`: LightningCLI warns of that wherever the program at work has arguments of its own.
        monkeypatch.setattr(sys, "argv", ["train.py", "fit", *arguments])
        return cli(model or Model, Data, save_config_callback=None, seed_everything_default=0)

    return run


@pytest.fixture
def said(run: Run, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What a program prints that ends well before it fits."""

    def said(*arguments: str, cli: type[LightningCLI] = LightningCLI) -> str:
        with pytest.raises(SystemExit) as caught:
            run(*arguments, cli=cli)
        assert caught.value.code == 0
        return capsys.readouterr().out

    return said


def callback_of(cli: LightningCLI) -> YDropCallback:
    (callback,) = (each for each in cli.trainer.callbacks if isinstance(each, YDropCallback))  # type: ignore[attr-defined]
    return callback


def settings_of(cli: LightningCLI) -> dict[str, str]:
    """All that the callback was made with: by repr, since measures and the like are equal only to themselves."""
    callback = callback_of(cli)
    settings = vars(callback.settings) | vars(callback.settings.path)
    kept = {name: settings[name] for name in settings if name not in ("path", "owner")} | {
        name: getattr(callback, name) for name in ("adapter", "convert", "include", "exclude")
    }
    return {name: repr(value) for name, value in kept.items()} | {"schedule": repr(callback._schedule)}


def explanations(help_text: str, prefix: str) -> dict[str, str]:
    """What a help text says of each option."""
    options = rf"^  --{re.escape(prefix)}\.([a-z_0-9]+)[ +](.*\n(?:    +.*\n)*)"
    return {name: " ".join(text.split()) for name, text in re.findall(options, help_text, re.MULTILINE)}


ARGUMENTS = list(inspect.signature(YDropCallback).parameters)
DOCUMENTED = inspect.getdoc(YDropCallback) or ""


@pytest.mark.parametrize(
    ("arguments", "cli", "prefix"),
    [
        (["--trainer.callbacks.help", "lightning_ydrop.YDropCallback"], LightningCLI, "trainer.callbacks"),
        (["--trainer.callbacks.help=YDropCallback"], LightningCLI, "trainer.callbacks"),
        (["--help"], YDropCLI, "ydrop"),
    ],
)
def test_help_explains_every_argument(
    arguments: list[str], cli: type[LightningCLI], prefix: str, said: Callable[..., str]
) -> None:
    text = said(*arguments, cli=cli)
    explained = explanations(text, prefix)
    assert list(ARGUMENTS) == [name for name in explained if name in ARGUMENTS]
    for name in ARGUMENTS:
        # The words of the docstring, as far as the help text is not broken there.
        first = re.search(rf"^    {name}: (\S+ \S+ \S+)", DOCUMENTED, re.MULTILINE)
        assert first is not None
        assert first[1] in explained[name]


def test_the_callback_is_added_from_the_command_line(run: Run) -> None:
    cli = run(*QUIET, ADD, "--trainer.callbacks.annealing_epochs=1", "--trainer.callbacks.elasticity=0.25")
    engine = callback_of(cli).engine
    assert engine is not None
    assert engine.settings.elasticity == 0.25
    assert engine.state_dict()["steps_taken"] == 2  # in the second of two epochs


@pytest.mark.filterwarnings("ignore:Training is to end before the annealing")
def test_it_is_added_to_those_of_a_file(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "base.yaml"
    other = {"class_path": "GradientAccumulationScheduler", "init_args": {"scheduling": {0: 1}}}
    file.write_text(yaml.safe_dump({"trainer": {"callbacks": [other]}}))
    cli = run(f"--config={file}", *QUIET, ADD)
    kinds = [type(callback).__name__ for callback in cli.trainer.callbacks]  # type: ignore[attr-defined]
    assert kinds == ["GradientAccumulationScheduler", "YDropCallback"]


EVERYTHING: dict[str, Any] = {
    "elasticity": 0.25,
    "buckets": {
        "low": {"mean": 0.05, "std": 0.0, "max": 0.25},
        "high": {"mean": 0.5, "std": 0.125, "max": 0.75},
        "strong_fraction": 0.25,
    },
    "initial_drop_prob": 0.125,
    "n_steps": 3,
    "num_samples": 4,
    "baseline": [0.5],
    "quadrature": "trapezoid",
    "measure": {
        "class_path": "lightning_ydrop.Inverted",
        "init_args": {
            "measure": {
                "class_path": "lightning_ydrop.CaptumMeasure",
                "init_args": {"attribution": "LayerActivation", "arguments": None},
            }
        },
    },
    "seed": 7,
    "annealing_epochs": None,
    "annealing_steps": 1,
    "transition": "linear",
    "every_n_batches": 2,
    "adapter": {
        "class_path": "lightning_ydrop.KeyAdapter",
        "init_args": {"inputs": ["x"], "target": "y", "keywords": True},
    },
    "objective": {
        "class_path": "lightning_ydrop.NegativeLoss",
        "init_args": {"loss": {"class_path": "torch.nn.CrossEntropyLoss", "init_args": {"reduction": "none"}}},
    },
    "interpolate_at": None,
    "convert": True,
    "include": ["body.*"],
    "exclude": "body.1",
    "batch_dim": 0,
    "compile_phase1": False,
}


def is_within(part: Any, whole: Any) -> bool:
    """Tell whether a configuration says what another says, which may say more."""
    if isinstance(part, dict):
        return isinstance(whole, dict) and all(name in whole and is_within(part[name], whole[name]) for name in part)
    return bool(part == whole)


@pytest.mark.filterwarnings("ignore:With every_n_batches=")
@pytest.mark.parametrize(
    ("cli", "section"),
    [
        (
            LightningCLI,
            {"trainer": {"callbacks": [{"class_path": "lightning_ydrop.YDropCallback", "init_args": EVERYTHING}]}},
        ),
        (YDropCLI, {"ydrop": EVERYTHING}),
    ],
)
def test_a_printed_configuration_is_read_back_as_it_was(
    cli: type[LightningCLI], section: dict[str, Any], run: Run, said: Callable[..., str], tmp_path: Path
) -> None:
    assert EVERYTHING.keys() == inspect.signature(YDropCallback).parameters.keys()
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text(yaml.safe_dump(section))
    printed = said(f"--config={first}", *QUIET, "--print_config", cli=cli)
    second.write_text(printed)
    config = yaml.safe_load(printed)
    found = config["ydrop"] if cli is YDropCLI else config["trainer"]["callbacks"][0]["init_args"]
    assert is_within(EVERYTHING, found)
    assert said(f"--config={second}", "--print_config", cli=cli) == printed
    typed, read = run(f"--config={first}", *QUIET, cli=cli), run(f"--config={second}", cli=cli)
    assert settings_of(typed) == settings_of(read)
    plain = {name: repr(value) for name, value in EVERYTHING.items() if not isinstance(value, dict)}
    assert len(plain) == 17
    for name in plain.keys() & settings_of(read).keys():
        assert settings_of(read)[name] == plain[name]
    for name in ("annealing_steps=1", "transition='linear'"):
        assert name in settings_of(read)["schedule"]
    assert "strong_fraction=0.25" in settings_of(read)["buckets"]
    assert "CaptumMeasure('LayerActivation'" in settings_of(read)["measure"]
    assert "KeyAdapter(inputs=['x'], target='y', keywords=True)" in settings_of(read)["adapter"]
    assert "NegativeLoss(loss=CrossEntropyLoss())" in settings_of(read)["objective"]
    for one, other in zip(typed.model.parameters(), read.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_recipe_gives_the_callback_options_of_its_own(run: Run) -> None:
    cli = run(
        *QUIET, "--ydrop.elasticity=0.25", "--ydrop.annealing_epochs=1", "--ydrop.buckets.strong_fraction=0.25",
        "--ydrop.measure=RandomImportance", "--ydrop.adapter=KeyAdapter", "--ydrop.adapter.inputs=x",
        "--ydrop.adapter.target=y", cli=YDropCLI,
    )  # fmt: skip
    engine = callback_of(cli).engine
    assert engine is not None
    assert engine.settings.buckets is not None
    assert (engine.settings.elasticity, engine.settings.buckets.strong_fraction, repr(engine.settings.measure)) == (
        *(0.25, 0.25),
        "RandomImportance()",
    )
    assert repr(callback_of(cli).adapter) == "KeyAdapter(inputs='x', target='y', keywords=False)"
    assert engine.state_dict()["steps_taken"] == 2


def test_the_recipe_reads_yaml_and_the_command_line_goes_before_it(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({"ydrop": {"annealing_epochs": 0, "elasticity": 0.5, "seed": 3}}))
    engine = callback_of(run(f"--config={file}", *QUIET, "--ydrop.elasticity=0.25", cli=YDropCLI)).engine
    assert engine is not None
    assert (engine.settings.elasticity, engine.settings.seed, engine.state_dict()["steps_taken"]) == (0.25, 3, 4)


def test_the_recipe_refuses_a_wrong_value_in_our_words(run: Run) -> None:
    with pytest.raises(ConfigurationError, match=r"YDropCallback\(elasticity=2.0\) was given"):
        run(*QUIET, "--ydrop.elasticity=2", cli=YDropCLI)


@pytest.mark.filterwarnings("ignore:Training is to end before the annealing")
@pytest.mark.parametrize("rate", ["low.mean=0.2", "low.max=0.3", "high.std=0.0"])
def test_one_number_of_a_rate_is_set_alone(rate: str, run: Run) -> None:
    name, value = rate.split("=")
    bucket, number = name.split(".")
    engine = callback_of(run(*QUIET, f"--ydrop.buckets.{rate}", cli=YDropCLI)).engine
    assert engine is not None
    assert getattr(getattr(engine.settings.buckets, bucket), number) == float(value)


class TimeFirst(Model):
    """A recurrent network with time first, as torch has it by default."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.LSTM(3, 6)  # type: ignore[assignment]
        self.drop, self.head = ConductanceDropout(unit_dim=-1, batch_dim=1), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.drop(self.body(x)[0])[-1])

    def ydrop_inputs(self, batch: dict[str, Tensor]) -> Any:
        return batch["x"].unflatten(1, (4, 3)).transpose(0, 1), batch["y"]

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        x, y = self.ydrop_inputs(batch)
        return nn.functional.cross_entropy(self(x), y)


def test_the_dimension_of_the_batch_and_compilation_are_read_from_yaml(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_ydrop.importance.compiled.compiled_graph", lambda graph, tensors: graph)
    file = tmp_path / "config.yaml"
    settings = {"annealing_epochs": 0, "batch_dim": 1, "compile_phase1": True}
    callback = {"class_path": "lightning_ydrop.YDropCallback", "init_args": settings}
    file.write_text(yaml.safe_dump({"trainer": {"callbacks": [callback]}}))
    cli = run(f"--config={file}", *QUIET, model=TimeFirst)  # warnings are errors
    engine = callback_of(cli).engine
    assert engine is not None
    assert engine.settings.path.batch_dim == 1
    assert engine.findings is not None
    assert engine.findings.plan.compiled is not None
    assert engine.scores["drop"].shape == (6,)
    assert engine.scores["drop"].any()
