"""When Y-Drop takes over from vanilla dropout, and how."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from lightning_ydrop.checks import check_choice, check_count
from lightning_ydrop.errors import ConfigurationError, describe

Transition = Literal["step", "linear"]
DEFAULT_EPOCHS = 2


@dataclass(frozen=True)
class Schedule:
    """Annealing, and the way out of it.

    It depends only on counters that the Trainer saves and all ranks share. So a resumed run goes on in the same way,
    and no rank waits for another that skips phase 1.

    Args:
        annealing_epochs: Epochs of vanilla dropout, at least 0; 2 where `annealing_steps` is not given either.
        annealing_steps: Optimiser steps of vanilla dropout instead, at least 0.
        transition: "step" from vanilla dropout to Y-Drop at the end of annealing, or "linear" over it.

    Raises:
        ConfigurationError: If an argument is out of range.

    """

    annealing_epochs: int | None = None
    annealing_steps: int | None = None
    transition: Transition = "step"

    def __post_init__(self) -> None:
        if self.annealing_epochs is not None and self.annealing_steps is not None:
            raise ConfigurationError(
                f"YDropCallback(annealing_epochs={describe(self.annealing_epochs)}, "
                f"annealing_steps={describe(self.annealing_steps)}) was given.",
                "Annealing is counted in epochs or in optimiser steps.",
                "Leave one of the two out.",
            )
        if self.annealing_epochs is not None:
            check_count("YDropCallback", "annealing_epochs", self.annealing_epochs, minimum=0, example=2)
        if self.annealing_steps is not None:
            check_count("YDropCallback", "annealing_steps", self.annealing_steps, minimum=0, example=1000)
        check_choice("YDropCallback", "transition", self.transition, get_args(Transition))

    def outlasts(self, trainer: Trainer) -> tuple[str, str] | None:
        """Tell whether training is sure to end before Y-Drop takes over.

        Returns:
            How long the two take, if so.

        """
        if trainer.fast_dev_run or self.transition == "linear":  # type: ignore[attr-defined]
            return None
        epochs = math.inf if trainer.max_epochs in (None, -1) else trainer.max_epochs
        steps = math.inf if trainer.max_steps == -1 else trainer.max_steps
        per_epoch = _steps_of_an_epoch(trainer)
        if self.annealing_steps is not None:
            shortest = min(steps, epochs * per_epoch)
            annealing = f"{self.annealing_steps} optimiser step(s)"
            return (f"{shortest} optimiser step(s)", annealing) if shortest <= self.annealing_steps else None
        if epochs <= self._epochs:
            return f"{epochs} epoch(s)", f"{self._epochs} epoch(s)"
        # Where an epoch has no known end, nothing is known of steps either.
        if per_epoch < math.inf and steps <= self._epochs * per_epoch:
            return f"{steps} optimiser step(s)", f"{self._epochs * per_epoch} optimiser step(s)"
        return None

    def announcement(self, trainer: Trainer, progress: float) -> str:
        """Say when rates change, in the first batch of a fit.

        Args:
            trainer: The Trainer.
            progress: How far annealing is.

        """
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return "fast_dev_run skips annealing:"
        if progress == 1.0 and trainer.global_step > 0:
            return "Y-Drop goes on after its annealing."
        if self.annealing_steps is not None:
            length, unit = self.annealing_steps, "optimiser step"
        else:
            length, unit = self._epochs, "epoch"
        if length == 0:
            return "From the first batch on,"
        if self.transition == "linear":
            return f"Over the first {length} {unit}(s), in a line,"
        return f"After {length} {unit}(s) of ordinary dropout,"

    @property
    def changes_at_once(self) -> bool:
        """Whether rates jump at the end of annealing."""
        length = self._epochs if self.annealing_steps is None else self.annealing_steps
        return self.transition == "step" and length > 0

    def progress(self, trainer: Trainer, batch_idx: int) -> float:
        """Tell how far to go from vanilla dropout, at 0, to Y-Drop, at 1."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return 1.0  # a trial run has to try what comes after annealing
        if self.annealing_steps is not None:
            length, done = self.annealing_steps, float(trainer.global_step)
        else:
            length = self._epochs
            # An endless epoch has no fractions, so annealing never ends in it.
            done = trainer.current_epoch + batch_idx / trainer.num_training_batches
        if done >= length:
            return 1.0
        return done / length if self.transition == "linear" else 0.0

    @property
    def _epochs(self) -> int:
        return DEFAULT_EPOCHS if self.annealing_epochs is None else self.annealing_epochs


def _steps_of_an_epoch(trainer: Trainer) -> float:
    """Count the optimiser steps of an epoch: infinitely many where that is not known beforehand."""
    scheduled = any(isinstance(callback, GradientAccumulationScheduler) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    if scheduled or not trainer.lightning_module.automatic_optimization or trainer.num_training_batches == math.inf:
        return math.inf
    return math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
