"""Monte Carlo averages over dropout masks, and distillation into a student that predicts them in one pass."""

from lightning_ydrop.uncertainty.distillation import DropoutDistillation
from lightning_ydrop.uncertainty.divergence import MonteCarloDivergence
from lightning_ydrop.uncertainty.head import StudentWithUncertainty
from lightning_ydrop.uncertainty.monte_carlo import monte_carlo
from lightning_ydrop.uncertainty.results import MonteCarlo, MonteCarloMultilabel, MonteCarloRegression

__all__ = [
    "DropoutDistillation",
    "MonteCarlo",
    "MonteCarloDivergence",
    "MonteCarloMultilabel",
    "MonteCarloRegression",
    "StudentWithUncertainty",
    "monte_carlo",
]
