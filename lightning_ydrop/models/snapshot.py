"""What a model holds, and how it is put back."""

import sys
from collections import OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ydrop.models.modules import all_modules, kind_of
from lightning_ydrop.models.objects import generator_state, items_of, refill, set_generator_state, slots_of
from lightning_ydrop.torch_internals import (
    PLAIN_TENSORS,
    attributes_of_script,
    copy_on_write,
    is_untouched,
    set_attribute_of_script,
    set_attributes,
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
        registered = {
            id(each): each for root in self.roots if isinstance(root, nn.Module) for each in all_modules(root)
        }
        self.registered = list(registered.values())
        self._sharded = any(kind_of(module).sharded for module in self.registered)
        self._modules: list[tuple[nn.Module, dict[str, Any]]] = []
        self._minding: list[nn.Module] = []
        self._scripts: list[tuple[torch.jit.ScriptModule, dict[str, Any]]] = []
        self._containers: list[tuple[Any, Any]] = []
        self._slotted: list[tuple[Any, dict[str, Any]]] = []
        self._generators: list[tuple[Any, Any]] = []
        self._shared: list[tuple[Tensor, Tensor, bool, int]] = []
        self._watched: list[tuple[str, Tensor, int]] = []
        self._seen: set[int] = set()

    def take(self) -> None:
        """Copy what the roots hold."""
        ahead: list[object] = [*self.roots, *self.registered]
        while ahead:
            value = ahead.pop()
            cls = type(value)
            if cls in CONSTANT or id(value) in self._seen:
                continue
            self._seen.add(id(value))
            if isinstance(value, Tensor):
                self._guard(value)
            elif isinstance(value, nn.Module):
                ahead += self._take_module(value)
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
        roots = [root for root in self.roots if isinstance(root, nn.Module)]
        if any(kind_of(module).overrides_train for module in self.registered):
            try:
                for root in roots:
                    root.eval()
            except Exception:
                self._set_flags()
        else:
            self._set_flags()

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
        for name, tensor, version in self._watched:
            if tensor._version != version and self.observations is not None:
                self.observations.written.add(id(tensor))
                self.observations.unguarded.append(name)

    def _set_flags(self) -> None:
        for module in self.registered:
            if module.training:
                kind = kind_of(module)
                if kind.minds_attributes:
                    self._minding.append(module)
                if kind.minds_attributes or kind.script:
                    module.training = False
                else:
                    module.__dict__["training"] = False  # what nn.Module does in the end, but faster

    def _take_module(self, module: nn.Module) -> list[object]:
        kind = kind_of(module)
        if kind.script:
            attributes = attributes_of_script(module)  # type: ignore[arg-type]
            self._scripts.append((module, attributes))  # type: ignore[arg-type]
            return [*attributes.values(), *module._modules.values()]
        held = module.__dict__
        own = held.copy()
        for registry in REGISTRIES:
            own[registry] = held[registry].copy()
        if not self._sharded:  # FSDP2 replaces parameters by what it gathers, and keeps track of them itself
            own["_parameters"] = held["_parameters"].copy()
        for hooks in BACKWARD_HOOKS:
            if held[hooks]:
                own[hooks] = OrderedDict()
        if kind.logs:
            own["log"] = ignore  # where it stands before the method of the class; `log_dict` comes here too
        self._modules.append((module, held))
        set_attributes(module, own)
        observations = self.observations
        for registry, always in (("_parameters", False), ("_buffers", not kind.of_torch)):
            if self._sharded and registry == "_parameters":
                continue  # and it takes the memory of what it has gathered away
            for name, tensor in held[registry].items():
                if tensor is None or id(tensor) in self._seen:
                    continue
                self._seen.add(id(tensor))
                if self.learning or always or observations is None or id(tensor) in observations.written:
                    self._guard(tensor)
                elif type(tensor) in PLAIN_TENSORS and not tensor.is_inference():
                    self._watched.append((f"{type(module).__name__}.{name}", tensor, tensor._version))
        if kind.ours:  # whose forward changes nothing
            return []
        return [
            *(value for name, value in held.items() if type(value) not in CONSTANT and name not in OF_EVERY_MODULE),
            *held["_modules"].values(),
        ]

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
            self._watched.append((f"a {type(tensor).__name__}", tensor, version))
            return
        copied = copy_on_write(tensor)
        if copied is not None:
            self._shared.append((tensor, copied, True, version))
        elif self.learning or observations is None or id(tensor) in observations.written:
            self._shared.append((tensor, tensor.detach().clone(), False, version))
        elif version >= 0:
            self._watched.append((f"a {type(tensor).__name__}", tensor, version))

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


def _same_bits(one: Tensor, other: Tensor) -> bool:
    one = one.detach()
    # NaN differs from itself.
    return torch.equal(one, other) or (
        torch.equal(one != one, other != other) and torch.equal(one[one == one], other[other == other])
    )


def ignore(*args: Any, **kwargs: Any) -> None:
    """Take what would have been logged."""
