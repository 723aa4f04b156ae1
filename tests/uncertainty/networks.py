"""A small classifier with dropout, as a LightningModule, and data for it."""

from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


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


class Points(LightningDataModule):
    """64 points, with labels or without."""

    def __init__(self, labels: bool = True) -> None:
        super().__init__()
        x = torch.randn(64, 4, generator=torch.Generator().manual_seed(3))
        y = (x.sum(1) > 0).long() + (x[:, 0] > 1).long()
        self.data = TensorDataset(x, y) if labels else TensorDataset(x)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.data, 16)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader
