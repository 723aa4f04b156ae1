"""The networks that are measured: the paper's, a ResNet, and those of the fidelity table."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models import resnet18

MakeDropout = Callable[[], nn.Module]

# The settings that README recommends where cost counts.
RECOMMENDED: dict[str, Any] = {"every_n_batches": 4}

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "tanh": nn.Tanh}


def perceptron(
    num_features: int,
    hidden: Sequence[int],
    num_classes: int,
    dropout: MakeDropout,
    activation: type[nn.Module] = nn.ReLU,
) -> nn.Sequential:
    """Stack linear layers with the dropout between each and its activation, as in the paper."""
    layers: list[nn.Module] = [nn.Flatten()]
    for width in hidden:
        layers += [nn.Linear(num_features, width), dropout(), activation()]
        num_features = width
    return nn.Sequential(*layers, nn.Linear(num_features, num_classes))


def paper_cnn(
    channels: Sequence[int], hidden: Sequence[int], dropout: MakeDropout, *, image_size: int, batch_norm: bool
) -> nn.Sequential:
    """Three 5x5 convolutions and a perceptron that drops: S without and M with BatchNorm (sec. 5, arXiv 2409.09088)."""
    layers: list[nn.Module] = []
    in_channels = 3
    for out_channels in channels:
        layers.append(nn.Conv2d(in_channels, out_channels, 5, padding=2))
        if batch_norm:
            layers += [nn.BatchNorm2d(out_channels), nn.ReLU(), nn.MaxPool2d(3, 2)]
            image_size = (image_size - 3) // 2 + 1
        else:
            layers += [nn.ReLU(), nn.MaxPool2d(2)]
            image_size //= 2
        in_channels = out_channels
    return nn.Sequential(*layers, *perceptron(in_channels * image_size**2, hidden, 10, dropout))


def resnet(dropout: MakeDropout) -> nn.Module:
    """Torchvision's ResNet-18, with a hidden layer and dropout in its classifier."""
    model = resnet18(num_classes=10)
    model.fc = nn.Sequential(nn.Linear(512, 512), dropout(), nn.ReLU(), nn.Linear(512, 10))
    return model


class Transformer(nn.Module):
    """A small encoder over (B, T, features), with dropout behind each feed-forward layer, that averages over T."""

    def __init__(
        self,
        num_features: int,
        width: int,
        num_layers: int,
        num_classes: int,
        dropout: MakeDropout,
        activation: type[nn.Module] = nn.GELU,
    ) -> None:
        super().__init__()
        self.embedding = nn.Linear(num_features, width)
        self.position = nn.Parameter(0.02 * torch.randn(64, width))
        self.blocks = nn.Sequential(*[Block(width, dropout, activation) for _ in range(num_layers)])
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        """Give the logits (B, C) of sequences (B, T, features), T at most 64."""
        x = self.embedding(x.flatten(2)) + self.position[: x.shape[1]]
        logits: Tensor = self.head(self.blocks(x).mean(1))
        return logits


class CheckpointedTransformer(Transformer):
    """It keeps only the input of each block, and runs the blocks again in the backward pass: always, or in training."""

    always = True

    def forward(self, x: Tensor) -> Tensor:
        """Give the logits (B, C) of sequences (B, T, features), T at most 64."""
        x = self.embedding(x.flatten(2)) + self.position[: x.shape[1]]
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.training or self.always else block(x)
        logits: Tensor = self.head(x.mean(1))
        return logits


class CheckpointedInTraining(CheckpointedTransformer):
    """It does so in training mode alone, as those of Hugging Face do."""

    always = False


class Block(nn.Module):
    """Attention and a feed-forward layer, each behind a layer norm."""

    def __init__(self, width: int, dropout: MakeDropout, activation: type[nn.Module]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            dropout(),
            activation(),
            nn.Linear(4 * width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, U) to (B, T, U)."""
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.feed_forward(x)


def small_cnn(dropout: MakeDropout, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Two convolutions with BatchNorm on (B, 1, H, W), with dropout of channels, and a hidden layer with dropout."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        dropout(),
        activation(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.BatchNorm2d(64),
        dropout(),
        activation(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(1024, 256),
        dropout(),
        activation(),
        nn.Linear(256, 10),
    )
