"""Residual networks."""

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from examples.networks.dropouts import Dropout, dropped_relu
from examples.networks.training import ClassifierBase


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


class ResidualClassifier(ClassifierBase):
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


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut (He et al., arXiv 1512.03385)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            projection = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """Add the branch to the shortcut: (B, C, H, W) to (B, C', H / stride, W / stride)."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class ResNet18(ClassifierBase):
    """ResNet-18 for images of 32x32, with a hidden layer in its head that has the dropout. SGD with momentum.

    Its first convolution is 3x3, and no pooling follows.

    Args:
        shape: Of an image, (C, H, W).
        num_classes: Classes to tell apart.
        channels: Of the first of four stages; 64 in the paper. Each later stage has twice as many.
        hidden: Width of the head's hidden layer.
        dropout: What stands in it: nothing, nn.Dropout, ConductanceDropout or Jumpout.
        p: Drop rate of nn.Dropout, and of ConductanceDropout while Y-Drop is not at work. Jumpout draws its own.
        lr: Learning rate.
        momentum: Momentum.
        milestones: Epochs at whose end the learning rate falls to a tenth.
        jumpout: Arguments of Jumpout; its paper's by default.

    """

    def __init__(
        self,
        shape: tuple[int, ...],
        num_classes: int = 10,
        channels: int = 64,
        hidden: int = 256,
        dropout: Dropout = "none",
        p: float = 0.5,
        lr: float = 0.05,
        momentum: float = 0.9,
        milestones: list[int] = [],  # noqa: B006
        jumpout: dict[str, float] = {},  # noqa: B006
    ) -> None:
        super().__init__(num_classes, lr, momentum, milestones)
        self.save_hyperparameters()
        stem = nn.Conv2d(shape[0], channels, 3, padding=1, bias=False)
        widths = [channels * 2**stage for stage in range(4)]
        blocks: list[nn.Module] = []
        for before, after in pairwise([channels, *widths]):
            blocks += [BasicBlock(before, after, 1 if after == channels else 2), BasicBlock(after, after, 1)]
        pooled = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        self.features = nn.Sequential(stem, nn.BatchNorm2d(channels), nn.ReLU(), *blocks, *pooled)
        self.head = nn.Sequential(
            nn.Linear(widths[-1], hidden), *dropped_relu(dropout, p, jumpout), nn.Linear(hidden, num_classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Give the logits (B, num_classes)."""
        logits: Tensor = self.head(self.features(x))
        return logits
