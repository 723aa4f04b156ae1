"""Passes of a model with its dropout on, as few as memory and the model's draws allow."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_ydrop.errors import ConfigurationError, describe
from lightning_ydrop.layers.kinds import draws_for_each_sample
from lightning_ydrop.models.calls import Inputs, dim_of_rows
from lightning_ydrop.models.holdings import modules_held
from lightning_ydrop.models.state import leaving_no_trace, random_stream_kept
from lightning_ydrop.uncertainty.draws import Draw, MaskSharing, noting_draws
from lightning_ydrop.uncertainty.masks import dropping

# Takes a model's output and the number of masks in it.
Consumer = Callable[[Any, int], None]


@dataclass(frozen=True)
class Subject:
    """What passes: a model and a batch for it.

    Attributes:
        model: The model.
        forward: What is called: the model itself, or another method.
        arguments: Positional and keyword arguments of the call.
        batch_size: Number of samples, B. Tensors with as many rows have one for each sample.
        batch_dim: Dimension of the rows. In tensors that have not as many there, it is the first one.

    """

    model: nn.Module
    forward: Callable[..., Any]
    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    batch_size: int
    batch_dim: int = 0

    def tensors(self) -> list[Tensor]:
        """List the tensors among the arguments."""
        return tensors_in(self.arguments)

    def beside(self) -> list[object]:
        """List what a call runs or may change besides the model."""
        own: list[object] = [] if self.forward is self.model else [self.forward, *modules_held(self.forward)]
        return [*own, *self.arguments]

    @contextmanager
    def looked_at(self, *, evaluate: bool = True) -> Iterator[None]:
        """Let calls inside leave no trace, nor move a random stream: they are to show something, and give nothing.

        Args:
            evaluate: Whether modules are in evaluation mode, or in their own.

        """
        with (
            torch.no_grad(),
            random_stream_kept(self.tensors()[0].device),
            leaving_no_trace([self.model, *self.beside()], evaluate=evaluate),
        ):
            yield

    def call(self, count: int, rows: slice) -> Any:
        """Call the model with some rows of the batch, `count` times one after the other."""

        def repeat(tensor: Tensor) -> Tensor:
            dim = dim_of_rows(tensor, self.batch_size, self.batch_dim)
            return tensor if dim is None else torch.cat([tensor[(slice(None),) * dim + (rows,)]] * count, dim)

        positional, keywords = self.arguments
        if count > 1 or len(range(self.batch_size)[rows]) < self.batch_size:
            positional, keywords = apply_to_collection(list(self.arguments), Tensor, repeat)
        return self.forward(*positional, **keywords)


def run_masks(
    subject: Subject,
    num_masks: int,
    at_once: int,
    sharing: MaskSharing,
    consume: Consumer,
    *,
    rows: slice = slice(None),
    may_halve: bool = True,
) -> None:
    """Pass a batch through a model with each of some masks, as many at once as `at_once` and the model allow.

    Args:
        subject: The model and the batch.
        num_masks: Number of masks, at least 1.
        at_once: How many may pass at once, at least 1.
        sharing: What is known of the model's draws. What is not known is learned by the first two passes, of which the
            first has one mask.
        consume: Gets what each pass returned, with masks after each other: row k B + i is sample i with mask k.
        rows: The rows of the batch that pass.
        may_halve: Whether half as many masks pass where a GPU has no memory. Otherwise that is an error.

    Raises:
        torch.OutOfMemoryError: If there is no memory for one mask, or for `at_once` and they may not be halved.

    """
    draws_of_one_mask: list[Draw] | None = None
    with dropping(subject.model, subject.beside()) as modules:
        if sharing.rows_mix or sharing.is_shared or not all(map(draws_for_each_sample, modules)):
            at_once = 1
        if num_masks == 2 and not sharing.is_known:
            at_once = 1  # after a first pass of one mask, there are no two left to compare it with
        masks_left = num_masks
        while masks_left > 0:
            is_compared = not sharing.is_known and at_once > 1
            count = 1 if is_compared and draws_of_one_mask is None else min(at_once, masks_left)
            noting: AbstractContextManager[list[Draw]] = noting_draws() if is_compared else nullcontext([])
            try:
                # A forward may write to its inputs, which the next mask passes with.
                with noting as draws, leaving_no_trace(subject.arguments, evaluate=False, streams=False):
                    output = subject.call(count, rows)
            except torch.OutOfMemoryError:
                if count == 1 or not may_halve:
                    raise
                at_once = count // 2
                continue
            if is_compared and draws_of_one_mask is None:
                draws_of_one_mask = draws
            elif is_compared and draws_of_one_mask is not None:
                sharing.compare(draws_of_one_mask, draws, count)
                if sharing.is_shared:
                    # All masks of this pass are one mask in part, so it doesn't count.
                    at_once = 1
                    continue
            consume(output, count)
            masks_left -= count


def tensors_in(arguments: Any) -> list[Tensor]:
    """List the tensors in arguments, however nested."""
    tensors: list[Tensor] = []
    apply_to_collection(arguments, Tensor, tensors.append)
    return tensors


def batch_size_of(inputs: Inputs, arguments: Sequence[Any], batch_dim: int = 0, *, may_be_empty: bool = False) -> int:
    """Tell how many samples a batch has.

    Args:
        inputs: The batch, for the message.
        arguments: What it is to be called with.
        batch_dim: The dimension of the samples.
        may_be_empty: Whether a batch of no samples will do.

    Raises:
        ConfigurationError: If it holds no tensors, or no samples.

    """
    tensors = [tensor for tensor in tensors_in(arguments) if tensor.ndim > 0]
    sizes = [tensor.shape[batch_dim if tensor.ndim > batch_dim else 0] for tensor in tensors[:1]]
    if batch_dim > 0 and all(tensor.ndim <= batch_dim for tensor in tensors):
        raise ConfigurationError(
            f"The inputs are {describe(inputs)}, with batch_dim={batch_dim}.",
            "At least one tensor has this dimension, which is that of the samples.",
            "Pass batch_dim=0 for inputs (B, *), or 1 for (T, B, F).",
        )
    if not sizes or (sizes[0] == 0 and not may_be_empty):
        raise ConfigurationError(
            f"The inputs are {describe(inputs)}.",
            "They hold at least one tensor, the first of them with a row for each sample, and at least one sample.",
            "Pass a batch of samples.",
        )
    return sizes[0]
