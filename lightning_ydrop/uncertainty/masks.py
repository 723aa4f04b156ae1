"""Dropout in evaluation mode, and training without dropout."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from lightning_ydrop.errors import ConfigurationError, describe
from lightning_ydrop.layers import ConductanceDropout
from lightning_ydrop.layers.kinds import drops
from lightning_ydrop.layers.surroundings import drops_attention_weights
from lightning_ydrop.models.modules import all_modules, evaluation_mode, set_training
from lightning_ydrop.models.state import leaving_no_trace
from lightning_ydrop.models.streams import random_streams_from_torch


def stochastic_modules(model: nn.Module) -> list[nn.Module]:
    """List the modules that drop in a model: dropout layers, and attention and recurrent layers with a dropout rate."""
    return [module for module in all_modules(model) if drops(module)]


@contextmanager
def dropping(model: nn.Module, beside: Sequence[object] = ()) -> Iterator[list[nn.Module]]:
    """Put everything in a model except what drops into evaluation mode, without gradients, and undo that at the end.

    A ConductanceDropout that has been driven drops at the running mean of its probabilities. Forward passes inside
    leave no trace in the model: see `leaving_no_trace`. Masks that Python or NumPy draws follow from torch's stream.

    Args:
        model: The model.
        beside: Whatever else the passes run or may change. In these modules nothing drops.

    Yields:
        The modules that drop.

    """
    modules = all_modules(model)
    dropped = [module for module in modules if drops(module)]
    with ExitStack() as stack:
        stack.enter_context(leaving_no_trace([model, *beside]))
        stack.enter_context(random_streams_from_torch())
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
    """Leave a model in its mode, let nothing in it drop, and undo that at the end."""
    modules = all_modules(model)
    dropped = [module for module in modules if drops(module)] + _attention_holding(modules)
    # These stay in training mode: cuDNN can't differentiate a recurrent layer in evaluation mode.
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
    """List the modules that hold a dropout of attention weights.

    Such a module may read the rate of that layer and drop the weights itself, in training mode.
    """
    return [
        module
        for module in modules
        if any(
            isinstance(child, nn.Dropout) and drops(child) and drops_attention_weights(module, called)
            for called, child in module._modules.items()
        )
    ]


def check_drops(owner: str, model: nn.Module) -> None:
    """Refuse a model in which nothing drops: all its predictions would be the same.

    Raises:
        ConfigurationError: If nothing does.

    """
    if not stochastic_modules(model):
        raise ConfigurationError(
            f"{owner} was given {describe(model)}, which has no layer that drops.",
            "It averages over masks of dropout: nn.Dropout and its kin, ConductanceDropout, Jumpout.",
            "Pass the network that was trained with dropout, with its dropout layers. If it calls F.dropout instead, "
            "pass functional=True.",
        )
