"""What a trained network shows: how importance is spread over its units, and how it does without some of them."""

from lightning_ydrop.analysis.pruning import prune_units
from lightning_ydrop.analysis.removal import RemovalCurve, removal_curve
from lightning_ydrop.analysis.shrinking import shrink_units
from lightning_ydrop.analysis.spread import ConductanceSpread, mean_conductance

__all__ = [
    "ConductanceSpread",
    "RemovalCurve",
    "mean_conductance",
    "prune_units",
    "removal_curve",
    "shrink_units",
]
