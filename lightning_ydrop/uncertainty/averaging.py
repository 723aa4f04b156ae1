"""Averages over masks: of what a task reads, in one go, with the same masks for all samples where that is wanted."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ydrop import progress
from lightning_ydrop.models.calls import Inputs, arguments_of, signature_of
from lightning_ydrop.models.sharing import without_lost_memory
from lightning_ydrop.uncertainty.draws import MaskSharing
from lightning_ydrop.uncertainty.mixing import check_single_samples, warn_of_mixing
from lightning_ydrop.uncertainty.outputs import Dims
from lightning_ydrop.uncertainty.passes import Subject, batch_size_of, run_masks
from lightning_ydrop.uncertainty.streams import devices_of, draw_seed, seeded, seeds_obeyed
from lightning_ydrop.uncertainty.tasks import Average, Probabilities, Task

Note = Callable[[Any, int], None]
# The fewest masks whose passes tell whether all rows share some draws: one alone, then two at once.
MASKS_TO_COMPARE = 3


def mean_probabilities(
    model: nn.Module,
    inputs: Inputs,
    num_masks: int,
    *,
    temperature: float = 1.0,
    class_dim: int = 1,
    max_rows: int | None = None,
    forward: Callable[..., Any] | None = None,
    sharing: MaskSharing | None = None,
) -> Tensor:
    """Average the softmax of a model's logits, divided by a temperature, over masks: see `monte_carlo`.

    Args:
        model: As for `monte_carlo`.
        inputs: As for `monte_carlo`.
        num_masks: Number of masks, at least 1.
        temperature: What logits are divided by, above 0.
        class_dim: As for `monte_carlo`.
        max_rows: As for `monte_carlo`.
        forward: As for `monte_carlo`.
        sharing: What earlier calls for the same model have learned of its draws. This call learns what is not known,
            and with what is known it saves the first pass, of one mask.

    Returns:
        Shape (B, C, *), float32 or float64.

    """
    subject = subject_of(model, inputs, forward)
    task = Probabilities(Dims(class_dim), temperature)
    return average_over_masks(subject, task, num_masks, max_rows=max_rows, sharing=sharing).means["probabilities"]


def subject_of(
    model: nn.Module,
    inputs: Inputs,
    forward: Callable[..., Any] | None,
    batch_dim: int = 0,
    *,
    may_be_empty: bool = False,
) -> Subject:
    """Read the arguments of a call from inputs.

    Args:
        model: As for `monte_carlo`.
        inputs: As for `monte_carlo`.
        forward: As for `monte_carlo`.
        batch_dim: As for `monte_carlo`.
        may_be_empty: Whether a batch of no samples will do.

    Raises:
        ConfigurationError: If forward does not take them, or they hold no samples.

    """
    forward = forward or model
    arguments = arguments_of(signature_of(model, forward), inputs)
    return Subject(
        model, forward, arguments, batch_size_of(inputs, arguments, batch_dim, may_be_empty=may_be_empty), batch_dim
    )


def average_over_masks(
    subject: Subject,
    task: Task,
    num_masks: int,
    *,
    max_rows: int | None = None,
    sharing: MaskSharing | None = None,
    shared_masks: bool = False,
    generator: torch.Generator | None = None,
    return_samples: bool = False,
    bar_of: Callable[[int], Any] | None = None,
    note_output: Callable[[Any, int], None] | None = None,
) -> Average:
    """Average what a task reads from a model's outputs over masks: see `monte_carlo`.

    Args:
        subject: The model and the batch.
        task: What to read.
        num_masks: Number of masks, at least 1.
        max_rows: As for `monte_carlo`.
        sharing: As for `mean_probabilities`.
        shared_masks: As for `monte_carlo`.
        generator: As for `monte_carlo`.
        return_samples: Whether to keep what each mask gives.
        bar_of: Makes a bar, as tqdm's, of that many passes of the batch, or with `shared_masks` of a sample. None: no
            bar.
        note_output: Gets each output of the model, and for how many rows it is.

    """
    sharing = sharing or MaskSharing()
    if subject.batch_size == 0:  # shows nothing of the draws
        shared_masks, sharing = False, MaskSharing(is_known=True, rows_mix=False)
    num_rows = 1 if shared_masks else subject.batch_size  # of a mask in a pass
    at_once = num_masks if max_rows is None else max(1, max_rows // max(1, num_rows))
    accelerators = devices_of(subject.model, subject.tensors()) if shared_masks or generator is not None else []
    num_passed = num_masks * (subject.batch_size if shared_masks else 1)
    bar = progress.progress_bar(None, "", False) if bar_of is None else bar_of(num_passed)

    def note(output: Any, count: int) -> None:
        bar.update(count)
        if note_output is not None:
            note_output(output, count * num_rows)

    def with_masks_of_its_own() -> Average:
        if at_once > 1 and num_masks > 1:
            warn_of_mixing(subject, task.dims, sharing)
        sums = Running(task, subject.batch_size, return_samples, note)
        run_masks(subject, num_masks, at_once, sharing, sums.add)
        return sums.average()

    def with_seed(seed: int) -> Average:
        with seeds_obeyed(subject.model, accelerators):
            if shared_masks:
                check_single_samples(subject, task.dims, sharing)
                return _shared(subject, task, num_masks, at_once, sharing, return_samples, note, seed, accelerators)
            with seeded(seed, accelerators):
                return with_masks_of_its_own()

    with bar:
        if shared_masks or generator is not None:
            return without_lost_memory(partial(with_seed, draw_seed(generator)))
        return without_lost_memory(with_masks_of_its_own)


class Running:
    """Means and variances over masks as passes come in, in one go (Chan, Golub, LeVeque, 1979).

    Sums of squares would lose a variance that is small beside the mean.

    Args:
        task: What to read from an output.
        batch_size: Number of rows with the same mask, B.
        return_samples: Whether to keep what each mask gives.
        note: Also gets each output.

    """

    def __init__(self, task: Task, batch_size: int, return_samples: bool, note: Note) -> None:
        self._task, self._batch_size, self._return_samples, self._note = task, batch_size, return_samples, note
        self._means: dict[str, Tensor] = {}
        self._squares: dict[str, Tensor] = {}
        self._samples: dict[str, list[Tensor]] = {}
        self._num_masks = 0

    def add(self, output: Any, count: int) -> None:
        """Add the output of a pass with `count` masks."""
        self._note(output, count)
        total = self._num_masks + count
        for name, rows in self._task.read(output, count * self._batch_size).items():
            values = rows.reshape(count, self._batch_size, *rows.shape[1:])
            if self._return_samples and name in self._task.sampled:
                self._samples.setdefault(name, []).append(values)
            mean = values.mean(0)
            former = self._means.get(name)
            if name in self._task.varying:
                squares = (values - mean).square().sum(0)
                if former is not None:
                    between = (mean - former).square() * (self._num_masks * count / total)
                    squares = self._squares[name] + squares + between
                self._squares[name] = squares
            self._means[name] = mean if former is None else former.lerp(mean, count / total)
        self._num_masks = total

    def average(self) -> Average:
        """Give what has come in."""
        return Average(
            self._means,
            {name: squares / self._num_masks for name, squares in self._squares.items()},
            {name: torch.cat(values) for name, values in self._samples.items()},
            self._num_masks,
        )


def _shared(
    subject: Subject,
    task: Task,
    num_masks: int,
    at_once: int,
    sharing: MaskSharing,
    return_samples: bool,
    note: Note,
    seed: int,
    accelerators: list[torch.device],
) -> Average:
    """Pass each sample alone, with the random streams of the first: layers draw the same for each.

    That holds for every way to draw: torch's functions, parametrizations, recurrent layers, Python and NumPy.
    """
    with seeded(seed, accelerators):
        if not sharing.is_known and num_masks >= MASKS_TO_COMPARE and at_once > 1:
            # Before the first sample: what it learns on the way changes how many masks pass at once, and so the masks.
            run_masks(subject, MASKS_TO_COMPARE, 2, sharing, lambda output, count: None, rows=slice(1))
    while True:
        averages = []
        try:
            for row in range(subject.batch_size):
                sums = Running(task, 1, return_samples, note)
                with seeded(seed, accelerators):
                    rows = slice(row, row + 1)
                    run_masks(subject, num_masks, at_once, sharing, sums.add, rows=rows, may_halve=False)
                averages.append(sums.average())
        except torch.OutOfMemoryError:
            if at_once == 1:
                raise
            at_once //= 2
        else:
            return _joined(averages)


def _joined(averages: list[Average]) -> Average:
    """Put the averages of single samples into a batch."""
    first = averages[0]
    return Average(
        {name: torch.cat([each.means[name] for each in averages]) for name in first.means},
        {name: torch.cat([each.variances[name] for each in averages]) for name in first.variances},
        {name: torch.cat([each.samples[name] for each in averages], 1) for name in first.samples},
        first.num_samples,
    )
