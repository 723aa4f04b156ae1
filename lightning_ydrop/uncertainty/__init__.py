"""Monte Carlo averages over dropout masks, and distillation into a student that predicts them in one pass."""

from lightning_ydrop.uncertainty.distillation import DropoutDistillation
from lightning_ydrop.uncertainty.monte_carlo import MonteCarlo, MonteCarloDivergence, monte_carlo

__all__ = ["DropoutDistillation", "MonteCarlo", "MonteCarloDivergence", "monte_carlo"]
