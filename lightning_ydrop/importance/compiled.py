"""Phase 1 as one compiled function of tensors, for batches of one shape.

The operations of an eager phase 1 are recorded, forward pass, backward pass and conductance, and compiled once. A
later phase 1 runs neither the model's code nor its hooks, so that it has nothing to undo. What that code would read is
compared with what it was: where something has changed, phase 1 runs eagerly.
"""

import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

from lightning_ydrop.errors import ConfigurationError
from lightning_ydrop.importance.baseline import Tensors
from lightning_ydrop.importance.conductance import one_pass
from lightning_ydrop.importance.passes import Recorder, with_own_starts
from lightning_ydrop.importance.recording import recording
from lightning_ydrop.importance.request import Request
from lightning_ydrop.models.checkpointing import seeing_checkpoints
from lightning_ydrop.models.modules import all_modules, kind_of
from lightning_ydrop.models.reads import OF_TRAINING, PLAIN, changed_since, seeing_reads, values_read
from lightning_ydrop.models.state import random_stream_kept
from lightning_ydrop.models.streams import random_streams_kept
from lightning_ydrop.torch_internals import PLAIN_TENSORS, compiled_graph, recorded_graph

# A CUDA graph is captured in the second call, and replayed from the third on.
CALLS_TO_WARM_UP = 3

# By the number of the module, the registry that holds it, and its name there.
Held = tuple[int, str, str]


@dataclass(eq=False)
class Compiled:
    """Conductance of requests that are like one that was seen before.

    Attributes:
        run: Gives the scores from the tensors that the model holds, and those of the request.
        names: Of the layers.
        tensors: Of the model, that `run` takes.
        modules: The model's, and those of whatever else a call runs.
        hooks: How many forward hooks they had.
        held: The same tensors, by all places where they are.
        layout: What the tensors of the request looked like, and how it was measured.
        values: What attributes the forward has read.

    """

    run: Callable[..., Sequence[Tensor]]
    names: list[str]
    tensors: list[Tensor]
    modules: list[nn.Module]
    hooks: int
    held: dict[Held, Tensor]
    layout: object
    values: dict[tuple[nn.Module, str], object]
    _has_warned: bool = field(default=False, init=False)

    def __call__(self, request: Request) -> dict[str, Tensor] | None:
        """Measure conductance: None where the request or the model is not like the one that was recorded."""
        if _layout(request) != self.layout:
            return None
        if changed := self.changed(request):
            if not self._has_warned:
                self._has_warned = True
                warnings.warn(
                    f"Phase 1 was compiled for another {changed}. It runs without compilation where this differs. "
                    "Leave out compile_phase1 if that is so in most batches.",
                    UserWarning,
                    stacklevel=2,
                )
            return None
        return self._run(request)

    def changed(self, request: Request) -> str | None:
        """Name something that a forward would find changed."""
        modules = _modules(request)
        if list(map(id, modules)) != list(map(id, self.modules)):
            return "set of modules"
        for (number, registry, name), tensor in self.held.items():
            now = modules[number].__dict__[registry].get(name)
            if now is not tensor or _look(now) != self.layout_of[id(tensor)]:
                return f"{type(modules[number]).__name__}.{name}"
        return "number of hooks" if _count_hooks(modules) != self.hooks else changed_since(self.values)

    def __post_init__(self) -> None:
        self.layout_of = {id(tensor): _look(tensor) for tensor in self.held.values()}

    def _run(self, request: Request) -> dict[str, Tensor]:
        kind = request.device.type
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            if torch.is_autocast_enabled(kind):  # conversions were recorded
                stack.enter_context(torch.autocast(kind, enabled=False))
            if kind == "cuda":
                torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
            scores = self.run(*self.tensors, *tree_leaves(_tensors(request)))
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
    if reason := _not_static(request):
        raise refusal(owner, request, reason)
    modules = _modules(request)
    held = {
        (number, registry, name): tensor
        for number, module in enumerate(modules)
        for registry in ("_parameters", "_buffers")
        for name, tensor in getattr(module, registry).items()
        if tensor is not None
    }
    tensors = list({id(tensor): tensor for tensor in held.values()}.values())
    versions = [tensor._version for tensor in tensors]
    hooks, names = _count_hooks(modules), list[str]()
    copied = set(request.plan.overwritten)

    with (
        random_streams_kept(),
        request.borrowed(constant_parameters=True),
        recording(request.layers, copied) as tape,
        seeing_checkpoints(request.model) as checkpointed,
        seeing_reads(modules) as reads,
    ):

        def phase_1(_: Sequence[Tensor], rest: tuple[Tensors, ...]) -> list[Tensor]:
            inputs, starts, carried, target = rest
            measured = replace(request, inputs=inputs, starts=starts, carried=carried, target=next(iter(target), None))
            scores = one_pass(with_own_starts(measured), Recorder(tape, copied))
            names[:] = scores
            return list(scores.values())

        try:
            graph = recorded_graph(phase_1, tensors, _tensors(request))
        except Exception as error:
            raise refusal(owner, request, "its operations could not be recorded: see above") from error
        written = any(tensor._version != version for tensor, version in zip(tensors, versions, strict=True))

    if any(reads[module] & OF_TRAINING for module in reads):
        raise refusal(owner, request, "forward reads the Trainer, such as for the number of the epoch")
    if written:
        raise refusal(owner, request, "forward writes to parameters or buffers in evaluation mode")
    if checkpointed:
        raise refusal(owner, request, "it checkpoints activations, which compilation would keep in memory")
    if reason := _not_repeatable(graph):
        raise refusal(owner, request, reason)

    used = [tensor for tensor, node in zip(tensors, graph.graph.nodes, strict=False) if node.users]
    for node in list(graph.graph.nodes)[: len(tensors)]:
        if not node.users:
            graph.graph.erase_node(node)
    graph.recompile()
    try:
        with random_streams_kept(), random_stream_kept(request.device), torch.no_grad():
            run = compiled_graph(graph, [*used, *tree_leaves(_tensors(request))])
            known = {place: tensor for place, tensor in held.items() if any(tensor is each for each in used)}
            result = Compiled(run, names, used, modules, hooks, known, _layout(request), values_read(reads))
            for _ in range(CALLS_TO_WARM_UP):
                result._run(request)
    except Exception as error:
        raise refusal(owner, request, "torch could not compile it: see above") from error
    return result


