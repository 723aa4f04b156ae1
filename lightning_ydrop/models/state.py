"""Everything that a pass through somebody else's model may change, and how it is undone."""

import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from lightning_ydrop.models.modules import all_modules, kind_of
from lightning_ydrop.models.observations import Observations
from lightning_ydrop.models.snapshot import Snapshot, ignore
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

    Yields:
        The modules among the roots, and those in them.

    """
    everything = learning or observations is None
    snapshot = Snapshot(roots, observations, learning)
    with ExitStack() as stack:
        if everything or observations is None or observations.python_random or observations.numpy_random:
            stack.enter_context(_random_streams(observations, learning))
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


@contextmanager
def _random_streams(observations: Observations | None, learning: bool) -> Iterator[None]:
    """Give the random streams of Python and NumPy back as they were.

    Copying the two takes 50 microseconds, so an engine's steps do it only if its dry run has seen them move.
    """
    everything = learning or observations is None
    numpy: Any = sys.modules.get("numpy")
    of_python = random.getstate() if everything or (observations and observations.python_random) else None
    with_numpy = numpy is not None and (everything or (observations and observations.numpy_random))
    of_numpy = numpy.random.get_state() if with_numpy else None
    try:
        yield
    finally:
        if of_python is not None and random.getstate() != of_python:
            random.setstate(of_python)
            if observations is not None:
                observations.python_random = True
        if of_numpy is not None:
            now = numpy.random.get_state()
            if now[2:] != of_numpy[2:] or (now[1] != of_numpy[1]).any():
                numpy.random.set_state(of_numpy)
                if observations is not None:
                    observations.numpy_random = True
