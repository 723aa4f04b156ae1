"""Networks that classify sentences, trained from scratch. Token 0 is padding."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.networks.dropouts import Dropout, dropped, dropped_relu
from examples.networks.training import AdamClassifier


class TextCNN(AdamClassifier):
    """A convolutional network for sentences (Kim, EMNLP 2014), whose dropout is on the penultimate layer.

    Args:
        shape: (T, V): words of a sentence, and numbers that stand for words.
        num_classes: Classes to tell apart.
        width: Of the embedding of words.
        windows: Words that a convolution sees.
        channels: Of each convolution.
        dropout: What stands on the penultimate layer: nothing, nn.Dropout, ConductanceDropout or Jumpout.
        p: Drop rate of nn.Dropout, and of ConductanceDropout while Y-Drop is not at work. Jumpout draws its own.
        lr: Learning rate of AdamW.
        weight_decay: Of AdamW.
        jumpout: Arguments of Jumpout; its paper's by default.

    """

    def __init__(
        self,
        shape: tuple[int, ...],
        num_classes: int,
        width: int = 100,
        windows: list[int] = [3, 4, 5],  # noqa: B006
        channels: int = 100,
        dropout: Dropout = "none",
        p: float = 0.5,
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        jumpout: dict[str, float] = {},  # noqa: B006
    ) -> None:
        super().__init__(num_classes, lr, weight_decay)
        self.save_hyperparameters()
        self.words = nn.Embedding(shape[1], width, padding_idx=0)
        self.convolutions = nn.ModuleList(nn.Conv1d(width, channels, window, padding=window // 2) for window in windows)
        self.dropout = dropped(dropout, p, jumpout)
        self.head = nn.Linear(channels * len(windows), num_classes)

    def forward(self, ids: Tensor) -> Tensor:
        """Give the logits (B, num_classes) of sentences (B, T)."""
        x = self.words(ids).transpose(1, 2)
        maxima = [F.relu(convolution(x)).amax(2) for convolution in self.convolutions]
        logits: Tensor = self.head(self.dropout(torch.cat(maxima, 1)))
        return logits


class TextLSTM(AdamClassifier):
    """An LSTM over the words of a sentence, and a hidden layer, which has the dropout.

    Args:
        shape: (T, V): words of a sentence, and numbers that stand for words.
        num_classes: Classes to tell apart.
        width: Of the embedding of words.
        hidden: Width of the LSTM and of the hidden layer.
        dropout: What stands in the hidden layer: nothing, nn.Dropout, ConductanceDropout or Jumpout.
        p: Drop rate of nn.Dropout, and of ConductanceDropout while Y-Drop is not at work. Jumpout draws its own.
        lr: Learning rate of AdamW.
        weight_decay: Of AdamW.
        jumpout: Arguments of Jumpout; its paper's by default.

    """

    def __init__(
        self,
        shape: tuple[int, ...],
        num_classes: int,
        width: int = 100,
        hidden: int = 128,
        dropout: Dropout = "none",
        p: float = 0.5,
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        jumpout: dict[str, float] = {},  # noqa: B006
    ) -> None:
        super().__init__(num_classes, lr, weight_decay)
        self.save_hyperparameters()
        self.words = nn.Embedding(shape[1], width, padding_idx=0)
        self.lstm = nn.LSTM(width, hidden, batch_first=True)
        self.head = nn.Sequential(
            nn.Linear(hidden, hidden), *dropped_relu(dropout, p, jumpout), nn.Linear(hidden, num_classes)
        )

    def forward(self, ids: Tensor) -> Tensor:
        """Give the logits (B, num_classes) of sentences (B, T)."""
        states, _ = self.lstm(self.words(ids))
        last = (ids != 0).sum(1).clamp(min=1) - 1
        at_last = states.gather(1, last[:, None, None].expand(-1, 1, states.shape[2])).squeeze(1)
        logits: Tensor = self.head(at_last)
        return logits


class TextTransformer(AdamClassifier):
    """A small Transformer encoder with its norms first. Dropout is where nn.TransformerEncoderLayer has it.

    Jumpout takes the place of the dropout behind the ReLU alone. There is none on attention weights.

    Args:
        shape: (T, V): words of a sentence, and numbers that stand for words.
        num_classes: Classes to tell apart.
        width: Of the model.
        depth: Layers.
        heads: Of attention.
        dropout: What stands in each layer: nothing, nn.Dropout, ConductanceDropout or Jumpout.
        p: Drop rate of nn.Dropout, and of ConductanceDropout while Y-Drop is not at work. Jumpout draws its own.
        lr: Learning rate of AdamW.
        weight_decay: Of AdamW.
        jumpout: Arguments of Jumpout; its paper's by default.

    """

    def __init__(
        self,
        shape: tuple[int, ...],
        num_classes: int,
        width: int = 64,
        depth: int = 2,
        heads: int = 4,
        dropout: Dropout = "none",
        p: float = 0.1,
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        jumpout: dict[str, float] = {},  # noqa: B006
    ) -> None:
        super().__init__(num_classes, lr, weight_decay)
        self.save_hyperparameters()
        self.words = nn.Embedding(shape[1], width, padding_idx=0)
        self.positions = nn.Embedding(shape[0], width)
        self.layers = nn.ModuleList()
        for _ in range(depth):
            layer = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, batch_first=True, norm_first=True)
            for name in ("dropout", "dropout1", "dropout2"):
                kind = "none" if dropout == "jumpout" and name != "dropout" else dropout
                setattr(layer, name, dropped(kind, p, jumpout))
            self.layers.append(layer)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, ids: Tensor) -> Tensor:
        """Give the logits (B, num_classes) of sentences (B, T)."""
        padding = ids == 0
        padding[:, 0] = False  # a sentence without words attends to itself
        x = self.words(ids) + self.positions.weight
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=padding)
        kept = (~padding).unsqueeze(-1)
        logits: Tensor = self.head((self.norm(x) * kept).sum(1) / kept.sum(1))
        return logits
