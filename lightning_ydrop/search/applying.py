"""How patterns are put into a model, and taken out again."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ydrop.layers.pattern_dropout import PatternDropout
from lightning_ydrop.layers.patterns import ConvPattern, Pattern
from lightning_ydrop.search.layout import CHILD, CONTAINERS, Layout, has_own_forward, is_inside, is_ordinary_dropout
from lightning_ydrop.search.reports import Place

# A module with the modules in it, its hooks, and the names of its attributes that are None.
_Registries = tuple[nn.Module, dict[str, nn.Module | None], dict[int, Any], list[str]]


class Silenced(nn.Identity):
    """Stands where an ordinary dropout was that a pattern replaces."""


@dataclass(frozen=True)
class _Former:
    """What stood where a pattern, or the silence beside it, stands now.

    Attributes:
        place: Name of the place.
        module: What was there. None where an attribute was None.
        was_registered: Whether a module, or None, was registered there. Otherwise the attribute was a plain None.
        is_on_module: Whether the layer masks what its holder puts out. Nothing stood there then.

    """

    place: str
    module: nn.Module | None
    was_registered: bool
    is_on_module: bool = False


def mask_output(self: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
    """Mask what a module puts out. TorchScript compiles this as a method of the module."""
    masked: Tensor = self.pattern_dropout(output)  # type: ignore[operator]
    return masked


def put_pattern(layout: Layout, place: Place, pattern: Pattern) -> Iterator[tuple[str, str]]:
    """Put a pattern at a place.

    Args:
        layout: The modules of the model, without patterns.
        place: The place.
        pattern: Not empty.

    Yields:
        Each ordinary dropout that it replaces, and how.

    """
    names = [*place.modules, *(place.shortcuts if isinstance(pattern, ConvPattern) and pattern.residual else ())]
    for name in names:
        layer = PatternDropout(pattern)
        layer.stand_at(f"the place {place.name!r}, on {name or 'the model itself'},", place.is_of_attention)
        module = layout.modules.get(name)
        if _gives_way(module):
            holder, called = layout.holders[name] if module is not None else _attribute(layout, name)
            _replace(holder, called, layer, place.name)
            if is_ordinary_dropout(module):
                yield name, f"{module!r} -> the pattern of {place.name}"
        else:
            assert module is not None
            _mask(_last(module, layout.shared), layer, place.name)
    for name in dropouts_beside(layout, place):
        _replace(*layout.holders[name], Silenced(), place.name)
        yield name, f"{layout[name]!r} -> nothing, beside the pattern of {place.name}"


def dropouts_beside(layout: Layout, place: Place) -> list[str]:
    """List the ordinary dropout at a place of maps: in the block, or after the masked module and before another layer.

    Args:
        layout: The modules of the model.
        place: A place. In Transformers the place is the dropout itself.

    Returns:
        Names of layers.

    """
    if place.kind == "token":
        return []
    block = _block_around(layout, place)
    found = [] if block is None else [each for each in layout.inside(block) if is_ordinary_dropout(layout[each])]
    for name in place.modules if block is None else ():
        holder = layout.holder_of(name)
        for each in layout.inside(holder):
            if layout.position(each) <= layout.ends_at(name):
                continue
            if is_ordinary_dropout(layout[each]):
                found.append(each)
            elif layout.maskable([each]) or isinstance(layout[each], (nn.Linear, nn.Flatten, *CONTAINERS)):
                break
    shortcuts = place.shortcuts
    return [
        name
        for name in dict.fromkeys(found)
        if name not in place.modules and not any(is_inside(name, each) for each in shortcuts)
    ]


def take_out(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Take all patterns out of a model that `put_pattern` put there, in the mode in which they stand.

    Args:
        model: The model.

    Returns:
        For each layer that was taken out and each module that came back: the name of the place, and the module.

    """
    taken: list[tuple[str, nn.Module]] = []
    for holder in list(model.modules()):
        for called, layer in list(holder._modules.items()):
            former = None if layer is None else layer.__dict__.get("former")
            if layer is None or not isinstance(former, _Former):
                continue
            taken.append((former.place, layer))
            if former.is_on_module:
                del holder._modules[called]
                for key in [key for key, hook in holder._forward_hooks.items() if hook is mask_output]:
                    del holder._forward_hooks[key]
            elif former.was_registered:
                holder._modules[called] = former.module
                if former.module is not None:
                    former.module.train(layer.training)
                    taken.append((former.place, former.module))
            else:
                del holder._modules[called]
                holder.__dict__[called] = None
    return taken


