"""The networks of the examples: those of Y-Drop's paper, and others that people train on little data."""

from examples.networks.dropouts import Dropout
from examples.networks.perceptrons import Classifier
from examples.networks.residual import ResidualClassifier, ResNet18, WideResNet
from examples.networks.series import SeriesFCN
from examples.networks.text import TextCNN, TextLSTM, TextTransformer
from examples.networks.training import AdamClassifier, ClassifierBase

__all__ = [
    "AdamClassifier",
    "Classifier",
    "ClassifierBase",
    "Dropout",
    "ResNet18",
    "ResidualClassifier",
    "SeriesFCN",
    "TextCNN",
    "TextLSTM",
    "TextTransformer",
    "WideResNet",
]
