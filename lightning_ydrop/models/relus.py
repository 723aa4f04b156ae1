"""ReLUs right after a recorded layer: the layer's output is kept anyway, and their gradient can do with it."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_ydrop.models.modules import all_modules
from lightning_ydrop.torch_internals import memory_of


@contextmanager
def seeing_relus(model: nn.Module, recorded: Mapping[str, Sequence[Tensor]]) -> Iterator[list[nn.Module]]:
    """Note which ReLUs take what a layer put out, and nothing else, where the model does not write over it afterwards.

    Args:
        model: The model.
        recorded: What the layers have put out so far, by name.

    Yields:
        These modules, complete at the end.

    """
    after: list[nn.Module] = []
    elsewhere: list[nn.Module] = []
    given_to: list[tuple[nn.Module, Tensor, int]] = []

    def look(module: nn.Module, args: Any) -> None:
        given = memory_of(args[0]) if len(args) == 1 and type(args[0]) is Tensor else None
        is_recorded = any(memory_of(each) == given for calls in recorded.values() for each in calls)
        (after if is_recorded else elsewhere).append(module)
        if is_recorded and not args[0].is_inference():
            given_to.append((module, args[0], args[0]._version))

    handles = [each.register_forward_pre_hook(look) for each in all_modules(model) if _is_plain(each)]
    try:
        yield after
    finally:
        for handle in handles:
            handle.remove()
        elsewhere += [module for module, tensor, version in given_to if tensor._version != version]
        after[:] = [each for each in dict.fromkeys(after) if each not in elsewhere]


def keep_inputs(relus: Iterable[nn.Module]) -> None:
    """Let ReLUs keep their inputs for the backward pass, not their outputs. Values and gradients stay the same.

    It sets the attribute `forward` of each module. Whoever has borrowed the modules removes it again. Modules that are
    no such ReLUs any more are left alone.
    """
    for relu in relus:
        if _is_plain(relu):
            relu.__dict__["forward"] = _relu


def _is_plain(module: nn.Module) -> bool:
    return type(module) is nn.ReLU and not module.inplace and "forward" not in module.__dict__


def _relu(input: Tensor) -> Tensor:
    # Classes of tensors that know a ReLU may not know a threshold.
    return torch.threshold(input, 0, 0) if type(input) is Tensor else F.relu(input)
