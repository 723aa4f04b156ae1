"""The networks of the examples: those of Y-Drop's paper (sec. 5, arXiv 2409.09088), and wide residual networks."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_ydrop import ConductanceDropout, Jumpout

Dropout = Literal["none", "vanilla", "conductance", "jumpout"]


def fully_connected(in_features: int, hidden: Sequence[int], num_classes: int, dropout: Dropout, p: float) -> nn.Module:
    """Stack linear layers, each hidden one followed by its dropout and a ReLU: FC_1 has `hidden=[1024, 1024]`."""
    # Dropout comes before the ReLU: a unit's activation, and so its conductance, is the linear output. Jumpout counts
    # the activations that the ReLU leaves.
    activations: dict[Dropout, Callable[[], list[nn.Module]]] = {
        "none": lambda: [nn.Identity(), nn.ReLU()],
        "vanilla": lambda: [nn.Dropout(p), nn.ReLU()],
        "conductance": lambda: [ConductanceDropout(p), nn.ReLU()],
        "jumpout": lambda: [nn.ReLU(), Jumpout()],
    }
    layers: list[nn.Module] = [nn.Flatten()]
    for width in hidden:
        layers += [nn.Linear(in_features, width), *activations[dropout]()]
        in_features = width
    return nn.Sequential(*layers, nn.Linear(in_features, num_classes))


def convolutional(shape: Sequence[int], channels: Sequence[int], batch_norm: bool) -> tuple[nn.Module, int]:
    """Stack 5x5 convolutions with pooling: those of S_1 to S_4, or with BatchNorm those of M_1 and M_2.

    Returns:
        The network, and how many numbers it makes of an image (C, H, W).

    """
    in_channels, *size = shape
    layers: list[nn.Module] = []
    for out_channels in channels:
        layers.append(nn.Conv2d(in_channels, out_channels, 5, padding=2))
        if batch_norm:
            layers += [nn.BatchNorm2d(out_channels), nn.ReLU(), nn.MaxPool2d(3, 2)]
            size = [(each - 3) // 2 + 1 for each in size]
        else:
            layers += [nn.ReLU(), nn.MaxPool2d(2)]
            size = [each // 2 for each in size]
        in_channels = out_channels
    return nn.Sequential(*layers), in_channels * math.prod(size)


class WideBlock(nn.Module):
    """A residual block with its norms before the convolutions.

    Args:
        in_channels: Channels of its input.
        out_channels: Channels of its output.
        stride: By how much it makes the map smaller.
        p: Drop rate between the two convolutions. Patterns on the block replace this dropout.

    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, p: float = 0.0) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.dropout = nn.Dropout(p) if p > 0 else nn.Identity()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.projects = stride != 1 or in_channels != out_channels
        # A module in any case, so that patterns can mask the shortcut.
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False) if self.projects else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Add the branch to the shortcut: (B, C, H, W) to (B, C', H / stride, W / stride)."""
        active = F.relu(self.bn1(x))
        y: Tensor = self.conv2(self.dropout(F.relu(self.bn2(self.conv1(active)))))
        shortcut: Tensor = self.shortcut(active if self.projects else x)
        return y + shortcut


class WideResNet(nn.Module):
    """WRN-`depth`-`width` (Zagoruyko and Komodakis, arXiv 1605.07146): three stages of (`depth` - 4) / 6 blocks each.

    Args:
        depth: 6 n + 4 layers, such as 10, 16, 28.
        width: Factor of the 16, 32 and 64 channels of the stages. It may be below 1.
        num_classes: Classes to tell apart.
        in_channels: Channels of an image.
        p: Drop rate in the blocks.
        stem_stride: By how much the first convolution makes the map smaller.

    """

    def __init__(
        self,
        depth: int = 28,
        width: float = 2,
        num_classes: int = 10,
        in_channels: int = 3,
        p: float = 0.0,
        stem_stride: int = 1,
    ) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6 != 0:
            raise ValueError(f"depth={depth} is not 6 n + 4, such as 10, 16, 22 or 28")
        num_blocks = (depth - 4) // 6
        channels = [16, *(max(1, round(each * width)) for each in (16, 32, 64))]
        self.stem = nn.Conv2d(in_channels, channels[0], 3, stem_stride, padding=1, bias=False)
        self.stages = nn.Sequential()
        for stage, (before, after) in enumerate(pairwise(channels)):
            first = WideBlock(before, after, stride=1 if stage == 0 else 2, p=p)
            others = (WideBlock(after, after, stride=1, p=p) for _ in range(num_blocks - 1))
            self.stages.append(nn.Sequential(first, *others))
        self.norm = nn.BatchNorm2d(channels[-1])
        self.head = nn.Linear(channels[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Give the logits (B, num_classes) of images (B, C, H, W) of any size."""
        maps = F.relu(self.norm(self.stages(self.stem(x))))
        logits: Tensor = self.head(maps.mean((2, 3)))
        return logits


class ImageClassifier(L.LightningModule):
    """What all classifiers of images share: the loss, accuracies, and SGD with momentum.

    Args:
        num_classes: Classes to tell apart.
        lr: Learning rate.
        momentum: Momentum.
        milestones: Epochs at whose end the learning rate falls to a tenth.

    """

    def __init__(self, num_classes: int, lr: float, momentum: float, milestones: Sequence[int]) -> None:
        super().__init__()
        self.lr = lr
        self.momentum = momentum
        self.milestones = milestones
        self.val_acc = MulticlassAccuracy(num_classes, average="micro")
        self.test_acc = MulticlassAccuracy(num_classes, average="micro")

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy of a training batch."""
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Loss and accuracy on held-out data."""
        x, y = batch
        logits = self(x)
        self.val_acc(logits, y)
        self.log_dict({"val_loss": F.cross_entropy(logits, y), "val_acc": self.val_acc}, prog_bar=True)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Accuracy on the test set."""
        x, y = batch
        self.test_acc(self(x), y)
        self.log("test_acc", self.test_acc)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """SGD with momentum, as in the paper."""
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=self.momentum, fused=True)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": torch.optim.lr_scheduler.MultiStepLR(optimizer, self.milestones)},
        }


class Classifier(ImageClassifier):
    """A classifier of images, trained with SGD and momentum.

    Args:
        shape: Of an image, (C, H, W).
        num_classes: Classes to tell apart.
        hidden: Width of each hidden layer.
        channels: Of each convolution before them; none by default.
        batch_norm: Whether the convolutions are those of M_1 and M_2, with BatchNorm, or those of S_1 to S_4.
        dropout: What stands in each hidden layer: nothing, nn.Dropout, ConductanceDropout or Jumpout.
        p: Drop rate of nn.Dropout, and of ConductanceDropout while Y-Drop is not at work. Jumpout draws its own.
        lr: Learning rate.
        momentum: Momentum.
        milestones: Epochs at whose end the learning rate falls to a tenth.

    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        num_classes: int = 10,
        hidden: list[int] = [1024, 1024],  # noqa: B006
        channels: list[int] = [],  # noqa: B006
        batch_norm: bool = False,
        dropout: Dropout = "none",
        p: float = 0.5,
        lr: float = 0.01,
        momentum: float = 0.9,
        milestones: list[int] = [],  # noqa: B006
    ) -> None:
        super().__init__(num_classes, lr, momentum, milestones)
        self.save_hyperparameters()
        self.convolutions, num_features = convolutional(shape, channels, batch_norm)
        self.network = fully_connected(num_features, hidden, num_classes, dropout, p)

    def forward(self, x: Tensor) -> Tensor:
        """Give the logits (B, C)."""
        logits: Tensor = self.network(self.convolutions(x))
        return logits

    def hidden_layers(self) -> list[str]:
        """Name the hidden linear layers: their outputs are the units."""
        linear = [name for name, module in self.named_modules() if isinstance(module, nn.Linear)]
        return linear[:-1]


class ResidualClassifier(ImageClassifier):
    """A wide residual network as a classifier of images, trained with SGD and momentum.

    Args:
        shape: Of an image, (C, H, W).
        num_classes: Classes to tell apart.
        depth: 6 n + 4 layers: 10 has one block in each of three stages.
        width: Factor of the 16, 32 and 64 channels of the stages.
        p: Drop rate in the blocks.
        stem_stride: By how much the first convolution makes the map smaller.
        lr: Learning rate.
        momentum: Momentum.
        milestones: Epochs at whose end the learning rate falls to a tenth.

    """

    def __init__(
        self,
        shape: tuple[int, int, int] = (1, 8, 8),
        num_classes: int = 10,
        depth: int = 10,
        width: float = 1.0,
        p: float = 0.0,
        stem_stride: int = 1,
        lr: float = 0.05,
        momentum: float = 0.9,
        milestones: list[int] = [],  # noqa: B006
    ) -> None:
        super().__init__(num_classes, lr, momentum, milestones)
        self.save_hyperparameters()
        self.network = WideResNet(depth, width, num_classes, shape[0], p, stem_stride)

    def forward(self, x: Tensor) -> Tensor:
        """Give the logits (B, num_classes)."""
        logits: Tensor = self.network(x)
        return logits
