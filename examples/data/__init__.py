"""Data modules: those of the paper's data sets, and those for your own files."""

from examples.data.files import ImageFolderData, Tabular, TextClassification, TimeSeries
from examples.data.images import (
    CIFAR10Images,
    CIFAR100Images,
    Digits,
    FromTorchvision,
    MNISTDigits,
    STL10Images,
    SVHNImages,
)
from examples.data.memory import InMemory, Samples

__all__ = [
    "CIFAR10Images",
    "CIFAR100Images",
    "Digits",
    "FromTorchvision",
    "ImageFolderData",
    "InMemory",
    "MNISTDigits",
    "STL10Images",
    "SVHNImages",
    "Samples",
    "Tabular",
    "TextClassification",
    "TimeSeries",
]
