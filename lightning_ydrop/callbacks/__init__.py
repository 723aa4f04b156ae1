"""The Lightning face: hooks of a few lines over what stands below."""

from lightning_ydrop.callbacks.dropout_schedule import DropoutSchedule
from lightning_ydrop.callbacks.exact_resume import ExactResume
from lightning_ydrop.callbacks.monitor import ConductanceMonitor
from lightning_ydrop.callbacks.monte_carlo import MonteCarloCallback
from lightning_ydrop.callbacks.patterns import PatternCallback
from lightning_ydrop.callbacks.ydrop import YDropCallback

__all__ = [
    "ConductanceMonitor",
    "DropoutSchedule",
    "ExactResume",
    "MonteCarloCallback",
    "PatternCallback",
    "YDropCallback",
]
