"""What counts as a dropout layer."""

from torch import nn

TORCH_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def is_dropout_like(module: nn.Module) -> bool:
    """Tell whether a module drops something, by its class or the name of its class.

    What is called after dropout but holds other modules, such as a network, is judged by these.
    """
    kind = type(module).__name__.lower()
    named = any(word in kind for word in ("drop", "jumpout", "stochasticdepth")) and not module._modules
    return isinstance(module, TORCH_DROPOUTS) or named


def dropout_like_modules(model: nn.Module) -> list[str]:
    """Every module of the model that drops something, as `name (Class)`."""
    return [f"{name} ({type(module).__name__})" for name, module in model.named_modules() if is_dropout_like(module)]
