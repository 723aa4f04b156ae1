"""When Y-Drop takes over from vanilla dropout, and how."""

from dataclasses import dataclass
from typing import Literal, get_args

from lightning.pytorch import Trainer

from lightning_ydrop.errors import ConfigurationError, check_choice, check_count, describe

Transition = Literal["step", "linear"]
DEFAULT_EPOCHS = 2


@dataclass(frozen=True)
class Schedule:
    """Annealing, and the way out of it.

    It depends on counters alone that a Trainer saves and that all ranks share: a resumed run goes on alike, and no rank
    waits for another that skips phase 1.

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

    def outlasts(self, trainer: Trainer) -> bool:
        """Tell whether training is to end before Y-Drop takes over."""
        if trainer.fast_dev_run or self.transition == "linear":  # type: ignore[attr-defined]
            return False
        if self.annealing_steps is not None:
            return 0 <= trainer.max_steps <= self.annealing_steps
        return trainer.max_epochs is not None and 0 <= trainer.max_epochs <= self._epochs

    def share(self, trainer: Trainer, batch_idx: int) -> float:
        """Tell how far to go from vanilla dropout, at 0, to Y-Drop, at 1."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return 1.0  # a trial run has to try what comes after annealing
        if self.annealing_steps is not None:
            length, done = self.annealing_steps, float(trainer.global_step)
        else:
            length = self._epochs
            # Of an endless epoch no batch is any part: it never ends annealing.
            done = trainer.current_epoch + batch_idx / trainer.num_training_batches
        if done >= length:
            return 1.0
        return done / length if self.transition == "linear" else 0.0

    @property
    def _epochs(self) -> int:
        return DEFAULT_EPOCHS if self.annealing_epochs is None else self.annealing_epochs
