"""A CUDA device that is not there: torch's fake tensors have a shape, a dtype and a device, but no values.

`fake_cuda` lets code run on such a device, and `Watch` lists what would be wrong or slow on a real one. Neither sees
wrong numbers, memory or time.
"""

import sys
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.graph import get_gradient_edge
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

import lightning_ydrop
from lightning_ydrop.models import snapshot, tensors
from lightning_ydrop.torch_internals import PLAIN_TENSORS

PACKAGE = str(Path(lightning_ydrop.__file__).parent)
MASKS = (torch.bool, torch.uint8)
# Hooks of tensors, by the node and the output that a gradient arrives at.
HOOKS: dict[tuple[Any, int], "OrderedDict[int, Callable[[Tensor], object]]"] = {}

# What CUDA refuses under torch.use_deterministic_algorithms(True), by the name that torch's documentation gives it. The
# documentation of older releases names some more, which stand at the end.
REFUSED: Mapping[str, tuple[str, ...]] = {
    "torch.nn.AvgPool3d": ("avg_pool3d_backward",),
    "torch.nn.AdaptiveAvgPool2d": ("_adaptive_avg_pool2d_backward",),
    "torch.nn.AdaptiveAvgPool3d": ("_adaptive_avg_pool3d_backward",),
    "torch.nn.AdaptiveMaxPool2d": ("adaptive_max_pool2d_backward",),
    "torch.nn.FractionalMaxPool2d": ("fractional_max_pool2d_backward",),
    "torch.nn.FractionalMaxPool3d": ("fractional_max_pool3d_backward",),
    "torch.nn.MaxUnpool1d": ("max_unpool2d",),
    "torch.nn.MaxUnpool2d": ("max_unpool2d",),
    "torch.nn.MaxUnpool3d": ("max_unpool3d",),
    "torch.nn.functional.interpolate": (
        "upsample_linear1d_backward",
        "upsample_bilinear2d_backward",
        "upsample_bicubic2d_backward",
        "upsample_trilinear3d_backward",
    ),
    "torch.nn.ReflectionPad1d": ("reflection_pad1d_backward",),
    "torch.nn.ReflectionPad2d": ("reflection_pad2d_backward",),
    "torch.nn.ReflectionPad3d": ("reflection_pad3d_backward",),
    "torch.nn.NLLLoss": ("nll_loss2d_forward", "nll_loss2d_backward"),  # of (B, C) it is another operator
    "torch.nn.CTCLoss": ("_ctc_loss_backward", "_cudnn_ctc_loss"),
    "torch.nn.EmbeddingBag": ("_embedding_bag_dense_backward",),
    "torch.Tensor.put_": ("put",),
    "torch.histc": ("histc",),
    "torch.bincount": ("bincount",),
    "torch.median": ("median",),
    "torch.nn.functional.grid_sample": ("grid_sampler_2d_backward", "grid_sampler_3d_backward"),
    "torch.Tensor.scatter_reduce": ("scatter_reduce",),
    "torch.Tensor.resize_": (),  # of quantised tensors, which hold no gradients
    "torch.nn.MaxPool3d": ("max_pool3d_with_indices_backward",),
    "torch.nn.ReplicationPad1d": ("replication_pad1d_backward",),
    "torch.nn.ReplicationPad2d": ("replication_pad2d_backward",),
    "torch.nn.ReplicationPad3d": ("replication_pad3d_backward",),
    "torch.kthvalue": ("kthvalue",),
    "torch.cumsum": ("cumsum",),
}
REFUSED_OPERATORS = frozenset(operator for operators in REFUSED.values() for operator in operators)
# Of some operators CUDA refuses only a part. By default it refuses all.
IS_REFUSED: Mapping[str, Callable[[Mapping[str, Any]], bool]] = {
    "cumsum": lambda given: given["self"].is_floating_point(),
    "bincount": lambda given: given.get("weights") is not None,
    "median": lambda given: "dim" in given,
    "scatter_reduce": lambda given: given["reduce"] == "prod",
    "_embedding_bag_dense_backward": lambda given: given["mode"] == 2,
}


@dataclass(frozen=True)
class Finding:
    """Something that a device would not like.

    Attributes:
        kind: What is wrong: "reads a value", "copies to the host", "waits for a copy", "mixes devices" or "is refused".
        operator: The operator of torch.
        shapes: Of its tensors.
        functions: Functions of the package that led to it, the innermost first.
        lines: Where these were.

    """

    kind: str
    operator: str
    shapes: tuple[tuple[int, ...], ...]
    functions: tuple[str, ...]
    lines: tuple[str, ...]


