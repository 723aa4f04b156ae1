"""How masks are averaged, checked and grouped: `monte_carlo` and `MonteCarloCallback` take the same settings."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from lightning_ydrop import progress
from lightning_ydrop.checks import check_count, check_flag
from lightning_ydrop.uncertainty.averaging import average_over_masks
from lightning_ydrop.uncertainty.draws import MaskSharing
from lightning_ydrop.uncertainty.functional_calls import dropping_in_calls, warn_of_calls_left_out
from lightning_ydrop.uncertainty.passes import Subject
from lightning_ydrop.uncertainty.tasks import Average, Averaged, task_of


@dataclass(frozen=True)
class Settings:
    """The arguments that the two have in common, as `monte_carlo` explains them, and whose they are."""

    owner: str
    task: Averaged
    batch_dim: int
    num_samples: int
    return_samples: bool
    shared_masks: bool
    max_rows: int | None
    progress_bar: bool
    functional: bool

    def average(
        self,
        subject: Subject,
        generator: torch.Generator | None,
        sharing: MaskSharing | None = None,
        note_output: Callable[[Any, int], None] | None = None,
        bar_of: Callable[[int], Any] | None = None,
    ) -> Average:
        """Average the outputs for a batch.

        Args:
            subject: The model and the batch.
            generator: As for `monte_carlo`.
            sharing: What earlier batches have shown of the model's draws.
            note_output: Gets each output of the model, and for how many rows it is.
            bar_of: Makes a bar of another kind than tqdm's, if one is to show.

        """
        bar_of = bar_of or partial(progress.progress_bar, None, "masks", True)
        sharing = sharing or MaskSharing()
        with dropping_in_calls(self.owner, subject, sharing) if self.functional else nullcontext():
            average = average_over_masks(
                subject,
                self.task,
                self.num_samples,
                max_rows=self.max_rows,
                sharing=sharing,
                shared_masks=self.shared_masks,
                generator=generator,
                return_samples=self.return_samples,
                bar_of=bar_of if self.progress_bar else None,
                note_output=note_output,
            )
        if not self.functional:
            warn_of_calls_left_out(self.owner, subject, sharing)
        return average


def checked_settings(
    owner: str,
    *,
    num_samples: int,
    task: str,
    noise: str | None,
    return_samples: bool,
    shared_masks: bool,
    class_dim: int,
    batch_dim: int,
    max_rows: int | None,
    progress_bar: bool,
    functional: bool,
) -> Settings:
    """Check the arguments, of which NumPy's numbers become Python's.

    Raises:
        ConfigurationError: If one is out of range, or belongs to another task.

    """
    batch_dim = check_count(owner, "batch_dim", batch_dim, minimum=0, example=1)
    return Settings(
        owner,
        task_of(owner, task, class_dim, batch_dim, noise),
        batch_dim,
        check_count(owner, "num_samples", num_samples, minimum=1, example=100),
        check_flag(owner, "return_samples", return_samples),
        check_flag(owner, "shared_masks", shared_masks),
        None if max_rows is None else check_count(owner, "max_rows", max_rows, minimum=1, example=4096),
        check_flag(owner, "progress_bar", progress_bar),
        check_flag(owner, "functional", functional),
    )
