"""Paths through the outputs of a module, such as an embedding, instead of the inputs."""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ydrop.errors import ConfigurationError, describe, listed
from lightning_ydrop.importance.arrangement import Batch
from lightning_ydrop.models.modules import embeddings_of, named_modules

# No more names than this go into a message.
MOST_NAMES = 30


def find_module(owner: str, model: nn.Module, name: str) -> nn.Module:
    """Find the module whose outputs the paths run through.

    Raises:
        ConfigurationError: If the model has no module of that name.

    """
    modules = named_modules(model)
    if name not in modules or not name:
        alike = difflib.get_close_matches(name, filter(None, modules), n=1) if isinstance(name, str) else []
        embeddings_first = sorted(filter(None, modules), key=lambda each: not isinstance(modules[each], nn.Embedding))
        raise ConfigurationError(
            f"{owner}(interpolate_at={describe(name)}) was given.",
            f"`interpolate_at` names a module of {type(model).__name__}: {listed(embeddings_first, MOST_NAMES)}.",
            f"Pass the full name of the embedding of words, such as {(alike or embeddings_of(model))[0]!r}.",
        )
    return modules[name]


@contextmanager
def noting_what_ran(model: nn.Module, name: str | None, ran: Iterable[str]) -> Iterator[set[str]]:
    """Note what of a growing collection is there when a module has run: nothing for the name None."""
    noted: set[str] = set()
    if name is None:
        yield noted
        return
    handle = find_module("YDrop", model, name).register_forward_hook(lambda module, args, output: noted.update(ran))
    try:
        yield noted
    finally:
        handle.remove()


def outputs_of(model: nn.Module, name: str, batch: Batch, batch_dim: int) -> tuple[nn.Module, Tensor]:
    """Find a module and what it puts out for samples, (B, *).

    Raises:
        ConfigurationError: If it puts out anything but one floating tensor with a row for each sample, or several.

    """
    module = find_module("YDrop", model, name)
    outputs: list[Any] = []
    # A single sample goes in twice, as in `Request.output`.
    carried = tuple(torch.cat([each, each]) for each in batch.carried) if batch.size == 1 else batch.carried
    handle = module.register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        batch.call((), carried)
    finally:
        handle.remove()
    output = outputs[0] if len(outputs) == 1 else None
    fits = isinstance(output, Tensor) and output.is_floating_point() and output.ndim > batch_dim
    if not isinstance(output, Tensor) or not fits or output.shape[batch_dim] != max(2, batch.size):
        raise ConfigurationError(
            f"interpolate_at={name!r} was given, and in one forward pass of {batch.size} samples "
            f"this module put out {describe(outputs)}.",
            "The path starts at a module that is called once and puts out one floating tensor (B, *).",
            "Name the embedding, or a module of your own whose output the paths should run through.",
        )
    return module, output.detach().movedim(batch_dim, 0)[: batch.size]


@contextmanager
def putting_out(module: nn.Module, output: Tensor) -> Iterator[None]:
    """Let a module put out a tensor, whatever it computes."""
    # In front of other hooks, so that one that records this module's output sees the tensor.
    handle = module.register_forward_hook(lambda module, args, ignored: output, prepend=True)
    try:
        yield
    finally:
        handle.remove()
