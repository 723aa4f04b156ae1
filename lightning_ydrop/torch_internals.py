"""The fragile uses of torch: what no public name offers, each with its reason. A test fails when torch changes one."""

import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.graph import CodeGen
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


def base_of(tensor: Tensor) -> Tensor | None:
    """Give the tensor that another is a view of. A copy of a view is a view of none, and so is what was loaded."""
    return tensor._base


def copy_on_write(tensor: Tensor) -> Tensor | None:
    """Give a copy that shares the memory until either of the two is written to, or None where torch can't do that.

    A copy costs as much memory and time as the tensor is large. Nothing else sees every write: version counters miss
    those through `.data`. Torch can't share memory that it does not own, such as NumPy's. It crashes in the first write
    to a shared tensor that was loaded from a file, whose memory has no allocator and can't be resized. Nor can what
    `numpy()` has shown, and the array would be left with memory that is freed.
    """
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_nested or tensor.numel() == 0:
        return None
    if not tensor.untyped_storage().resizable():
        return None
    try:
        with torch.no_grad():
            return torch._lazy_clone(tensor)
    except (RuntimeError, NotImplementedError):
        return None


def is_untouched(tensor: Tensor) -> bool:
    """Tell whether a tensor still shares its memory with what `copy_on_write` gave."""
    return bool(torch._C._is_cow_tensor(tensor))  # type: ignore[attr-defined]


def is_lost(tensor: Tensor) -> bool:
    """Tell whether torch has lost the memory of a tensor that shared it: where it grows, only reads get at its values.

    It replaces the memory without taking it out of what is shared, so that the next write fails.
    """
    try:
        tensor.data_ptr()
    except RuntimeError as error:
        return "COW.cpp" in str(error)
    return False


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


def set_flags(modules: Iterable[nn.Module], training: bool) -> None:
    """Set that of many modules: a call for each takes longer than all of the rest."""
    for module in modules:
        module.__dict__["training"] = training


def set_class(module: object, cls: type) -> None:
    """Let a module be of the class that it was of, past any `__setattr__` of its own."""
    object.__setattr__(module, "__class__", cls)


class _NoHooks(OrderedDict[Any, Any]):
    """A registry of hooks that takes none."""

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


# It stands in the place of a module's backward hooks, also of those that a forward pass registers.
NO_HOOKS = _NoHooks()


def uncompiled(model: nn.Module) -> nn.Module:
    """Give the module that `torch.compile` was called with, where a model is what that returned."""
    # Not `.get`, which TorchScript's modules don't have.
    inner = model._modules["_orig_mod"] if "_orig_mod" in model._modules else None  # noqa: SIM401
    return model if inner is None else inner


def is_compiled(module: nn.Module) -> bool:
    """Tell whether a module is compiled, in place or not."""
    return module._compiled_call_impl is not None or uncompiled(module) is not module


def compilations_allowed() -> int:
    """Say how often torch compiles the same code for other values before it gives up and runs it as it is."""
    config: Any = torch._dynamo.config
    # Older releases call it cache_size_limit.
    return int(getattr(config, "recompile_limit", None) or config.cache_size_limit)


def without_compilation(name: str) -> str:
    """Take out of a module's name what compilation adds."""
    return name.replace("_orig_mod.", "")


def attributes_of_script(module: torch.jit.ScriptModule) -> dict[str, Any]:
    """Give the attributes of a TorchScript module, which lie outside of its dictionary."""
    # Not `module._concrete_type`, which frozen modules don't have.
    names = torch._C.ConcreteModuleType.from_jit_type(module._c._type()).get_attributes()  # type: ignore[attr-defined]
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


