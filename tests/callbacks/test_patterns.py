import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ydrop import (
    ConfigurationError,
    ConvPattern,
    NoEffectWarning,
    PatternCallback,
    PatternDropout,
    TokenPattern,
    YDropCallback,
)
from lightning_ydrop.search.applying import layers_of
from lightning_ydrop.search.files import write_patterns
from tests.callbacks.test_ydrop import trainer_of
from tests.sameness import assert_same
from tests.search.networks import Block

BATCHES = 5
X = torch.randn(8 * BATCHES, 4, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(8 * BATCHES) % 3
PATTERN = ConvPattern(0.5, residual=True, rate=0.5)
PATTERNS = {"stage1.1": PATTERN, "stage1.2": ConvPattern(0)}


def network() -> nn.Module:
    return nn.Sequential(Block(), Block(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(4, 3))


class Net(LightningModule):
    """A residual network of images."""

    def __init__(self) -> None:
        super().__init__()
        self.body: Any = network()

    def forward(self, x: Tensor) -> Any:
        return self.body(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        assert not any(layer.training for layer in layers_of(self))
        self(batch[0])

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class BuildsInSetup(Net):
    """It builds its network in `setup`, anew for each fit."""

    def __init__(self) -> None:
        super().__init__()
        self.body = None

    def setup(self, stage: str) -> None:
        self.body = network()


class BuildsInConfigureModel(Net):
    """It builds its network in `configure_model`."""

    def __init__(self) -> None:
        super().__init__()
        self.body = None

    def configure_model(self) -> None:
        if self.body is None:
            self.body = network()


class Grows(Net):
    """It has one block, and builds the second in `configure_model`."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(Block())

    def configure_model(self) -> None:
        if len(self.body) == 1:
            self.body = nn.Sequential(self.body[0], *list(network().children())[1:])


class Synchronised(Net):
    """It takes SyncBatchNorm, as Trainer(sync_batchnorm=True) does after callbacks are set up."""

    def configure_model(self) -> None:
        self.body = nn.SyncBatchNorm.convert_sync_batchnorm(self.body)


class Probe(Callback):
    """Notes in each batch how many patterns stand, and how far their warm-up is."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, float]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        layers = layers_of(pl_module)
        assert all(layer.training for layer in layers)
        self.seen.append((len(layers), layers[0].progress))


class Interrupt(Callback):
    """Ends a fit with an error."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer.global_step == 7:
            raise RuntimeError("interrupted")


def loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(X, Y), batch_size=8)


def fitted(*callbacks: Callback, net: Net | None = None, **kwargs: Any) -> Net:
    torch.manual_seed(3)
    net = Net() if net is None else net
    trainer_of(*callbacks, **({"max_epochs": 2} | kwargs)).fit(net, loader(), loader())
    return net


@pytest.mark.parametrize("kind", [Net, BuildsInSetup, BuildsInConfigureModel])
def test_patterns_stand_through_a_fit_and_not_after_it(kind: type[Net]) -> None:
    probe = Probe()
    net = fitted(PatternCallback(PATTERNS), probe, net=kind())
    assert probe.seen == [(3, 1.0)] * 2 * BATCHES
    assert not any(isinstance(module, PatternDropout) for module in net.modules())
    assert not any(module._forward_hooks for module in net.modules())
    assert isinstance(net.body[0].drop, nn.Dropout)
    assert net.body[0].shortcut is None


def test_patterns_fit_the_whole_of_a_network_that_grows() -> None:
    """To one block, two patterns of a stage fit by relative depth: it would take the first of them."""
    probe = Probe()
    fitted(PatternCallback({"stage1.1": PATTERN, "stage1.2": PATTERN}), probe, net=Grows())
    assert [count for count, _ in probe.seen] == [6] * 2 * BATCHES


def test_patterns_stay_where_batch_norms_are_replaced() -> None:
    class Counting(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            masked = (module for module in pl_module.modules() if not isinstance(module, PatternDropout))
            counts.append(sum(bool(module._forward_hooks) for module in masked))

    counts: list[int] = []
    net = fitted(PatternCallback(PATTERNS), Counting(), net=Synchronised(), max_epochs=1)
    assert counts == [2]
    assert not any(module._forward_hooks for module in net.modules())


def test_they_change_the_training() -> None:
    plain = fitted()
    masked = fitted(PatternCallback(PATTERNS))
    empty = fitted(PatternCallback(dict.fromkeys(PATTERNS, ConvPattern(0))))
    assert_same(empty.state_dict(), plain.state_dict())
    assert not torch.equal(masked.body[5].weight, plain.body[5].weight)


def test_patterns_come_from_a_file_or_a_mapping(tmp_path: Path) -> None:
    write_patterns(PATTERNS, tmp_path / "patterns.yaml")
    expected = fitted(PatternCallback(PATTERNS)).state_dict()
    for given in ("patterns.yaml", tmp_path / "patterns.yaml"):
        assert_same(fitted(PatternCallback(given)).state_dict(), expected)


def test_the_rate_rises_over_a_share_of_the_steps() -> None:
    probe = Probe()
    fitted(PatternCallback(PATTERNS, warmup=0.4), probe, max_epochs=2)
    assert [progress for _, progress in probe.seen] == [0, 0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1]
    accumulated = Probe()
    fitted(PatternCallback(PATTERNS, warmup=0.5), accumulated, max_epochs=2, accumulate_grad_batches=2)
    # Three steps in each epoch of five batches.
    assert [progress for _, progress in accumulated.seen] == pytest.approx([0, 0, 1 / 3, 1 / 3, 2 / 3, 1, 1, 1, 1, 1])
    whole = Probe()
    fitted(PatternCallback(PATTERNS, warmup=1.0), whole, max_epochs=-1, max_steps=4)
    assert [progress for _, progress in whole.seen] == [0, 0.25, 0.5, 0.75]


def test_a_warm_up_without_an_end_is_refused_before_training() -> None:
    net, probe = Net(), Probe()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(ConfigurationError) as caught:
        fitted(PatternCallback(PATTERNS, warmup=0.1), probe, net=net, max_epochs=-1)
    assert str(caught.value) == (
        "PatternCallback(warmup=0.1) was given to a Trainer that has no last step. "
        "The warm-up is a share of the steps of the fit. "
        "Pass max_epochs or max_steps to the Trainer, or leave warmup out."
    )
    assert_same(net.state_dict(), before)
    assert probe.seen == []
    assert layers_of(net) == []


@pytest.mark.filterwarnings("ignore:.*exists and is not empty", "ignore:The dirpath has changed")
def test_a_resumed_fit_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_epochs": 3, "enable_checkpointing": True, "num_sanity_val_steps": 0}

    class Seeded(Callback):
        """Gives each batch its own random stream, as a checkpoint holds none."""

        def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
            torch.manual_seed(trainer.global_step)

    def callbacks() -> list[Callback]:
        return [PatternCallback(PATTERNS, warmup=0.8), Seeded()]

    whole = fitted(*callbacks(), ModelCheckpoint(tmp_path / "whole"), **settings)
    with pytest.raises(RuntimeError, match="interrupted"):
        fitted(*callbacks(), ModelCheckpoint(tmp_path / "first", filename="last"), Interrupt(), **settings)
    net, probe = Net(), Probe()
    again = trainer_of(*callbacks(), ModelCheckpoint(tmp_path / "second"), probe, **settings)
    again.fit(net, loader(), loader(), ckpt_path=tmp_path / "first" / "last.ckpt")
    assert [progress for _, progress in probe.seen] == pytest.approx([min(1, step / 12) for step in range(5, 15)])
    assert_same(net.state_dict(), whole.state_dict())


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_checkpoint_bears_no_trace(tmp_path: Path) -> None:
    fitted(PatternCallback(PATTERNS), ModelCheckpoint(tmp_path, filename="last"), enable_checkpointing=True)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=False)
    plain = Net()
    plain.load_state_dict(checkpoint["state_dict"], strict=True)
    assert list(checkpoint["state_dict"]) == list(plain.state_dict())
    assert not any("PatternCallback" in name for name in checkpoint["callbacks"])
    assert "pattern" not in repr({key: value for key, value in checkpoint.items() if key != "state_dict"}).lower()
    Net.load_from_checkpoint(tmp_path / "last.ckpt", strict=True)
    resumed = trainer_of(max_epochs=3)
    resumed.fit(Net(), loader(), loader(), ckpt_path=tmp_path / "last.ckpt")
    assert resumed.global_step == 3 * BATCHES


def test_several_fits_in_a_row_and_other_loops() -> None:
    callback, net, probe = PatternCallback(PATTERNS, warmup=0.5), Net(), Probe()
    trainer = trainer_of(callback, probe, max_epochs=1)
    trainer.fit(net, loader(), loader())
    trainer.test(net, loader())
    trainer.validate(net, loader())
    assert layers_of(net) == []
    trainer.fit_loop.max_epochs = 2
    trainer.fit(net, loader(), loader())
    assert len(probe.seen) == 2 * BATCHES
    assert {count for count, _ in probe.seen} == {3}
    other = BuildsInSetup()
    for _ in range(2):
        trainer_of(callback, probe, max_epochs=1).fit(other, loader(), loader())
    assert {count for count, _ in probe.seen} == {3}
    assert len(probe.seen) == 4 * BATCHES
    assert layers_of(other) == []


def test_an_error_leaves_the_model_without_patterns() -> None:
    net = Net()
    with pytest.raises(RuntimeError, match="interrupted"):
        fitted(PatternCallback(PATTERNS), Interrupt(), net=net)
    assert layers_of(net) == []
    assert net.body[0].shortcut is None


@pytest.mark.parametrize("first", [True, False])
def test_it_works_beside_ydrop(first: bool) -> None:
    ydrop, patterns, probe = YDropCallback(annealing_epochs=0, convert=True), PatternCallback(PATTERNS), Probe()
    order: list[Callback] = [patterns, ydrop] if first else [ydrop, patterns]
    net = fitted(*order, probe, max_epochs=1)
    assert probe.seen == [(3, 1.0)] * BATCHES
    assert ydrop.engine is not None
    assert int(ydrop.engine.state_dict()["steps_taken"]) == BATCHES
    assert list(ydrop.engine.layers) == ["body.1.drop", "body.4"]
    assert isinstance(net.body[0].drop, nn.Dropout)
    assert layers_of(net) == []


def test_ydrops_phase_1_sees_the_network_without_masks() -> None:
    class Watched(Net):
        def forward(self, x: Tensor) -> Any:
            layers = layers_of(self)
            modes.append((torch.is_grad_enabled(), self.training, {layer.training for layer in layers}))
            return super().forward(x)

    modes: list[tuple[bool, bool, set[bool]]] = []
    fitted(YDropCallback(annealing_epochs=0, convert=True), PatternCallback(PATTERNS), net=Watched(), max_epochs=1)
    in_phase_1 = [layers for _, training, layers in modes if not training]
    assert len(in_phase_1) >= BATCHES
    assert all(layers == {False} for layers in in_phase_1)
    assert [layers for _, training, layers in modes if training] == [{True}] * BATCHES


def test_one_line_of_the_report_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        fitted(PatternCallback(PATTERNS), max_epochs=1)
    lines = [record.message for record in caplog.records if "pattern(s)" in record.message]
    assert lines == ["1 pattern(s) applied, 1 ordinary dropout layer(s) replaced, 3 left."]


@pytest.mark.parametrize(
    ("patterns", "word"),
    [
        ({"stage7.1": PATTERN}, "'stage7.1'"),
        ({"stage1.1": TokenPattern(2), "stage1.2": PATTERN}, "takes a ConvPattern"),
        ({"stage1.1": PATTERN, "stage2.1": PATTERN}, "1 stage(s)"),
    ],
)
@pytest.mark.parametrize("kind", [Net, BuildsInSetup, BuildsInConfigureModel])
def test_patterns_that_do_not_fit_end_a_fit_before_training(kind: type[Net], patterns: Any, word: str) -> None:
    net = kind()
    with pytest.raises(ConfigurationError) as caught:
        fitted(PatternCallback(patterns), net=net)
    assert word in str(caught.value)
    assert layers_of(net) == []


def test_a_pattern_that_covers_the_map_ends_a_fit_before_the_first_step() -> None:
    net = Net()
    before = {
        name: value.clone() for name, value in net.state_dict().items() if "running" not in name and "num" not in name
    }
    with pytest.raises(ConfigurationError, match="covers such a map"):
        fitted(
            PatternCallback({"stage1.1": ConvPattern(0.99), "stage1.2": ConvPattern(0)}),
            net=net,
            num_sanity_val_steps=0,
        )
    for name, value in before.items():
        assert torch.equal(net.state_dict()[name], value)


@pytest.mark.parametrize(
    ("kwargs", "word"),
    [
        ({"patterns": "missing.yaml"}, "can't be read"),
        ({"patterns": 3}, "Patterns are a mapping"),
        ({"patterns": {"stage1.1": 3}}, "PatternCallback found stage1.1: 3."),
        ({"patterns": PATTERNS, "warmup": 1.5}, "PatternCallback(warmup=1.5)"),
        ({"patterns": PATTERNS, "warmup": "long"}, "PatternCallback(warmup='long')"),
    ],
)
def test_bad_arguments_are_refused_when_they_are_given(kwargs: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        PatternCallback(**kwargs)
    assert word in str(caught.value)


def test_two_of_them_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="several PatternCallbacks"):
        fitted(PatternCallback(PATTERNS), PatternCallback(PATTERNS))


class Data(LightningDataModule):
    """The images of these tests."""

    def train_dataloader(self) -> Any:
        return loader()

    def val_dataloader(self) -> Any:
        return loader()


FILE_AND_INLINE = {
    "a file": "patterns.yaml",
    "inline": {
        "stage1.1": {
            "class_path": "lightning_ydrop.ConvPattern",
            "init_args": {"size": 0.5, "residual": True, "rate": 0.5},
        },
        "stage1.2": {"class_path": "lightning_ydrop.ConvPattern", "init_args": {"size": 0}},
    },
}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., LightningCLI]:
    """Run a program with a LightningCLI, as from a shell."""
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning calls it by an older name

    def run(*arguments: str) -> LightningCLI:
        quiet = ["--trainer.accelerator=cpu", "--trainer.max_epochs=1", "--trainer.logger=false"]
        quiet += [f"--trainer.enable_{name}=false" for name in ("checkpointing", "progress_bar", "model_summary")]
        monkeypatch.setattr(sys, "argv", ["train.py", "fit", *quiet, *arguments])
        return LightningCLI(Net, Data, save_config_callback=None, seed_everything_default=0)

    return run


@pytest.mark.parametrize("given", FILE_AND_INLINE)
def test_a_yaml_file_of_lightning_cli_names_or_holds_the_patterns(
    given: str, run: Callable[..., LightningCLI], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    write_patterns(PATTERNS, tmp_path / "patterns.yaml")
    arguments = {"patterns": FILE_AND_INLINE[given], "warmup": 0.5}
    callback = {"class_path": "lightning_ydrop.PatternCallback", "init_args": arguments}
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [callback]}}))
    with pytest.raises(SystemExit):
        run("--config=fit.yaml", "--print_config")
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["trainer"]["callbacks"][0]["init_args"]["warmup"] == 0.5
    (tmp_path / "again.yaml").write_text(printed)
    for config in ("fit.yaml", "again.yaml"):
        cli = run(f"--config={config}")
        (found,) = (each for each in cli.trainer.callbacks if isinstance(each, PatternCallback))  # type: ignore[attr-defined]
        assert found.patterns == PATTERNS
        assert cli.trainer.global_step == BATCHES


def test_a_bad_file_fails_before_a_trainer_is_made(run: Callable[..., LightningCLI]) -> None:
    add = "--trainer.callbacks+=lightning_ydrop.PatternCallback"
    with pytest.raises(ValueError, match=r"read_patterns\('missing.yaml'\) was given, and the file can't be read"):
        run(add, "--trainer.callbacks.patterns=missing.yaml")


class FusedAttention(nn.Module):
    """Reads the rate of its dropout layer, and never calls it in training."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out_proj = (nn.Linear(8, 8) for _ in range(4))
        self.attn_dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        weights = (self.query(x) @ self.key(x).mT).softmax(-1)
        if self.training:
            weights = nn.functional.dropout(weights, getattr(self.attn_dropout, "p", 0.0))
        else:
            weights = self.attn_dropout(weights)
        output: Tensor = self.out_proj(weights @ self.value(x))
        return output


class Attending(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.attention = FusedAttention()
        self.norm = nn.LayerNorm(8)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.norm(batch + self.attention(batch)).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_pattern_that_is_never_called_is_warned_of() -> None:
    model = Attending()
    data: Any = DataLoader(list(torch.randn(8, 5, 8)), batch_size=4)  # type: ignore[arg-type]
    callback = PatternCallback({"attention": TokenPattern(2, rate=0.5), "values": TokenPattern(2, rate=0.5)})
    trainer = trainer_of(callback, max_epochs=1)
    with pytest.warns(NoEffectWarning) as caught:
        trainer.fit(model, data)
    (said,) = (str(each.message) for each in caught if each.category is NoEffectWarning)
    assert said.startswith("The first training step did not call 'attention.attn_dropout' in training mode, where a ")
    assert callback.idle_places == {"attention"}
    assert not callback._handles


def test_a_pattern_in_a_part_that_is_frozen_is_warned_of() -> None:
    class Frozen(Net):
        def on_train_epoch_start(self) -> None:
            self.body[0].eval()

    callback = PatternCallback({"stage1.1": PATTERN, "stage1.2": PATTERN})
    with pytest.warns(NoEffectWarning, match="frozen in evaluation mode"):
        fitted(callback, net=Frozen(), max_epochs=1)
    assert callback.idle_places == {"stage1.1"}
