"""Whether the rows of a batch influence each other."""

import warnings

import torch

from lightning_ydrop.errors import ConfigurationError
from lightning_ydrop.models.calls import differ
from lightning_ydrop.models.functional_dropout import seeing_rates
from lightning_ydrop.uncertainty.draws import MaskSharing
from lightning_ydrop.uncertainty.outputs import Dims
from lightning_ydrop.uncertainty.passes import Subject


def warn_of_mixing(subject: Subject, dims: Dims, sharing: MaskSharing) -> None:
    """Learn whether rows mix, if that is not known, and warn where they do: one mask then passes at a time."""
    if _seen_to_mix(subject, dims, sharing):
        warnings.warn(f"{_finding(subject)} So one mask passes at a time. {_remedy(dims)}", UserWarning, stacklevel=2)


def check_single_samples(subject: Subject, dims: Dims, sharing: MaskSharing) -> None:
    """Refuse to pass each sample alone, as shared masks do, where that changes the outputs.

    Raises:
        ConfigurationError: If it does.

    """
    if _seen_to_mix(subject, dims, sharing):
        raise ConfigurationError(
            _finding(subject),
            "With shared_masks=True each sample passes alone.",
            f"{_remedy(dims)} Or leave shared_masks out.",
        )


def rows_mix(subject: Subject, dims: Dims, sharing: MaskSharing) -> bool:
    """Pass one row alone and beside another, without dropout, and compare.

    They differ where a network normalises by the batch at hand, or where what is taken for the samples is something
    else, such as the time of (T, B, F). Then several masks can't pass side by side, as samples of one batch.

    Args:
        subject: The model and the batch.
        dims: Where rows are in the output.
        sharing: It learns which calls of functional dropout the passes make.

    Returns:
        Whether they mix. False if a pass is a matter of chance in evaluation mode too: a comparison says nothing then.

    """
    # A single row is compared with itself beside itself.
    count, pair, one = (2, slice(1), slice(1)) if subject.batch_size == 1 else (1, slice(2), slice(1, 2))
    with subject.looked_at(), seeing_rates() as sharing.rates_in_evaluation:
        beside = dims.rows_first(subject.call(count, pair), 2)[1:]
        alone = dims.rows_first(subject.call(1, one), 1)
        return differ(beside, alone) and not differ(dims.rows_first(subject.call(1, one), 1), alone)


def _seen_to_mix(subject: Subject, dims: Dims, sharing: MaskSharing) -> bool:
    """Learn whether rows mix, if that is not known, and tell whether this has shown that they do."""
    if sharing.rows_mix is not None:
        return False
    try:
        sharing.rows_mix = rows_mix(subject, dims, sharing)
    except (ConfigurationError, torch.OutOfMemoryError):
        sharing.rows_mix = False  # the passes that count say what is wrong
    except Exception:
        sharing.rows_mix = True  # it may take batches of one size alone
        return False
    return sharing.rows_mix


def _finding(subject: Subject) -> str:
    return f"{type(subject.model).__name__} gives a sample another output where one more sample is beside it."


def _remedy(dims: Dims) -> str:
    return (
        f"Where another dimension than {dims.samples} is the batch, as in models of (T, B, F), pass "
        f"batch_dim={1 if dims.samples == 0 else 0} to monte_carlo or MonteCarloCallback."
    )
