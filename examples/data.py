"""Data sets: scikit-learn's digits, which ship inside the package, and MNIST."""

import math
from abc import abstractmethod
from typing import Any

import lightning as L
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset, random_split
from torchvision.datasets import MNIST

Samples = Dataset[tuple[Tensor, ...]]


class ImagesInMemory(L.LightningDataModule):
    """Images in memory, with part of the training set held out for validation.

    Args:
        batch_size: Samples in a training batch.
        val_fraction: Share of the training set held out, in (0, 1).
        split_seed: Of the choice of the samples held out, the same for every run that is compared.
        train_fraction: Share of what is not held out to train on, in (0, 1]: how much does it matter to have data?

    """

    num_features: int

    def __init__(
        self, batch_size: int = 64, val_fraction: float = 0.25, split_seed: int = 0, train_fraction: float = 1.0
    ) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.val_fraction = val_fraction
        self.split_seed = split_seed
        self.train_fraction = train_fraction

    @abstractmethod
    def load(self) -> tuple[TensorDataset, TensorDataset]:
        """Read the training and the test set."""

    def setup(self, stage: str) -> None:
        """Read the data and split off the validation set."""
        train, self.test = self.load()
        split = [1 - self.val_fraction, self.val_fraction]
        ours, self.val = random_split(train, split, torch.Generator().manual_seed(self.split_seed))
        self.train = Subset(train, ours.indices[: math.ceil(self.train_fraction * len(ours))])

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled training batches."""
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """Validation batches."""
        return DataLoader(self.val, 1000)

    def test_dataloader(self) -> DataLoader[Any]:
        """Test batches."""
        return DataLoader(self.test, 1000)


class Digits(ImagesInMemory):
    """The 1,797 handwritten digits of 8x8 pixels that scikit-learn ships; a fifth of them is the test set."""

    num_features = 64

    def load(self) -> tuple[TensorDataset, TensorDataset]:
        """Read the digits, scaled to zero mean and unit variance over all pixels of the training set."""
        images, labels = load_digits(return_X_y=True)
        x_train, x_test, y_train, y_test = train_test_split(images, labels, test_size=0.2, random_state=0)
        mean, std = x_train.mean(), x_train.std()
        train, test = (
            TensorDataset(torch.as_tensor((x - mean) / std, dtype=torch.float32), torch.as_tensor(y))
            for x, y in ((x_train, y_train), (x_test, y_test))
        )
        return train, test


class MNISTDigits(ImagesInMemory):
    """The 70,000 handwritten digits of MNIST.

    Args:
        root: Folder that holds MNIST/raw; what is missing is downloaded.
        batch_size: Samples in a training batch.
        val_fraction: Share of the training set held out, in (0, 1).
        split_seed: Of the choice of the samples held out, the same for every run that is compared.
        train_fraction: Share of what is not held out to train on, in (0, 1].

    """

    num_features = 784

    def __init__(
        self,
        root: str = "data",
        batch_size: int = 64,
        val_fraction: float = 0.25,
        split_seed: int = 0,
        train_fraction: float = 1.0,
    ) -> None:
        super().__init__(batch_size, val_fraction, split_seed, train_fraction)
        self.root = root

    def prepare_data(self) -> None:
        """Download what is missing."""
        MNIST(self.root, download=True)

    def load(self) -> tuple[TensorDataset, TensorDataset]:
        """Read MNIST, normalised by the usual mean and standard deviation of its pixels."""
        train, test = (self._normalised(MNIST(self.root, train=train)) for train in (True, False))
        return train, test

    @staticmethod
    def _normalised(mnist: MNIST) -> TensorDataset:
        return TensorDataset((mnist.data / 255 - 0.1307) / 0.3081, mnist.targets)
