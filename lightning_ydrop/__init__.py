"""Y-Drop for PyTorch Lightning: dropout that drops the most important units more often (arXiv 2409.09088)."""

from lightning_ydrop.callbacks import YDropCallback
from lightning_ydrop.distillation import DropoutDistillation, monte_carlo
from lightning_ydrop.errors import ConfigurationError, NoEffectWarning
from lightning_ydrop.functional.rates import Buckets, HalfNormalRate
from lightning_ydrop.layers import ConductanceDropout, ConversionReport, Jumpout, convert_dropout, restore_dropout
from lightning_ydrop.models.adapters import Adapter, IndexAdapter, KeyAdapter
from lightning_ydrop.phase1.attribution import layer_conductance
from lightning_ydrop.phase1.context import Phase1
from lightning_ydrop.phase1.engine import YDrop
from lightning_ydrop.phase1.measures import CaptumMeasure, Conductance, Inverted, Measure, RandomImportance, Shuffled
from lightning_ydrop.phase1.objectives import NegativeLoss, Objective, OutputSum, PredictedLogit, TargetLogit

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "Buckets",
    "CaptumMeasure",
    "Conductance",
    "ConductanceDropout",
    "ConfigurationError",
    "ConversionReport",
    "DropoutDistillation",
    "HalfNormalRate",
    "IndexAdapter",
    "Inverted",
    "Jumpout",
    "KeyAdapter",
    "Measure",
    "NegativeLoss",
    "NoEffectWarning",
    "Objective",
    "OutputSum",
    "Phase1",
    "PredictedLogit",
    "RandomImportance",
    "Shuffled",
    "TargetLogit",
    "YDrop",
    "YDropCallback",
    "convert_dropout",
    "layer_conductance",
    "monte_carlo",
    "restore_dropout",
]
