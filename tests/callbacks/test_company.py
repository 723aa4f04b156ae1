"""Beside Lightning's other callbacks, in either order: both do their work, and phase 1 takes nothing from the other."""

import csv
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch import callbacks as lightnings
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner.tuning import Tuner
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ydrop import ConductanceDropout, YDropCallback
from tests.callbacks.test_ydrop import Observing, X, Y, trainer_of
from tests.networks import perceptron

EPOCHS = 4
BATCH_SIZE = 8
BATCHES = len(X) // BATCH_SIZE
LR = 0.1


class Net(LightningModule):
    """What the callbacks want: a backbone, a batch size, a learning rate and something to monitor."""

    def __init__(self, dropout: type[nn.Module] = ConductanceDropout) -> None:
        super().__init__()
        body = perceptron(dropout=dropout)
        self.backbone, self.head = body[:3], body[3:]
        self.lr, self.batch_size = LR, BATCH_SIZE

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.backbone(x))
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([each for each in self.parameters() if each.requires_grad], lr=self.lr)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(X, Y), batch_size=self.batch_size)


class Normalised(Net):
    """The same with BatchNorm, for which weight averaging passes over the data once more."""

    def __init__(self, dropout: type[nn.Module] = ConductanceDropout) -> None:
        super().__init__(dropout)
        self.head.add_module("norm", nn.BatchNorm1d(5))  # append() would name it "4", which is the dropout


