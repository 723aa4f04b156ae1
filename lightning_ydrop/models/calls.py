"""How any model is called, and what it returns."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_ydrop.errors import ConfigurationError, describe

Inputs = Any
Target = Tensor | None

SQUEEZED = "The dimension of the batch has to stay when there is one row: write .squeeze(-1) instead of .squeeze()."


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
        listed = isinstance(inputs, (tuple, list)) and not isinstance(inputs, PackedSequence)
        positional = tuple(inputs) if listed else (inputs,)
    if not _takes(signature, positional, {}):
        by_name = any(each.kind in (each.VAR_KEYWORD, each.KEYWORD_ONLY) for each in signature.parameters.values())
        raise ConfigurationError(
            f"The inputs are {describe(inputs)}, and the model's forward takes {signature}.",
            "A tensor is given to forward as it is, a tuple as positional arguments, a mapping as keyword arguments.",
            "Give the inputs that forward takes, by an adapter or by `ydrop_inputs` in the LightningModule."
            + (" KeyAdapter(..., keywords=True) passes them by name." if by_name else ""),
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
    is_scalar = any(isinstance(each, Tensor) and each.is_floating_point() for each in candidates)
    raise ConfigurationError(
        f"The model's forward returned {describe(output)}.",
        "The output is a floating tensor with a row for each sample, or has one as its `logits`. Otherwise the first "
        "such tensor in it counts.",
        "Return the logits from forward; whatever else is needed can be computed in training_step."
        + (f" {SQUEEZED}" if is_scalar else ""),
    )


def read_rows(output: Any, rows: int, batch_dim: int = 0) -> Tensor:
    """Find the one tensor that counts, as `read_output` does, and check that it has a row for each one that went in.

    Args:
        output: What the model returned.
        rows: How many went in.
        batch_dim: The dimension of the rows; the first one also serves, as in the last state of a recurrent layer.

    Returns:
        Floating, shape (rows, *).

    Raises:
        ConfigurationError: If there is none.

    """
    tensor = read_output(output)
    dim = dim_of_rows(tensor, rows, batch_dim)
    if dim is None:
        raise ConfigurationError(
            f"The model's forward returned {describe(tensor)} for {rows} rows.",
            "The output has one row for each row of the inputs, in its first dimension"
            f"{f' or in dimension {batch_dim}, as batch_dim={batch_dim} says' if batch_dim else ''}.",
            "Return logits of shape (B, ...), with the batch first, or say with batch_dim=... which dimension it is."
            + (f" {SQUEEZED}" if rows == 1 else ""),
        )
    return tensor.movedim(dim, 0) if dim else tensor


def dim_of_rows(tensor: Tensor, rows: int, batch_dim: int) -> int | None:
    """Find the dimension of the rows: `batch_dim` if it has as many entries, else the first if that has, else none."""
    for dim in (batch_dim, 0):
        if tensor.ndim > dim and tensor.shape[dim] == rows:
            return dim
    return None


def differ(one: Tensor, other: Tensor) -> bool:
    """Tell whether outputs differ by more than the order of additions explains."""
    if one.shape != other.shape:
        return True
    precision = one.dtype
    if torch.is_autocast_enabled(one.device.type):
        precision = torch.get_autocast_dtype(one.device.type)
    tolerance = max(0.01, 16 * torch.finfo(precision).eps)
    one, other = one.double(), other.double()
    both = one.isfinite() & other.isfinite()
    scale = other.where(both, 0.0).abs().max()
    return bool(((one - other).where(both, 0.0).abs() > tolerance * scale).any())
