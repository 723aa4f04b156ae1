"""What a model holds, and how it is put back."""

import sys
from collections import OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ydrop.models.modules import ModuleKind, all_modules, kind_of
from lightning_ydrop.models.objects import generator_state, items_of, refill, set_generator_state, slots_of
from lightning_ydrop.torch_internals import (
    PLAIN_TENSORS,
    attributes_of_script,
    copy_on_write,
    is_untouched,
    set_attribute_of_script,
    set_attributes,
    set_flag,
)

# Values that can't be changed in place, and what is no part of a model's state.
CONSTANT = frozenset(
    {
        *(bool, int, float, complex, str, bytes, type(None), type(...), range, type, FunctionType, BuiltinFunctionType),
        *(ModuleType, torch.device, torch.dtype, torch.Size, torch.layout, torch.memory_format),
    }
)
# The attributes that every module has: registries, of which those that a forward pass may change are looked at by name.
OF_EVERY_MODULE = frozenset(nn.Module().__dict__)
REGISTRIES = ("_buffers", "_modules", "_non_persistent_buffers_set")
BACKWARD_HOOKS = ("_backward_hooks", "_backward_pre_hooks")
# Objects of these libraries are machinery around a model, such as its Trainer and loggers, some with threads of their
# own. They are no part of its state.
MACHINERY = frozenset(
    {
        *sys.stdlib_module_names,
        *(
            "torch",
            "lightning",
            "pytorch_lightning",
            "lightning_fabric",
            "numpy",
            "omegaconf",
            "hydra",
            "PIL",
            "pandas",
        ),
        *("tensorboard", "tensorboardX", "wandb", "mlflow", "comet_ml", "neptune", "clearml", "aim", "datasets", "ray"),
    }
)
# Containers with more items than this are not searched for what lies inside.
MOST_ITEMS = 1000


# Of classes of torch's own, how many attributes a module had in which nothing could be changed in place.
_SEARCHED_IN_VAIN: dict[type, int] = {}


@dataclass
class Observations:
    """What an engine has seen passes through its model change, so that later passes guard that alone.

    Attributes:
        written: Tensors, by id, that a pass has written to.
        read_raw: Tensors, by id, whose memory something asked for without writing to it. Sharing it would cost a copy.
        python_random: Whether a pass draws from Python's random stream.
        numpy_random: Whether a pass draws from NumPy's.
        tensor_hooks: Whether a pass registers hooks on tensors.
        unguarded: Descriptions of tensors that a later pass was the first to write to.

    """

    written: set[int] = field(default_factory=set)
    read_raw: set[int] = field(default_factory=set)
    python_random: bool = False
    numpy_random: bool = False
    tensor_hooks: bool = False
    unguarded: list[str] = field(default_factory=list)


