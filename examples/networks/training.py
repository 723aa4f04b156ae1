"""What all classifiers of the examples share."""

from collections.abc import Sequence

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy


class ClassifierBase(L.LightningModule):
    """What all classifiers share: the loss, accuracies, and SGD with momentum.

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

    def hidden_layers(self) -> list[str]:
        """Name the layers whose outputs are the units that a picture of conductance shows; none by default."""
        return []


class AdamClassifier(ClassifierBase):
    """What classifiers share that are trained with AdamW.

    Args:
        num_classes: Classes to tell apart.
        lr: Learning rate.
        weight_decay: Of AdamW.

    """

    def __init__(self, num_classes: int, lr: float, weight_decay: float) -> None:
        super().__init__(num_classes, lr, 0.0, [])
        self.weight_decay = weight_decay

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with a constant learning rate."""
        return torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=self.weight_decay, fused=True)
