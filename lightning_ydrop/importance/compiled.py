"""Phase 1 as one compiled function of tensors, for batches of one shape.

The operations of an eager phase 1 are recorded, forward pass, backward pass and conductance, and compiled once. A
later phase 1 runs neither the model's code nor its hooks, so that it has nothing to undo. What that code would read is
compared with what it was: where something has changed, phase 1 runs eagerly.
"""

import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import compress

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._pytree import tree_flatten, tree_leaves

from lightning_ydrop.importance.baseline import Tensors
from lightning_ydrop.importance.compilable import (
    CHECKPOINTS,
    callers_of,
    is_plain,
    modules_of,
    not_repeatable,
    not_static,
    others_of,
    refusal,
    tensors_of,
)
from lightning_ydrop.importance.conductance import one_pass
from lightning_ydrop.importance.passes import Recorder, with_own_starts
from lightning_ydrop.importance.recording import recording
from lightning_ydrop.importance.request import Request
from lightning_ydrop.models.checkpointing import seeing_checkpoints
from lightning_ydrop.models.descriptions import NotComparable, Same
from lightning_ydrop.models.looks import Looks, seeing_looks
from lightning_ydrop.models.reads import Reads, Values, seeing_reads
from lightning_ydrop.models.state import random_stream_kept
from lightning_ydrop.models.streams import numpy_state, python_state, random_streams_kept
from lightning_ydrop.torch_internals import compiled_graph, global_forward_hooks, memory_of, recorded_graph

# A CUDA graph is captured in the second call, and replayed from the third on.
CALLS_TO_WARM_UP = 3

# By the number of the module, the registry that holds it, and its name there.
Held = tuple[int, str, str]