class Snapshot:
    """What modules hold, and the objects in their attributes, taken before a pass and put back after it.

    Modules get a copy of their dictionary of attributes for the pass, and the former one back. Containers and plain
    objects in their attributes are copied as far as they reach. Tensors share their memory with a copy until one is
    written to.

    Args:
        roots: Modules, and objects that may hold modules or be changed by the pass, such as a model's arguments.
        observations: What earlier passes have shown: parameters, and buffers of torch's own modules, are then only
            guarded where a pass was seen to write to them. None guards everything.
        learning: Whether this pass is one that observations are made of.

    """

    def __init__(
        self, roots: Iterable[object], observations: Observations | None = None, learning: bool = False
    ) -> None:
        self.roots = list(roots)
        self.observations = observations
        self.learning = learning or observations is None
        self.registered = _registered(self.roots)
        self._kinds = [kind_of(module) for module in self.registered]
        self._sharded = any(kind.sharded for kind in self._kinds)
        self._overrides_train = any(kind.overrides_train for kind in self._kinds)
        self._modules: list[tuple[nn.Module, dict[str, Any]]] = []
        self._minding: list[nn.Module] = []
        self._scripts: list[tuple[torch.jit.ScriptModule, dict[str, Any]]] = []
        self._containers: list[tuple[Any, Any]] = []
        self._slotted: list[tuple[Any, dict[str, Any]]] = []
        self._generators: list[tuple[Any, Any]] = []
        self._shared: list[tuple[Tensor, Tensor, bool, int]] = []
        self._watched: list[tuple[Tensor, int]] = []
        self._seen: set[int] = set()

    def take(self) -> None:
        """Copy what there is."""
        ahead: list[object] = list(self.roots)
        for module, kind in zip(self.registered, self._kinds, strict=True):
            self._take_module(module, kind, ahead)
        while ahead:
            value = ahead.pop()
            if type(value) in CONSTANT or id(value) in self._seen:
                continue
            if isinstance(value, nn.Module):
                self._take_module(value, kind_of(value), ahead)
                ahead += value._modules.values()
                continue
            self._seen.add(id(value))
            if isinstance(value, Tensor):
                self._guard(value)
            elif isinstance(value, (dict, list, set, deque, bytearray)):
                ahead += self._take_container(value)
            elif isinstance(value, (tuple, frozenset)):
                ahead += value if len(value) <= MOST_ITEMS else ()
            else:
                ahead += self._take_object(value)

    def evaluate(self) -> None:
        """Put the modules among the roots in the state that their `eval()` gives.

        Where no class overrides `train` or `eval`, that is a flag. An override that raises is passed over.
        """
        if self._overrides_train:
            try:
                for root in self.roots:
                    if isinstance(root, nn.Module):
                        root.eval()
                return
            except Exception:
                pass
        for module, kind in zip(self.registered, self._kinds, strict=True):
            if module.training:
                if kind.minds_attributes:
                    self._minding.append(module)
                if kind.minds_attributes or kind.script:
                    module.training = False
                else:
                    set_flag(module, False)

    def put_back(self) -> None:
        """Put everything back as it was."""
        for module in self._minding:
            if not module.training:
                module.training = True
        for script, attributes in self._scripts:
            for name, value in attributes.items():
                set_attribute_of_script(script, name, value)
        for module, attributes in self._modules:
            set_attributes(module, attributes)
        for container, copied in self._containers:
            refill(container, copied)
        for value, slots in self._slotted:
            for name, held in slots.items():
                if getattr(value, name, None) is not held:
                    object.__setattr__(value, name, held)  # past a frozen class
        for generator, state in self._generators:
            set_generator_state(generator, state)
        for tensor, copied_tensor, shares, version in self._shared:
            self._put_back_tensor(tensor, copied_tensor, shares, version)
        for tensor, version in self._watched:
            if tensor._version != version and self.observations is not None:
                self.observations.written.add(id(tensor))
                self.observations.unguarded.append(self._name_of(tensor))

    def _name_of(self, tensor: Tensor) -> str:
        for module in self.registered:
            for name, held in (*module._parameters.items(), *module._buffers.items()):
                if held is tensor:
                    return f"{type(module).__name__}.{name}"
        return f"a tensor of shape {tuple(tensor.shape)}"

    def _take_module(self, module: nn.Module, kind: ModuleKind, ahead: list[object]) -> None:
        """Give a module another dictionary of attributes, and find what is to be looked at in it."""
        self._seen.add(id(module))
        if kind.script:
            script: Any = module
            attributes = attributes_of_script(script)
            self._scripts.append((script, attributes))
            ahead += attributes.values()
            return
        held = module.__dict__
        attributes = held.copy()
        for registry in REGISTRIES:
            attributes[registry] = held[registry].copy()
        # FSDP2 puts what it gathers in the place of parameters, and takes its memory away again.
        if not self._sharded and (parameters := held["_parameters"]):
            self._look_at(parameters, always=False)
        if not self._sharded:
            attributes["_parameters"] = held["_parameters"].copy()
        if buffers := held["_buffers"]:
            self._look_at(buffers, always=not kind.of_torch)
        for hooks in BACKWARD_HOOKS:
            if held[hooks]:
                attributes[hooks] = OrderedDict()
        if kind.logs:
            attributes["log"] = ignore  # where it stands before the method of the class; `log_dict` comes here too
        self._modules.append((module, held))
        set_attributes(module, attributes)
        # In our layers forward changes nothing, and most of torch's have nothing that could be changed in place.
        if not kind.ours and _SEARCHED_IN_VAIN.get(type(module)) != len(held):
            changeable = [
                value for name, value in held.items() if type(value) not in CONSTANT and name not in OF_EVERY_MODULE
            ]
            ahead += changeable
            if kind.of_torch and not changeable:
                _SEARCHED_IN_VAIN[type(module)] = len(held)

    def _look_at(self, tensors: dict[str, Tensor | None], always: bool) -> None:
        """Guard parameters or buffers, or watch their versions where no pass was seen to write to them."""
        observations = self.observations
        for tensor in tensors.values():
            if tensor is None or id(tensor) in self._seen:
                continue
            self._seen.add(id(tensor))
            if self.learning or always or observations is None or id(tensor) in observations.written:
                self._guard(tensor)
            elif type(tensor) in PLAIN_TENSORS and not tensor.is_inference():
                self._watched.append((tensor, tensor._version))

    def _take_container(self, container: Any) -> Iterable[object]:
        self._containers.append(
            (container, items_of(container) if self.learning or len(container) <= MOST_ITEMS else len(container))
        )
        if len(container) > MOST_ITEMS or isinstance(container, bytearray):
            return ()
        return list(container.values()) if isinstance(container, dict) else list(container)

    def _take_object(self, value: object) -> list[object]:
        state = generator_state(value)
        if state is not None:
            self._generators.append((value, state))
            return []
        if type(value).__module__.partition(".")[0] in MACHINERY:
            return []
        slots = {name: getattr(value, name) for name in slots_of(type(value)) if hasattr(value, name)}  # type: ignore[arg-type]
        if slots:
            self._slotted.append((value, slots))
        attributes = getattr(value, "__dict__", None)
        if not isinstance(attributes, dict):
            return list(slots.values())
        self._containers.append((attributes, items_of(attributes)))
        return [*attributes.values(), *slots.values()]

    def _guard(self, tensor: Tensor) -> None:
        if type(tensor) not in PLAIN_TENSORS:
            return
        observations = self.observations
        version = -1 if tensor.is_inference() else tensor._version
        if not self.learning and observations is not None and id(tensor) in observations.read_raw:
            self._watched.append((tensor, version))
            return
        copied = copy_on_write(tensor)
        if copied is not None:
            self._shared.append((tensor, copied, True, version))
        elif self.learning or observations is None or id(tensor) in observations.written:
            self._shared.append((tensor, tensor.detach().clone(), False, version))
        elif version >= 0:
            self._watched.append((tensor, version))

    def _put_back_tensor(self, tensor: Tensor, copied: Tensor, shares: bool, version: int) -> None:
        is_same_version = version < 0 or tensor._version == version
        if shares and is_same_version and is_untouched(tensor):
            return
        if self.observations is not None:
            if not self.learning:
                self.observations.written.add(id(tensor))
            # Only a learning pass may look at values. Where a version has not moved, `.data` may have been written to.
            elif is_same_version and tensor.shape == copied.shape and _same_bits(tensor, copied):
                if shares:
                    self.observations.read_raw.add(id(tensor))
                return
            else:
                self.observations.written.add(id(tensor))
        with torch.inference_mode(tensor.is_inference()), torch.no_grad():
            if (tensor.shape, tensor.dtype, tensor.device) == (copied.shape, copied.dtype, copied.device):
                tensor.copy_(copied)
            else:
                tensor.data = copied


def _registered(roots: Iterable[object]) -> list[nn.Module]:
    """List the modules among some objects, and those in them, each once."""
    modules = [root for root in roots if isinstance(root, nn.Module)]
    if len(modules) == 1:
        return all_modules(modules[0])
    return list({id(each): each for module in modules for each in all_modules(module)}.values())


def _same_bits(one: Tensor, other: Tensor) -> bool:
    one = one.detach()
    # NaN differs from itself.
    return torch.equal(one, other) or (
        torch.equal(one != one, other != other) and torch.equal(one[one == one], other[other == other])
    )


def ignore(*args: Any, **kwargs: Any) -> None:
    """Take what would have been logged."""
