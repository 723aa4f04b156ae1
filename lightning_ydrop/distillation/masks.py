"""A network in evaluation, but for its dropout."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lightning_ydrop.errors import is_dropout_like
from lightning_ydrop.layers import ConductanceDropout, Jumpout
from lightning_ydrop.phase1.recording import all_modules, slow_attention


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
    driven = [
        (layer, layer.active, layer._applied_drop_prob.clone(), layer._applied_mean.clone())
        for layer in all_modules(model)
        if isinstance(layer, ConductanceDropout) and len(layer.mean_drop_prob) > 0
    ]
    with _training_alone(model, stochastic_modules(model)), torch.no_grad(), slow_attention():
        for layer, *_ in driven:
            layer.activate_mean()
        try:
            yield
        finally:
            for layer, active, drop_prob, mean in driven:
                layer._applied_drop_prob.copy_(drop_prob)
                layer._applied_mean.copy_(mean)
                layer.active = active


@contextmanager
def dropout_off(model: nn.Module) -> Iterator[None]:
    """Leave a model in its mode, but for what drops, which is in evaluation; at the end it is as it was."""
    drops = set(map(id, stochastic_modules(model)))
    with _training_alone(model, [each for each in all_modules(model) if each.training and id(each) not in drops]):
        yield


@contextmanager
def _training_alone(model: nn.Module, training: list[nn.Module]) -> Iterator[None]:
    """Set the flags alone: a user's model may do other things in train() and eval()."""
    modules = all_modules(model)
    flags = [module.training for module in modules]
    for module in modules:
        module.training = False
    for module in training:
        module.training = True
    try:
        yield
    finally:
        for module, flag in zip(modules, flags, strict=True):
            module.training = flag
