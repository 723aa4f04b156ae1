"""A small classifier with dropout, as a LightningModule."""

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn


class Small(LightningModule):
    """Linear, BatchNorm, ReLU, dropout, Linear."""

    def __init__(self, width: int = 16, p: float = 0.5) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Linear(4, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(p), nn.Linear(width, 3)
        )

    def forward(self, x: Tensor) -> Any:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)
