import csv
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_ydrop import (
    ConductanceDropout,
    ConfigurationError,
    ConvPattern,
    DropoutSchedule,
    Jumpout,
    NoEffectWarning,
    PatternCallback,
    PatternDropout,
    YDropCallback,
)
from lightning_ydrop.callbacks.dropout_schedule import OTHER_GRAPHS
from tests.callbacks.test_cli import Data
from tests.callbacks.test_compilation import Net as Compiled
from tests.callbacks.test_ydrop import trainer_of
from tests.sameness import assert_same

pytestmark = pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")

BATCHES = 4
X = torch.randn(8 * BATCHES, 12, generator=torch.Generator().manual_seed(0))
Y = torch.arange(8 * BATCHES) % 5


class Net(LightningModule):
    """A perceptron with dropout of four kinds."""

    def __init__(self, *dropouts: nn.Module) -> None:
        super().__init__()
        first, second = dropouts or (nn.Dropout(0.5), nn.Dropout(0.2))
        self.body: Any = nn.Sequential(nn.Linear(12, 16), first, nn.ReLU(), nn.Linear(16, 8), second, nn.Linear(8, 5))

    def forward(self, x: Tensor) -> Any:
        return self.body(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.body(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Probe(Callback):
    """Notes the rates of each training step. It may end the fit with an error, or save."""

    def __init__(self, raise_at: int = -1, save_at: int = -1) -> None:
        self.rates: list[tuple[float, float]] = []
        self.raise_at, self.save_at = raise_at, save_at

    def on_before_backward(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        self.rates.append((pl_module.body[1].p, pl_module.body[4].p))
        if len(self.rates) == self.raise_at:
            raise KeyError("ends here")

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.save_at:
            trainer.save_checkpoint("middle.ckpt")


def loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(X, Y), batch_size=8)


def rates_of(schedule: DropoutSchedule, epochs: int = 4, **settings: Any) -> list[tuple[float, float]]:
    probe, net = Probe(), Net()
    trainer_of(schedule, probe, max_epochs=epochs, **settings).fit(net, loader())
    assert (net.body[1].p, net.body[4].p) == (0.5, 0.2)
    return probe.rates


def test_a_rate_rises_from_epoch_to_epoch_to_the_layer_s_own() -> None:
    rates = rates_of(DropoutSchedule())
    assert rates[::BATCHES] == [pytest.approx((0.5 * share, 0.2 * share)) for share in (0, 1 / 3, 2 / 3, 1)]
    assert rates == [each for each in rates[::BATCHES] for _ in range(BATCHES)]
    assert rates[-1] == (0.5, 0.2)


def test_a_rate_may_change_with_each_step() -> None:
    rates = rates_of(DropoutSchedule("linear", p=0.6, initial=0.3, by="steps"), epochs=2)
    assert rates == [pytest.approx((rate, rate)) for rate in torch.linspace(0.3, 0.6, 2 * BATCHES).tolist()]
    # Of an optimiser, which takes one of every two batches here.
    rates = rates_of(DropoutSchedule("late", length=2, by="steps"), epochs=2, accumulate_grad_batches=2)
    assert rates == [(0.0, 0.0)] * 4 + [(0.5, 0.2)] * 4


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (DropoutSchedule("early", length=1), [0.5, 0, 0, 0]),
        (DropoutSchedule("late", length=3), [0, 0, 0, 0.5]),
        (DropoutSchedule("cyclic", length=2), [0, 0.5, 0, 0.5]),
        (DropoutSchedule("cosine", length=2), [0, 0.25, 0.5, 0.5]),
        (DropoutSchedule("curriculum", length=2, gamma=2), [0, 0.31606, 0.43233, 0.47511]),
        (DropoutSchedule("linear", initial=0.4, p=0.0, levels=3), [0.4, 0.2, 0.2, 0]),
    ],
    ids=lambda each: each.curve.kind if isinstance(each, DropoutSchedule) else "",
)
def test_each_kind_is_there(schedule: DropoutSchedule, expected: list[float]) -> None:
    assert [first for first, _ in rates_of(schedule)[::BATCHES]] == pytest.approx(expected, abs=1e-5)


