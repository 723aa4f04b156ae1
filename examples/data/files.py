"""Data modules for your own files: pictures, sentences, tables and time series.

Each takes a `root`: a folder with a training and a test set, or with the training set alone. Then a fifth of it, the
same for every run, is the test set.
"""

import csv
from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.compose import ColumnTransformer
from sklearn.impute import SimpleImputer
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torchvision import datasets
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as vision

from examples.data.memory import InMemory, Labelled

# Raw inputs and labels as they are written.
Read = tuple[Any, list[str]]
TEST_FRACTION = 0.2
PADDING, UNKNOWN = 0, 1
# Spreadsheets write a byte order mark, which is no part of the text.
ENCODING = "utf-8-sig"


class FromFiles(InMemory):
    """Samples of files, whose labels are any words or numbers.

    Args:
        root: A folder with a training set and, where there is one, a test set; or the file of a training set.
        batch_size: Samples in a training batch.
        val_fraction: Share of the training set held out, in (0, 1).
        split_seed: Of the choice of the samples held out, the same for every run that is compared.
        train_fraction: Share of what is not held out to train on, in (0, 1].
        num_workers: Processes that read; worth it where images are augmented.

    """

    suffix: str

    def __init__(
        self,
        root: str = "data",
        batch_size: int = 64,
        val_fraction: float = 0.25,
        split_seed: int = 0,
        train_fraction: float = 1.0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, val_fraction, split_seed, train_fraction, num_workers)
        self.root = Path(root)

    @abstractmethod
    def read(self, place: Path) -> Read:
        """Read the inputs, N of them, and the label of each."""

    @property
    def num_classes(self) -> int:  # type: ignore[override]
        """How many labels the training set has."""
        return len(self._classes)

    def load(self, train: bool) -> Labelled:
        """Read the inputs (N, *) and labels (N,) of the training or the test set.

        Raises:
            FileNotFoundError: If there is no training set.
            ValueError: If a file is not in its format, a label is missing, or the test set has labels that the
                training set lacks.

        """
        inputs, labels = self._train if train else self._test
        if any(label.lower() in ("", "nan") for label in labels):
            raise ValueError(f"{self.root} has samples without a label. Remove them, or label them.")
        if unknown := sorted(set(labels) - set(self._classes)):
            raise ValueError(
                f"The test set of {self.root} has labels that its training set lacks: {unknown}. "
                "Add samples of them to the training set, or remove them from the test set."
            )
        numbers = {name: number for number, name in enumerate(self._classes)}
        return torch.as_tensor(inputs), torch.tensor([numbers[label] for label in labels])

    @cached_property
    def _classes(self) -> list[str]:
        names = set(self._train[1])
        # By name where numbers are equal, as 1 and 1.0 are: a set has no order of its own.
        return sorted(names, key=(lambda name: (float(name), name)) if all(map(_is_number, names)) else None)

    @cached_property
    def _train(self) -> Read:
        inputs, labels = self.read(self._place("train"))
        return (inputs, labels) if self._has_test else self._part(inputs, labels, 0)

    @cached_property
    def _test(self) -> Read:
        return self.read(self._place("test")) if self._has_test else self._part(*self.read(self._place("train")), 1)

    @property
    def _has_test(self) -> bool:
        return self.root.is_dir() and self._place("test").exists()

    def _part(self, inputs: Any, labels: Sequence[str], which: int) -> Read:
        """Split off the test set, which is the same whatever is trained on."""
        try:
            split = train_test_split(range(len(labels)), test_size=TEST_FRACTION, random_state=0, stratify=labels)
        except ValueError as error:
            raise ValueError(
                f"{self.root} has no test set, and too few samples to split one off: {error} "
                f"Add samples, or write test{self.suffix}."
            ) from error
        return inputs[split[which]], [labels[place] for place in split[which]]

    def _place(self, name: str) -> Path:
        file = f", or one {self.suffix} file" if self.suffix else ""
        remedy = f"`root` is a folder with train{self.suffix} and, optionally, test{self.suffix}{file}."
        if not self.root.exists():
            raise FileNotFoundError(f"{self.root} does not exist. {remedy}")
        if self.root.is_file() and not self.suffix:
            raise NotADirectoryError(f"{self.root} is a file. {remedy}")
        place = self.root / f"{name}{self.suffix}" if self.root.is_dir() else self.root
        if name == "train" and not place.exists():
            raise FileNotFoundError(f"{self.root} has no train{self.suffix}. {remedy}")
        return place


