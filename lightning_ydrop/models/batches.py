"""What it takes to call a LightningModule, outside its own steps, on a batch of its loaders."""

from collections.abc import Callable
from typing import Any

from torch import nn

from lightning_ydrop.errors import ConfigurationError, describe
from lightning_ydrop.models.adapters import Adapter
from lightning_ydrop.models.calls import Inputs, Target


def own_method(model: nn.Module, name: str) -> Callable[..., Any] | None:
    """Find a method that a model, usually a LightningModule, may have for this package.

    Args:
        model: The model.
        name: "ydrop_inputs" or "ydrop_forward".

    Returns:
        The method, or None where the model has none.

    Raises:
        ConfigurationError: If the model has something of that name that can't be called.

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
    """Take inputs and target out of a batch.

    Args:
        model: The model, whose method `ydrop_inputs` reads the batch if it has one.
        adapter: It reads the batch otherwise.
        batch: A batch on the model's device.

    Returns:
        The inputs and the target, as in `Adapter.read`.

    Raises:
        ConfigurationError: If the method or the adapter returns no such pair.

    """
    method = own_method(model, "ydrop_inputs")
    reader = f"{adapter!r}.read" if method is None else f"{type(model).__name__}.ydrop_inputs"
    try:
        pair: Any = adapter.read(batch) if method is None else method(batch)
    except ConfigurationError:
        raise
    except Exception as error:
        error.add_note(
            f"lightning_ydrop called {reader} with the batch {describe(batch)}. "
            "It takes a batch of the loaders, on the device of the model, and returns (inputs, target). "
            "Let it read such a batch, or choose another way: a method `ydrop_inputs(batch)` of the LightningModule "
            "comes before the argument `adapter`."
        )
        raise
    if not (isinstance(pair, (tuple, list)) and len(pair) == 2):
        raise ConfigurationError(
            f"{reader} returned {describe(pair)}.",
            "It returns a pair (inputs, target).",
            "Return, for example, (batch['image'], batch['label']), or (x, None) without a target.",
        )
    inputs, target = pair
    return inputs, target
