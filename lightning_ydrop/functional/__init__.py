"""The mathematics of the methods: tensors in, tensors out, no state and no modules.

What a class of this package computes, one of these functions computes too:

- phase 1 of Y-Drop: `path_points`, `path_conductance`, `sum_to_units`,
- its rates: `draw_rates`, `strong_count`, `bucket_probabilities`,
- dropout: `vanilla_dropout`, `unit_dropout` (for `ConductanceDropout`), `jumpout` (for `Jumpout`), `make_stencil`,
  `stencil_dropout`, `token_dropout` (for `PatternDropout`),
- what a trained network shows: `top_share`, `gini`, `conductance_spread` (for `ConductanceSpread`),
  `removal_threshold` (for `RemovalCurve`),
- averages over masks: `predictive_entropy` (for `MonteCarlo`), `bernoulli_entropy` (for `MonteCarloMultilabel`),
  `monte_carlo_divergence` (for `MonteCarloDivergence`).
"""

from lightning_ydrop.functional.attribution import conductance_spread, gini, path_conductance, sum_to_units, top_share
from lightning_ydrop.functional.masking import jumpout, unit_dropout, vanilla_dropout
from lightning_ydrop.functional.path import path_points
from lightning_ydrop.functional.rates import bucket_probabilities, draw_rates, strong_count
from lightning_ydrop.functional.removal import removal_threshold
from lightning_ydrop.functional.runs import token_dropout
from lightning_ydrop.functional.stencils import make_stencil, stencil_dropout
from lightning_ydrop.functional.uncertainty import bernoulli_entropy, monte_carlo_divergence, predictive_entropy

__all__ = [
    "bernoulli_entropy",
    "bucket_probabilities",
    "conductance_spread",
    "draw_rates",
    "gini",
    "jumpout",
    "make_stencil",
    "monte_carlo_divergence",
    "path_conductance",
    "path_points",
    "predictive_entropy",
    "removal_threshold",
    "stencil_dropout",
    "strong_count",
    "sum_to_units",
    "token_dropout",
    "top_share",
    "unit_dropout",
    "vanilla_dropout",
]
