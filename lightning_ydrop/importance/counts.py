"""Counts of what goes wrong in steps, on the training device: the host never reads them while a model trains."""

from collections.abc import Callable

import torch
from torch import Tensor

# A step starts no operation for a count before so much is waiting to be counted.
MOST_TENSORS = 64
MOST_ELEMENTS = 4096


class Count:
    """A whole number on a device, which is brought up to date once in a while.

    Args:
        counting: Counts what it is given, a 1-D tensor, into an int64 scalar tensor, without reading a value.
            None where there is nothing to count.

    """

    def __init__(self, counting: Callable[[Tensor], Tensor | None]) -> None:
        self.counting = counting
        self._total = torch.zeros((), dtype=torch.int64)
        self._waiting: list[Tensor] = []

    def add(self, values: Tensor) -> None:
        """Count values, of any shape, when it is time."""
        self._waiting.append(values)
        if len(self._waiting) >= MOST_TENSORS or values.numel() > MOST_ELEMENTS:
            self._count()

    @property
    def total(self) -> Tensor:
        """The count so far, int64, a scalar on the device."""
        self._count()
        return self._total

    @total.setter
    def total(self, total: Tensor) -> None:
        self._waiting.clear()
        self._total = total

    def _count(self) -> None:
        if self._waiting:
            waiting, self._waiting = self._waiting, []
            device = self._total.device
            count = self.counting(torch.cat([each.to(device).flatten() for each in waiting]))
            if count is not None:
                self._total += count


def count_nonfinite(values: Tensor) -> Tensor:
    """Count what is infinite or NaN."""
    return (~values.isfinite()).sum()
