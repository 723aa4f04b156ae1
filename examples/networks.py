"""The paper's fully connected networks (sec. 5, arXiv 2409.09088)."""

from collections.abc import Callable, Sequence
from typing import Literal

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_ydrop import ConductanceDropout

Dropout = Literal["none", "vanilla", "conductance"]


def fully_connected(in_features: int, hidden: Sequence[int], num_classes: int, dropout: Dropout, p: float) -> nn.Module:
    """Stack linear layers, each hidden one followed by its dropout and a ReLU: FC_1 has `hidden=[1024, 1024]`."""
    kinds: dict[Dropout, Callable[[], nn.Module]] = {
        "none": nn.Identity,
        "vanilla": lambda: nn.Dropout(p),
        "conductance": lambda: ConductanceDropout(p),
    }
    layers: list[nn.Module] = [nn.Flatten()]
    for width in hidden:
        # Between the linear layer and its ReLU: a unit's activation, and so its conductance, is the linear output.
        layers += [nn.Linear(in_features, width), kinds[dropout](), nn.ReLU()]
        in_features = width
    return nn.Sequential(*layers, nn.Linear(in_features, num_classes))


class Classifier(L.LightningModule):
    """A fully connected classifier, trained with SGD and momentum.

    Args:
        in_features: Numbers in one input.
        num_classes: Classes to tell apart.
        hidden: Width of each hidden layer.
        dropout: What stands in each hidden layer: nothing, nn.Dropout or ConductanceDropout.
        p: Drop rate of nn.Dropout, and of ConductanceDropout while Y-Drop is not at work.
        lr: Learning rate.
        momentum: Momentum.

    """

    def __init__(
        self,
        in_features: int,
        num_classes: int = 10,
        hidden: list[int] = [1024, 1024],  # noqa: B006
        dropout: Dropout = "none",
        p: float = 0.5,
        lr: float = 0.01,
        momentum: float = 0.9,
    ) -> None:
        super().__init__()
        self.network = fully_connected(in_features, hidden, num_classes, dropout, p)
        self.lr = lr
        self.momentum = momentum
        self.val_acc = MulticlassAccuracy(num_classes, average="micro")
        self.test_acc = MulticlassAccuracy(num_classes, average="micro")

    def forward(self, x: Tensor) -> Tensor:
        """Give the logits (B, C)."""
        logits: Tensor = self.network(x)
        return logits

    def hidden_layers(self) -> list[str]:
        """Name the hidden linear layers: their outputs are the units."""
        linear = [name for name, module in self.named_modules() if isinstance(module, nn.Linear)]
        return linear[:-1]

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

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD with momentum, as in the paper."""
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=self.momentum)
