"""Everything that a pass through somebody else's model may change, and how it is undone."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from lightning_ydrop.models.modules import all_modules, kind_of
from lightning_ydrop.models.observations import Observations
from lightning_ydrop.models.snapshot import Snapshot, ignore
from lightning_ydrop.models.streams import random_streams_kept
from lightning_ydrop.torch_internals import (
    caches_off,
    defaults_kept,
    global_hooks_off,
    has_global_hooks,
    tensor_hooks_off,
    unshared_before_resizing,
)


@contextmanager
def leaving_no_trace(
    roots: Iterable[object],
    observations: Observations | None = None,
    *,
    learning: bool = False,
    evaluate: bool = True,
    streams: bool = True,
) -> Iterator[list[nn.Module]]:
    """Put modules in evaluation mode for forward passes of ours, and undo what these passes change.

    Attributes, buffers, parameters, the objects in attributes, the random streams of Python and NumPy, and the caches
    of autocast and of parametrizations are afterwards what they were; what a LightningModule logs is dropped; hooks of
    backward passes don't fire, and anomaly detection is off. `nn.TransformerEncoderLayer` takes no fast path.

    Args:
        roots: The modules, and whatever else the passes may change, with all that these hold.
        observations: As for `Snapshot`: None guards everything.
        learning: Whether these passes are observed.
        evaluate: Whether to put modules in evaluation mode, or leave them in their own.
        streams: Whether the random streams of Python and NumPy are given back. Passes inside others, which are to draw
            other numbers each, let them go on.

    Yields:
        The modules among the roots, and those in them.

    """
    everything = learning or observations is None
    snapshot = Snapshot(roots, observations, learning)
    with ExitStack() as stack:
        if streams:
            stack.enter_context(random_streams_kept())
        stack.callback(snapshot.put_back)
        snapshot.take()
        stack.enter_context(defaults_kept())
        stack.enter_context(caches_off())
        if has_global_hooks():
            stack.enter_context(global_hooks_off())
        stack.enter_context(slow_attention())
        if torch.is_anomaly_enabled():
            stack.enter_context(torch.autograd.set_detect_anomaly(False))
        if everything or (observations is not None and observations.tensor_hooks):
            callers = stack.enter_context(tensor_hooks_off())
            stack.enter_context(unshared_before_resizing())
            if observations is not None:
                stack.callback(lambda: _note_hooks(observations, callers))
        if evaluate:
            snapshot.evaluate()
        yield snapshot.registered


def _note_hooks(observations: Observations, callers: Sequence[str]) -> None:
    observations.tensor_hooks = observations.tensor_hooks or bool(callers)


@contextmanager
def logging_muted(model: nn.Module) -> Iterator[None]:
    """Drop what LightningModules in a model log, for passes of ours in training mode."""
    modules = [module for module in all_modules(model) if kind_of(module).logs]
    former = [module.__dict__.get("log") for module in modules]
    try:
        for module in modules:
            module.__dict__["log"] = ignore
        yield
    finally:
        for module, log in zip(modules, former, strict=True):
            if log is None:
                del module.__dict__["log"]
            else:
                module.__dict__["log"] = log


@contextmanager
def random_stream_kept(device: torch.device) -> Iterator[None]:
    """Give torch's random stream back as it was: some layers draw in evaluation too."""
    accelerated = device.type != "cpu"
    with torch.random.fork_rng(
        devices=[device] if accelerated else [], device_type=device.type if accelerated else "cuda"
    ):
        yield


@contextmanager
def slow_attention() -> Iterator[None]:
    """Keep `nn.TransformerEncoderLayer` off its fast path, which skips the dropout layers inside it."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
