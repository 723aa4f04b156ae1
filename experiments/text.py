"""Sentences as data, and a small Transformer that classifies them."""

import math
import re
from collections import Counter
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

PADDING, UNKNOWN = 0, 1


class Sentences(L.LightningDataModule):
    """Sentences with a label: `label TAB words` in each line of train.tsv and test.tsv.

    A sample is (ids of the words (T,), label). Sentences are padded with 0 to the same length, and longer ones cut.

    Args:
        root: Folder of the two files.
        batch_size: Samples in a training batch.
        train_size: Sentences of the training set that are trained on.
        length: Words of a sentence.
        vocabulary: The most frequent words of the training set that are known. All others are one word.
        split_seed: Of the choice of the sentences trained on. All others of the training set are for validation.

    """

    def __init__(
        self,
        root: str,
        batch_size: int = 64,
        train_size: int = 1000,
        length: int = 24,
        vocabulary: int = 4000,
        split_seed: int = 0,
    ) -> None:
        super().__init__()
        self.root = Path(root)
        self.batch_size = batch_size
        self.train_size = train_size
        self.length = length
        self.vocabulary = vocabulary
        self.split_seed = split_seed

    def setup(self, stage: str) -> None:
        """Read the sentences, and number the words of those that are trained on."""
        lines = self._read("train.tsv")
        order = torch.randperm(len(lines), generator=torch.Generator().manual_seed(self.split_seed)).tolist()
        train = [lines[index] for index in order[: self.train_size]]
        counts = Counter(word for _, words in train for word in words)
        numbers = {word: number for number, (word, _) in enumerate(counts.most_common(self.vocabulary), UNKNOWN + 1)}
        self.train = self._numbered(train, numbers)
        self.val = self._numbered([lines[index] for index in order[self.train_size :]], numbers)
        self.test = self._numbered(self._read("test.tsv"), numbers)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Shuffled training batches."""
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Validation batches."""
        return DataLoader(self.val, 1000)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Test batches."""
        return DataLoader(self.test, 1000)

    def _read(self, name: str) -> list[tuple[int, list[str]]]:
        lines = (self.root / name).read_text(encoding="utf-8").splitlines()
        pairs = (line.split("\t", 1) for line in lines if line.strip())
        return [(int(label), re.sub(r"\d", "0", words.lower()).split()) for label, words in pairs]

    def _numbered(self, lines: list[tuple[int, list[str]]], numbers: dict[str, int]) -> TensorDataset:
        ids = torch.full((len(lines), self.length), PADDING)
        for row, (_, words) in zip(ids, lines, strict=True):
            known = [numbers.get(word, UNKNOWN) for word in words[: self.length]]
            row[: len(known)] = torch.tensor(known)
        return TensorDataset(ids, torch.tensor([label for label, _ in lines]))


class Attention(nn.Module):
    """Attention of several heads, with layers of its own for queries, keys and values."""

    def __init__(self, width: int, heads: int, p: float) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.dropout = nn.Dropout(p)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        """Attend (B, T, C) to what is no padding."""
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        weights = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        weights = self.dropout(weights.masked_fill(padding[:, None, None], -torch.inf).softmax(-1))
        attended: Tensor = self.proj((weights @ v).transpose(1, 2).flatten(2))
        return attended


class Block(nn.Module):
    """A block of a Transformer, with its norms first."""

    def __init__(self, width: int, heads: int, p: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, p)
        self.dropout1, self.dropout2 = nn.Dropout(p), nn.Dropout(p)
        self.wide = nn.Linear(width, 4 * width)
        self.hidden_dropout = nn.Dropout(p)
        self.narrow = nn.Linear(4 * width, width)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        """Transform (B, T, C)."""
        x = x + self.dropout1(self.attention(self.norm1(x), padding))
        transformed: Tensor = x + self.dropout2(self.narrow(self.hidden_dropout(F.gelu(self.wide(self.norm2(x))))))
        return transformed


class TransformerClassifier(L.LightningModule):
    """A small Transformer encoder, trained from scratch with AdamW, that classifies sentences.

    Args:
        vocabulary: Words that are known.
        num_classes: Classes to tell apart.
        length: Words of a sentence, at most.
        width: Of the model.
        depth: Blocks.
        heads: Of attention.
        p: Drop rate everywhere.
        lr: Learning rate, which falls to 0 along a cosine.
        weight_decay: Of AdamW.

    """

    def __init__(
        self,
        vocabulary: int = 4000,
        num_classes: int = 6,
        length: int = 24,
        width: int = 64,
        depth: int = 2,
        heads: int = 4,
        p: float = 0.1,
        lr: float = 2e-3,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.words = nn.Embedding(vocabulary + UNKNOWN + 1, width, padding_idx=PADDING)
        self.positions = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads, p) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)
        self.lr = lr
        self.weight_decay = weight_decay
        self.val_acc = MulticlassAccuracy(num_classes, average="micro")
        self.test_acc = MulticlassAccuracy(num_classes, average="micro")

    def forward(self, ids: Tensor) -> Tensor:
        """Give the logits (B, C) of sentences (B, T)."""
        padding = ids == PADDING
        x = self.words(ids) + self.positions.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x, padding)
        kept = (~padding).unsqueeze(-1)
        logits: Tensor = self.head((self.norm(x) * kept).sum(1) / kept.sum(1).clamp(min=1))
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy of a training batch."""
        ids, labels = batch
        loss = F.cross_entropy(self(ids), labels)
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Loss and accuracy on held-out sentences."""
        ids, labels = batch
        logits = self(ids)
        self.val_acc(logits, labels)
        self.log_dict({"val_loss": F.cross_entropy(logits, labels), "val_acc": self.val_acc})

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Accuracy on the test set."""
        ids, labels = batch
        self.test_acc(self(ids), labels)
        self.log("test_acc", self.test_acc)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with a cosine."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
