"""scikit-learn's digits, which ship inside the package, and the five data sets of the paper, through torchvision.

Splits, normalisation and augmentation are the paper's (sec. 5, arXiv 2409.09088).
"""

from abc import abstractmethod
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torchvision import datasets
from torchvision.transforms import v2

from examples.data.memory import InMemory, Labelled


class Digits(InMemory):
    """The 1,797 handwritten digits of 8x8 pixels that scikit-learn ships; a fifth of them is the test set."""

    shape = (1, 8, 8)
    num_classes = 10

    def load(self, train: bool) -> Labelled:
        """Read the digits, scaled to zero mean and unit variance over all pixels of the training set."""
        images, labels = load_digits(return_X_y=True)
        x_train, x_test, y_train, y_test = train_test_split(images, labels, test_size=0.2, random_state=0)
        x, y = (x_train, y_train) if train else (x_test, y_test)
        scaled = torch.as_tensor((x - x_train.mean()) / x_train.std(), dtype=torch.float32)
        return scaled.view(-1, *self.shape), torch.as_tensor(y)


class FromTorchvision(InMemory):
    """One of the paper's data sets, as bytes in memory. What is missing is downloaded, unless `download` is False.

    Args:
        root: Folder that holds the data set, as torchvision lays it out.
        batch_size: Samples in a training batch; the paper's by default.
        val_fraction: Share of the training set held out, in (0, 1); the paper's by default.
        split_seed: Of the choice of the samples held out, the same for every run that is compared.
        train_fraction: Share of what is not held out to train on, in (0, 1].
        num_workers: Processes that read; worth it where images are augmented.
        download: Whether to download what is missing.

    Attributes:
        mean: Of each channel over the training set, where pixels lie in [0, 1].
        std: Standard deviation of each channel.

    """

    num_classes = 10
    mean: tuple[float, ...]
    std: tuple[float, ...]
    batch_size = 64
    val_fraction = 0.25

    def __init__(
        self,
        root: str = "data",
        batch_size: int | None = None,
        val_fraction: float | None = None,
        split_seed: int = 0,
        train_fraction: float = 1.0,
        num_workers: int = 0,
        download: bool = True,
    ) -> None:
        super().__init__(
            type(self).batch_size if batch_size is None else batch_size,
            type(self).val_fraction if val_fraction is None else val_fraction,
            split_seed,
            train_fraction,
            num_workers,
        )
        self.root = root
        self.download = download

    def prepare_data(self) -> None:
        """Download what is missing, in one process at a time."""
        Path(self.root).mkdir(parents=True, exist_ok=True)
        with FileLock(Path(self.root) / f"{type(self).__name__}.lock"):
            for train in (True, False):
                self.read(train, download=self.download)

    def load(self, train: bool) -> Labelled:
        """Read what is there by now."""
        return self.read(train, download=False)

    @abstractmethod
    def read(self, train: bool, download: bool) -> Labelled:
        """Read the images as bytes (N, C, H, W), and the labels (N,)."""

    def normalise(self, inputs: Tensor) -> Tensor:
        """Scale bytes by the mean and standard deviation of each channel."""
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return (inputs / 255 - mean) / std


class MNISTDigits(FromTorchvision):
    """The 70,000 handwritten digits of MNIST."""

    shape = (1, 28, 28)
    mean, std = (0.1307,), (0.3081,)

    def read(self, train: bool, download: bool) -> Labelled:
        """Read the images as bytes (N, 1, 28, 28), and the labels (N,)."""
        found = datasets.MNIST(self.root, train=train, download=download)
        return found.data.unsqueeze(1), found.targets


class CIFAR10Images(FromTorchvision):
    """The 60,000 photographs of CIFAR-10, flipped and cropped for training."""

    shape = (3, 32, 32)
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    augment = v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()])

    def read(self, train: bool, download: bool) -> Labelled:
        """Read the images as bytes (N, 3, 32, 32), and the labels (N,)."""
        found = datasets.CIFAR10(self.root, train=train, download=download)
        return torch.from_numpy(found.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(found.targets)


class CIFAR100Images(FromTorchvision):
    """The 60,000 photographs of CIFAR-100, flipped and cropped for training."""

    shape = (3, 32, 32)
    num_classes = 100
    mean, std = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
    augment = CIFAR10Images.augment

    def read(self, train: bool, download: bool) -> Labelled:
        """Read the images as bytes (N, 3, 32, 32), and the labels (N,)."""
        found = datasets.CIFAR100(self.root, train=train, download=download)
        return torch.from_numpy(found.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(found.targets)


class SVHNImages(FromTorchvision):
    """The house numbers of SVHN: 604,388 for training, which are torchvision's "train" and "extra", and 26,032."""

    shape = (3, 32, 32)
    mean, std = (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)
    batch_size = 32

    def read(self, train: bool, download: bool) -> Labelled:
        """Read the images as bytes (N, 3, 32, 32), and the labels (N,)."""
        splits = ("train", "extra") if train else ("test",)
        found = [datasets.SVHN(self.root, split=split, download=download) for split in splits]
        images = np.concatenate([part.data for part in found])
        return torch.from_numpy(images), torch.from_numpy(np.concatenate([part.labels for part in found]))


class STL10Images(FromTorchvision):
    """The 13,000 labelled photographs of STL-10, flipped and cropped for training."""

    shape = (3, 96, 96)
    mean, std = (0.4467, 0.4398, 0.4066), (0.2603, 0.2566, 0.2713)
    batch_size = 32
    val_fraction = 0.1
    augment = v2.Compose([v2.RandomCrop(96, padding=4), v2.RandomHorizontalFlip()])

    def read(self, train: bool, download: bool) -> Labelled:
        """Read the images as bytes (N, 3, 96, 96), and the labels (N,)."""
        found = datasets.STL10(self.root, split="train" if train else "test", download=download)
        return torch.from_numpy(found.data), torch.from_numpy(np.asarray(found.labels, dtype=np.int64))
