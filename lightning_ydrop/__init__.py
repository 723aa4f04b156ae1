"""Y-Drop for PyTorch Lightning: dropout that drops the most important units more often (arXiv 2409.09088)."""

from lightning_ydrop.callbacks import (
    ConductanceMonitor,
    DropoutSchedule,
    ExactResume,
    MonteCarloCallback,
    PatternCallback,
    YDropCallback,
)
from lightning_ydrop.errors import ConfigurationError, NoEffectWarning
from lightning_ydrop.functional.rates import Buckets, HalfNormalRate
from lightning_ydrop.importance.attribution import layer_conductance
from lightning_ydrop.importance.engine import YDrop
from lightning_ydrop.importance.measures import (
    CaptumMeasure,
    Conductance,
    Inverted,
    Measure,
    RandomImportance,
    Shuffled,
)
from lightning_ydrop.importance.neuron import neuron_conductance
from lightning_ydrop.importance.objectives import NegativeLoss, Objective, OutputSum, PredictedLogit, TargetLogit
from lightning_ydrop.importance.request import Request
from lightning_ydrop.importance.tasks import NegativeSquaredError, Reconstruction, SignedLogit
from lightning_ydrop.layers import (
    ConductanceDropout,
    ConversionReport,
    ConvPattern,
    Jumpout,
    PatternDropout,
    TokenPattern,
    convert_dropout,
    restore_dropout,
)
from lightning_ydrop.models.adapters import Adapter, IndexAdapter, KeyAdapter
from lightning_ydrop.search.places import apply_patterns, find_places, remove_patterns
from lightning_ydrop.uncertainty import DropoutDistillation, monte_carlo

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "Buckets",
    "CaptumMeasure",
    "Conductance",
    "ConductanceDropout",
    "ConductanceMonitor",
    "ConfigurationError",
    "ConvPattern",
    "ConversionReport",
    "DropoutDistillation",
    "DropoutSchedule",
    "ExactResume",
    "HalfNormalRate",
    "IndexAdapter",
    "Inverted",
    "Jumpout",
    "KeyAdapter",
    "Measure",
    "MonteCarloCallback",
    "NegativeLoss",
    "NegativeSquaredError",
    "NoEffectWarning",
    "Objective",
    "OutputSum",
    "PatternCallback",
    "PatternDropout",
    "PredictedLogit",
    "RandomImportance",
    "Reconstruction",
    "Request",
    "Shuffled",
    "SignedLogit",
    "TargetLogit",
    "TokenPattern",
    "YDrop",
    "YDropCallback",
    "apply_patterns",
    "convert_dropout",
    "find_places",
    "layer_conductance",
    "monte_carlo",
    "neuron_conductance",
    "remove_patterns",
    "restore_dropout",
]
