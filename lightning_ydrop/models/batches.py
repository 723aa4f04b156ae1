"""What it takes to call a LightningModule, outside its own steps, on a batch of its loaders."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule
from torch import nn

from lightning_ydrop.errors import ConfigurationError, describe
from lightning_ydrop.models.adapters import Adapter
from lightning_ydrop.models.calls import Inputs, Target
from lightning_ydrop.models.state import all_modules


def own_method(model: nn.Module, name: str) -> Callable[..., Any] | None:
    """Find a method that a model, as a rule a LightningModule, may have for Y-Drop.

    Raises:
        ConfigurationError: If what has that name is no method.

    """
    method: Any = getattr(model, name, None)
    if method is not None and not callable(method):
        raise ConfigurationError(
            f"{type(model).__name__}.{name} is {describe(method)}.",
            f"`{name}` is a method that lightning_ydrop calls where a model has it.",
            "Write a method of that name, or call the attribute something else.",
        )
    return method  # type: ignore[no-any-return]


def read_batch(model: nn.Module, adapter: Adapter, batch: Any) -> tuple[Inputs, Target]:
    """Take inputs and target out of a batch: by the model's own `ydrop_inputs`, otherwise by an adapter.

    Raises:
        ConfigurationError: If that gives no such pair.

    """
    own = own_method(model, "ydrop_inputs")
    read: Any = adapter.read(batch) if own is None else own(batch)
    if not (isinstance(read, (tuple, list)) and len(read) == 2):
        reader = f"{adapter!r}.read" if own is None else f"{type(model).__name__}.ydrop_inputs"
        raise ConfigurationError(
            f"{reader} returned {describe(read)}.",
            "It returns a pair (inputs, target).",
            "Return, for example, (batch['image'], batch['label']), or (x, None) without a target.",
        )
    inputs, target = read
    return inputs, target


@contextmanager
def logging_muted(model: nn.Module) -> Iterator[None]:
    """Keep what a model logs in its forward pass out of the logs: to be measured is no step of its own."""
    modules = [module for module in all_modules(model) if isinstance(module, LightningModule)]
    # Set on the instance, where it stands before the method of the class. `log_dict` comes here too.
    own = [module.__dict__.get("log") for module in modules]
    try:
        for module in modules:
            module.__dict__["log"] = _ignore
        yield
    finally:
        for module, log in zip(modules, own, strict=True):
            if log is None:
                del module.__dict__["log"]
            else:
                module.__dict__["log"] = log


def _ignore(*args: Any, **kwargs: Any) -> None:
    """Take what would have been logged."""
