"""What phase 1 has to say to the other processes of a distributed run; alone, it says nothing."""

from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

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
