"""What a model is called with, seen as tensors that have a row for each sample."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_ydrop.checks import is_real
from lightning_ydrop.errors import ConfigurationError, describe
from lightning_ydrop.models.calls import Inputs, arguments_of

Baseline = float | Tensor | None | Sequence[float | Tensor | None]
Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Call:
    """How a model is called, as a function of the tensors that have a row for each sample.

    Attributes:
        model: What is called.
        positional: Its positional arguments.
        keywords: Its keyword arguments.
        roles: Of every tensor in them, in the order in which they stand: "walked", "carried" or "fixed".

    """

    model: Callable[..., Any]
    positional: tuple[Any, ...]
    keywords: Mapping[str, Any]
    roles: tuple[str, ...]

    def __call__(self, walked: Tensors, carried: Tensors) -> Any:
        """Call the model with other rows: of the floating inputs, and of what goes along with them."""
        rows: dict[str, Iterator[Tensor]] = {"walked": iter(walked), "carried": iter(carried)}
        roles = iter(self.roles)

        def replace(tensor: Tensor) -> Tensor:
            role = next(roles)
            return tensor if role == "fixed" else next(rows[role])

        # One after the other: both are flat as a rule, and the library is quick with what is.
        positional = apply_to_collection(list(self.positional), Tensor, replace)
        keywords = apply_to_collection(dict(self.keywords), Tensor, replace)
        return self.model(*positional, **keywords)


def arrange(
    model: Callable[..., Any], signature: inspect.Signature, inputs: Inputs, baseline: Baseline, *, walk: bool
) -> tuple[Call, Tensors, Tensors]:
    """Find out which tensors of the inputs have a row for each sample, and which of these can be walked to.

    Args:
        model: What is called.
        signature: How it can be called.
        inputs: A tensor, a tuple or list of arguments, or a mapping: of arguments by name where the model takes them
            so, otherwise one argument. Arguments may nest tensors in lists, tuples, mappings and dataclasses.
        baseline: Of a sequence, None says that a floating tensor is carried along and not walked to.
        walk: Whether the path lies between inputs; it may lie behind a module instead.

    Returns:
        The call; the tensors that are walked to, floating (B, *); and those that are carried along, (B, *).

    Raises:
        ConfigurationError: If there is nothing to walk to, or it is not clear what the samples are.

    """
    positional, keywords = arguments_of(signature, inputs)
    tensors = _tensors_of(positional, keywords)
    if any(tensor.is_inference() for tensor in tensors):
        positional = tuple(apply_to_collection(list(positional), Tensor, ordinary))
        keywords = apply_to_collection(dict(keywords), Tensor, ordinary)
        tensors = _tensors_of(positional, keywords)
    floating = [tensor for tensor in tensors if tensor.is_floating_point() and tensor.ndim > 0]
    candidates = floating if walk else [tensor for tensor in tensors if tensor.ndim > 0]
    if not candidates:
        raise ConfigurationError(
            f"The inputs are {describe(inputs)}.",
            "Phase 1 walks a straight line from the baseline to the inputs, so that there is a floating tensor with a "
            "row for each sample among them: between integers there is nothing to walk on.",
            "Convert pixels with x.float() / 255; for tokens let the path start at their embeddings, with "
            'interpolate_at="name.of.the.embedding".',
        )
    if any(tensor.layout != torch.strided for tensor in candidates):
        raise ConfigurationError(
            f"The inputs are {describe(inputs)}, not all of them dense.",
            "Phase 1 takes samples out of a batch, and lays points on their paths into one: of dense tensors.",
            "Make them dense in `ydrop_inputs`, and sparse again in `ydrop_forward`.",
        )
    num_samples = len(candidates[0])
    if num_samples == 0 or (walk and any(len(tensor) != num_samples for tensor in floating)):
        raise ConfigurationError(
            f"The inputs are {describe(inputs)}.",
            "All floating inputs have the same number of samples, at least one, in their first dimension.",
            "Give every input the batch as its first dimension; keep what all samples share in a buffer of the model.",
        )
    if walk and isinstance(baseline, (list, tuple)) and len(baseline) != len(floating):
        raise ConfigurationError(
            f"baseline={describe(baseline)} was given for {len(floating)} floating input(s).",
            "A list of baselines has one for each floating input.",
            "Pass as many baselines as inputs, or a single number for all of them.",
        )
    unwalked = [start is None for start in baseline] if isinstance(baseline, (list, tuple)) else []
    order = iter(unwalked)
    roles = []
    for tensor in tensors:
        if walk and tensor.is_floating_point() and tensor.ndim > 0:
            roles.append("carried" if next(order, False) else "walked")
        else:
            roles.append("carried" if tensor.ndim > 0 and len(tensor) == num_samples else "fixed")
    call = Call(model, positional, keywords, tuple(roles))
    walked, carried = (
        tuple(tensor for tensor, role in zip(tensors, roles, strict=True) if role == wanted)
        for wanted in ("walked", "carried")
    )
    return call, walked, carried


def is_empty(inputs: Inputs) -> bool:
    """Tell whether inputs hold tensors, but no sample."""
    rows = [len(tensor) for tensor in _tensors_of((inputs,), {}) if tensor.ndim > 0]
    return bool(rows) and not any(rows)


def ordinary(tensor: Tensor) -> Tensor:
    """Copy what was made in inference mode, as the batches are that a Trainer validates: autograd could not keep it."""
    return tensor.clone() if tensor.is_inference() else tensor


def check_baseline(owner: str, baseline: Baseline) -> None:
    """Refuse what cannot be a baseline for any input.

    Raises:
        ConfigurationError: If it is neither a finite number nor a finite tensor, nor a sequence of these and None.

    """
    listed = isinstance(baseline, (list, tuple))
    for item in (baseline or ("empty",)) if isinstance(baseline, (list, tuple)) else (baseline,):
        fits = bool(item.isfinite().all()) if isinstance(item, Tensor) else is_real(item) or (listed and item is None)
        if not fits:
            raise ConfigurationError(
                f"{owner}(baseline={describe(baseline)}) was given.",
                "A baseline is a finite number or tensor, or a list of one of these for each floating input, with None "
                "for an input that stays as it is.",
                "Pass, for example, baseline=0.0.",
            )


def start_points(walked: Tensors, baseline: Baseline) -> Tensors:
    """Bring baselines to the shape of what is walked to, on its device and in its dtype.

    Args:
        walked: Tensors (B, *).
        baseline: One for all, or a sequence of one for each: a number, or a tensor of shape (*) or (1, *), shared
            by all samples, or (B, *), one for each sample. None stands for what is not walked to.

    Returns:
        For each a start of shape (1, *), or (B, *) for all where one is not shared.

    Raises:
        ConfigurationError: If a baseline does not fit.

    """
    if isinstance(baseline, (list, tuple)):
        listed = [item for item in baseline if item is not None]
    else:
        listed = [baseline] * len(walked)
    if len(listed) != len(walked) or not walked:
        raise ConfigurationError(
            f"baseline={describe(baseline)} was given for paths to {len(walked)} tensor(s).",
            "A list of baselines has one for each tensor that is walked to, not all of them None.",
            "Pass as many baselines as inputs, or a single number for all of them.",
        )
    starts = [_start(item, start) for item, start in zip(walked, listed, strict=True)]
    rows = max(len(start) for start in starts)
    return tuple(start.expand(rows, *start.shape[1:]) for start in starts)


def take_rows(tensors: Tensors, rows: Tensor) -> Tensors:
    """Take the same samples of every tensor."""
    return tuple(tensor.index_select(0, rows) for tensor in tensors)


def _tensors_of(positional: tuple[Any, ...], keywords: Mapping[str, Any]) -> list[Tensor]:
    """List the tensors of a call in the order in which they stand."""
    tensors: list[Tensor] = []
    apply_to_collection(list(positional), Tensor, tensors.append)
    apply_to_collection(keywords, Tensor, tensors.append)
    return tensors


def _start(walked: Tensor, baseline: Any) -> Tensor:
    if not isinstance(baseline, Tensor):
        return torch.full_like(walked[:1], baseline)
    start = baseline.unsqueeze(0) if baseline.ndim == walked.ndim - 1 else baseline
    if start.shape[1:] != walked.shape[1:] or start.shape[:1] not in (torch.Size([1]), walked.shape[:1]):
        raise ConfigurationError(
            f"baseline={describe(baseline)} was given for the input {describe(walked)}.",
            "A baseline is a number, or a tensor of the shape of one sample or of the whole input.",
            f"Pass a tensor of shape {tuple(walked.shape[1:])} or {tuple(walked.shape)}, or 0.0.",
        )
    return start.detach().to(walked)
