"""The modules of a model, by kind and by name, and their mode."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import nn

from lightning_ydrop.torch_internals import is_compiled, set_flag, without_compilation


class ModuleKind(NamedTuple):
    """What this package has to know of a module's class.

    Attributes:
        ours: Whether it is a layer of this package.
        of_torch: Whether it is one of torch's own.
        logs: Whether it is a LightningModule.
        sharded: Whether FSDP2 shards its parameters.
        overrides_train: Whether it has a `train` or `eval` of its own.
        minds_attributes: Whether it has a `__setattr__` of its own.
        script: Whether it is TorchScript's.

    """

    ours: bool
    of_torch: bool
    logs: bool
    sharded: bool
    overrides_train: bool
    minds_attributes: bool
    script: bool


# Their classes have attributes that no pass through a model changes.
FRAMEWORKS = ("torch", "lightning", "pytorch_lightning", "lightning_ydrop", "torchmetrics", "builtins", "abc", "typing")

# What embeds positions or kinds of tokens, and no words, is called so.
OF_POSITIONS = re.compile(r"pos|wpe|type|segment|distance|relative")

_KINDS: dict[type, ModuleKind] = {}


def kind_of(module: object) -> ModuleKind:
    """Tell what matters here of a module's class."""
    cls = type(module)
    kind = _KINDS.get(cls)
    if kind is None:
        kind = _KINDS[cls] = _kind_of_class(cls)
    return kind


def _kind_of_class(cls: Any) -> ModuleKind:
    bases = {base.__name__ for base in cls.__mro__}
    script = issubclass(cls, torch.jit.ScriptModule)
    return ModuleKind(
        ours=cls.__module__.startswith("lightning_ydrop.layers"),
        of_torch=cls.__module__.startswith("torch.nn."),
        logs="LightningModule" in bases,  # by name: `lightning` and `pytorch_lightning` have classes of their own
        sharded="FSDPModule" in bases,
        overrides_train=not script and (cls.train is not nn.Module.train or cls.eval is not nn.Module.eval),
        minds_attributes=not script and cls.__setattr__ is not nn.Module.__setattr__,
        script=script,
    )


@cache
def classes_of_users(cls: Any) -> tuple[type, ...]:
    """List a class and its bases, as far as they are a user's, or made inside a function, as torch.fx does."""
    return tuple(
        base
        for base in cls.__mro__
        if base.__module__.partition(".")[0] not in FRAMEWORKS or "<locals>" in base.__qualname__
    )


def overrides_train(module: nn.Module) -> bool:
    """Tell whether the class of a module overrides `train` or `eval`, or somebody has on the instance."""
    return kind_of(module).overrides_train or overrides_train_itself(module)


def overrides_train_itself(module: nn.Module) -> bool:
    """Tell whether somebody has overridden `train` or `eval` on the instance."""
    return "train" in module.__dict__ or "eval" in module.__dict__


def is_training(module: nn.Module) -> bool:
    """Tell whether a module is in training mode: a frozen TorchScript module has none."""
    return bool(getattr(module, "training", False))


def all_modules(model: nn.Module) -> list[nn.Module]:
    """List what `model.modules()` gives, in another order but much faster, because each step needs it."""
    modules = {id(model): model}
    ahead = [model]
    while ahead:
        for child in ahead.pop()._modules.values():
            if child is not None and id(child) not in modules:
                modules[id(child)] = child
                ahead.append(child)
    return list(modules.values())


def has_compiled_parts(model: nn.Module) -> bool:
    """Tell whether a model or something in it is compiled, in place or not."""
    return any(map(is_compiled, all_modules(model)))


def device_of(model: nn.Module) -> torch.device:
    """Say where a model is: on the CPU where it has no parameters."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """List what `model.named_modules()` gives, by names without what compilation adds to them."""
    return {without_compilation(name): module for name, module in model.named_modules()}


@contextmanager
def evaluation_mode(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Flip the flag of the modules that are training, and of just those: `.eval()` and `.train()` may be overridden."""
    training = [module for module in modules if is_training(module)]
    try:
        for module in training:
            set_training(module, False)
        yield
    finally:
        for module in training:
            set_training(module, True)


def set_training(module: nn.Module, training: bool) -> None:
    """Set the flag of a module, but not of the modules in it."""
    kind = kind_of(module)
    if kind.minds_attributes or kind.script:
        module.training = training
    else:
        set_flag(module, training)


def embeddings_of(model: nn.Module | None) -> list[str]:
    """Name the two embeddings of a model that are most like those of words, or give an example of a name."""
    modules = {} if model is None else named_modules(model)
    embeddings = {name: each for name, each in modules.items() if name and isinstance(each, nn.Embedding)}
    return by_likeness_to_words(embeddings)[:2] or ["name.of.the.embedding"]


def by_likeness_to_words(embeddings: Mapping[str, nn.Embedding]) -> list[str]:
    """Sort embeddings: those of positions and of kinds of tokens come last, the largest first otherwise."""

    def rank(name: str) -> tuple[bool, int]:
        return OF_POSITIONS.search(name.lower().rpartition(".")[2]) is not None, -embeddings[name].num_embeddings

    return sorted(embeddings, key=rank)
