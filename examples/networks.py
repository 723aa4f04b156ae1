"""The paper's networks (sec. 5, arXiv 2409.09088)."""

import math
from collections.abc import Callable, Sequence
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
