"""A network in evaluation, but for its dropout."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn

from lightning_ydrop.errors import is_dropout_like
from lightning_ydrop.layers import ConductanceDropout, Jumpout
from lightning_ydrop.phase1.recording import all_modules, evaluation_mode, set_training, slow_attention


def stochastic_modules(model: nn.Module) -> list[nn.Module]:
    """List what drops something at random in a model: dropout layers, and attention and recurrence with a dropout."""
    return [
        module
        for module in all_modules(model)
        if is_dropout_like(module) or (isinstance(module, (nn.MultiheadAttention, nn.RNNBase)) and module.dropout > 0)
    ]


def draws_once_for_a_batch(module: nn.Module) -> bool:
    """Tell whether a module draws something that all samples of a batch share."""
    return isinstance(module, Jumpout) or getattr(module, "mode", None) == "batch"


@contextmanager
def dropping(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, but for what drops, without gradients; at the end it is as it was.

    A ConductanceDropout that has been driven drops at the running mean of its probabilities.
    """
    drops = stochastic_modules(model)
    driven = [
        (layer, layer.active, layer._applied_drop_prob.clone(), layer._applied_mean.clone())
        for layer in drops
        if isinstance(layer, ConductanceDropout) and len(layer.mean_drop_prob) > 0
    ]
    with evaluation_mode(all_modules(model)), torch.no_grad(), slow_attention():
        try:
            for module in drops:
                set_training(module, True)
            for layer, *_ in driven:
                layer.activate_mean()
            yield
        finally:
            for layer, active, drop_prob, mean in driven:
                layer._applied_drop_prob.copy_(drop_prob)
                layer._applied_mean.copy_(mean)
                layer.active = active
            for module in drops:
                set_training(module, False)


def dropout_off(model: nn.Module) -> AbstractContextManager[None]:
    """Leave a model in its mode, but for what drops, which is in evaluation; at the end it is as it was."""
    return evaluation_mode(stochastic_modules(model))
