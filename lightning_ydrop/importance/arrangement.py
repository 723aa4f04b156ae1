"""A batch, arranged: what the model is called with, as tensors whose first dimension is the batch."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_ydrop.errors import ConfigurationError, describe
from lightning_ydrop.importance.baseline import Baseline, Tensors, start_points
from lightning_ydrop.importance.objectives import Objective
from lightning_ydrop.importance.targets import check_pairs
from lightning_ydrop.models.calls import Inputs, Target, arguments_of
from lightning_ydrop.models.modules import embeddings_of


class Role(NamedTuple):
    """What a tensor among the arguments is.

    Attributes:
        kind: "interpolated" along the path, "carried" along with its sample, or "fixed": it has no samples.
        dim: The dimension of its samples.

    """

    kind: Literal["interpolated", "carried", "fixed"]
    dim: int = 0


FIXED = Role("fixed")


@dataclass(frozen=True)
class Call:
    """How a model is called, as a function of the tensors that have a row for each sample.

    Attributes:
        function: What is called.
        positional: Its positional arguments.
        keywords: Its keyword arguments.
        roles: Of every tensor in them, in the order in which they stand.

    """

    function: Callable[..., Any]
    positional: tuple[Any, ...]
    keywords: Mapping[str, Any]
    roles: tuple[Role, ...]

    def __call__(self, interpolated: Tensors, carried: Tensors) -> Any:
        """Call the model with other rows: of the floating inputs, and of what is carried along. The batch comes first.

        An exception that it raises gets a note that says what it was called with.
        """
        positional, keywords = self._arguments(interpolated, carried)
        try:
            return self.function(*positional, **keywords)
        except ConfigurationError:
            raise
        except Exception as error:
            rows = len((interpolated or carried)[0])
            called = describe((*positional, *keywords.values()))
            error.add_note(
                f"lightning_ydrop called {_name_of(self.function)} with {rows} rows: {called}. "
                "Phase 1 calls it in evaluation mode with points between the baseline and samples of the batch, in any "
                "order and number, and with the inputs alone. "
                "Let it take such rows. Otherwise write another method in the LightningModule: `ydrop_forward`, which "
                "is called instead, or `ydrop_inputs(batch)`, which returns the inputs and the target. Outside of a "
                "Trainer pass forward=...."
            )
            raise

    @property
    def others(self) -> tuple[object, ...]:
        """What the arguments hold beside rows, which a call might change: nothing where all of them are rows."""
        if not self.keywords and all(isinstance(argument, Tensor) for argument in self.positional):
            return tuple(each for each, role in zip(self.positional, self.roles, strict=True) if role == FIXED)
        return (self.positional, dict(self.keywords))

    def _arguments(self, interpolated: Tensors, carried: Tensors) -> tuple[list[Any], dict[str, Any]]:
        rows: dict[str, Iterator[Tensor]] = {"interpolated": iter(interpolated), "carried": iter(carried)}
        roles = iter(self.roles)

        def replaced(tensor: Tensor) -> Tensor:
            role = next(roles)
            if role == FIXED:
                return tensor
            row = next(rows[role.kind])
            return row.movedim(0, role.dim) if role.dim else row

        # One after the other: both are usually flat, and the library is fast with flat collections.
        positional = apply_to_collection(list(self.positional), Tensor, replaced)
        return positional, apply_to_collection(dict(self.keywords), Tensor, replaced)


@dataclass(frozen=True)
class Batch:
    """A batch, arranged.

    Attributes:
        call: Calls the model with rows of the two that follow.
        inputs: Floating tensors that paths end at, each (B, *).
        starts: For each input the baseline, (1, *), or (B, *) where the samples do not share one.
        carried: Whatever else has a row for each sample, (B, *).
        target: (B, *), or None.

    """

    call: Call
    inputs: Tensors
    starts: Tensors
    carried: Tensors
    target: Target

    @property
    def size(self) -> int:
        """B."""
        return len((self.inputs or self.carried)[0])

    @property
    def device(self) -> torch.device:
        """Where the model works on the samples."""
        return device_of_samples(self.inputs, self.carried)

    @property
    def shares_start(self) -> bool:
        """Whether all paths start at the same point, which then takes one row."""
        return not self.carried and all(len(start) == 1 for start in self.starts)

    def aimed_by(self, objective: Objective) -> "Batch":
        """Take the input for the target, where the objective compares the output with that.

        Raises:
            ConfigurationError: If there is not one floating input.

        """
        if not objective.target_is_input:
            return self
        if len(self.inputs) != 1:
            raise ConfigurationError(
                f"{objective!r} was given for {len(self.inputs)} floating inputs on the path.",
                "It compares the output with the one input of the model.",
                "Keep others off the path with baseline=[0.0, None], or return the target from `ydrop_inputs` and pass "
                'objective="regression".',
            )
        return replace(self, target=self.inputs[0])

    def read_as(self, roles: tuple[Role, ...]) -> "Batch":
        """Carry other tensors along, or with their samples elsewhere, in a batch of which no rows are taken."""
        carried = _of_kind("carried", _tensors_of(self.call.positional, self.call.keywords), roles)
        return replace(self, call=replace(self.call, roles=roles), carried=carried)

    def take(self, rows: Tensor) -> "Batch":
        """Keep the samples with these indices, int64 on the CPU, in this order."""
        shared = all(len(start) == 1 for start in self.starts)
        return replace(
            self,
            inputs=take_rows(self.inputs, rows),
            starts=self.starts if shared else take_rows(self.starts, rows),
            carried=take_rows(self.carried, rows),
            target=None if self.target is None else take_rows((self.target,), rows)[0],
        )


def arrange(
    function: Callable[..., Any],
    signature: inspect.Signature,
    inputs: Inputs,
    target: Target = None,
    *,
    baseline: Baseline = 0.0,
    interpolate: bool = True,
    batch_dim: int = 0,
    roles: tuple[Role, ...] | None = None,
    model: nn.Module | None = None,
) -> Batch:
    """Find out which tensors of the inputs have a row for each sample, and which of these paths can run through.

    Args:
        function: What is called.
        signature: How it can be called.
        inputs: A tensor, a tuple or list of arguments, or a mapping: of arguments by name where the model takes them
            so, otherwise one argument. Arguments may nest tensors in lists, tuples, mappings and dataclasses.
        target: What F is taken with, or None.
        baseline: Of a sequence, None says that a floating tensor is carried along.
        interpolate: Whether the paths run through inputs; they may run through the outputs of a module instead.
        batch_dim: The dimension of the samples. A tensor that has B entries in its first dimension alone, such as
            lengths, has its samples there.
        roles: What an earlier batch has decided. A tensor that was carried and no longer has a row for each sample is
            fixed in this batch.
        model: Its embeddings are named in a message.

    Raises:
        ConfigurationError: If there is nothing to interpolate, or it is not clear what the samples are.

    """
    positional, keywords = arguments_of(signature, inputs)
    tensors = _tensors_of(positional, keywords)
    if any(tensor.is_inference() for tensor in tensors):
        positional = tuple(apply_to_collection(list(positional), Tensor, ordinary))
        keywords = apply_to_collection(dict(keywords), Tensor, ordinary)
        tensors = _tensors_of(positional, keywords)
    floating = [tensor for tensor in tensors if tensor.is_floating_point() and tensor.ndim > batch_dim]
    ends = [tensor for tensor, stays in zip(floating, _staying(baseline, len(floating)), strict=True) if not stays]
    candidates = (ends or floating) if interpolate else [tensor for tensor in tensors if tensor.ndim > batch_dim]
    if not candidates:
        items = list(inputs.values()) if isinstance(inputs, Mapping) else inputs
        if any(isinstance(each, np.ndarray) for each in (items if isinstance(items, (list, tuple)) else [items])):
            raise ConfigurationError(
                f"The inputs are {describe(inputs)}.",
                "Inputs are tensors, at least one of them floating.",
                "Convert arrays with torch.from_numpy(x).",
            )
        raise ConfigurationError(
            f"The inputs are {describe(inputs)}.",
            "Phase 1 moves in a straight line from the baseline to the inputs, so one of them is a floating tensor "
            "with a row for each sample: between whole numbers there is no path.",
            "Convert pixels with x.float() / 255; for tokens let the path start at their embeddings, with "
            f"{' or '.join(f'interpolate_at={name!r}' for name in embeddings_of(model))}.",
        )
    num_samples = candidates[0].shape[batch_dim]
    if num_samples == 0 or (interpolate and any(tensor.shape[batch_dim] != num_samples for tensor in ends)):
        raise ConfigurationError(
            f"The inputs are {describe(inputs)}.",
            "All floating inputs have the same number of samples, at least one, in their first dimension"
            f"{f' but {batch_dim}, as batch_dim={batch_dim} says' if batch_dim else ''}.",
            "Give every input the batch as its first dimension, or say with batch_dim=... which it is; keep what all "
            "samples share in a buffer of the model.",
        )
    if interpolate and isinstance(baseline, Sequence) and len(baseline) != len(floating):
        raise ConfigurationError(
            f"baseline={describe(baseline)} was given for {len(floating)} floating input(s).",
            "A list of baselines has one for each floating input.",
            "Pass as many baselines as inputs, or a single number for all of them.",
        )
    if roles is None or len(roles) != len(tensors):
        roles = _roles(tensors, num_samples, baseline, interpolate, batch_dim)
    roles = tuple(
        role if role.kind != "carried" or _has_samples(tensor, role.dim, num_samples) else FIXED
        for tensor, role in zip(tensors, roles, strict=True)
    )
    interpolated, carried = (_of_kind(kind, tensors, roles) for kind in ("interpolated", "carried"))
    check_pairs(target, num_samples, batch_dim, candidates[0].shape)
    if isinstance(target, Tensor) and batch_dim and _has_samples(target, batch_dim, num_samples):
        target = target.movedim(batch_dim, 0)
    starts = start_points(interpolated, baseline, batch_dim) if interpolate else ()
    return Batch(Call(function, positional, keywords, roles), interpolated, starts, carried, target)


def is_empty(inputs: Inputs, batch_dim: int = 0) -> bool:
    """Tell whether inputs hold tensors, but no sample."""
    rows = [tensor.shape[min(batch_dim, tensor.ndim - 1)] for tensor in _tensors_of((inputs,), {}) if tensor.ndim > 0]
    return bool(rows) and not any(rows)


def ordinary(tensor: Tensor) -> Tensor:
    """Copy a tensor made in inference mode, as a Trainer's validation batches are: autograd can't save it."""
    return tensor.clone() if tensor.is_inference() else tensor


def device_of_samples(inputs: Tensors, carried: Tensors) -> torch.device:
    """Say where a model works on samples: what goes along with them, such as lengths, may stay on the CPU."""
    tensors = inputs or carried
    return next((tensor.device for tensor in tensors if tensor.device.type != "cpu"), tensors[0].device)


def take_rows(tensors: Tensors, rows: Tensor) -> Tensors:
    """Take the same samples of every tensor, wherever it is: `rows` are on the CPU."""
    on_device: dict[torch.device, Tensor] = {}
    for tensor in tensors:
        if tensor.device not in on_device:
            on_device[tensor.device] = rows.to(tensor.device, non_blocking=True)
    return tuple(tensor.index_select(0, on_device[tensor.device]) for tensor in tensors)


def _roles(
    tensors: Sequence[Tensor], num_samples: int, baseline: Baseline, interpolate: bool, batch_dim: int
) -> tuple[Role, ...]:
    """Say what each tensor is, of a first batch."""
    num_floating = sum(tensor.is_floating_point() and tensor.ndim > batch_dim for tensor in tensors)
    stays = iter(_staying(baseline, num_floating))
    roles = []
    for tensor in tensors:
        is_floating = interpolate and tensor.is_floating_point() and tensor.ndim > batch_dim
        if is_floating and not next(stays):
            roles.append(Role("interpolated", batch_dim))
        elif _has_samples(tensor, batch_dim, num_samples):
            roles.append(Role("carried", batch_dim))
        else:
            roles.append(Role("carried", 0) if _has_samples(tensor, 0, num_samples) else FIXED)
    return tuple(roles)


def _staying(baseline: Baseline, num_floating: int) -> list[bool]:
    """Say which of the floating tensors no path runs through: those whose baseline is None."""
    starts = list(baseline) if isinstance(baseline, Sequence) else []
    return [start is None for start in starts[:num_floating]] + [False] * (num_floating - len(starts))


def _of_kind(kind: str, tensors: Sequence[Tensor], roles: Sequence[Role]) -> Tensors:
    """Take the tensors of a kind, with their samples first."""
    return tuple(
        tensor.movedim(role.dim, 0) if role.dim else tensor
        for tensor, role in zip(tensors, roles, strict=True)
        if role.kind == kind
    )


def _has_samples(tensor: Tensor, dim: int, num_samples: int) -> bool:
    return tensor.ndim > dim and tensor.shape[dim] == num_samples


def _tensors_of(positional: tuple[Any, ...], keywords: Mapping[str, Any]) -> list[Tensor]:
    """List the tensors of a call in the order in which they stand.

    Raises:
        ConfigurationError: If one of them has no rows that can be taken out one by one.

    """
    tensors: list[Tensor] = []

    def visit(value: Any) -> Any:
        if isinstance(value, PackedSequence) or value.is_nested or value.layout != torch.strided:
            raise ConfigurationError(
                f"The inputs are {describe((*positional, *keywords.values()))}, not all of them dense.",
                "Phase 1 takes samples out of a batch and makes a batch of points on their paths, so it needs dense "
                "tensors.",
                "Make them dense in `ydrop_inputs`, with torch.nn.utils.rnn.pad_packed_sequence or to_padded_tensor "
                "for sequences, and turn them back in `ydrop_forward`.",
            )
        tensors.append(value)
        return value

    apply_to_collection(list(positional), (Tensor, PackedSequence), visit)
    apply_to_collection(keywords, (Tensor, PackedSequence), visit)
    return tensors


def _name_of(function: Callable[..., Any]) -> str:
    if isinstance(function, torch.nn.Module):
        return f"{type(function).__name__}.forward"
    return str(getattr(function, "__qualname__", type(function).__name__))
