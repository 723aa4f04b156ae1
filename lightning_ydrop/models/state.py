"""A model in another mode for a while, and then as it was."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torchmetrics import Metric


def all_modules(model: nn.Module) -> list[nn.Module]:
    """List what `model.modules()` gives, in another order and in a fraction of the time: each step looks at them."""
    found = {id(model): model}
    ahead = [model]
    while ahead:
        for child in ahead.pop()._modules.values():
            if child is not None and id(child) not in found:
                found[id(child)] = child
                ahead.append(child)
    return list(found.values())


def device_of(model: nn.Module) -> torch.device:
    """Say where a model is: on the CPU where it has no parameters."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """List what `model.named_modules()` gives, by names without what compilation adds to them."""
    return {name.replace("_orig_mod.", ""): module for name, module in model.named_modules()}


def uncompiled(model: nn.Module) -> nn.Module:
    """Give the module that `torch.compile` was called with, where a model is what that returned."""
    inner = model._modules.get("_orig_mod")
    return model if inner is None else inner


def has_compiled_parts(model: nn.Module) -> bool:
    """Tell whether a model or something in it is compiled, in place or not."""
    return any(
        module._compiled_call_impl is not None or uncompiled(module) is not module for module in all_modules(model)
    )


@contextmanager
def leaving_no_trace(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Put modules in evaluation mode for forward passes that are none of the user's own, and undo what these do.

    Buffers and the states of torchmetrics' metrics are copies, autocast keeps no casts of weights, and
    `nn.TransformerEncoderLayer` runs the layers inside it.
    """
    with ExitStack() as stack:
        stack.enter_context(evaluation_mode(modules))
        stack.enter_context(buffers_kept(modules))
        stack.enter_context(metrics_kept(modules))
        stack.enter_context(autocast_without_cache())
        stack.enter_context(slow_attention())
        yield


@contextmanager
def evaluation_mode(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Flip the flag of the modules that are training, and of just those: `.eval()` and `.train()` may be overridden."""
    training = [module for module in modules if module.training]
    try:
        for module in training:
            set_training(module, False)
        yield
    finally:
        for module in training:
            set_training(module, True)


def set_training(module: nn.Module, training: bool) -> None:
    """Set the flag of a module, and of none that it holds."""
    if type(module).__setattr__ is nn.Module.__setattr__:
        module.__dict__["training"] = training  # what it comes down to, without a search for parameters of that name
    else:
        module.training = training


@contextmanager
def random_stream_kept(device: torch.device) -> Iterator[None]:
    """Give torch's random stream back as it was: some layers draw in evaluation too."""
    accelerated = device.type != "cpu"
    with torch.random.fork_rng(
        devices=[device] if accelerated else [], device_type=device.type if accelerated else "cuda"
    ):
        yield


@contextmanager
def metrics_kept(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Let those of the modules that are metrics, which a forward pass may update, count on copies of their states."""
    metrics = [module for module in modules if isinstance(module, Metric)]
    kept = [metric.__dict__ for metric in metrics]
    try:
        for metric in metrics:
            metric.__dict__ = metric.__dict__ | {
                name: list(state) if isinstance(state, list) else state.clone()
                for name, state in metric.metric_state.items()
            }
        yield
    finally:
        for metric, state in zip(metrics, kept, strict=True):
            metric.__dict__ = state


@contextmanager
def buffers_kept(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Let modules, whose forward pass may count in their buffers, write to copies of these.

    Torch's own write to none in evaluation.
    """
    own = [module for module in modules if module._buffers and not type(module).__module__.startswith("torch.nn.")]
    kept = [dict(module._buffers) for module in own]
    copies: dict[int, Tensor] = {}  # one for each, in however many modules it is
    try:
        for module, buffers in zip(own, kept, strict=True):
            for name, buffer in buffers.items():
                if buffer is not None:
                    if id(buffer) not in copies:
                        copies[id(buffer)] = buffer.clone()
                    module._buffers[name] = copies[id(buffer)]
        yield
    finally:
        for module, buffers in zip(own, kept, strict=True):
            module._buffers.update(buffers)


@contextmanager
def autocast_without_cache() -> Iterator[None]:
    """Let autocast keep no casts of weights: made without gradients, they would serve the caller's training step."""
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)


@contextmanager
def slow_attention() -> Iterator[None]:
    """Keep `nn.TransformerEncoderLayer` off its fast path, which skips the dropout layers inside it."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
