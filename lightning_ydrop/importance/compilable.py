"""Which phase 1 can be compiled, and what is said of those that can't."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

from lightning_ydrop.errors import ConfigurationError
from lightning_ydrop.importance.baseline import Tensors
from lightning_ydrop.importance.passes import with_own_starts
from lightning_ydrop.importance.request import Request
from lightning_ydrop.models.descriptions import OF_TRAINING, PLAIN
from lightning_ydrop.models.looks import Looks
from lightning_ydrop.models.modules import all_modules, kind_of, overrides_train
from lightning_ydrop.models.reads import Reads
from lightning_ydrop.torch_internals import PLAIN_TENSORS

DRAWS = "forward draws random numbers in evaluation mode"
CHECKPOINTS = "it checkpoints activations, which compilation would keep in memory"


def not_static(request: Request, modules: Sequence[nn.Module]) -> str | None:
    """Say what speaks against one compiled pass before anything is recorded."""
    starts, plan = with_own_starts(request).starts, request.plan
    if request.max_rows is not None and len(starts[0]) + request.n_steps * request.num_samples > request.max_rows:
        return "its rows take more than one pass: choose a smaller num_samples"
    if plan.checkpointed or plan.memory < 1:
        return CHECKPOINTS
    if any(kind_of(module).script or kind_of(module).sharded for module in modules):
        return "it has TorchScript modules, or parameters that FSDP shards"
    for module in modules:
        if overrides_train(module) and not kind_of(module).ours:
            return f"train() or eval() of {type(module).__name__} is its own, and may do more than set flags"
    held = [tensor for module in modules for tensor in (*module._parameters.values(), *module._buffers.values())]
    held += tree_leaves(tensors_of(request))
    if not all(each is None or is_plain(each) for each in held):
        return "it works with tensors that are sparse, nested, of special classes, or made in inference mode"
    if not all(isinstance(each, (*PLAIN, Tensor)) for each in tree_leaves(others_of(request))):
        return "forward takes other arguments than tensors, numbers and text"
    return None


def not_repeatable(
    graph: GraphModule, reads: Reads, looks: Looks, *, held: int, written: bool, drawn: bool
) -> str | None:
    """Say what in a graph would not be the same in another batch.

    Args:
        graph: The recorded operations.
        reads: Which attributes forward has read.
        looks: Which values it has looked at.
        held: How many of the graph's first arguments are parameters and buffers.
        written: Whether it has written to them.
        drawn: Whether it has drawn random numbers of Python or NumPy.

    """
    if any(names & OF_TRAINING for names in reads.names.values()):
        return "forward reads the Trainer, such as for the number of the epoch"
    if written or _writes_to_the_first(held, graph):
        return "forward writes to parameters or buffers in evaluation mode"
    if drawn:
        return DRAWS
    if looks.reasons:
        return looks.reasons[0]
    for node in graph.graph.nodes:
        # A constant in the code is copied when it is read. Another tensor may be replaced or written to.
        if node.op == "get_attr" and not all("lift_fresh" in str(user.target) for user in node.users):
            return "forward reads a tensor that is no argument, parameter or buffer"
        if node.op == "call_function" and torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            # Attention may drop, and is given the rate.
            names = [argument.name for argument in node.target._schema.arguments]
            rates = [value for name, value in zip(names, node.args, strict=False) if name == "dropout_p"]
            if "dropout_p" not in names or any((*rates, node.kwargs.get("dropout_p", 0.0))):
                return DRAWS
    return None


def _writes_to_the_first(held: int, graph: GraphModule) -> bool:
    """Tell whether a graph writes to one of its first arguments, also through `.data`, which no version shows."""
    nodes = list(graph.graph.nodes)
    same_memory = set(nodes[:held])
    for node in nodes:
        if node.op != "call_function" or not hasattr(node.target, "_schema"):
            continue
        given = [*zip(node.target._schema.arguments, node.args, strict=False)]
        given += [(each, node.kwargs[each.name]) for each in node.target._schema.arguments if each.name in node.kwargs]
        shared = [each.alias_info for each, value in given if each.alias_info is not None and value in same_memory]
        if any(each.is_write for each in shared):
            return True
        if shared:
            same_memory.add(node)
    return False


def is_plain(tensor: Tensor) -> bool:
    """Tell whether a tensor is no more than its values in memory."""
    return (
        type(tensor) in PLAIN_TENSORS
        and tensor.layout == torch.strided
        and not (tensor.is_nested or tensor.is_inference())
    )


def refusal(owner: str, request: Request, reason: str) -> ConfigurationError:
    """Say why phase 1 of a model is not compiled."""
    return ConfigurationError(
        f"{owner}(compile_phase1=True) was given, but phase 1 of {type(request.model).__name__} can't be compiled: "
        f"{reason}.",
        "Compilation takes a forward that runs the same operations on each batch, and computes them from its "
        "arguments, parameters, buffers and attributes that don't change.",
        "Change what the reason names, or leave out compile_phase1: the scores are the same.",
    )


def tensors_of(request: Request) -> tuple[Tensors, ...]:
    """Give the tensors of a request that differ from batch to batch."""
    return request.inputs, request.starts, request.carried, () if request.target is None else (request.target,)


def others_of(request: Request) -> tuple[object, ...]:
    """Give what a call takes besides rows. What is guarded for the model itself are modules and functions."""
    return tuple(each for each in request.guarded if isinstance(each, (Tensor, tuple, list, dict)))


def callers_of(request: Request) -> tuple[object, ...]:
    """Give what takes part in a pass, and is no module: a function that calls the model, and the objective."""
    collections = (nn.Module, Tensor, tuple, list, dict)
    return (*(each for each in request.guarded if not isinstance(each, collections)), request.objective)


def modules_of(request: Request) -> list[nn.Module]:
    """List the modules that a call runs, each once."""
    roots = (request.model, *(each for each in request.guarded if isinstance(each, nn.Module)))
    return list({id(module): module for root in dict.fromkeys(roots) for module in all_modules(root)}.values())
