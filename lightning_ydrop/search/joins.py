"""Where a module adds two paths from one tensor: its shortcut and the branch beside it."""

import inspect
import operator
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node, Tracer

from lightning_ydrop.models.state import leaving_no_trace, random_stream_kept

ADDITIONS = (operator.add, operator.iadd, torch.add)
ADDING_METHODS = ("add", "add_", "__add__", "__iadd__")
# What people call a shortcut.
OF_SHORTCUT = re.compile(r"(.*_)?(down_?samples?|short_?cuts?|skips?|identity|bypass)(_\w+|\d+)?")


@dataclass(frozen=True)
class Join:
    """An addition.

    Attributes:
        branch: Names of the modules that one path calls and the other doesn't, in order. They are relative to the
            module that adds.
        shortcut: The same of the other path, which has the fewer convolutions. Empty where it calls none.
        is_told: Whether it is known which of the two paths is the shortcut.

    """

    branch: tuple[str, ...]
    shortcut: tuple[str, ...]
    is_told: bool


class _OneStorey(Tracer):
    """Traces the forward of one module. All modules that it calls are leaves."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def find_joins(module: nn.Module) -> list[Join] | None:
    """Find the additions of two paths in the forward of a module, by torch.fx. The module stays as it was.

    An addition inside a path that another one adds is not listed.

    Args:
        module: Any module.

    Returns:
        The additions in order, or None if torch.fx can't trace this forward.

    """
    with _unchanged(module):
        graph = _trace(module)
        return None if graph is None else _joins_of(graph, module)


def find_dormant_shortcut(module: nn.Module) -> str | None:
    """Find an attribute that is None and whose module would be called on the shortcut, as `downsample` of a ResNet is.

    Args:
        module: A module that adds its input to a branch without calling a module on the shortcut.

    Returns:
        The name of the attribute, or None if there is none.

    """
    names = [name for name, value in {**vars(module), **module._modules}.items() if value is None]
    # Those that are called as shortcuts come first.
    names = [name for name in names if not name.startswith("_")]
    for name in sorted(names, key=lambda name: OF_SHORTCUT.fullmatch(name) is None):
        with _unchanged(module):
            try:
                setattr(module, name, nn.Identity())
            except Exception:  # a property, or a class that minds
                continue
            graph = _trace(module)
            joins = [] if graph is None else _joins_of(graph, module)
        if any(join.shortcut == (name,) and join.is_told for join in joins):
            return name
    return None


@contextmanager
def _unchanged(module: nn.Module) -> Iterator[None]:
    """Undo whatever tracing a forward does to a module: the forward runs, with symbols for tensors."""
    with (
        leaving_no_trace([module], evaluate=False),
        random_stream_kept(torch.device("cpu")),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


def _trace(module: nn.Module) -> Graph | None:
    try:
        parameters = inspect.signature(module.forward).parameters.values()
        # Optional arguments have their defaults: `if mask is not None` would be true of a symbol.
        defaults = {each.name: each.default for each in parameters if each.default is not each.empty}
        return _OneStorey().trace(module, defaults)
    except Exception:  # whatever a forward does with symbols that only tensors can do
        return None


def _joins_of(graph: Graph, module: nn.Module) -> list[Join]:
    nodes = list(graph.nodes)
    index = {node: position for position, node in enumerate(nodes)}
    # Sets of nodes as the bits of whole numbers: what each one depends on, itself included.
    reach: list[int] = []
    inputs = 0
    for position, node in enumerate(nodes):
        bits = 1 << position
        for source in node.all_input_nodes:
            bits |= reach[index[source]]
        reach.append(bits)
        inputs |= 1 << position if node.op == "placeholder" else 0
    inside = 0
    found: list[Join] = []
    for position in range(len(nodes) - 1, -1, -1):
        operands = _added(nodes[position])
        if operands is None or inside >> position & 1:
            continue
        first, second = (reach[index[operand]] for operand in operands)
        if not first & second & inputs:
            continue  # such as an embedding of positions
        only = first & ~second, second & ~first
        sides = [tuple(str(node.target) for node in _called(nodes, bits)) for bits in only]
        if not any(sides):
            continue
        inside |= only[0] | only[1]
        found.append(_told_apart(sides, module))
    return found[::-1]


def _added(node: Node) -> tuple[Node, Node] | None:
    """Give the two operands of an addition."""
    adds = (node.op == "call_function" and node.target in ADDITIONS) or (
        node.op == "call_method" and node.target in ADDING_METHODS
    )
    operands: Sequence[Any] = [*node.args, *(node.kwargs[name] for name in ("other",) if name in node.kwargs)]
    if not adds or len(operands) < 2 or not all(isinstance(each, Node) for each in operands[:2]):
        return None
    return operands[0], operands[1]


def _called(nodes: Sequence[Node], bits: int) -> list[Node]:
    return [node for position, node in enumerate(nodes) if bits >> position & 1 and node.op == "call_module"]


def _told_apart(sides: Sequence[tuple[str, ...]], module: nn.Module) -> Join:
    """Tell the shortcut of two paths: the one without modules, the one with such a name, or with fewer convolutions."""
    weights = [sum(_count_convolutions(module.get_submodule(name)) for name in side) for side in sides]
    named = [any(OF_SHORTCUT.fullmatch(name.rpartition(".")[2]) for name in side) for side in sides]
    if not all(sides):
        shortcut = sides.index(())
    elif named[0] != named[1] and weights[named.index(True)] <= weights[named.index(False)]:
        shortcut = named.index(True)
    elif weights[0] != weights[1]:
        shortcut = weights.index(min(weights))
    else:
        return Join(sides[0] + sides[1], (), is_told=False)
    return Join(sides[1 - shortcut], sides[shortcut], is_told=True)


def _count_convolutions(module: nn.Module) -> int:
    weights = [getattr(each, "weight", None) for each in module.modules()]
    return sum(isinstance(weight, torch.Tensor) and weight.ndim > 1 for weight in weights)
