"""The networks of Y-Drop's paper (sec. 5, arXiv 2409.09088)."""

import math
from collections.abc import Sequence

from torch import Tensor, nn

from examples.networks.dropouts import Dropout, JumpoutArguments, dropped_relu
from examples.networks.training import ClassifierBase


def fully_connected(
    in_features: int,
    hidden: Sequence[int],
    num_classes: int,
    dropout: Dropout,
    p: float,
    jumpout: JumpoutArguments,
) -> nn.Module:
    """Stack linear layers, each hidden one followed by its dropout and a ReLU: FC_1 has `hidden=[1024, 1024]`."""
    layers: list[nn.Module] = [nn.Flatten()]
    for width in hidden:
        layers += [nn.Linear(in_features, width), *dropped_relu(dropout, p, jumpout)]
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


class Classifier(ClassifierBase):
    """A classifier of images, or of rows of a table, trained with SGD and momentum.

    Args:
        shape: Of an image, (C, H, W), or of a row, (F,).
        num_classes: Classes to tell apart.
        hidden: Width of each hidden layer.
        channels: Of each convolution before them; none by default.
        batch_norm: Whether the convolutions are those of M_1 and M_2, with BatchNorm, or those of S_1 to S_4.
        dropout: What stands in each hidden layer: nothing, nn.Dropout, ConductanceDropout or Jumpout.
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
        hidden: list[int] = [1024, 1024],  # noqa: B006
        channels: list[int] = [],  # noqa: B006
        batch_norm: bool = False,
        dropout: Dropout = "none",
        p: float = 0.5,
        lr: float = 0.01,
        momentum: float = 0.9,
        milestones: list[int] = [],  # noqa: B006
        jumpout: dict[str, float] = {},  # noqa: B006
    ) -> None:
        super().__init__(num_classes, lr, momentum, milestones)
        self.save_hyperparameters()
        self.convolutions, num_features = convolutional(shape, channels, batch_norm)
        self.network = fully_connected(num_features, hidden, num_classes, dropout, p, jumpout)

    def forward(self, x: Tensor) -> Tensor:
        """Give the logits (B, C)."""
        logits: Tensor = self.network(self.convolutions(x))
        return logits

    def hidden_layers(self) -> list[str]:
        """Name the hidden linear layers: their outputs are the units."""
        linear = [name for name, module in self.named_modules() if isinstance(module, nn.Linear)]
        return linear[:-1]