def global_forward_hooks() -> list[int]:
    """Number the forward hooks that are registered for all modules. No two hooks ever have the same number."""
    return [*module_of_torch._global_forward_pre_hooks, *module_of_torch._global_forward_hooks]


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

    Hooks that torch itself registers, as FSDP2 does to gather parameters, are left alone, and so are captum's, our own
    and those of other threads.

    Yields:
        Where the calls came from, filled while the model runs.

    """
    thread, callers = threading.get_ident(), list[str]()

    def instead_of(original: Callable[..., Any]) -> Callable[..., Any]:
        def ignore(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            caller = _caller()
            if threading.get_ident() != thread or caller.partition(".")[0] in ("torch", "captum", "lightning_ydrop"):
                return original(tensor, *args, **kwargs)
            callers.append(caller)
            # The caller may remove it.
            return None if original.__name__ == "retain_grad" else RemovableHandle(OrderedDict())

        return ignore

    names = ("register_hook", "register_post_accumulate_grad_hook", "retain_grad")
    with _methods_of_tensors(names, instead_of):
        yield callers


@contextmanager
def unshared_before_resizing() -> Iterator[None]:
    """Let `resize_` take a tensor's memory out of what `copy_on_write` shares, where torch would lose it."""

    def instead_of(original: Callable[..., Any]) -> Callable[..., Any]:
        def resize(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            if tensor.layout == torch.strided and is_untouched(tensor):
                tensor.data_ptr()
            return original(tensor, *args, **kwargs)

        return resize

    with _methods_of_tensors(("resize_", "resize_as_"), instead_of):
        yield


@contextmanager
def exports_seen(look: Callable[[Tensor], None]) -> Iterator[None]:
    """Call a function with each tensor whose values are taken out of torch, which no dispatch mode sees."""

    def instead_of(original: Callable[..., Any]) -> Callable[..., Any]:
        def export(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            look(tensor)
            return original(tensor, *args, **kwargs)

        return export

    with _methods_of_tensors(("tolist", "numpy", "__array__", "__dlpack__"), instead_of):
        yield


@contextmanager
def _methods_of_tensors(
    names: Sequence[str], instead_of: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    own = {name: Tensor.__dict__[name] for name in names if name in Tensor.__dict__}  # others are inherited
    try:
        for name in names:
            setattr(Tensor, name, instead_of(getattr(Tensor, name)))
        yield
    finally:
        for name in names:
            if name in own:
                setattr(Tensor, name, own[name])
            else:
                delattr(Tensor, name)


def _caller() -> str:
    """Name the module of whoever called a method, or called the function of torch that registers hooks for its user."""
    frame = sys._getframe(2)
    while frame.f_globals.get("__name__") == "torch.autograd.graph" and frame.f_back is not None:
        frame = frame.f_back
    return str(frame.f_globals.get("__name__", ""))


@contextmanager
def defaults_kept() -> Iterator[None]:
    """Give back the default dtype and device that tensors are made with."""
    dtype, device = torch.get_default_dtype(), _default_device()
    try:
        yield
    finally:
        if torch.get_default_dtype() != dtype:
            torch.set_default_dtype(dtype)
        if _default_device() is not device:
            torch.set_default_device(None if device is None else device.device)
            if device is None:
                del torch._GLOBAL_DEVICE_CONTEXT.device_context  # torch 2.6's `get_default_device` fails on None


def _default_device() -> Any:
    """Give torch's context of the default device: None where nobody has set one, which `get_default_device` hides."""
    return getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None)


def recorded_graph(function: Callable[..., Any], *arguments: Any) -> GraphModule:
    """Run a function, and record the operations as a graph: those of a backward pass too, which torch.compile can't.

    The graph takes the tensors in the arguments one after the other. Tensors that the function reads otherwise, but
    that are among the arguments, count as these.
    """
    config: Any = torch._dynamo.config
    # Parts of a model that the user has compiled are recorded as what they are made of.
    with config.patch(error_on_nested_fx_trace=False):
        graph = make_fx(function)(*arguments)
    # Without the arguments' nesting.
    graph.graph.set_codegen(CodeGen())
    graph.recompile()
    return graph


def compiled_graph(graph: GraphModule, tensors: Sequence[Tensor]) -> Callable[..., Sequence[Tensor]]:
    """Compile a graph for tensors of one layout, on a GPU as a CUDA graph.

    `torch.compile` would guard each tensor, and compile once more where one is frozen.
    """
    # The name is documented, and imports a compiler, which takes a second.
    from torch._inductor import compile as compile_graph

    run: Callable[..., Sequence[Tensor]] = compile_graph(graph, list(tensors), options={"triton.cudagraphs": True})
    return run