@contextmanager
def all_or_nothing(model: nn.Module) -> Iterator[None]:
    """Put back the modules and hooks of a model, patterns included, if an error is raised."""
    kept = _registries(model)
    try:
        yield
    except BaseException:
        _give_back(kept)
        raise


@contextmanager
def without_patterns(model: nn.Module) -> Iterator[None]:
    """Take the patterns out of a model for a while."""
    kept = _registries(model)
    try:
        take_out(model)
        yield
    finally:
        _give_back(kept)


def _registries(model: nn.Module) -> list[_Registries]:
    return [
        (module, dict(module._modules), dict(module._forward_hooks), [k for k, v in vars(module).items() if v is None])
        for module in model.modules()
        if not isinstance(module, torch.jit.ScriptModule)
    ]


def _give_back(kept: list[_Registries]) -> None:
    for module, modules, hooks, empty in kept:
        module._modules.clear()
        module._modules.update(modules)
        module._forward_hooks.clear()
        module._forward_hooks.update(hooks)
        module.__dict__.update(dict.fromkeys(empty))
        for called in modules:
            module.__dict__.pop(called, None)


def reattach(model: nn.Module) -> None:
    """Hang patterns on modules again whose hooks were lost, as where SyncBatchNorm takes a batch norm's place."""
    for module in model.modules():
        layer = module._modules.get(CHILD)
        if layer is not None and "former" in layer.__dict__ and mask_output not in module._forward_hooks.values():
            _hang_on(module)


def forget_compiled_code() -> None:
    """Let compiled code be compiled again: torch does not notice hooks that come or go after that."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def layers_of(model: nn.Module) -> list[PatternDropout]:
    """List the patterns that stand in a model because `put_pattern` put them there."""
    return [each for each in model.modules() if isinstance(each, PatternDropout) and "former" in each.__dict__]


def places_of(layers: Iterable[PatternDropout]) -> set[str]:
    """Name the places at which patterns stand."""
    return {layer.__dict__["former"].place for layer in layers}


def _mask(module: nn.Module, layer: PatternDropout, place: str) -> None:
    """Let a layer mask what a module puts out."""
    layer.__dict__["former"] = _Former(place, None, was_registered=False, is_on_module=True)
    layer.train(module.training)
    layer.to(_device_of(module))
    module.register_module(CHILD, layer)
    _hang_on(module)


def _hang_on(module: nn.Module) -> None:
    """Let a module that holds a pattern apply it. A sequence does so by itself: the pattern is its last item."""
    if not _is_sequence(module):
        module.register_forward_hook(mask_output)


def _replace(holder: nn.Module, called: str, layer: nn.Module, place: str) -> None:
    """Put a layer where a module stands that does nothing in evaluation, or where an attribute is None."""
    was_registered = called in holder._modules
    module = holder._modules.get(called)
    layer.__dict__["former"] = _Former(place, module, was_registered)
    layer.__dict__["p"] = 0.0  # for code that reads the rate of a dropout layer
    layer.train(holder.training if module is None else module.training)
    layer.to(_device_of(holder))
    holder.__dict__.pop(called, None)
    holder._modules[called] = layer


def _gives_way(module: nn.Module | None) -> bool:
    """Tell whether a pattern takes the place of what is there: None, a dropout, or a module that does nothing."""
    if module is None or is_ordinary_dropout(module):
        return True
    empty = isinstance(module, nn.Sequential) and not module._modules
    return empty or (type(module) is nn.Identity and not module._forward_hooks and not module._forward_pre_hooks)


def _attribute(layout: Layout, name: str) -> tuple[nn.Module, str]:
    """Find an attribute that is None."""
    holder, _, called = name.rpartition(".")
    return layout[holder], called


def _last(module: nn.Module, shared: set[int]) -> nn.Module:
    """Find the module whose output is that of a sequence, unless it is called elsewhere too, as a shared ReLU is."""
    while _is_sequence(module) and id(last := module[-1]) not in shared:  # type: ignore[index]
        module = last
    return module


def _is_sequence(module: nn.Module) -> bool:
    """Tell whether a module calls what it holds one after the other, and that is all."""
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward and len(module) > 0


def _block_around(layout: Layout, place: Place) -> str | None:
    """Find the block that a place masks several modules of."""
    name = place.modules[0]
    while len(place.modules) > 1 and name:
        name = layout.holder_of(name)
        if all(is_inside(each, name) for each in place.modules):
            return name if has_own_forward(layout[name]) else None
    return None


def _device_of(module: nn.Module) -> torch.device:
    tensors = chain(module.parameters(), module.buffers())
    return next((tensor.device for tensor in tensors), torch.device("cpu"))