def test_patterns_choose_the_layers() -> None:
    assert rates_of(DropoutSchedule(include="body.1"), 2)[0] == (0.0, 0.2)
    assert rates_of(DropoutSchedule(exclude=["body.1"]), 2)[0] == (0.5, 0.0)
    two = [DropoutSchedule(include="body.1"), DropoutSchedule(include="body.4", initial=0.1)]
    probe = Probe()
    trainer_of(*two, probe, max_epochs=2).fit(Net(), loader())
    assert probe.rates[0] == (0.0, 0.1)


def test_layers_of_other_kinds_follow() -> None:
    jumpout, pattern = Jumpout(p_min=0.1, p_max=0.4), PatternDropout(ConvPattern(1.0, rate=0.5))

    class Other(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            seen.append((jumpout.p_max, jumpout.p_min, pattern.progress))
            pattern(torch.ones(2, 1, 2, 2))
            return super().training_step(batch, batch_idx)

    seen: list[tuple[float, ...]] = []
    net = Other(jumpout, ConductanceDropout())
    net.body.append(nn.Identity())
    net.pattern = pattern
    trainer_of(DropoutSchedule(), max_epochs=3).fit(net, loader())
    assert seen[::BATCHES] == [(0.0, 0.0, 0.0), (0.2, 0.1, 0.5), (0.4, 0.1, 1.0)]
    assert (jumpout.p_max, jumpout.p_min, pattern.progress) == (0.4, 0.1, 1.0)


def test_a_fit_that_raises_gives_the_rates_back() -> None:
    net = Net()
    with pytest.raises(KeyError, match="ends here"):
        trainer_of(DropoutSchedule(), Probe(raise_at=2), max_epochs=2).fit(net, loader())
    assert (net.body[1].p, net.body[4].p) == (0.5, 0.2)


@pytest.mark.parametrize("by", ["epochs", "steps"])
def test_a_resumed_fit_equals_the_uninterrupted_one(by: Any) -> None:
    class Numbered(Net):
        """Takes the batch and the masks of its step: where a resumed loader goes on is not our matter here."""

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            torch.manual_seed(self.global_step)
            rows = torch.arange(8) + self.global_step
            return super().training_step((X[rows], Y[rows]), batch_idx)

    def run(net: Net, path: str | None = None) -> Probe:
        probe = Probe(save_at=6)
        trainer_of(DropoutSchedule("cosine", by=by), probe, max_epochs=3).fit(net, loader(), ckpt_path=path)
        return probe

    whole, again = Numbered(), Numbered()
    before, after = run(whole), run(again, "middle.ckpt")
    assert after.rates == before.rates[6:]
    assert_same(again.state_dict(), whole.state_dict())


def test_a_schedule_that_is_another_than_the_checkpoint_s_is_said() -> None:
    trainer_of(DropoutSchedule(), Probe(save_at=4), max_epochs=2).fit(Net(), loader())
    with pytest.warns(UserWarning, match=r"saved with a DropoutSchedule of length=1\. This one has length=3, so"):
        trainer_of(DropoutSchedule(), max_epochs=4).fit(Net(), loader(), ckpt_path="middle.ckpt")
    schedule = DropoutSchedule("late", length=1)
    trainer_of(schedule).test(Net(), loader(), ckpt_path="middle.ckpt", verbose=False)
    trainer_of(schedule, max_epochs=2).fit(Net(), loader())  # the test's checkpoint says nothing of this fit


def test_rates_are_logged(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    schedule = DropoutSchedule(include="body.1", log_rates=True)
    trainer_of(schedule, max_epochs=2, logger=logger, log_every_n_steps=1).fit(Net(), loader())
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = [row["dropout/body.1"] for row in csv.DictReader(file)]
    assert rows == ["0.0"] * BATCHES + ["0.5"] * BATCHES


@pytest.mark.parametrize(
    ("schedule", "net", "others", "settings", "message"),
    [
        (DropoutSchedule(include="head.*"), Net, [], {}, r"layer: body\.1 \(Dropout\), body\.4 \(Dropout\)\. Pass"),
        (DropoutSchedule(exclude="head.*"), Net, [], {}, "exclude='body.1'"),
        (DropoutSchedule(), lambda: Net(nn.Identity(), nn.Dropout(0.0)), [], {}, "changes no rate"),
        (DropoutSchedule(exclude="*"), Net, [], {}, r"\(exclude='\*'\) was.* takes away all dropout layers"),
        (DropoutSchedule(include="body.1", exclude="body.1"), Net, [], {}, "away every layer that `include`"),
        (DropoutSchedule(by="steps"), Net, [], {"max_epochs": -1}, "how many steps the fit has"),
        (DropoutSchedule(), Net, [], {"max_epochs": -1}, "how many epochs the fit has"),
        (DropoutSchedule(), Net, [YDropCallback(convert=True)], {}, r"DropoutSchedule\(exclude=\['body\.1', 'body"),
        (DropoutSchedule(), Net, [DropoutSchedule(include="body.4")], {}, r"DropoutSchedule\(exclude=\['body.4'\]\)"),
        (
            DropoutSchedule(p=0.5),
            lambda: Net(nn.Dropout(), PatternDropout(ConvPattern(0.5, rate=0.3))),
            [],
            {},
            "whose pattern has a lower rate",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(
    schedule: DropoutSchedule, net: Any, others: list[Callback], settings: dict[str, Any], message: str
) -> None:
    # In this order: callbacks that come later have made their layers too by then.
    trainer = trainer_of(schedule, *others, **({"max_epochs": 2} | settings))
    with pytest.raises(ConfigurationError, match=message):
        trainer.fit(net(), loader())
    assert trainer.global_step == 0


def test_patterns_of_a_pattern_callback_are_left_to_it() -> None:
    class Pictures(Net):
        def __init__(self) -> None:
            super().__init__()
            block = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
            self.body = nn.Sequential(
                block, nn.Dropout(0.5), nn.Flatten(), nn.Linear(4 * 12, 8), nn.Dropout(0.2), nn.Linear(8, 5)
            )

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step((batch[0].view(-1, 1, 3, 4), batch[1]), batch_idx)

    def patterns() -> PatternCallback:
        return PatternCallback({"stage1.1": ConvPattern(0.5, rate=0.5)})

    with pytest.raises(ConfigurationError, match=r"PatternCallback\(warmup=\.\.\.\) lets the rate of patterns rise"):
        trainer_of(DropoutSchedule(), patterns(), max_epochs=2).fit(Pictures(), loader())
    probe = Probe()
    trainer_of(DropoutSchedule(include=["body.1", "body.4"]), patterns(), probe, max_epochs=2).fit(Pictures(), loader())
    assert probe.rates[0] == (0.0, 0.0)


def test_layers_that_y_drop_does_not_drive_can_be_scheduled_beside_it() -> None:
    probe = Probe()
    ydrop = YDropCallback(annealing_epochs=0)
    net = Net(ConductanceDropout(0.5), nn.Dropout(0.2))
    trainer_of(DropoutSchedule(exclude="body.1"), ydrop, probe, max_epochs=2).fit(net, loader())
    assert probe.rates == [(0.5, 0.0)] * BATCHES + [(0.5, 0.2)] * BATCHES


@pytest.mark.parametrize("kind", ["early", "late"])
def test_a_fit_that_ends_too_early_is_said(kind: Any) -> None:
    with pytest.warns(NoEffectWarning, match="before DropoutSchedule switches dropout, after 2 epochs"):
        trainer_of(DropoutSchedule(kind, length=2), max_epochs=2).fit(Net(), loader())


def of_unknown_length() -> DataLoader[Any]:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(TensorDataset(X, Y))

    return DataLoader(Stream(), batch_size=8)


class TwoOptimizers(Net):
    """Steps twice for each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizers: Any = self.optimizers()
        for optimizer in optimizers:
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.body[place].parameters(), lr=0.1) for place in (0, 3)]


@pytest.mark.parametrize("max_epochs", [50, -1])
def test_a_fit_that_max_steps_ends_has_as_many_epochs_as_it_takes(max_epochs: int) -> None:
    probe = Probe()
    settings: dict[str, Any] = {"max_epochs": max_epochs, "max_steps": 6, "accumulate_grad_batches": 2}
    trainer_of(DropoutSchedule(), probe, **settings).fit(Net(), loader())
    assert [first for first, _ in probe.rates] == [each for each in (0.0, 0.25, 0.5) for _ in range(BATCHES)]


@pytest.mark.parametrize(
    ("net", "data", "others"),
    [
        (Net, of_unknown_length, []),
        (TwoOptimizers, loader, []),
        (Net, loader, [GradientAccumulationScheduler({0: 1, 1: 2})]),
    ],
)
def test_a_schedule_by_steps_does_not_guess_their_number(net: Any, data: Any, others: list[Callback]) -> None:
    with pytest.raises(ConfigurationError, match=r"how many steps the fit has.*several optimisers"):
        trainer_of(DropoutSchedule(by="steps"), *others, max_epochs=2).fit(net(), data())
    probe = Probe()
    trainer_of(DropoutSchedule("late", by="steps", length=3), probe, *others, max_epochs=2).fit(net(), data())
    first = [rate for rate, _ in probe.rates]
    assert first == sorted(first)
    assert {first[0], first[-1]} == {0.0, 0.5}


class Eager:
    """A backend that counts graphs and runs them as they are."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        self.count += 1
        return graph.forward


def fit_compiled(schedule: DropoutSchedule) -> tuple[int, bool]:
    """Train a network that is compiled in part, and tell whether torch gave up compiling it."""
    torch._dynamo.reset()
    counters.clear()
    backend, net = Eager(), Compiled(nn.Dropout)
    net.body = torch.compile(net.body, backend=backend)
    data = DataLoader(TensorDataset(X, Y), batch_size=12)  # the last batch is smaller
    trainer_of(schedule, max_epochs=4).fit(net, data, data)
    torch._dynamo.reset()
    return backend.count, any("limit" in reason for reason in counters["unimplemented"])


def test_a_compiled_model_is_compiled_for_each_rate_so_their_number_is_bounded() -> None:
    with torch._dynamo.config.patch(recompile_limit=5):
        for schedule in (DropoutSchedule(p=0.6, levels=2, by="steps"), DropoutSchedule("late", length=2)):
            graphs, gave_up = fit_compiled(schedule)
            assert not gave_up
            assert 2 + 2 <= graphs <= 2 + OTHER_GRAPHS + 1  # torch may make one of them twice
        with pytest.warns(UserWarning, match=r"changes the rate of a compiled model more than 2 times.* levels=2"):
            _, gave_up = fit_compiled(DropoutSchedule(p=0.6, by="steps"))
        assert gave_up


def test_the_command_line_knows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    config = {
        "seed_everything": 0,
        "trainer": {
            "accelerator": "cpu", "max_epochs": 2, "logger": False, "enable_checkpointing": False,
            "enable_progress_bar": False, "enable_model_summary": False,
            "callbacks": [
                {
                    "class_path": "lightning_ydrop.DropoutSchedule",
                    "init_args": {"kind": "curriculum", "p": 0.4, "gamma": 5, "by": "steps", "include": ["body.*"]},
                }
            ],
        }
    }  # fmt: skip
    Path("config.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.setattr(sys, "argv", ["train", "fit", "--config", "config.yaml"])
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning calls it by an older name

    class OfDictionaries(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step((batch["x"], batch["y"]), batch_idx)

    cli = LightningCLI(OfDictionaries, Data, save_config_callback=None)
    (schedule,) = (each for each in cli.trainer.callbacks if isinstance(each, DropoutSchedule))  # type: ignore[attr-defined]
    assert repr(schedule) == "DropoutSchedule(kind='curriculum', p=0.4, by='steps', gamma=5.0, include=['body.*'])"


def test_checkpoints_bear_no_trace_in_the_weights(tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path, "last")
    trainer_of(DropoutSchedule(), saving, max_epochs=1, enable_checkpointing=True).fit(Net(), loader())
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert content["state_dict"].keys() == Net().state_dict().keys()
