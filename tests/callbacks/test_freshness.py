"""Rankings that are out of date are warned of."""

from contextlib import nullcontext
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_ydrop import YDropCallback


class Net(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 3))

    def forward(self, x: torch.Tensor) -> Any:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter([(torch.randn(4), torch.tensor(0))] * 16)


SAMPLES = TensorDataset(torch.randn(72, 4), torch.randint(3, (72,)))


@pytest.mark.parametrize(
    ("every_n_batches", "trainer", "data", "warned"),
    [
        (1, {}, SAMPLES, None),
        (4, {}, SAMPLES, None),  # of 9 batches
        (5, {}, SAMPLES, "every_n_batches=5 YDropCallback ranks units 1.8 time.s. in an epoch of 9 batches"),
        (16, {}, SAMPLES, "Pass every_n_batches=2 or less"),
        (5, {"fast_dev_run": 2}, SAMPLES, None),
        (2, {"limit_train_batches": 2}, SAMPLES, "Pass every_n_batches=1 or less"),
        (1, {"limit_train_batches": 1}, SAMPLES, None),
        (16, {}, Endless(), None),  # nobody knows how long an epoch is
    ],
)
def test_a_fit_that_ranks_units_too_seldom_warns(
    every_n_batches: int, trainer: dict[str, Any], data: Any, warned: str | None
) -> None:
    callback = YDropCallback(annealing_epochs=0, every_n_batches=every_n_batches, convert=True)
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    fit = L.Trainer(
        max_epochs=1, accelerator="cpu", enable_checkpointing=False, callbacks=[callback], **quiet, **trainer
    )
    with pytest.warns(UserWarning, match=warned) if warned else nullcontext():
        fit.fit(Net(), DataLoader(data, 8))
