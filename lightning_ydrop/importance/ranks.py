"""What the processes of a distributed run exchange in phase 1. A process by itself exchanges nothing."""

from collections.abc import Iterator, Mapping
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_ydrop.errors import ConfigurationError

Report = TypeVar("Report")


def world_size() -> int:
    """Count the processes of the run: 1 where torch.distributed is not at work."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Tell which of them this one is, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def add_over_ranks(values: Tensor) -> None:
    """Replace values by their sum over all ranks, in place; every rank has to call this alike."""
    if world_size() > 1:
        dist.all_reduce(values)


def gather_over_ranks(report: Report) -> list[Report]:
    """Collect one object, which can be pickled, from each rank; every rank has to call this alike."""
    if world_size() == 1:
        return [report]
    reports: list[Report] = [report] * world_size()
    dist.all_gather_object(reports, report)
    return reports


def agree_on_units(num_units: Mapping[str, int], raised: Exception | None, is_nothing: bool) -> dict[str, int] | None:
    """Tell all ranks what each has found in its dry run; every rank has to call this alike.

    Args:
        num_units: The units of each layer that this rank has scored.
        raised: What its dry run has raised.
        is_nothing: Whether it had no samples.

    Returns:
        The units of each layer that any rank has scored; None where no rank had a sample.

    Raises:
        Exception: `raised`, on its own rank.
        ConfigurationError: On the other ranks, and where they have found different widths.

    """
    reports = gather_over_ranks((dict(num_units), str(raised or ""), is_nothing))
    if raised is not None:
        raise raised
    if all(is_empty for _, _, is_empty in reports):
        return None
    units = dict(num_units)
    for other, (theirs, message, _) in enumerate(reports):
        if message or any(units.get(name, size) != size for name, size in theirs.items()):
            raise ConfigurationError(
                f"Rank {other} cannot run phase 1: {message or theirs}",
                "All ranks run phase 1 alike, on layers of the same width.",
                "Fix what is wrong on that rank.",
            )
        units |= theirs
    return units


def averages(
    scores: Mapping[str, Tensor], num_units: Mapping[str, int], device: torch.device
) -> Iterator[tuple[list[str], Tensor]]:
    """Average over samples (Eq. 4, arXiv 2409.09088), those of all ranks; every rank has to call this alike.

    Args:
        scores: Of this rank's samples, (N, U) for each layer by name.
        num_units: U of all layers that any rank scores, in one order on all of them.
        device: Where the ranks exchange scores.

    Yields:
        The names of layers of one width, and their scores as one (L, U), float32.

    """
    if world_size() > 1:
        scores = _averages_of_all_ranks(scores, num_units, device)
    alike: dict[tuple[torch.Size, torch.device], list[str]] = {}
    for name in num_units:
        if name in scores:
            alike.setdefault((scores[name].shape, scores[name].device), []).append(name)
    for names in alike.values():
        with torch.no_grad():
            means = torch.stack([scores[name] for name in names]).mean(1, dtype=torch.float32)
        yield names, means


def _averages_of_all_ranks(
    scores: Mapping[str, Tensor], num_units: Mapping[str, int], device: torch.device
) -> dict[str, Tensor]:
    """Average over the samples of all ranks: (1, U) for each layer."""
    # Sums and counts of all layers in one message: ranks may have different numbers of samples.
    parts = []
    for name, size in num_units.items():
        values = scores.get(name, torch.empty(0, size, device=device)).detach().to(device, torch.float32)
        parts += [values.sum(0), torch.full((1,), float(len(values)), dtype=torch.float32, device=device)]
    flat = torch.cat(parts)
    add_over_ranks(flat)
    totals = iter(torch.split(flat, [length for size in num_units.values() for length in (size, 1)]))
    # A layer that no rank has called gets zeros, which rank nothing.
    return {name: (next(totals) / next(totals).clamp(min=1)).unsqueeze(0) for name in num_units}
