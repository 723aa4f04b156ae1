"""Another try where torch has lost memory that a tensor shared with its copy."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from torch import Tensor, nn

Result = TypeVar("Result")


class _Sharing(threading.local):
    parameters_alone = False
    has_lost_memory = False


_SHARING = _Sharing()


def may_be_shared(tensor: Tensor) -> bool:
    """Tell whether a tensor may share its memory with a copy: parameters always may, because nobody resizes them."""
    return not _SHARING.parameters_alone or isinstance(tensor, nn.Parameter)


def note_lost_memory() -> None:
    """Say that a pass has met lost memory, and may have failed for that."""
    _SHARING.has_lost_memory = True


@contextmanager
def parameters_shared_alone() -> Iterator[None]:
    """Copy buffers and other tensors instead of sharing their memory."""
    former, _SHARING.parameters_alone = _SHARING.parameters_alone, True
    try:
        yield
    finally:
        _SHARING.parameters_alone = former


def without_lost_memory(call: Callable[[], Result]) -> Result:
    """Call a function that passes through a model, and once more if that has lost memory.

    Torch loses shared memory where an operation makes a tensor larger, as `out=` and the observers of quantisation do.
    The pass then fails or shows nonsense. It is undone like any other, and the next one shares parameters alone.
    """
    _SHARING.has_lost_memory = False
    try:
        result = call()
    except Exception:
        if not _SHARING.has_lost_memory:
            raise
    else:
        if not _SHARING.has_lost_memory:
            return result
    with parameters_shared_alone():
        return call()
