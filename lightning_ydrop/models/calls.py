"""How any model is called, and what it returns."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from lightning_ydrop.errors import ConfigurationError, describe

Inputs = Any
Target = Tensor | None


def signature_of(model: nn.Module, forward: Callable[..., Any]) -> inspect.Signature:
    """Tell how `forward`, which may be the model itself, is called."""
    return inspect.signature(model.forward if forward is model else forward)


def arguments_of(signature: inspect.Signature, inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Tell the positional from the keyword arguments that inputs are.

    Raises:
        ConfigurationError: If what is called does not take them.

    """
    if isinstance(inputs, Mapping):
        keywords = {str(name): value for name, value in inputs.items()}
        if _takes(signature, (), keywords):
            return (), keywords
        positional: tuple[Any, ...] = (inputs,)
    else:
        positional = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
    if not _takes(signature, positional, {}):
        raise ConfigurationError(
            f"The inputs are {describe(inputs)}, and the model's forward takes {signature}.",
            "A tensor is given to forward as it is, a tuple as positional arguments, a mapping as keyword arguments.",
            "Let the inputs be those that forward takes: with an adapter, or with `ydrop_inputs` in the "
            "LightningModule.",
        )
    return positional, {}


def _takes(signature: inspect.Signature, positional: tuple[Any, ...], keywords: Mapping[str, Any]) -> bool:
    try:
        signature.bind(*positional, **keywords)
    except TypeError:
        return False
    return True


def read_output(output: Any) -> Tensor:
    """Find the one tensor that counts: the output itself, its `logits`, or the first floating tensor in it.

    Args:
        output: What the model returned: a tensor, an object or mapping with `logits`, a mapping, dataclass or tuple.

    Returns:
        Floating, shape (rows, *).

    Raises:
        ConfigurationError: If there is none.

    """
    candidates = [output, getattr(output, "logits", None)]
    if isinstance(output, Mapping):
        candidates += [output.get("logits"), *output.values()]
    elif dataclasses.is_dataclass(output):
        candidates += [getattr(output, field.name) for field in dataclasses.fields(output)]
    elif isinstance(output, (tuple, list)):
        candidates += output
    for candidate in candidates:
        if isinstance(candidate, Tensor) and candidate.is_floating_point() and candidate.ndim > 0:
            return candidate
    raise ConfigurationError(
        f"The model's forward returned {describe(output)}.",
        "It holds a floating tensor with a row for each sample: it is that tensor, or has it as its `logits`, or the "
        "first such tensor in it is taken.",
        "Return the logits from forward; whatever else is needed can be computed in training_step.",
    )


def read_rows(output: Any, rows: int) -> Tensor:
    """Find the one tensor that counts, as `read_output` does, and check that it has a row for each one that went in.

    Args:
        output: What the model returned.
        rows: How many went in.

    Returns:
        Floating, shape (rows, *).

    Raises:
        ConfigurationError: If there is none.

    """
    found = read_output(output)
    if len(found) != rows:
        raise ConfigurationError(
            f"The model's forward returned {describe(found)} for {rows} rows.",
            "The output has one row for each row of the inputs, in its first dimension.",
            "Return logits of shape (B, ...), with the batch first.",
        )
    return found
