"""Points on all paths, passed through the model with its layers recorded, in as many passes as the rows allow."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

from lightning_ydrop.errors import ConfigurationError
from lightning_ydrop.importance.baseline import Tensors
from lightning_ydrop.importance.recording import Tape, recording
from lightning_ydrop.importance.request import Request
from lightning_ydrop.importance.selection import Layout, count_units, layout_of

Key = TypeVar("Key")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Recorded:
    """What the layers put out in one forward pass, one entry for each call of a layer.

    Attributes:
        names: Of the layers.
        activations: What they put out, as the network has it.
        layouts: Where each activation has its rows and its units.

    """

    names: list[str]
    activations: list[Tensor]
    layouts: list[Layout]

    def rows_first(self, tensors: list[Tensor]) -> list[Tensor]:
        """Move the rows to the front, of tensors that are laid out as the activations."""
        return [layout.rows_first(each) for layout, each in zip(self.layouts, tensors, strict=True)]


class Recorder:
    """Runs forward passes of a request, and keeps what its layers put out."""

    def __init__(self, tape: Tape, overwritten: set[str]) -> None:
        self.tape = tape
        self.overwritten = overwritten

    def passed(self, run: Callable[[], Result]) -> Result:
        """Run a forward pass, and once more with copies if the network has written over what layers put out."""
        self.tape.clear()
        result = run()
        if self.tape.overwritten:
            self.overwritten.update(self.tape.overwritten)
            self.tape.clear()
            del result  # or both graphs would be in memory
            result = run()
        return result

    def recorded(self, request: Request, rows: int) -> Recorded:
        """List what was recorded in the last pass, before a backward pass. The list alone keeps it alive from now on.

        Raises:
            ConfigurationError: If an activation has no dimension of units.

        """
        kept = Recorded([], [], [])
        for name, calls in self.tape.items():
            layer, unit_dim, batch_dim = request.layers[name], request.unit_dims[name], request.dim_of_rows(name)
            count_units(name, layer, calls, unit_dim, rows=rows, batch_dim=batch_dim)
            for activation in calls:
                layout = layout_of(activation, unit_dim, rows=rows, batch_dim=batch_dim)
                assert layout is not None
                kept.names.append(name)
                kept.activations.append(activation)
                kept.layouts.append(layout)
        self.tape.close()
        return kept


def measured_in_parts(request: Request, measure: Callable[[Request, Recorder], dict[Key, Tensor]]) -> dict[Key, Tensor]:
    """Measure samples in as few passes as `max_rows` allows.

    Args:
        request: The samples, on whole paths.
        measure: Measures some of them, on parts of their paths, in one forward pass. What it gives has the samples in
            the first dimension, and adds up over the parts of a path.

    Returns:
        What it gives for all samples, on their whole paths.

    """
    overwritten = set(request.plan.overwritten)
    with (
        request.borrowed(constant_parameters=True),
        recording(request.layers, overwritten) as tape,
    ):
        return _in_parts(request, measure, Recorder(tape, overwritten))


def _in_parts(
    request: Request, measure: Callable[[Request, Recorder], dict[Key, Tensor]], recorder: Recorder
) -> dict[Key, Tensor]:
    num_samples, num_starts, n_steps = request.num_samples, len(request.starts[0]), request.n_steps
    if (
        request.max_rows is None
        or num_starts + n_steps * num_samples <= request.max_rows
        or n_steps == 1 == num_samples
    ):
        return measure(request, recorder)
    if num_samples > 1:
        at_once = (request.max_rows - 1) // n_steps if num_starts == 1 else request.max_rows // (n_steps + 1)
        passes = math.ceil(num_samples / max(1, at_once))
        size, more = divmod(num_samples, passes)
        ends = [size * each + min(each, more) for each in range(passes + 1)]
        parts = [_in_parts(request.part(first, end), measure, recorder) for first, end in itertools.pairwise(ends)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    # Part of a straight path is a straight path, and the sum over its steps is the sum over the steps of its parts.
    steps = n_steps // 2
    middle = tuple(
        torch.lerp(start, item, steps / n_steps) for start, item in zip(request.starts, request.inputs, strict=True)
    )
    near = _in_parts(replace(request, inputs=middle, n_steps=steps), measure, recorder)
    far = _in_parts(replace(request, starts=middle, n_steps=n_steps - steps), measure, recorder)
    return {name: near[name] + far[name] for name in near}


def with_own_starts(request: Request) -> Request:
    """Give each sample a start of its own, where the output at the start, or the gradient of F, depends on the sample.

    Samples that share a start need a single row for it.
    """
    if not request.carried and (request.quadrature == "right" or request.target is None):
        return request
    starts = tuple(start.expand_as(item) for start, item in zip(request.starts, request.inputs, strict=True))
    return replace(request, starts=starts)


def along_the_path(request: Request, rows: Tensor) -> Tensor:
    """Repeat rows (B, *) for every point of the paths: for the starts, then for all samples at each step."""
    return torch.cat([rows[: len(request.starts[0])], *[rows] * request.n_steps])


def carried_along(request: Request) -> Tensors:
    """Give what is carried along the paths for every point."""
    return tuple(along_the_path(request, rows) for rows in request.carried)


def target_along(request: Request) -> Tensor | None:
    """Give the target for every point."""
    return None if request.target is None else along_the_path(request, request.target)


def gradients(value: Tensor, activations: list[Tensor], *, keep_graph: bool = False) -> list[Tensor]:
    """Differentiate F, summed over rows, with respect to activations: zeros for those that it does not depend on.

    Args:
        value: F of each row, (rows,).
        activations: What layers put out.
        keep_graph: Whether another backward pass is to follow.

    Raises:
        ConfigurationError: If the model checkpoints activations in a way that does not allow it.

    """
    found: dict[int, Tensor] = {}
    hand_over_gradients(value, dict(enumerate(activations)), found.__setitem__, keep_graph=keep_graph)
    return [found[place] for place in range(len(activations))]


def hand_over_gradients(
    value: Tensor, activations: Mapping[Key, Tensor], take: Callable[[Key, Tensor], None], *, keep_graph: bool = False
) -> None:
    """Differentiate F, summed over rows, and hand over each gradient as soon as the backward pass has it.

    If `take` lets go of it, and of the activation, then there are never all of them in memory.

    Args:
        value: F of each row, (rows,).
        activations: What layers put out.
        take: Called with the key of each activation and the gradient, zeros where F does not depend on it.
        keep_graph: Whether another backward pass is to follow.

    Raises:
        ConfigurationError: If the model checkpoints activations in a way that does not allow it.

    """
    left = set(activations)

    def hand_over(key: Key, gradient: Tensor | None) -> None:
        if gradient is None:  # what a user's own autograd function gives where F does not depend on its input
            return
        left.remove(key)
        take(key, gradient)

    if activations and value.requires_grad:
        handles = [
            each.register_hook(partial(hand_over, key))  # type: ignore[no-untyped-call]
            for key, each in activations.items()
        ]
        try:
            # Not value.sum(): in half precision the sum of many rows could overflow.
            ends, each_row = _ends(list(activations.values())), torch.ones_like(value)
            torch.autograd.grad(value, ends, each_row, retain_graph=keep_graph, allow_unused=True)
        except RuntimeError as error:
            if "checkpoint" not in str(error).lower():
                raise
            raise ConfigurationError(
                "The model checkpoints activations with use_reentrant=True.",
                "Phase 1 differentiates with respect to activations, which reentrant checkpointing cannot do.",
                "Call torch.utils.checkpoint.checkpoint(..., use_reentrant=False), as torch recommends.",
            ) from error
        finally:
            for handle in handles:
                handle.remove()
    for key in [key for key in activations if key in left]:
        take(key, torch.zeros_like(activations[key]))


def _ends(activations: Sequence[Tensor]) -> list[Tensor]:
    """Choose activations that a backward pass has to reach, so that it comes by all others."""
    ends = [each for each in activations if each.is_leaf]
    reached = {get_gradient_edge(each).node for each in ends}
    for activation in activations:
        if activation.grad_fn is not None:
            if not _leads_to(activation.grad_fn, reached):
                ends.append(activation)
            reached.add(activation.grad_fn)
    return ends


def _leads_to(node: Node, reached: Set[Node]) -> bool:
    seen, waiting = {node}, [node]
    while waiting:
        nodes = [each for each, _ in waiting.pop().next_functions if each is not None and each not in seen]
        if not reached.isdisjoint(nodes):
            return True
        seen.update(nodes)
        waiting += nodes
    return False