@dataclass(eq=False, repr=False)
class Compiled:
    """Conductance of requests that are like one that was seen before.

    Attributes:
        run: Gives the scores from the tensors that the model holds, and those of the request.
        names: Of the layers.
        modules: The model's, and those of whatever else a call runs.
        structure: What they consist of: see `_structure`.
        places: Of each tensor that they hold, all places where it is.
        looks: What each of these tensors looked like: a forward may ask for no more than its shape.
        used: Whether `run` takes it.
        layout: What the tensors of the request looked like, and how it was measured.
        values: What the forward has read of them, and of whatever calls them.

    """

    run: Callable[..., Sequence[Tensor]]
    names: list[str]
    modules: list[nn.Module]
    structure: object
    places: list[list[Held]]
    looks: list[object]
    used: list[bool]
    layout: object
    values: Values
    _has_warned: bool = field(default=False, init=False)

    def __call__(self, request: Request) -> dict[str, Tensor] | None:
        """Measure conductance: None where the request or the model is not like the one that was recorded."""
        if _layout(request) != self.layout:
            return None
        tensors = self.tensors()
        if changed := self.changed(request, tensors):
            if not self._has_warned:
                self._has_warned = True
                warnings.warn(
                    f"Phase 1 was compiled for another {changed}. It runs without compilation where this differs. "
                    "Leave out compile_phase1 if that is so in most batches.",
                    UserWarning,
                    stacklevel=2,
                )
            return None
        return self.run_on(request, tensors)

    def changed(self, request: Request, tensors: Sequence[Tensor]) -> str | None:
        """Name something that a forward would find changed."""
        modules = modules_of(request)
        if list(map(id, modules)) != list(map(id, self.modules)) or _structure(modules) != self.structure:
            return "set of modules or hooks"
        for tensor, places, look in zip(tensors, self.places, self.looks, strict=True):
            for number, registry, name in places:
                if modules[number].__dict__[registry][name] is not tensor or _look(tensor) != look:
                    return f"{type(modules[number]).__name__}.{name}"
        return self.values.changed()

    def tensors(self) -> list[Tensor]:
        """List the tensors of the model: others than before, where somebody has replaced them."""
        return [self.modules[number].__dict__[registry].get(name) for (number, registry, name), *_ in self.places]

    def run_on(self, request: Request, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """Measure conductance, whatever has changed."""
        kind = request.device.type
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            if torch.is_autocast_enabled(kind):  # conversions were recorded
                stack.enter_context(torch.autocast(kind, enabled=False))
            if kind == "cuda":
                torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
            scores = self.run(*compress(tensors, self.used), *tree_leaves(tensors_of(request)))
            if kind == "cuda":  # the next replay of a CUDA graph writes over what this one gives
                scores = [each.clone() for each in scores]
        return dict(zip(self.names, scores, strict=True))


def compiled(owner: str, request: Request) -> Compiled:
    """Record and compile phase 1.

    Args:
        owner: What the user called.
        request: A request like those to come.

    Raises:
        ConfigurationError: If phase 1 of this model can't be recorded, or would be another one in other batches.

    """
    modules = modules_of(request)
    if reason := not_static(request, modules):
        raise refusal(owner, request, reason)
    held = {
        (number, registry, name): tensor
        for number, module in enumerate(modules)
        for registry in ("_parameters", "_buffers")
        for name, tensor in module.__dict__[registry].items()
        if tensor is not None
    }
    structure = _structure(modules)
    tensors = list({id(tensor): tensor for tensor in held.values()}.values())
    graph, names, reads = _recorded(owner, request, modules, tensors)
    try:
        values = Values(reads, callers_of(request))
    except NotComparable as error:
        raise refusal(owner, request, str(error)) from error
    used = [bool(node.users) for node in list(graph.graph.nodes)[: len(tensors)]]
    for node in list(graph.graph.nodes)[: len(tensors)]:
        if not node.users:
            graph.graph.erase_node(node)
    graph.recompile()
    places = [[place for place, each in held.items() if each is tensor] for tensor in tensors]
    try:
        with random_streams_kept(), random_stream_kept(request.device), torch.no_grad():
            run = compiled_graph(graph, [*compress(tensors, used), *tree_leaves(tensors_of(request))])
            looks = [_look(tensor) for tensor in tensors]
            result = Compiled(run, names, modules, structure, places, looks, used, _layout(request), values)
            for _ in range(CALLS_TO_WARM_UP):
                result.run_on(request, tensors)
    except Exception as error:
        raise refusal(owner, request, "torch could not compile it: see above") from error
    return result


def _recorded(
    owner: str, request: Request, modules: Sequence[nn.Module], tensors: Sequence[Tensor]
) -> tuple[GraphModule, list[str], Reads]:
    """Record phase 1 as a graph of the model's tensors and those of the request, with what else its forward reads."""
    copied, names, seen = set(request.plan.overwritten), list[str](), list[Looks]()
    before = list(map(_written, tensors))
    with (
        random_streams_kept(),
        request.borrowed(constant_parameters=True),
        recording(request.layers, copied) as tape,
        seeing_checkpoints(request.model) as checkpointed,
        seeing_reads(modules) as reads,
    ):
        streams = python_state(), numpy_state()

        def phase_1(_: Sequence[Tensor], rest: tuple[Tensors, ...]) -> list[Tensor]:
            # Where one tensor is several arguments, or one and a parameter, each has to be another.
            inputs, starts, carried, target = (tuple(each.detach() for each in part) for part in rest)
            measured = replace(request, inputs=inputs, starts=starts, carried=carried, target=next(iter(target), None))
            with seeing_looks() as looks:
                scores = one_pass(with_own_starts(measured), Recorder(tape, copied))
            seen.append(looks)
            names[:] = scores
            return list(scores.values())

        try:
            graph = recorded_graph(phase_1, tensors, tensors_of(request))
        except Exception as error:
            raise refusal(owner, request, "its operations could not be recorded: see above") from error
        written = list(map(_written, tensors)) != before
        drawn = (python_state(), numpy_state()) != streams
    (looks,) = seen
    held = len(tensors)
    if reason := (
        CHECKPOINTS if checkpointed else not_repeatable(graph, reads, looks, held=held, written=written, drawn=drawn)
    ):
        raise refusal(owner, request, reason)
    return graph, names, reads


def _layout(request: Request) -> object:
    """Describe all that a request decides besides values."""
    kind = request.device.type
    precision = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    others, names = tree_flatten(others_of(request))
    others = [_look(each) if isinstance(each, Tensor) else each for each in others]
    looks = [[_look(each) for each in part] for part in tensors_of(request)]
    same = (Same(request.objective), Same(request.layers), Same(request.unit_dims))
    return (
        looks,
        others,
        names,
        precision,
        same,
        request.n_steps,
        request.quadrature,
        request.batch_dim,
        request.max_rows,
    )


def _written(tensor: Tensor) -> tuple[int, int]:
    """Give what a write changes: the version, or, where somebody sets `tensor.data`, the memory."""
    return tensor._version, memory_of(tensor)


def _look(tensor: Tensor) -> object:
    if not is_plain(tensor):
        return type(tensor)
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _structure(modules: Sequence[nn.Module]) -> list[object]:
    """List what modules consist of: their classes, submodules and hooks, and which tensors they have by what name."""
    parts: list[object] = [*global_forward_hooks()]
    for module in modules:
        held = module.__dict__
        parts.append(type(module))
        parts += [(name, id(child)) for name, child in held["_modules"].items()]
        parts += [(name, each is None) for name, each in held["_parameters"].items()]
        parts += [(name, each is None) for name, each in held["_buffers"].items()]
        parts += [*held["_forward_pre_hooks"], *held["_forward_hooks"]]
    return parts
