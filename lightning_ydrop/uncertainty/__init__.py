"""What a network with dropout says on average over its masks, and how to train a student to say it in one pass."""

from lightning_ydrop.uncertainty.distillation import DropoutDistillation
from lightning_ydrop.uncertainty.monte_carlo import MonteCarlo, MonteCarloDivergence, monte_carlo

__all__ = ["DropoutDistillation", "MonteCarlo", "MonteCarloDivergence", "monte_carlo"]
