"""The one place that says what counts as a dropout layer."""

from torch import nn

from lightning_ydrop.layers.conductance_dropout import ConductanceDropout
from lightning_ydrop.layers.jumpout import Jumpout
from lightning_ydrop.layers.pattern_dropout import PatternDropout

CHANNEL_DROPOUTS = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
# The layers that `convert_dropout` replaces.
CONVERTED = (nn.Dropout, *CHANNEL_DROPOUTS)
TORCH_DROPOUTS = (*CONVERTED, nn.AlphaDropout, nn.FeatureAlphaDropout)
OUR_DROPOUTS = (ConductanceDropout, Jumpout, PatternDropout)
# Layers that draw for each element of their input, or for each of its channels.
ELEMENTWISE = (*TORCH_DROPOUTS, ConductanceDropout)
# Layers that draw for each sample, though the samples of a batch may share a scale.
FOR_EACH_SAMPLE = (*ELEMENTWISE, PatternDropout)
# Layers that do something else and have a rate in their attribute `dropout`.
WITH_A_DROPOUT = (nn.MultiheadAttention, nn.RNNBase)
# Dropout layers of other libraries have one of these in the name of their class.
NAMED_LIKE_DROPOUT = ("drop", "jumpout", "stochasticdepth")


def is_dropout_like(module: nn.Module) -> bool:
    """Tell whether a module is a dropout layer of any kind, by its class or the name of its class.

    A module that holds others, such as a network, is not judged by its name.
    """
    kind = type(module).__name__.lower()
    named = any(word in kind for word in NAMED_LIKE_DROPOUT) and not module._modules
    return isinstance(module, (*TORCH_DROPOUTS, *OUR_DROPOUTS)) or named


def drops(module: nn.Module) -> bool:
    """Tell whether a module drops something: a dropout layer, or attention or recurrent layers with a rate above 0.

    A layer of torch with rate 0 drops nothing. One of ours may have other rates than its `p`.
    """
    if isinstance(module, WITH_A_DROPOUT):
        # A recurrent layer drops between its layers, so it needs two of them.
        return module.dropout > 0 and getattr(module, "num_layers", 2) > 1
    if isinstance(module, TORCH_DROPOUTS):
        return module.p > 0
    if isinstance(module, PatternDropout):
        return not module.pattern.is_empty
    return is_dropout_like(module)


def draws_for_each_sample(module: nn.Module) -> bool:
    """Tell whether a module that drops is known to draw separately for each sample of a batch."""
    known = isinstance(module, (*FOR_EACH_SAMPLE, *WITH_A_DROPOUT)) and not getattr(module, "shared_masks", False)
    return known or getattr(module, "mode", None) == "row"  # torchvision's StochasticDepth


def dropout_like_modules(model: nn.Module) -> list[str]:
    """List every dropout layer of a model, as `name (Class)`."""
    return [f"{name} ({type(module).__name__})" for name, module in model.named_modules() if is_dropout_like(module)]