class ImageFolderData(FromFiles):
    """Pictures in a folder for each class: `train/CLASS/*.jpg`, and `test/CLASS/*.jpg` where there is a test set.

    They are scaled and cropped to squares, and those that are trained on are flipped and shifted.

    Args:
        root: Folder of `train` and `test`.
        image_size: Height and width in pixels.
        augment_images: Whether to flip and shift those that are trained on.
        batch_size: Samples in a training batch.
        val_fraction: Share of the training set held out, in (0, 1).
        split_seed: Of the choice of the samples held out, the same for every run that is compared.
        train_fraction: Share of what is not held out to train on, in (0, 1].
        num_workers: Processes that read and augment.

    """

    suffix = ""

    def __init__(
        self,
        root: str = "data",
        image_size: int = 32,
        augment_images: bool = True,
        batch_size: int = 64,
        val_fraction: float = 0.25,
        split_seed: int = 0,
        train_fraction: float = 1.0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(root, batch_size, val_fraction, split_seed, train_fraction, num_workers)
        self.shape = (3, image_size, image_size)
        self._scale = v2.Compose([v2.Resize(image_size), v2.CenterCrop(image_size)])
        shifts = v2.RandomCrop(image_size, padding=image_size // 8)
        self.augment = v2.Compose([shifts, v2.RandomHorizontalFlip()]) if augment_images else None

    def read(self, place: Path) -> Read:
        """Read pictures as bytes (N, 3, H, W)."""
        found = datasets.ImageFolder(str(place), transform=self._scaled)
        return torch.stack([image for image, _ in found]), [found.classes[number] for number in found.targets]

    def _scaled(self, image: Any) -> Tensor:
        pixels = vision.pil_to_tensor(image)
        scaled: Tensor = pixels if pixels.shape == self.shape else self._scale(pixels)
        return scaled

    def fit(self, inputs: Tensor) -> None:
        """Learn mean and standard deviation of each channel."""
        std, self.mean = torch.std_mean(inputs / 255, (0, 2, 3), keepdim=True)
        self.std = std.clamp(min=1e-6)  # of a channel that is the same everywhere

    def normalise(self, inputs: Tensor) -> Tensor:
        """Scale bytes by the mean and standard deviation of each channel."""
        return (inputs / 255 - self.mean) / self.std


class TextClassification(FromFiles):
    """Sentences: `label TAB words` in each line of train.tsv, and of test.tsv where there is one.

    A sample is the numbers of its words, shape (T,). Words are split at spaces, in small letters, and digits become 0;
    short sentences are padded with 0 and long ones cut.

    Args:
        root: Folder of the two files, or one file.
        length: `T`, words of a sentence.
        vocabulary: The most frequent words of the sentences trained on that are known. All others are one word.
        batch_size: Samples in a training batch.
        val_fraction: Share of the training set held out, in (0, 1).
        split_seed: Of the choice of the samples held out, the same for every run that is compared.
        train_fraction: Share of what is not held out to train on, in (0, 1].
        num_workers: Processes that read.

    Attributes:
        shape: (T, numbers that stand for words).

    """

    suffix = ".tsv"

    def __init__(
        self,
        root: str = "data",
        length: int = 40,
        vocabulary: int = 5000,
        batch_size: int = 50,
        val_fraction: float = 0.25,
        split_seed: int = 0,
        train_fraction: float = 1.0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(root, batch_size, val_fraction, split_seed, train_fraction, num_workers)
        self.length = length
        self.vocabulary = vocabulary
        self.shape = (length, vocabulary + UNKNOWN + 1)
        # By word of the training set. Those that only the test set has are unknown.
        self._numbers: dict[str, int] = {}

    def read(self, place: Path) -> Read:
        """Number the words: (N, T), in the order in which they are met."""
        # Not splitlines: it also splits at characters that sentences contain, such as U+0085.
        lines = [line.split("\t", 1) for line in place.read_text(ENCODING).split("\n") if line.strip()]
        if short := next((line for line in lines if len(line) != 2), None):
            raise ValueError(
                f"{place} has the line {short[0]!r}. Each line is `label TAB words`: put a tab after the label."
            )
        ids = np.full((len(lines), self.length), PADDING)
        for row, (_, text) in zip(ids, lines, strict=True):
            words = "".join("0" if each.isdigit() else each for each in text.lower()).split()[: self.length]
            row[: len(words)] = [self._numbers.setdefault(word, len(self._numbers) + UNKNOWN + 1) for word in words]
        return ids, [label for label, _ in lines]

    def fit(self, inputs: Tensor) -> None:
        """Find the most frequent words."""
        counts = inputs.flatten().bincount()
        counts[: UNKNOWN + 1] = 0
        frequent = counts.argsort(descending=True, stable=True)[: self.vocabulary]
        frequent = frequent[counts[frequent] > 0]
        self._known = torch.full((max(self._numbers.values(), default=UNKNOWN) + 1,), UNKNOWN)
        self._known[PADDING] = PADDING
        self._known[frequent] = torch.arange(len(frequent)) + UNKNOWN + 1

    def normalise(self, inputs: Tensor) -> Tensor:
        """Number the known words by how frequent they are."""
        beyond = inputs >= len(self._known)
        return self._known[inputs.masked_fill(beyond, UNKNOWN)]


class Tabular(FromFiles):
    """Rows of a table: train.csv, and test.csv where there is one, with a head.

    Columns of numbers get zero mean and unit variance, and their median where a value is missing. Those of words become
    a 0 or 1 for each word.

    Args:
        root: Folder of the two files, or one file.
        target: The column that is to be predicted; the last by default.
        batch_size: Samples in a training batch.
        val_fraction: Share of the training set held out, in (0, 1).
        split_seed: Of the choice of the samples held out, the same for every run that is compared.
        train_fraction: Share of what is not held out to train on, in (0, 1].
        num_workers: Processes that read.

    """

    suffix = ".csv"

    def __init__(
        self,
        root: str = "data",
        target: str | None = None,
        batch_size: int = 32,
        val_fraction: float = 0.25,
        split_seed: int = 0,
        train_fraction: float = 1.0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(root, batch_size, val_fraction, split_seed, train_fraction, num_workers)
        self.target = target

    @property
    def shape(self) -> tuple[int]:  # type: ignore[override]
        """How many numbers stand for a row."""
        return (self._train[0].shape[1],)

    def read(self, place: Path) -> Read:
        """Read numbers (N, F), NaN where one is missing."""
        rows, labels = self._columns(place)
        words = self._words
        numbers = np.array(
            [[_number(cell, place) for at, cell in enumerate(row) if at not in words] for row in rows], dtype=float
        )
        parts = [numbers]
        parts += [np.array([[row[at] == word for word in known] for row in rows]) for at, known in words.items()]
        return np.concatenate(parts, 1).astype(np.float32), labels

    def fit(self, inputs: Tensor) -> None:
        """Learn the median, the mean and the standard deviation of each column."""
        numbers = list(range(inputs.shape[1] - sum(map(len, self._words.values()))))
        steps = make_pipeline(SimpleImputer(strategy="median", keep_empty_features=True), StandardScaler())
        self._scaling = ColumnTransformer([("numbers", steps, numbers)], remainder="passthrough").fit(inputs.numpy())

    def normalise(self, inputs: Tensor) -> Tensor:
        """Fill what is missing, and scale (N, F)."""
        return torch.as_tensor(self._scaling.transform(inputs.numpy()), dtype=torch.float32)

    @cached_property
    def _words(self) -> dict[int, list[str]]:
        """The words of each column that has others than numbers, in the training set."""
        columns = list(zip(*self._columns(self._place("train"))[0], strict=True))
        return {
            at: sorted(set(column))
            for at, column in enumerate(columns)
            if not all(map(_is_number, filter(None, column)))
        }

    @cached_property
    def _head(self) -> list[str]:
        return _table(self._place("train"))[0]

    def _columns(self, place: Path) -> tuple[list[list[str]], list[str]]:
        head, rows = _table(place)
        if head != self._head:
            raise ValueError(
                f"{place} has the columns {', '.join(head)}, but the training set has {', '.join(self._head)}. "
                "Write the same columns in the same order."
            )
        target = head[-1] if self.target is None else self.target
        if target not in head:
            raise ValueError(f"{place} has no column {target!r}. Choose `target` from {', '.join(head)}.")
        at = head.index(target)
        return [[*row[:at], *row[at + 1 :]] for row in rows], [row[at] for row in rows]


class TimeSeries(FromFiles):
    """Time series: train.npz, and test.npz where there is one, with arrays x (N, C, T) and y (N,).

    Each channel gets zero mean and unit variance. NaN, as after the end of a shorter series, becomes 0.

    Args:
        root: Folder of the two files, or one file.
        batch_size: Samples in a training batch.
        val_fraction: Share of the training set held out, in (0, 1).
        split_seed: Of the choice of the samples held out, the same for every run that is compared.
        train_fraction: Share of what is not held out to train on, in (0, 1].
        num_workers: Processes that read.

    """

    suffix = ".npz"

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Channels and length of a series, (C, T)."""
        return tuple(self._train[0].shape[1:])

    def read(self, place: Path) -> Read:
        """Read series (N, C, T)."""
        with np.load(place) as found:
            arrays = dict(found)
        shapes = {name: array.shape for name, array in arrays.items()}
        if not {"x", "y"} <= shapes.keys() or len(shapes["x"]) != 3 or len(arrays["x"]) != len(arrays["y"]):
            raise ValueError(f"{place} has arrays of shapes {shapes}. Save x as (N, C, T), and y as (N,).")
        return arrays["x"].astype(np.float32), [str(label) for label in arrays["y"]]

    def fit(self, inputs: Tensor) -> None:
        """Learn mean and standard deviation of each channel."""
        self.mean = inputs.nanmean((0, 2))[:, None]
        self.std = (inputs - self.mean).square().nanmean((0, 2)).sqrt().clamp(min=1e-6)[:, None]

    def normalise(self, inputs: Tensor) -> Tensor:
        """Scale the channels of (N, C, T)."""
        return ((inputs - self.mean) / self.std).nan_to_num(0.0)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _number(cell: str, place: Path) -> float:
    """Read a number of a table, or NaN where none is written."""
    try:
        return float(cell or "nan")
    except ValueError as error:
        raise ValueError(
            f"{place} has {cell!r} in a column that has only numbers in the training set. "
            "Write a number, or leave the cell empty."
        ) from error


def _table(place: Path) -> tuple[list[str], list[list[str]]]:
    """Read the head and the rows of a csv file, without empty lines."""
    with place.open(newline="", encoding=ENCODING) as opened:
        head, *rows = [row for row in csv.reader(opened) if row] or [[]]
    if not rows:
        raise ValueError(f"{place} has no rows. Write the names of the columns, and then a row for each sample.")
    if other := next((row for row in rows if len(row) != len(head)), None):
        raise ValueError(
            f"{place} has {len(head)} columns, but the row {','.join(other)!r} has {len(other)} cells. "
            "Leave a cell empty if its value is missing."
        )
    return head, rows
