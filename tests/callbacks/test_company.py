"""Beside Lightning's other callbacks, in either order."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch import callbacks as lightnings
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ydrop import ConductanceDropout, YDropCallback
from tests.callbacks.test_ydrop import Observing, Probe, X, Y, trainer_of
from tests.networks import perceptron

EPOCHS = 4


class Net(LightningModule):
    """What the callbacks want: a backbone, a batch size, a learning rate and something to monitor."""

    def __init__(self, dropout: type[nn.Module] = ConductanceDropout) -> None:
        super().__init__()
        body = perceptron(dropout=dropout)
        self.backbone, self.head = body[:3], body[3:]
        self.lr, self.batch_size = 0.1, 8

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


class Unfreezing(lightnings.BackboneFinetuning):
    """Unfreezes the backbone after one epoch, which LightningModules without a schedule can take."""

    def __init__(self) -> None:
        super().__init__(unfreeze_backbone_at_epoch=1, lambda_func=lambda epoch: 1.0, verbose=False)


def averaging(name: str) -> Callable[[Path], Callback]:
    def make(folder: Path) -> Callback:
        kind = getattr(lightnings, name, None)
        if kind is None:
            pytest.skip(f"this Lightning has no {name}")
        callback: Callback = kind()
        return callback

    return make


OTHERS: dict[str, Callable[[Path], Callback]] = {
    "ModelCheckpoint": lambda folder: lightnings.ModelCheckpoint(folder, every_n_train_steps=3),
    "EarlyStopping": lambda folder: lightnings.EarlyStopping("loss", patience=9, check_on_train_epoch_end=True),
    "StochasticWeightAveraging": lambda folder: lightnings.StochasticWeightAveraging(0.05, swa_epoch_start=2),
    "WeightAveraging": averaging("WeightAveraging"),
    "EMAWeightAveraging": averaging("EMAWeightAveraging"),
    "GradientAccumulationScheduler": lambda folder: lightnings.GradientAccumulationScheduler({0: 1, 2: 3}),
    "LearningRateFinder": lambda folder: lightnings.LearningRateFinder(num_training_steps=30),
    "BatchSizeFinder": lambda folder: lightnings.BatchSizeFinder("power", steps_per_trial=1, max_trials=1),
    "LearningRateMonitor": lambda folder: lightnings.LearningRateMonitor(),
    "RichProgressBar": lambda folder: lightnings.RichProgressBar(),
    "ModelPruning": lambda folder: lightnings.ModelPruning("l1_unstructured", amount=0.1),
    "BackboneFinetuning": lambda folder: Unfreezing(),
}

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*Metric `loss`"),
    pytest.mark.filterwarnings("ignore:Experiment logs directory"),
    pytest.mark.filterwarnings("ignore:Swapping scheduler"),
    pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step"),
    pytest.mark.filterwarnings("ignore:The `lr_scheduler.step"),
]


def fit(folder: Path, other: Callback, dropout: type[nn.Module], *ours: Callback, first: bool) -> tuple[Net, Trainer]:
    torch.manual_seed(0)
    net = Net(dropout)
    callbacks = [*ours, other] if first else [other, *ours]
    bar = isinstance(other, lightnings.RichProgressBar)
    trainer = trainer_of(
        *callbacks, max_epochs=EPOCHS, logger=CSVLogger(folder), enable_progress_bar=bar,
        enable_checkpointing=isinstance(other, lightnings.ModelCheckpoint),
    )  # fmt: skip
    trainer.fit(net)
    return net, trainer


@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
@pytest.mark.parametrize("name", list(OTHERS))
def test_both_do_their_work(name: str, first: bool, tmp_path: Path) -> None:
    other, ydrop, probe = OTHERS[name](tmp_path / "kept"), YDropCallback(annealing_epochs=1), Probe()
    net, trainer = fit(tmp_path, other, ConductanceDropout, ydrop, probe, first=first)
    assert {epoch for epoch, _ in probe.active} == set(range(EPOCHS))
    assert all(active is (epoch >= 1) for epoch, active in probe.active)
    assert ydrop.engine is not None
    driven = sum(active for _, active in probe.active)
    assert ydrop.engine.state_dict()["steps_taken"] == driven  # no trial of a finder counts
    if name == "ModelCheckpoint":
        assert list((tmp_path / "kept").glob("*.ckpt"))
    if name == "LearningRateFinder":
        assert net.lr != 0.1
    if name == "BatchSizeFinder":
        assert net.batch_size != 8
    if name == "ModelPruning":
        assert torch.count_nonzero(net.backbone[0].weight) < net.backbone[0].weight.numel()  # type: ignore[arg-type, operator]
    if name == "GradientAccumulationScheduler":
        assert trainer.global_step < len(probe.active)


@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
@pytest.mark.parametrize("name", list(OTHERS))
def test_observing_beside_them_changes_no_weight(name: str, first: bool, tmp_path: Path) -> None:
    ends = []
    for dropout, ours in ((nn.Dropout, []), (ConductanceDropout, [Observing(annealing_epochs=0)])):
        net, _ = fit(tmp_path, OTHERS[name](tmp_path / "kept"), dropout, *ours, first=first)
        ends.append(list(net.state_dict().values()))
    for one, other in zip(*ends, strict=True):
        assert torch.equal(one, other)
