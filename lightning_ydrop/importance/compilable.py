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
from lightning_ydrop.models.modules import all_modules, kind_of
from lightning_ydrop.models.reads import OF_TRAINING, PLAIN, Reads
from lightning_ydrop.torch_internals import PLAIN_TENSORS

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
    held = [tensor for module in modules for tensor in (*module._parameters.values(), *module._buffers.values())]
    held += tree_leaves(tensors_of(request))
    if not all(each is None or is_plain(each) for each in held):
        return "it works with tensors that are sparse, nested, of special classes, or made in inference mode"
    if not all(isinstance(each, (*PLAIN, Tensor)) for each in tree_leaves(others_of(request))):
        return "forward takes other arguments than tensors, numbers and text"
    return None


def not_repeatable(graph: GraphModule, reads: Reads, *, written: bool) -> str | None:
    """Say what in a graph would not be the same in another batch.

    Args:
        graph: The recorded operations.
        reads: Which attributes forward has read.
        written: Whether it has written to parameters or buffers.

    """
    if any(names & OF_TRAINING for names in reads.values()):
        return "forward reads the Trainer, such as for the number of the epoch"
    if written:
        return "forward writes to parameters or buffers in evaluation mode"
    for node in graph.graph.nodes:
        # A constant in the code is copied when it is read. Another tensor may be replaced or written to.
        if node.op == "get_attr" and not all("lift_fresh" in str(user.target) for user in node.users):
            return "forward reads a tensor that is no argument, parameter or buffer"
        if node.op == "call_function" and torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            # Attention may drop, and is given the rate.
            names = [argument.name for argument in node.target._schema.arguments]
            rates = [value for name, value in zip(names, node.args, strict=False) if name == "dropout_p"]
            if "dropout_p" not in names or any((*rates, node.kwargs.get("dropout_p", 0.0))):
                return "forward draws random numbers in evaluation mode"
    return None


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
    return tuple(each for each in request.guarded if isinstance(each, (tuple, list, dict)))


def modules_of(request: Request) -> list[nn.Module]:
    """List the modules that a call runs, each once."""
    roots = (request.model, *(each for each in request.guarded if isinstance(each, nn.Module)))
    return list({id(module): module for root in dict.fromkeys(roots) for module in all_modules(root)}.values())
