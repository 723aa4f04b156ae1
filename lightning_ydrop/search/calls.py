"""What the code of a class does with the modules that it holds: which it calls, in which order, and what it reads."""

import ast
import inspect
import textwrap
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Uses:
    """How the code of a class uses its attributes.

    Attributes:
        called: Names of attributes that are called, or may be, as they are handed on, iterated or kept under another
            name. They are in the order of evaluation in each method.
        read: Pairs of an attribute's name and the name of what is read of it, such as ("dropout", "p").

    """

    called: tuple[str, ...]
    read: frozenset[tuple[str, str]]


class _Visitor(ast.NodeVisitor):
    def __init__(self) -> None:
        self.called: list[str] = []
        self.read: set[tuple[str, str]] = set()

    def visit_Call(self, node: ast.Call) -> None:
        # Arguments are evaluated before the call.
        for argument in (*node.args, *(keyword.value for keyword in node.keywords)):
            self.visit(argument)
        function = node.func
        if isinstance(function, ast.Attribute) and function.attr in ("forward", "__call__"):
            function = function.value
        name = _attribute_of_self(function)
        if name is None:
            self.visit(node.func)
        else:
            self.called.append(name)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        name = _attribute_of_self(node)
        inner = _attribute_of_self(node.value)
        if inner is not None:
            self.read.add((inner, node.attr))
        elif name is None:
            self.generic_visit(node)
        elif isinstance(node.ctx, ast.Load):
            self.called.append(name)


def _attribute_of_self(node: ast.AST) -> str | None:
    held = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
    return node.attr if held else None  # type: ignore[attr-defined]


@cache
def uses_of(cls: Any) -> Uses | None:
    """Read the code of a class and its bases, except those of torch.

    Args:
        cls: A class of modules.

    Returns:
        The uses, or None where there is no code to read.

    """
    visitor = _Visitor()
    for base in cls.__mro__:
        if base.__module__.startswith("torch.nn.modules.module") or not issubclass(base, nn.Module):
            continue
        try:
            visitor.visit(ast.parse(textwrap.dedent(inspect.getsource(base))))
        except (OSError, TypeError, SyntaxError):  # such as what was typed into an interpreter
            return None
    return Uses(tuple(dict.fromkeys(visitor.called)), frozenset(visitor.read))