class Values(TorchDispatchMode):
    """Answers whoever looks at a value, since a fake tensor has none.

    Args:
        as_expected: Whether the host sees what gives no reason to worry: tensors are equal, `all` is true, every other
            boolean is false, and numbers are 0. Otherwise it sees the opposite, and numbers are 1.

    """

    def __init__(self, as_expected: bool = True) -> None:
        super().__init__()
        self.as_expected = as_expected

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = _name_of(func)
        if name in ("_local_scalar_dense", "item"):
            looked_at = args[0]
            if looked_at.dtype == torch.bool:
                return self.as_expected == hasattr(looked_at, "is_result_of_all")
            return (0.0 if looked_at.is_floating_point() else 0) + (not self.as_expected)
        if name == "equal":
            return self.as_expected
        if name == "nonzero":
            return args[0].new_empty((args[0].numel(), args[0].ndim), dtype=torch.int64)
        if name == "index":
            return func(args[0], _without_masks(args[1]))
        result = func(*args, **(kwargs or {}))
        if name == "all":
            result.is_result_of_all = True
        return result


class Watch(Values):
    """Lists what a CUDA device would not like, and how many operators ran.

    Attributes:
        findings: What is wrong, in the order in which it happened.
        num_operators: How many operators ran.

    """

    def __init__(self, as_expected: bool = True) -> None:
        super().__init__(as_expected)
        self.findings: list[Finding] = []
        self.num_operators = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.namespace == "prim":  # a question such as that for the device, which a fake tensor answers itself
            return func(*args, **(kwargs or {}))
        self.num_operators += 1
        given = {**dict(zip([each.name for each in func._schema.arguments], args, strict=False)), **(kwargs or {})}
        for kind in _complaints(func, given):
            shapes = tuple(tuple(tensor.shape) for tensor in _tensors_in(given))
            self.findings.append(Finding(kind, func._schema.name, shapes, *_callers()))
        return super().__torch_dispatch__(func, types, args, kwargs)


@contextmanager
def fake_cuda() -> Iterator[None]:
    """Let `device="cuda"` be a device without values, memory and driver.

    Tensors of the CPU have no values either. What needs a driver, or does not know fake tensors, is replaced.
    """
    with ExitStack() as stack:
        # It asks the driver for the state of the device's random stream.
        stack.enter_context(patch("torch.random.fork_rng", lambda **_: nullcontext()))
        # Its engine asks the driver for the device's streams.
        stack.enter_context(patch("torch.autograd.grad", gradients))
        HOOKS.clear()
        stack.enter_context(patch.object(Tensor, "register_hook", _register_hook))
        # The type of a fake tensor is another one, and it would not be guarded at all.
        stack.enter_context(patch.object(snapshot, "PLAIN_TENSORS", (*PLAIN_TENSORS, FakeTensor)))
        # A fake tensor has no memory that could be shared.
        stack.enter_context(patch.object(tensors, "copy_on_write", lambda tensor: None))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=False))
        yield


def _register_hook(tensor: Tensor, hook: Callable[[Tensor], object]) -> RemovableHandle:
    """Register a hook that `gradients` calls."""
    edge = get_gradient_edge(tensor)
    hooks = HOOKS.setdefault((edge.node, edge.output_nr), OrderedDict())
    handle = RemovableHandle(hooks)
    hooks[handle.id] = hook
    return handle


def gradients(
    outputs: Tensor,
    inputs: Sequence[Tensor],
    grad_outputs: Tensor,
    retain_graph: bool = False,
    materialize_grads: bool = False,
    allow_unused: bool = True,
) -> tuple[Tensor | None, ...]:
    """Differentiate as `torch.autograd.grad` does, but call the nodes of the graph from here.

    Args:
        outputs: What is differentiated.
        inputs: With respect to what.
        grad_outputs: The gradient of the outputs.
        retain_graph: Whether it may be called again. Here it always may.
        materialize_grads: Whether zeros stand for gradients that do not exist. Otherwise None does.
        allow_unused: Whether there may be such. Here there always may.

    """
    root = get_gradient_edge(outputs)
    uses: defaultdict[Any, int] = defaultdict(int)  # of each node, by nodes closer to the outputs
    found: set[Any] = {root.node}
    ahead: list[Any] = [root.node]
    while ahead:
        for node, _ in ahead.pop().next_functions:
            if node is None:
                continue
            uses[node] += 1
            if node not in found:
                found.add(node)
                ahead.append(node)
    arrived: defaultdict[Any, dict[int, Tensor]] = defaultdict(dict, {root.node: {root.output_nr: grad_outputs}})
    ready: list[Any] = [root.node]  # all that uses these nodes has been called
    while ready:
        node = ready.pop()
        for place, gradient in arrived[node].items():
            for hook in HOOKS.get((node, place), {}).values():
                with torch.no_grad():
                    hook(gradient)
        passed: Any = [None] * len(node.next_functions)
        if arrived[node] and node.next_functions:
            passed = node(*(arrived[node].get(place) for place in range(len(node._input_metadata))))
            passed = passed if isinstance(passed, tuple) else (passed,)
        for gradient, (following, place) in zip(passed, node.next_functions, strict=True):
            if following is None:
                continue
            if gradient is not None:
                shape = following._input_metadata[place].shape
                # What a node passes on may still have to be added up over broadcast dimensions.
                gradient = gradient if gradient.shape == shape else gradient.sum_to_size(shape)
                before = arrived[following].get(place)
                arrived[following][place] = gradient if before is None else before + gradient
            uses[following] -= 1
            if not uses[following]:
                ready.append(following)
    edges = map(get_gradient_edge, inputs)
    taken = [arrived[edge.node].get(edge.output_nr) for edge in edges]
    missing = torch.zeros_like if materialize_grads else lambda tensor: None
    return tuple(missing(tensor) if each is None else each for tensor, each in zip(inputs, taken, strict=True))


