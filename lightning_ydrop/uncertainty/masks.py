"""A network in evaluation, but for its dropout."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ydrop.layers import ConductanceDropout
from lightning_ydrop.layers.kinds import ELEMENTWISE, drops
from lightning_ydrop.layers.surroundings import drops_attention_weights
from lightning_ydrop.models.state import all_modules, evaluation_mode, leaving_no_trace, set_training


def stochastic_modules(model: nn.Module) -> list[nn.Module]:
    """List what drops something at random in a model: dropout layers, and attention and recurrence with a dropout."""
    return [module for module in all_modules(model) if drops(module)]


@contextmanager
def finding_shared_masks(dropped: Sequence[nn.Module], rows: int) -> Iterator[list[nn.Module]]:
    """Find which dropout layers are called on something that has no rows, such as a weight: all masks would be one.

    Args:
        dropped: What drops in the model that is called.
        rows: How many rows pass through it.

    Yields:
        Those that were, filled while the model runs.

    """
    shared: list[nn.Module] = []

    def look(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        # Rows come first, or behind the time; windows and the like make several of each.
        if inputs and isinstance(inputs[0], Tensor) and all(size % rows for size in inputs[0].shape[:2]):
            shared.append(layer)

    hooks = [layer.register_forward_pre_hook(look) for layer in dropped if isinstance(layer, ELEMENTWISE)]
    try:
        yield shared
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def dropping(model: nn.Module) -> Iterator[list[nn.Module]]:
    """Put a model into evaluation mode, but for what drops, without gradients; at the end it is as it was.

    A ConductanceDropout that has been driven drops at the running mean of its probabilities. Buffers and metrics
    that the forward pass updates are copies.

    Yields:
        What drops.

    """
    modules = all_modules(model)
    dropped = [module for module in modules if drops(module)]
    with ExitStack() as stack:
        stack.enter_context(leaving_no_trace(modules))
        stack.enter_context(torch.no_grad())
        for module in dropped:
            if isinstance(module, ConductanceDropout) and len(module.mean_drop_prob) > 0:
                stack.enter_context(module.dropping_at_mean())
        for module in [*dropped, *_attention_holding(modules)]:
            set_training(module, True)
            stack.callback(set_training, module, False)
        yield dropped


@contextmanager
def dropout_off(model: nn.Module) -> Iterator[None]:
    """Leave a model in its mode, but let nothing drop; at the end it is as it was."""
    modules = all_modules(model)
    dropped = [module for module in modules if drops(module)] + _attention_holding(modules)
    # cuDNN differentiates no recurrent layer that is in evaluation mode.
    recurrent = [(module, module.dropout) for module in dropped if isinstance(module, nn.RNNBase)]
    with evaluation_mode([module for module in dropped if not isinstance(module, nn.RNNBase)]):
        try:
            for module, _ in recurrent:
                module.dropout = 0.0
            yield
        finally:
            for module, p in recurrent:
                module.dropout = p


def _attention_holding(modules: Sequence[nn.Module]) -> list[nn.Module]:
    """List what holds a dropout of attention weights: it may read the rate, and drop itself when it is in training."""
    return [
        module
        for module in modules
        if any(
            isinstance(child, nn.Dropout) and drops(child) and drops_attention_weights(module, called)
            for called, child in module._modules.items()
        )
    ]
