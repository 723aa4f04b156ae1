"""Data in memory, with part of the training set held out."""

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset, random_split

Labelled = tuple[Tensor, Tensor]


class Samples(Dataset[Labelled]):
    """Samples in memory, made ready for a network when they are read.

    Args:
        inputs: Shape (N, *).
        labels: Shape (N,).
        normalise: From some of the inputs to what the network takes.
        augment: What is done to each input before, with a new draw each time; nothing by default.

    """

    def __init__(
        self,
        inputs: Tensor,
        labels: Tensor,
        normalise: Callable[[Tensor], Tensor],
        augment: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.inputs = inputs
        self.labels = labels
        self.normalise = normalise
        self.augment = augment

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, place: int) -> Labelled:
        return self.__getitems__([place])[0]

    def __getitems__(self, places: list[int]) -> list[Labelled]:
        """Read a batch at once, as DataLoader does where it can."""
        inputs = self.inputs[places]
        if self.augment is not None:
            inputs = torch.stack([self.augment(each) for each in inputs])
        return list(zip(self.normalise(inputs), self.labels[places], strict=True))


class InMemory(L.LightningDataModule):
    """Labelled samples in memory, with part of the training set held out for validation.

    Args:
        batch_size: Samples in a training batch.
        val_fraction: Share of the training set held out, in (0, 1).
        split_seed: Of the choice of the samples held out, the same for every run that is compared.
        train_fraction: Share of what is not held out to train on, in (0, 1]: how much does it matter to have data?
        num_workers: Processes that read; worth it where images are augmented.

    Attributes:
        shape: Of a sample, as the network takes it.
        num_classes: Of labels.
        augment: What is done to each training sample.

    """

    shape: tuple[int, ...]
    num_classes: int
    augment: Callable[[Tensor], Tensor] | None = None

    def __init__(
        self,
        batch_size: int = 64,
        val_fraction: float = 0.25,
        split_seed: int = 0,
        train_fraction: float = 1.0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.val_fraction = val_fraction
        self.split_seed = split_seed
        self.train_fraction = train_fraction
        self.num_workers = num_workers

    @abstractmethod
    def load(self, train: bool) -> Labelled:
        """Read the inputs (N, *) and labels (N,) of the training or the test set."""

    def fit(self, inputs: Tensor) -> None:
        """Learn how to normalise from the inputs that are trained on."""

    def normalise(self, inputs: Tensor) -> Tensor:
        """Make some inputs ready for the network, such as to about zero mean and unit variance."""
        return inputs

    def setup(self, stage: str) -> None:
        """Read the data and split off the validation set."""
        inputs, labels = self.load(train=True)
        split = [1 - self.val_fraction, self.val_fraction]
        ours, held_out = random_split(TensorDataset(labels), split, torch.Generator().manual_seed(self.split_seed))
        used = list(ours.indices)[: math.ceil(self.train_fraction * len(ours))]
        self.fit(inputs[used])
        self.train = Samples(inputs[used], labels[used], self.normalise, self.augment)
        self.val = Samples(inputs[held_out.indices], labels[held_out.indices], self.normalise)
        self.test = Samples(*self.load(train=False), self.normalise)

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled training batches."""
        return DataLoader(self.train, self.batch_size, shuffle=True, num_workers=self.num_workers)

    def val_dataloader(self) -> DataLoader[Any]:
        """Validation batches."""
        return DataLoader(self.val, 1000)

    def test_dataloader(self) -> DataLoader[Any]:
        """Test batches."""
        return DataLoader(self.test, 1000)
