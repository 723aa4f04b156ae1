"""The fragile uses of torch: what no public name offers, each with its reason. A test fails when torch changes one."""

import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_of_torch
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

# Tensors that are no more than memory and a shape: subclasses may keep their values elsewhere.
PLAIN_TENSORS = (Tensor, nn.Parameter)


def same_memory(tensor: Tensor) -> Tensor:
    """Give a new node of the autograd graph over the same memory.

    `view` would not do: an in-place operation on a view changes the graph of what it is a view of.
    """
    result: Tensor = torch.ops.aten._unsafe_view(tensor, tensor.shape)
    return result


def copy_each(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy tensors in place in one operation: one launch on a GPU, where a loop takes one for each."""
    torch._foreach_copy_(list(targets), list(sources))


def copy_on_write(tensor: Tensor) -> Tensor | None:
    """Give a copy that shares the memory until either of the two is written to, or None where torch can't do that.

    A copy costs as much memory and time as the tensor is large. Nothing else sees every write: version counters miss
    those through `.data`. Torch can't share memory that it does not own, such as NumPy's.
    """
    if tensor.layout != torch.strided or tensor.is_meta or tensor.numel() == 0:
        return None
    try:
        with torch.no_grad():
            return torch._lazy_clone(tensor)
    except (RuntimeError, NotImplementedError):
        return None


def is_untouched(tensor: Tensor) -> bool:
    """Tell whether a tensor still shares its memory with what `copy_on_write` gave."""
    return bool(torch._C._is_cow_tensor(tensor))  # type: ignore[attr-defined]


def memory_of(tensor: Tensor) -> int:
    """Name the memory of a tensor, which its views share. An address would not do: to ask for it counts as a write."""
    return int(tensor.untyped_storage()._cdata)


def set_attributes(module: object, attributes: dict[str, Any]) -> None:
    """Let a module have another dictionary of attributes, past any `__setattr__` of its own.

    To put the former dictionary back undoes every change of an attribute at once, in a tenth of a microsecond.
    """
    object.__setattr__(module, "__dict__", attributes)


def set_flag(module: nn.Module, training: bool) -> None:
    """Set the training flag of a module: what `module.training = ...` comes down to, without a search for parameters.

    It is for modules that have no `__setattr__` of their own, and are no TorchScript.
    """
    module.__dict__["training"] = training


def uncompiled(model: nn.Module) -> nn.Module:
    """Give the module that `torch.compile` was called with, where a model is what that returned."""
    # Not `.get`, which TorchScript's modules don't have.
    inner = model._modules["_orig_mod"] if "_orig_mod" in model._modules else None  # noqa: SIM401
    return model if inner is None else inner


def is_compiled(module: nn.Module) -> bool:
    """Tell whether a module is compiled, in place or not."""
    return module._compiled_call_impl is not None or uncompiled(module) is not module


def without_compilation(name: str) -> str:
    """Take out of a module's name what compilation adds."""
    return name.replace("_orig_mod.", "")


def attributes_of_script(module: torch.jit.ScriptModule) -> dict[str, Any]:
    """Give the attributes of a TorchScript module, which lie outside of its dictionary."""
    names = module._concrete_type.get_attributes()
    return {name: module._c.getattr(name) for name in names}


def set_attribute_of_script(module: torch.jit.ScriptModule, name: str, value: Any) -> None:
    """Set one of them."""
    module._c.setattr(name, value)


@contextmanager
def caches_off() -> Iterator[None]:
    """Let neither autocast nor `parametrize.cached()` keep anything.

    What they keep of a pass without gradients for parameters would serve the caller's training step, which then could
    not train these. The caller's own caches come back at the end.
    """
    autocast, enabled, cached = torch.is_autocast_cache_enabled(), parametrize._cache_enabled, parametrize._cache
    torch.set_autocast_cache_enabled(False)
    parametrize._cache_enabled, parametrize._cache = 0, {}
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(autocast)
        parametrize._cache_enabled, parametrize._cache = enabled, cached


def has_global_hooks() -> bool:
    """Tell whether backward hooks are registered for all modules."""
    return bool(module_of_torch._global_backward_hooks or module_of_torch._global_backward_pre_hooks)


@contextmanager
def global_hooks_off() -> Iterator[None]:
    """Let no backward hook fire that was registered for all modules: those of single modules are their attributes."""
    registries = (module_of_torch._global_backward_hooks, module_of_torch._global_backward_pre_hooks)
    hooks = [dict(registry) for registry in registries]
    try:
        for registry in registries:
            registry.clear()
        yield
    finally:
        for registry, former in zip(registries, hooks, strict=True):
            registry.update(former)


@contextmanager
def tensor_hooks_off() -> Iterator[list[str]]:
    """Let a forward pass register no hooks on tensors and retain no gradients: a backward pass of ours is none of its.

    Hooks that torch itself registers, as FSDP2 does to gather parameters, are left alone, and so are captum's and those
    of other threads.

    Yields:
        Where the calls came from, filled while the model runs.

    """
    names = ("register_hook", "retain_grad")
    originals: dict[str, Callable[..., Any]] = {name: getattr(Tensor, name) for name in names}
    thread, callers = threading.get_ident(), list[str]()

    def instead_of(name: str) -> Callable[..., Any]:
        def ignore(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if threading.get_ident() != thread or caller.partition(".")[0] in ("torch", "captum"):
                return originals[name](tensor, *args, **kwargs)
            callers.append(caller)
            return RemovableHandle(OrderedDict()) if name == "register_hook" else None  # the caller may remove it

        return ignore

    try:
        for name in names:
            setattr(Tensor, name, instead_of(name))
        yield callers
    finally:
        for name, original in originals.items():
            setattr(Tensor, name, original)
