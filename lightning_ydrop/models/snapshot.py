"""What a model holds, and how it is put back."""

import sys
from collections import deque
from collections.abc import Iterable
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ydrop.models.modules import all_modules, is_training, kind_of, overrides_train
from lightning_ydrop.models.objects import (
    UNSET,
    array_type,
    generator_state,
    holds_attributes,
    items_of,
    refill,
    refill_array,
    set_generator_state,
    set_slots,
    slots_of,
)
from lightning_ydrop.models.observations import Observations
from lightning_ydrop.models.tensors import KeptTensor, is_plain, replace_inference_tensors, version_of
from lightning_ydrop.torch_internals import (
    NO_HOOKS,
    PLAIN_TENSORS,
    attributes_of_script,
    copy_on_write,
    set_attribute_of_script,
    set_attributes,
    set_class,
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
# A pass may register hooks, or take them away by handles that know these very dictionaries.
HOOKS = tuple(name for name in nn.Module().__dict__ if "_hooks" in name and name not in BACKWARD_HOOKS)
# Objects of these libraries are machinery around a model, such as its Trainer and loggers, some with threads of their
# own. They are no part of its state.
MACHINERY = frozenset(
    {
        *sys.stdlib_module_names,
        *("torch", "lightning", "pytorch_lightning", "lightning_fabric", "lightning_ydrop", "numpy", "omegaconf"),
        *("hydra", "PIL", "pandas", "tensorboard", "tensorboardX", "wandb", "mlflow", "comet_ml", "neptune"),
        *("clearml", "aim", "datasets", "ray"),
    }
)
# Containers with more items than this are not searched for what lies inside.
MOST_ITEMS = 1000
# A step looks at no more objects than this, besides modules and what a pass was seen to write to: a model may hold its
# data.
MOST_OBJECTS_OF_A_STEP = 200
# Of classes of torch's own, how many attributes a module had in which nothing could be changed in place.
_SEARCHED_IN_VAIN: dict[type, int] = {}


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
        self._written: set[int] = set() if observations is None else observations.written
        self._minds_parameters = learning or observations is None or observations.parameters
        self.registered = _registered(self.roots)
        self._sharded = any(kind_of(module).sharded for module in self.registered)
        # How many objects a step looks at, besides modules and what a pass was seen to write to.
        self._most_objects = sys.maxsize if self.learning else MOST_OBJECTS_OF_A_STEP
        self._modules: list[tuple[nn.Module, type[nn.Module], dict[str, Any]]] = []
        self._minding: list[nn.Module] = []
        self._scripts: list[tuple[torch.jit.ScriptModule, dict[str, Any]]] = []
        self._containers: list[tuple[Any, Any]] = []
        self._slotted: list[tuple[Any, dict[str, Any]]] = []
        self._arrays: list[tuple[Any, Any]] = []
        self._generators: list[tuple[Any, Any]] = []
        self._minds_inference = learning or observations is None or observations.inference
        self._copies: dict[int, Tensor] = {}
        self._of_parameters: set[int] = set()
        self._parameters: list[tuple[Tensor, bool, Tensor | None, int]] = []
        self._kept: list[KeptTensor] = []
        self._watched: list[tuple[Tensor, int]] = []
        self._seen: set[int] = set()

    def take(self) -> None:
        """Copy what there is."""
        ahead: list[Any] = [*self.roots, *(() if self.observations is None else self.observations.changeable.values())]
        for module in self.registered:
            self._seen.add(id(module))
            ahead += self._take_module(module)
        while ahead and self._most_objects > 0:
            value = ahead.pop()
            cls = type(value)
            if cls in CONSTANT or id(value) in self._seen:
                continue
            self._seen.add(id(value))
            self._most_objects -= 1
            if isinstance(value, Tensor):
                if self.learning or id(value) in self._written:
                    self._guard(value)
                elif is_plain(value):  # of many that a container may hold
                    self._watched.append((value, version_of(value)))
            elif isinstance(value, nn.Module):
                ahead += (*self._take_module(value), *value._modules.values())
            elif isinstance(value, (dict, list, set, deque, bytearray)):
                ahead += self._take_container(value)
            elif isinstance(value, (tuple, frozenset)):
                ahead += value if len(value) <= MOST_ITEMS else ()
            elif cls is MethodType:
                ahead.append(value.__self__)
            elif cls is partial:
                ahead += (value.func, *value.args, *value.keywords.values())
            elif cls is array_type():
                ahead += self._take_array(value)
            else:
                ahead += self._take_object(value)

    def evaluate(self) -> None:
        """Put the modules among the roots in the state that their `eval()` gives.

        Where nothing overrides `train` or `eval`, that is a flag. An override that raises is passed over.
        """
        roots = [root for root in self.roots if isinstance(root, nn.Module)]
        if any(map(overrides_train, self.registered)):
            try:
                for root in roots:
                    root.eval()
            except Exception:
                self._set_flags()
        else:
            self._set_flags()

    def put_back(self) -> None:
        """Let everything be as it was taken."""
        for module in self._minding:
            if not module.training:
                module.training = True
        for script, attributes in self._scripts:
            for name, value in attributes.items():
                set_attribute_of_script(script, name, value)
        for module, cls, attributes in self._modules:
            if type(module) is not cls:
                set_class(module, cls)
            set_attributes(module, attributes)
            if self.learning or attributes["_forward_hooks"] or attributes["_forward_pre_hooks"]:
                self._clear_hooks(attributes)
        for container, copied in self._containers:
            if refill(container, copied):
                self._note_written(container)
                if id(container) in self._of_parameters and self.observations is not None:
                    self.observations.parameters = True
        for value, slots in self._slotted:
            set_slots(value, slots)
        for array, copied in self._arrays:
            if refill_array(array, copied):
                self._note_written(array)
        for generator, state in self._generators:
            set_generator_state(generator, state)
        self._put_back_tensors()

    def _put_back_tensors(self) -> None:
        for parameter, requires_grad, gradient, version in self._parameters:
            now, is_changed = parameter.grad, parameter.requires_grad != requires_grad
            if is_changed:
                parameter.requires_grad_(requires_grad)
            if now is not gradient or (gradient is not None and version_of(gradient) != version):
                parameter.grad, is_changed = gradient, True
            if is_changed and self.observations is not None:
                self.observations.parameters = True
        for kept in self._kept:
            is_written = kept.put_back(may_compare=self.learning)
            if is_written:
                self._written.add(id(kept.tensor))
            elif is_written is None and self.observations is not None:
                self.observations.read_raw.add(id(kept.tensor))
        for kept in self._kept:
            kept.release()
        for kept in self._kept:
            kept.unshare()
        for tensor, version in self._watched:
            if version_of(tensor) != version and self.observations is not None:
                self._written.add(id(tensor))
                self.observations.unguarded.append(self._name_of(tensor))

    def _note_written(self, value: Any) -> None:
        """Remember what a pass has changed: later ones look at it, wherever it is."""
        self._written.add(id(value))
        if self.observations is not None:
            self.observations.changeable[id(value)] = value

    def _name_of(self, tensor: Tensor) -> str:
        for module in self.registered:
            for name, held in (*module._parameters.items(), *module._buffers.items()):
                if held is tensor:
                    return f"{type(module).__name__}.{name}"
        return f"a tensor of shape {tuple(tensor.shape)}"

    def _set_flags(self) -> None:
        for module in self.registered:
            if is_training(module):
                kind = kind_of(module)
                if kind.minds_attributes:
                    self._minding.append(module)
                if kind.minds_attributes or kind.script:
                    module.training = False
                else:
                    set_flag(module, False)

    def _take_module(self, module: nn.Module) -> list[object]:
        kind = kind_of(module)
        if kind.script:
            attributes = attributes_of_script(module)  # type: ignore[arg-type]
            self._scripts.append((module, attributes))  # type: ignore[arg-type]
            return [*attributes.values(), *module._parameters.values()]
        held = module.__dict__
        own = held.copy()
        for registry in REGISTRIES:
            own[registry] = held[registry].copy()
        if not self._sharded:  # FSDP2 puts what it gathers in the place of parameters, and knows what stands there
            own["_parameters"] = held["_parameters"].copy()
        for hooks in BACKWARD_HOOKS:
            own[hooks] = NO_HOOKS
        if kind.logs:
            own["log"] = ignore  # where it stands before the method of the class; `log_dict` comes here too
        if self._minds_inference:
            for holder in (own, own["_buffers"], own["_parameters"]):
                replace_inference_tensors(holder, self._copies)
            if self._copies and self.observations is not None:
                self.observations.inference = True
        self._modules.append((module, type(module), held))
        set_attributes(module, own)
        ahead: list[object] = []
        if not self._sharded and (parameters := held["_parameters"]):  # whose memory FSDP2 takes away, too
            ahead += self._take_tensors(parameters, always=False)
        if buffers := held["_buffers"]:
            ahead += self._take_tensors(buffers, always=not kind.of_torch)
        if self.learning or held["_forward_hooks"] or held["_forward_pre_hooks"]:
            self._take_hooks(held)
            ahead += (*held["_forward_hooks"].values(), *held["_forward_pre_hooks"].values())
        # In our layers a forward changes nothing, and in most of torch's there is nothing to change in place.
        if kind.ours or _SEARCHED_IN_VAIN.get(type(module)) == len(held):
            return ahead
        if not kind.of_torch:
            ahead += self._take_slots(module)
        found = [value for name, value in held.items() if type(value) not in CONSTANT and name not in OF_EVERY_MODULE]
        if kind.of_torch and not found:
            _SEARCHED_IN_VAIN[type(module)] = len(held)
        for value in found:
            if isinstance(value, Tensor) and id(value) not in self._seen:
                self._seen.add(id(value))
                self._guard(value)
        return ahead + found

    def _take_tensors(self, registry: dict[str, Tensor | None], *, always: bool) -> list[object]:
        """Take parameters or buffers."""
        ahead: list[object] = []
        guards_all, written, seen = self.learning or always, self._written, self._seen
        for tensor in registry.values():
            if tensor is None or id(tensor) in seen:
                continue
            seen.add(id(tensor))
            if type(tensor) not in PLAIN_TENSORS:
                continue
            if guards_all or id(tensor) in written:
                self._guard(tensor)
            elif not tensor.is_inference():
                self._watched.append((tensor, tensor._version))
            if self._minds_parameters and isinstance(tensor, nn.Parameter):
                ahead += self._take_parameter(tensor)
        return ahead

    def _take_parameter(self, parameter: Tensor) -> Iterable[object]:
        """Take what a parameter holds besides its values: a gradient, a flag, and attributes."""
        gradient = parameter.grad
        version = -1 if gradient is None else version_of(gradient)
        self._parameters.append((parameter, parameter.requires_grad, gradient, version))
        attributes = parameter.__dict__
        self._of_parameters.add(id(attributes))
        if gradient is not None and id(gradient) not in self._seen:
            self._seen.add(id(gradient))
            self._guard(gradient)
        return (attributes,)

    def _take_hooks(self, attributes: dict[str, Any]) -> None:
        for name in HOOKS:
            self._seen.add(id(attributes[name]))
            self._containers.append((attributes[name], items_of(attributes[name])))

    def _clear_hooks(self, attributes: dict[str, Any]) -> None:
        for name in HOOKS:
            if id(attributes[name]) not in self._seen:
                attributes[name].clear()

    def _take_container(self, container: Any) -> Iterable[object]:
        is_small = len(container) <= MOST_ITEMS
        is_copied = is_small or self.learning or id(container) in self._written
        self._containers.append((container, items_of(container) if is_copied else len(container)))
        if not is_small or isinstance(container, bytearray):
            return ()
        return list(container.values()) if isinstance(container, dict) else list(container)

    def _take_array(self, array: Any) -> Iterable[object]:
        """Take one of NumPy, which can't share its memory: a large one where a pass was seen to write to it."""
        if array.size <= MOST_ITEMS or self.learning or id(array) in self._written:
            self._arrays.append((array, array.copy()))
        return array.ravel().tolist() if array.dtype.hasobject and array.size <= MOST_ITEMS else ()

    def _take_object(self, value: object) -> Iterable[object]:
        state = generator_state(value)
        if state is not None:
            self._generators.append((value, state))
            return ()
        if type(value).__module__.partition(".")[0] in MACHINERY and not holds_attributes(value):
            return ()
        slots = self._take_slots(value)
        attributes = getattr(value, "__dict__", None)
        if not isinstance(attributes, dict):
            return slots
        self._containers.append((attributes, items_of(attributes)))
        return (*attributes.values(), *slots)

    def _take_slots(self, value: object) -> list[object]:
        names = slots_of(type(value))  # type: ignore[arg-type] # mypy sees no hash in classes
        if not names:
            return []
        slots = {name: getattr(value, name, UNSET) for name in names}
        self._slotted.append((value, slots))
        return list(slots.values())

    def _guard(self, tensor: Tensor) -> None:
        if not is_plain(tensor):
            return
        observations, is_written = self.observations, id(tensor) in self._written
        may_share, must_guard = True, self.learning or is_written
        if observations is not None and not self.learning:
            # To share what will be written to takes as long as to copy it, and moves it to other memory.
            may_share = not is_written and id(tensor) not in observations.read_raw
        copied = copy_on_write(tensor) if may_share else None
        if copied is None and not must_guard and tensor.numel() > MOST_ITEMS:
            self._watched.append((tensor, version_of(tensor)))
        else:
            self._kept.append(KeptTensor(tensor, copied))


def _registered(roots: Iterable[object]) -> list[nn.Module]:
    """List the modules among some objects, and those in them, each once."""
    modules = [root for root in roots if isinstance(root, nn.Module)]
    if len(modules) == 1:
        return all_modules(modules[0])
    return list({id(each): each for module in modules for each in all_modules(module)}.values())


def ignore(*args: Any, **kwargs: Any) -> None:
    """Take what would have been logged."""
