"""A network that classifies time series."""

from torch import Tensor, nn

from examples.networks.dropouts import Dropout, dropped
from examples.networks.training import AdamClassifier


class SeriesFCN(AdamClassifier):
    """A fully convolutional network (Wang, Yan and Oates, arXiv 1611.06455), with dropout before its last layer.

    Args:
        shape: Of a series, (C, T).
        num_classes: Classes to tell apart.
        channels: Of the three convolutions; 128, 256 and 128 in the paper.
        dropout: What stands before the last layer: nothing, nn.Dropout, ConductanceDropout or Jumpout.
        p: Drop rate of nn.Dropout, and of ConductanceDropout while Y-Drop is not at work. Jumpout draws its own.
        lr: Learning rate of AdamW.
        weight_decay: Of AdamW.
        jumpout: Arguments of Jumpout; its paper's by default.

    """

    def __init__(
        self,
        shape: tuple[int, ...],
        num_classes: int,
        channels: list[int] = [128, 256, 128],  # noqa: B006
        dropout: Dropout = "none",
        p: float = 0.5,
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        jumpout: dict[str, float] = {},  # noqa: B006
    ) -> None:
        super().__init__(num_classes, lr, weight_decay)
        self.save_hyperparameters()
        layers: list[nn.Module] = []
        before = shape[0]
        for after, window in zip(channels, (8, 5, 3), strict=True):
            layers += [nn.Conv1d(before, after, window, padding=window // 2), nn.BatchNorm1d(after), nn.ReLU()]
            before = after
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten())
        self.dropout = dropped(dropout, p, jumpout)
        self.head = nn.Linear(before, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Give the logits (B, num_classes) of series (B, C, T)."""
        logits: Tensor = self.head(self.dropout(self.features(x)))
        return logits