def _not_static(request: Request) -> str | None:
    """Say what speaks against one compiled pass before anything is recorded."""
    starts, plan = with_own_starts(request).starts, request.plan
    if request.max_rows is not None and len(starts[0]) + request.n_steps * request.num_samples > request.max_rows:
        return "its rows take more than one pass: choose a smaller num_samples"
    if plan.checkpointed or plan.memory < 1:
        return "it checkpoints activations, which compilation would keep in memory"
    modules = _modules(request)
    if any(kind_of(module).script or kind_of(module).sharded for module in modules):
        return "it has TorchScript modules, or parameters that FSDP shards"
    held = [tensor for module in modules for tensor in (*module._parameters.values(), *module._buffers.values())]
    held += tree_leaves(_tensors(request))
    if any(each is not None and (type(each) not in PLAIN_TENSORS or each.is_inference()) for each in held):
        return "it works with tensors of special classes, or such that were made in inference mode"
    if not all(isinstance(each, (*PLAIN, Tensor)) for each in tree_leaves(_others(request))):
        return "forward takes other arguments than tensors, numbers and text"
    return None


def _not_repeatable(graph: GraphModule) -> str | None:
    """Say what in a graph would not be the same in another batch."""
    for node in graph.graph.nodes:
        if node.op == "get_attr" and not all("lift_fresh" in str(user.target) for user in node.users):
            return "forward reads a tensor that is no argument, parameter or buffer"
        if node.op == "call_function" and torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            # Attention may drop, and is asked for the rate.
            names = [argument.name for argument in node.target._schema.arguments]
            rates = [value for name, value in zip(names, node.args, strict=False) if name == "dropout_p"]
            if "dropout_p" not in names or any((*rates, node.kwargs.get("dropout_p", 0.0))):
                return "forward draws random numbers in evaluation mode"
    return None


def refusal(owner: str, request: Request, reason: str) -> ConfigurationError:
    """Say why phase 1 of a model is not compiled."""
    return ConfigurationError(
        f"{owner}(compile_phase1=True) was given, but phase 1 of {type(request.model).__name__} can't be compiled: "
        f"{reason}.",
        "Compilation takes a forward that runs the same operations on each batch, and computes them from its "
        "arguments, parameters, buffers and attributes that don't change.",
        "Change what the reason names, or leave out compile_phase1: the scores are the same.",
    )


def _tensors(request: Request) -> tuple[Tensors, ...]:
    return request.inputs, request.starts, request.carried, () if request.target is None else (request.target,)


def _others(request: Request) -> tuple[object, ...]:
    """Give what a call takes besides rows. What is guarded for the model itself are modules and functions."""
    return tuple(each for each in request.guarded if isinstance(each, (tuple, list, dict)))


def _layout(request: Request) -> object:
    """Describe all that a request decides besides values."""
    kind = request.device.type
    precision = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    others = [each for each in tree_leaves(_others(request)) if not isinstance(each, Tensor)]
    looks = [[_look(each) for each in part] for part in _tensors(request)]
    return looks, others, precision, request.n_steps, request.quadrature, request.batch_dim


def _look(tensor: Tensor | None) -> object:
    return None if tensor is None else (tensor.shape, tensor.stride(), tensor.dtype, tensor.device)


def _modules(request: Request) -> list[nn.Module]:
    """List the modules that a call runs, each once."""
    roots = (request.model, *(each for each in request.guarded if isinstance(each, nn.Module)))
    return list({id(module): module for root in dict.fromkeys(roots) for module in all_modules(root)}.values())


def _count_hooks(modules: Sequence[nn.Module]) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules)
