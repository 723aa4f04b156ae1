"""Y-Drop for PyTorch Lightning: dropout that drops the units that matter most more often (arXiv 2409.09088)."""

from lightning_ydrop.callbacks import YDropCallback
from lightning_ydrop.errors import ConfigurationError, NoEffectWarning
from lightning_ydrop.functional.rates import Buckets, HalfNormalRate
from lightning_ydrop.layers import ConductanceDropout
from lightning_ydrop.phase1.attribution import layer_conductance
from lightning_ydrop.phase1.engine import YDrop
from lightning_ydrop.phase1.measures import CaptumMeasure, Conductance, Inverted, Measure, Phase1, RandomImportance

__version__ = "0.1.0"

__all__ = [
    "Buckets",
    "CaptumMeasure",
    "Conductance",
    "ConductanceDropout",
    "ConfigurationError",
    "HalfNormalRate",
    "Inverted",
    "Measure",
    "NoEffectWarning",
    "Phase1",
    "RandomImportance",
    "YDrop",
    "YDropCallback",
    "layer_conductance",
]
