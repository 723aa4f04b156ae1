"""Whether a pass looks at values of tensors: then it may be another one for other values."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_ydrop.torch_internals import exports_seen

VALUES = "forward looks at values of tensors"
SHAPES = "forward makes tensors whose shapes depend on values"
MASKS = (torch.bool, torch.uint8)


class Looks(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes what is looked at. Values don't count that the pass itself has made of constants.

    Attributes:
        reasons: What was done, in words.

    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.reasons: list[str] = []
        self._made: dict[int, Tensor] = {}

    def at(self, tensor: Tensor) -> None:
        """Note that the values of a tensor are looked at."""
        if id(tensor) not in self._made:
            self.reasons.append(VALUES)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and note whether it shows values."""
        given = [each for each in tree_leaves((args, kwargs or {})) if isinstance(each, Tensor)]
        is_made = func is torch.ops.aten.lift_fresh.default or all(id(each) in self._made for each in given)
        if not is_made:
            if torch.Tag.data_dependent_output in func.tags:
                self.reasons.append(VALUES)
            by_mask = func is not torch.ops.aten.index.Tensor or any(each.dtype in MASKS for each in given[1:])
            if torch.Tag.dynamic_output_shape in func.tags and by_mask:
                self.reasons.append(SHAPES)
        result = func(*args, **(kwargs or {}))
        is_made = is_made and torch.Tag.nondeterministic_seeded not in func.tags
        for each in tree_leaves(result):
            if isinstance(each, Tensor):
                if is_made:
                    self._made[id(each)] = each
                else:
                    self._made.pop(id(each), None)
        return result


@contextmanager
def seeing_looks() -> Iterator[Looks]:
    """Note in what ways a pass looks at values of tensors.

    Yields:
        What was seen, filled while the model runs.

    """
    with ExitStack() as stack:
        looks = stack.enter_context(Looks())
        stack.enter_context(exports_seen(looks.at))
        yield looks