def _name_of(func: Any) -> str:
    """Give an operator's name without its namespace, and without what marks it as one in place."""
    return func._schema.name.rpartition("::")[2].rstrip("_") if hasattr(func, "_schema") else ""


def _complaints(func: Any, given: Mapping[str, Any]) -> Iterator[str]:
    """Say what is wrong with a call of an operator.

    Args:
        func: The operator.
        given: Its arguments by name.

    """
    name, tensors = _name_of(func), _tensors_in(given)
    if not any(_is_on_device(tensor) for tensor in tensors) and not _is_device(given.get("device")):
        return
    if _looks_at_values(func, name, given):
        yield "reads a value"
    if name in ("_to_copy", "copy", "_foreach_copy"):
        for source, is_to_device in _copies(name, given):
            if _is_on_device(source) and not is_to_device:
                yield "copies to the host"
            elif not _is_on_device(source) and is_to_device and source.numel() > 0 and not given.get("non_blocking"):
                yield "waits for a copy"
    elif name in ("index", "index_put", "_index_put_impl", "where"):
        # These take tensors of the CPU, and copy them to the device themselves.
        if any(not _is_on_device(tensor) and tensor.numel() > 0 for tensor in tensors):
            yield "waits for a copy"
    # A tensor of the CPU without dimensions is a number to the device.
    elif len({tensor.device.type for tensor in tensors if tensor.ndim > 0}) > 1:
        yield "mixes devices"
    if name in REFUSED_OPERATORS and IS_REFUSED.get(name, lambda given: True)(given):
        yield "is refused"


def _looks_at_values(func: Any, name: str, given: Mapping[str, Any]) -> bool:
    """Tell whether the host has to know values, for a number or for a shape."""
    if name in ("index", "index_put", "_index_put_impl"):
        has_mask = any(each is not None and each.dtype in MASKS for each in given["indices"])
        # To set one value wherever a mask is set takes no indices.
        return has_mask and not ("values" in given and given["values"].numel() == 1)
    tags = getattr(func, "tags", ())
    return name == "equal" or torch.Tag.data_dependent_output in tags or torch.Tag.dynamic_output_shape in tags


def _copies(name: str, given: Mapping[str, Any]) -> list[tuple[Tensor, bool]]:
    """List what an operator copies, each with whether it goes to the device."""
    if name == "_to_copy":
        return [(given["self"], _is_device(given.get("device") or given["self"].device))]
    if name == "copy":
        return [(given["src"], _is_on_device(given["self"]))]
    return [(source, _is_on_device(goal)) for goal, source in zip(given["self"], given["src"], strict=True)]


def _without_masks(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Put numbers in the place of masks, as if these were set everywhere."""
    numbers: list[Tensor | None] = []
    for each in indices:
        if each is not None and each.dtype in MASKS:
            numbers += [each.new_empty(each.numel(), dtype=torch.int64)] * each.ndim
        else:
            numbers.append(each)
    return numbers


def _tensors_in(given: Any) -> list[Tensor]:
    return [value for value in tree_leaves(given) if isinstance(value, Tensor)]


def _is_on_device(tensor: Tensor) -> bool:
    return tensor.device.type == "cuda"


def _is_device(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def _callers() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Name the functions of the package that are running, the innermost first, and the lines where they are."""
    functions, lines = [], []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.startswith(PACKAGE):
            functions.append(frame.f_code.co_name)
            lines.append(f"{frame.f_code.co_filename.removeprefix(PACKAGE)}:{frame.f_lineno}")
        frame = frame.f_back
    return tuple(functions), tuple(lines)