class Watch(Callback):
    """Notes, last in each batch, what is true of the layers and the weights."""

    def __init__(self) -> None:
        self.epochs: list[int] = []
        self.active: list[bool] = []
        self.trainable: list[bool] = []
        self.weights: list[list[Tensor]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.epochs.append(trainer.current_epoch)
        states = {module.active for module in pl_module.modules() if isinstance(module, ConductanceDropout)}
        assert states != {True, False}
        self.active.append(True in states)
        self.trainable.append(pl_module.backbone[0].weight.requires_grad)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        self.weights.append([parameter.detach().clone() for parameter in pl_module.parameters()])


@dataclass
class Fitted:
    """All that is left of a fit."""

    folder: Path
    other: Any
    net: Net
    trainer: Any
    watch: Watch
    printed: str = ""
    weights: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.weights = [parameter.detach().clone() for parameter in self.net.parameters()]


def assert_close(weights: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(weights, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def mean_of(states: list[list[Tensor]]) -> list[Tensor]:
    return [torch.stack(each).mean(0) for each in zip(*states, strict=True)]


def wrote_our_state(fitted: Fitted) -> None:
    files = {int(file.stem.removeprefix("step=")): file for file in (fitted.folder / "kept").glob("*.ckpt")}
    assert sorted(files) == [6, 12, 18, 24, 30]
    for step, file in files.items():
        ours = torch.load(file, weights_only=True)["callbacks"]["YDropCallback"]
        assert ours["steps_taken"] == max(0, step - BATCHES)


def stopped(fitted: Fitted) -> None:
    assert fitted.other.stopped_epoch == 1
    assert set(fitted.watch.epochs) == {0, 1}


def averaged_epochs(fitted: Fitted) -> None:
    ends = fitted.watch.weights[BATCHES - 1 :: BATCHES]
    assert_close(fitted.weights, mean_of(ends[:3]))  # it averages at the start of epochs 1, 2 and 3


def averaged_epochs_and_their_statistics(fitted: Fitted) -> None:
    ends = fitted.watch.weights[BATCHES - 1 :: BATCHES]
    # In the last batch of the pass for the statistics, Lightning steps with the gradients of training once more.
    assert_close(fitted.watch.weights[-2], mean_of(ends[:3]))
    norm = fitted.net.head.get_submodule("norm")
    assert isinstance(norm, nn.BatchNorm1d)
    assert norm.num_batches_tracked == BATCHES  # of that pass: phase 1 adds none


def averaged_steps(fitted: Fitted) -> None:
    assert_close(fitted.weights, mean_of(fitted.watch.weights))


def averaged_exponentially(fitted: Fitted) -> None:
    average, *steps = fitted.watch.weights
    for weights in steps:
        average = [0.8 * one + 0.2 * other for one, other in zip(average, weights, strict=True)]
    assert_close(fitted.weights, average)


def accumulated(fitted: Fitted) -> None:
    assert fitted.trainer.global_step == BATCHES + BATCHES + 3 + 3  # of eight batches: three, three, and two


def found_a_learning_rate(fitted: Fitted) -> None:
    assert fitted.net.lr == fitted.other.optimal_lr.suggestion() != LR


def found_a_batch_size(fitted: Fitted) -> None:
    assert fitted.net.batch_size == fitted.other.optimal_batch_size != BATCH_SIZE
    assert len(fitted.watch.epochs) == EPOCHS * len(X) // fitted.net.batch_size


def monitored(fitted: Fitted) -> None:
    with (fitted.folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    logged = {int(row["step"]): float(row["lr-SGD"]) for row in rows if row["lr-SGD"]}
    assert logged == dict.fromkeys(range(1, EPOCHS * BATCHES, 2), LR)
    ours = [int(row["step"]) for row in rows if row["ydrop/nonfinite"]]
    assert ours == [step for step in logged if step >= BATCHES]


def showed_progress(fitted: Fitted) -> None:
    assert f"Epoch {EPOCHS - 1}/{EPOCHS - 1}" in fitted.printed


def pruned(fitted: Fitted) -> None:
    weights = torch.cat([each.flatten() for each in fitted.weights])
    left = weights.count_nonzero() / len(weights)
    assert left == pytest.approx(0.9**EPOCHS, abs=0.01)


def unfroze(fitted: Fitted) -> None:
    assert fitted.watch.trainable == [epoch >= 1 for epoch in fitted.watch.epochs]
    first, *_, last = (weights[0] for weights in fitted.watch.weights[:BATCHES])
    assert torch.equal(first, last)
    assert not torch.equal(first, fitted.weights[0])


@dataclass(frozen=True)
class Case:
    """Another callback.

    Attributes:
        make: Builds it, given a folder of its own.
        did: Asserts that it has done its own work.
        said: What Lightning warns of where it is used.
        epochs: How many there are with it.
        net: What is trained.

    """

    make: Callable[[Path], Callback]
    did: Callable[[Fitted], None]
    said: tuple[str, ...] = ()
    epochs: int = EPOCHS
    net: type[Net] = Net


def made_where_there_is(name: str, **kwargs: Any) -> Callable[[Path], Callback]:
    def make(folder: Path) -> Callback:
        kind: Any = getattr(lightnings, name, None)
        if kind is None:
            pytest.skip(f"this Lightning has no {name}")
        callback: Callback = kind(**kwargs)
        return callback

    return make


def unfreezing(folder: Path) -> Callback:
    # Lightning's own rate multiplier doubles each epoch; these few steps would diverge.
    return lightnings.BackboneFinetuning(unfreeze_backbone_at_epoch=1, lambda_func=lambda epoch: 1.0)


SWA_SAYS = ("ignore:Detected call of `lr_scheduler.step", "ignore:Swapping scheduler")
CASES: dict[str, Case] = {
    "ModelCheckpoint": Case(
        lambda folder: lightnings.ModelCheckpoint(folder, "{step}", every_n_train_steps=6, save_top_k=-1),
        wrote_our_state,
    ),
    "EarlyStopping": Case(
        # No epoch is better than the first by so much.
        lambda folder: lightnings.EarlyStopping("loss", 99.0, patience=1, check_on_train_epoch_end=True),
        stopped,
        epochs=2,
    ),
    "StochasticWeightAveraging": Case(
        lambda folder: lightnings.StochasticWeightAveraging(0.05, swa_epoch_start=2), averaged_epochs, SWA_SAYS
    ),
    "StochasticWeightAveraging with BatchNorm": Case(
        lambda folder: lightnings.StochasticWeightAveraging(0.05, swa_epoch_start=2),
        averaged_epochs_and_their_statistics,
        SWA_SAYS,
        epochs=EPOCHS + 1,
        net=Normalised,
    ),
    "WeightAveraging": Case(made_where_there_is("WeightAveraging"), averaged_steps),
    "EMAWeightAveraging": Case(made_where_there_is("EMAWeightAveraging", decay=0.8), averaged_exponentially),
    "GradientAccumulationScheduler": Case(
        lambda folder: lightnings.GradientAccumulationScheduler({0: 1, 2: 3}), accumulated
    ),
    "LearningRateFinder": Case(
        lambda folder: lightnings.LearningRateFinder(num_training_steps=30), found_a_learning_rate
    ),
    "BatchSizeFinder": Case(
        lambda folder: lightnings.BatchSizeFinder(steps_per_trial=1, max_trials=1), found_a_batch_size
    ),
    "LearningRateMonitor": Case(lambda folder: lightnings.LearningRateMonitor("step"), monitored),
    "RichProgressBar": Case(lambda folder: lightnings.RichProgressBar(), showed_progress),
    "ModelPruning": Case(lambda folder: lightnings.ModelPruning("l1_unstructured", amount=0.1), pruned),
    "BackboneFinetuning": Case(unfreezing, unfroze),
}
every_case = pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=name, marks=[pytest.mark.filterwarnings(said) for said in case.said])
        for name, case in CASES.items()
    ],
)


def fit(folder: Path, case: Case, dropout: type[nn.Module], *ours: Callback, first: bool) -> Fitted:
    torch.manual_seed(0)
    folder.mkdir()
    net, other, watch = case.net(dropout), case.make(folder / "kept"), Watch()
    if isinstance(other, lightnings.RichProgressBar):
        pytest.importorskip("rich")
    trainer = trainer_of(
        *([*ours, other, watch] if first else [other, *ours, watch]),
        max_epochs=EPOCHS,
        logger=CSVLogger(folder, "", ""),
        enable_progress_bar=isinstance(other, lightnings.RichProgressBar),
        enable_checkpointing=isinstance(other, lightnings.ModelCheckpoint),
        default_root_dir=folder,
    )
    trainer.fit(net)
    return Fitted(folder, other, net, trainer, watch)


@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
@every_case
def test_both_do_their_work(case: Case, first: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ydrop = YDropCallback(annealing_epochs=1)
    fitted = fit(tmp_path / "fit", case, ConductanceDropout, ydrop, first=first)
    fitted.printed = capsys.readouterr().out
    assert fitted.watch.active == [epoch >= 1 for epoch in fitted.watch.epochs]
    assert set(fitted.watch.epochs) == set(range(case.epochs))
    assert ydrop.engine is not None
    assert ydrop.engine.state_dict()["steps_taken"] == sum(fitted.watch.active)  # no trial of a finder counts
    assert not ydrop.engine.active
    case.did(fitted)


@every_case
def test_observing_beside_them_changes_no_weight(case: Case, tmp_path: Path) -> None:
    plain = fit(tmp_path / "plain", case, nn.Dropout, first=True)
    for first in (True, False):
        observing = Observing(annealing_epochs=0)
        observed = fit(tmp_path / f"{first}", case, ConductanceDropout, observing, first=first)
        assert observing.state_dict()["steps_taken"] == len(observed.watch.epochs)
        assert len(observed.watch.weights) == len(plain.watch.weights)
        ends = (list(fitted.net.state_dict().values()) for fitted in (plain, observed))
        for one, other in zip(*ends, strict=True):
            assert torch.equal(one, other)


@every_case
def test_a_compiled_phase_1_follows_what_they_change(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They freeze and average weights. Two of them change what is compared, and phase 1 runs eagerly then."""
    # The recorded graph, without torch's compiler, which takes seconds.
    monkeypatch.setattr("lightning_ydrop.importance.compiled.compiled_graph", lambda graph, tensors: graph)
    eager = fit(tmp_path / "eager", case, ConductanceDropout, YDropCallback(annealing_epochs=1), first=True)
    ydrop = YDropCallback(annealing_epochs=1, compile_phase1=True)
    names = {
        "ModelPruning": "set of modules or hooks",
        "StochasticWeightAveraging with BatchNorm": "BatchNorm1d.momentum",
    }
    changes = next((what for name, what in names.items() if case is CASES[name]), None)
    with pytest.warns(UserWarning, match=f"compiled for another {changes}") if changes else nullcontext():
        compiled = fit(tmp_path / "compiled", case, ConductanceDropout, ydrop, first=True)
    assert len(compiled.watch.weights) == len(eager.watch.weights)
    for one, other in zip(compiled.watch.weights, eager.watch.weights, strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
@pytest.mark.parametrize("name", ["LearningRateFinder", "BatchSizeFinder"])
def test_what_is_converted_can_be_tried_out_first(name: str, first: bool, tmp_path: Path) -> None:
    ydrop = YDropCallback(annealing_epochs=1, convert=True)
    fitted = fit(tmp_path / "fit", CASES[name], nn.Dropout, ydrop, first=first)
    CASES[name].did(fitted)
    assert ydrop.engine is not None
    assert list(ydrop.engine.layers) == ["backbone.1", "head.4"]
    assert ydrop.state_dict()["steps_taken"] == sum(fitted.watch.active) > 0


def test_a_tuner_leaves_the_callback_as_it_was() -> None:
    net, ydrop, watch = Net(), YDropCallback(annealing_epochs=1), Watch()
    trainer = trainer_of(ydrop, watch, max_epochs=EPOCHS)
    found = Tuner(trainer).lr_find(net, num_training=20)
    assert found is not None
    assert net.lr == found.suggestion() != LR
    assert watch.epochs == []
    trainer.fit(net)
    assert watch.active == [epoch >= 1 for epoch in watch.epochs]
    assert ydrop.state_dict()["steps_taken"] == (EPOCHS - 1) * BATCHES
