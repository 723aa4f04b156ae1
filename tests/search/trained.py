"""A network and data that searches of the tests train: named in configurations."""

import copy

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models.resnet import BasicBlock

from tests.search.recorded import record


class Tiny(L.LightningModule):
    """Two places, and an epoch of two batches. Each training step is recorded in a file, if one is given."""

    def __init__(self, width: int = 4, lr: float = 0.1, record: str | None = None) -> None:
        super().__init__()
        self.network = nn.Sequential(
            *(nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.ReLU()),
            *(nn.Conv2d(width, width, 3, 2), nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2)),
        )
        self.network(torch.zeros(2, 1, 8, 8))
        self.lr = lr
        self.record = record

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.network(batch[0]), batch[1])
        if self.record is not None:
            record(self.record, f"{self.current_epoch} {batch_idx}")
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        logits = self.network(batch[0])
        self.log("val_loss", F.cross_entropy(logits, batch[1]))
        self.log("val_acc", (logits.argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class WithCopy(Tiny):
    """It holds a copy of its network, which training does not call."""

    def __init__(self) -> None:
        super().__init__()
        self.copy = copy.deepcopy(self.network)


class OneName(Tiny):
    """Training logs a number of its own under the name of the metric, at the end of an epoch."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self.log("val_loss", 1234.0, on_step=False, on_epoch=True)
        return super().training_step(batch, batch_idx)


class Diverging(Tiny):
    """Its weights are NaN after the first epoch."""

    def on_train_epoch_end(self) -> None:
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.fill_(torch.nan)


class Shrinking(Tiny):
    """Its last map is a single pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(
            *(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
            *(nn.Conv2d(4, 4, 6), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2)),
        )


class BuiltInSetup(Tiny):
    """Its network is there after `setup`."""

    def __init__(self) -> None:
        super().__init__()
        self._later, self.network = [self.network], nn.Sequential()

    def setup(self, stage: str) -> None:
        self.network = self._later[0]


class HalfBuilt(Tiny):
    """Its second half is there after `configure_model`."""

    def __init__(self) -> None:
        super().__init__()
        self._later = list(self.network[3:])
        self.network = self.network[:3]

    def configure_model(self) -> None:
        if len(self.network) == 3:
            self.network.extend(self._later)


class Placeless(Tiny):
    """A network without a place for a pattern."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))


class Squares(L.LightningDataModule):
    """Bright squares, left or right."""

    def setup(self, stage: str) -> None:
        generator = torch.Generator().manual_seed(1)
        images = torch.randn(48, 1, 8, 8, generator=generator)
        labels = torch.arange(48) % 2
        images[labels == 1, :, :, 4:] += 1
        self.train, self.val = TensorDataset(images[:32], labels[:32]), TensorDataset(images[32:], labels[32:])

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.train, 16, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.val, 16)


class TwoBlocks(Tiny):
    """Two residual blocks in one stage."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), BasicBlock(4, 4), BasicBlock(4, 4), Pooled())


class Pooled(nn.Sequential):
    """A head for maps of any size."""

    def __init__(self) -> None:
        super().__init__(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
