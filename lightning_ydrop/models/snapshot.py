"""What a model holds, and how it is put back."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ydrop.models.contents import CONSTANT, FORWARD_HOOKS, OF_PARAMETERS, Contents, Start
from lightning_ydrop.models.modules import all_modules, classes_of_users, is_training, kind_of, overrides_train_itself
from lightning_ydrop.models.objects import copy_of_iterator, is_iterator, items_of, refill
from lightning_ydrop.models.observations import Observations
from lightning_ydrop.models.tensors import Tensors, replace_inference_tensors, version_of
from lightning_ydrop.torch_internals import (
    NO_HOOKS,
    PLAIN_TENSORS,
    attributes_of_script,
    set_attribute_of_script,
    set_attributes,
    set_class,
    set_flags,
)

# The attributes that every module has: registries, of which those that a forward pass may change are looked at by name.
OF_EVERY_MODULE = frozenset(nn.Module().__dict__)
NAMES_OF_BUFFERS = "_non_persistent_buffers_set"
REGISTRIES = ("_buffers", "_modules", NAMES_OF_BUFFERS)
BACKWARD_HOOKS = ("_backward_hooks", "_backward_pre_hooks")
# A pass may register hooks, or take them away by handles that know these very dictionaries.
HOOKS = tuple(name for name in nn.Module().__dict__ if "_hooks" in name and name not in BACKWARD_HOOKS)


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
        self._minds_parameters = self.learning or observations is None or observations.parameters
        self._minds_inference = self.learning or observations is None or observations.inference
        self._tensors = Tensors(observations, learning)
        self._contents = Contents(observations, learning, self._tensors, self._take_module)
        self._seen = self._tensors.seen
        self._modules: list[tuple[nn.Module, type[nn.Module], dict[str, Any]]] = []
        self._minding: list[nn.Module] = []
        self._scripts: list[tuple[torch.jit.ScriptModule, dict[str, Any]]] = []
        self._hooks: list[tuple[dict[Any, Any], Any]] = []
        self._copies: dict[int, Tensor] = {}
        self._parameters: list[tuple[Tensor, bool, Tensor | None, int]] = []

    def take(self) -> None:
        """Copy what there is."""
        contents = self._contents
        self._seen.update(map(id, self.registered))
        for module in self.registered:
            if starts := self._take_module(module):
                contents.add(starts)
        contents.add([((type(root), ""), root) for root in self.roots if not isinstance(root, nn.Module)])
        contents.search()

    def evaluate(self) -> None:
        """Put the modules among the roots in the state that their `eval()` gives.

        Where nothing overrides `train` or `eval`, that is a flag. An override that raises is passed over.
        """
        roots = [root for root in self.roots if isinstance(root, nn.Module)]
        if any(kind.overrides_train for kind in self._kinds) or any(map(overrides_train_itself, self.registered)):
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
        for hooks, held in self._hooks:
            refill(hooks, held)
        self._contents.put_back()
        self._put_back_parameters()
        self._tensors.put_back(self._name_of)

    def _put_back_parameters(self) -> None:
        for parameter, requires_grad, gradient, version in self._parameters:
            now, is_changed = parameter.grad, parameter.requires_grad != requires_grad
            if is_changed:
                parameter.requires_grad_(requires_grad)
            if now is not gradient or (gradient is not None and version_of(gradient) != version):
                parameter.grad, is_changed = gradient, True
            if is_changed and self.observations is not None:
                self.observations.parameters = True

    def _name_of(self, tensor: Tensor) -> str:
        for module in self.registered:
            for name, held in (*module._parameters.items(), *module._buffers.items()):
                if held is tensor:
                    return f"{type(module).__name__}.{name}"
        return f"a tensor of shape {tuple(tensor.shape)}"

    def _set_flags(self) -> None:
        plain: list[nn.Module] = []
        for module, kind in zip(self.registered, self._kinds, strict=True):
            if not (kind.minds_attributes or kind.script):
                plain.append(module)
            elif is_training(module):
                if kind.minds_attributes:
                    self._minding.append(module)
                module.training = False
        set_flags(plain, False)

    def _take_module(self, module: nn.Module) -> list[Start]:
        kind = kind_of(module)
        if kind.script:
            attributes = attributes_of_script(module)  # type: ignore[arg-type]
            self._scripts.append((module, attributes))  # type: ignore[arg-type]
            place = (type(module), "")
            return [(place, value) for value in (*attributes.values(), *module._parameters.values())]
        held = module.__dict__
        own = held.copy()
        for registry in REGISTRIES:
            if held[registry]:
                own[registry] = held[registry].copy()
            else:
                own[registry] = set() if registry == NAMES_OF_BUFFERS else {}
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
        cls = type(module)
        self._modules.append((module, cls, held))
        set_attributes(module, own)
        starts: list[Start] = []
        if not self._sharded and (parameters := held["_parameters"]):  # whose memory FSDP2 takes away, too
            starts += self._take_tensors(parameters, always=False)
        if buffers := held["_buffers"]:
            starts += self._take_tensors(buffers, always=not kind.of_torch)
        if self.learning or held["_forward_hooks"] or held["_forward_pre_hooks"]:
            starts += self._take_hooks(cls, held)
        if kind.ours:  # a forward changes nothing in our layers
            return starts
        if not kind.of_torch:
            for each in classes_of_users(cls):  # type: ignore[arg-type] # mypy sees no hash in classes
                self._contents.add_class(each)
            starts += [((cls, ""), value) for value in self._contents.take_slots(module, (cls, ""))]
        for name, value in held.items():
            if name in OF_EVERY_MODULE or type(value) in CONSTANT:
                continue
            if isinstance(value, Tensor):
                if id(value) not in self._seen:
                    self._seen.add(id(value))
                    self._tensors.take(value)
            elif is_iterator(value):  # which can't be set back: a pass goes on with a copy
                own[name] = copy_of_iterator(value)
            else:
                starts.append(((cls, name), value))
        return starts

    def _take_tensors(self, registry: dict[str, Tensor | None], *, always: bool) -> list[Start]:
        """Take parameters or buffers."""
        starts: list[Start] = []
        tensors, seen = self._tensors, self._seen
        guards_all, written = self.learning or always, tensors.written
        for tensor in registry.values():
            key = id(tensor)
            if tensor is None or key in seen:
                continue
            seen.add(key)
            if type(tensor) not in PLAIN_TENSORS:
                continue
            if guards_all or key in written:
                tensors.take(tensor)
            elif not tensor.is_inference():
                tensors.watched.append((tensor, tensor._version, None))
            if self._minds_parameters and isinstance(tensor, nn.Parameter):
                starts.append(self._take_parameter(tensor))
        return starts

    def _take_parameter(self, parameter: Tensor) -> Start:
        """Take what a parameter holds besides its values: a gradient, a flag, and attributes."""
        gradient = parameter.grad
        version = -1 if gradient is None else version_of(gradient)
        self._parameters.append((parameter, parameter.requires_grad, gradient, version))
        if gradient is not None and id(gradient) not in self._seen:
            self._seen.add(id(gradient))
            self._tensors.take(gradient)
        return OF_PARAMETERS, parameter.__dict__

    def _take_hooks(self, cls: type, attributes: dict[str, Any]) -> list[Start]:
        for name in HOOKS:
            self._seen.add(id(attributes[name]))
            self._hooks.append((attributes[name], items_of(attributes[name])))
        return [((cls, name), hook) for name in FORWARD_HOOKS for hook in attributes[name].values()]

    def _clear_hooks(self, attributes: dict[str, Any]) -> None:
        for name in HOOKS:
            if id(attributes[name]) not in self._seen:
                attributes[name].clear()


def _registered(roots: Iterable[object]) -> list[nn.Module]:
    """List the modules among some objects, and those in them, each once."""
    modules = [root for root in roots if isinstance(root, nn.Module)]
    if len(modules) == 1:
        return all_modules(modules[0])
    return list({id(each): each for module in modules for each in all_modules(module)}.values())


def ignore(*args: Any, **kwargs: Any) -> None:
    """Take what would have been logged."""
