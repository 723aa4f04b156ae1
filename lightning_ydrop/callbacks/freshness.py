"""Whether units are ranked often enough."""

import math

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn

# With fewer rankings in an epoch nothing is left of the gain over dropout: docs/results/every_n_batches.
FEWEST_RANKINGS = 2


def warn_of_stale_rankings(trainer: Trainer, every_n_batches: int) -> None:
    """Warn where phase 1 runs so seldom that its rankings are out of date.

    Args:
        trainer: The Trainer of a fit that begins.
        every_n_batches: Phase 1 runs on every nth batch.

    """
    batches = trainer.num_training_batches
    if every_n_batches == 1 or batches == math.inf or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    rankings = batches / every_n_batches
    if rankings < FEWEST_RANKINGS:
        rank_zero_warn(
            f"With every_n_batches={every_n_batches} YDropCallback ranks units {rankings:.2g} time(s) in an epoch of "
            f"{batches} batches. With fewer than {FEWEST_RANKINGS} nothing was left of its gain over nn.Dropout in our "
            f"experiments. Pass every_n_batches={max(1, int(batches // 4))} or less.",
        )
