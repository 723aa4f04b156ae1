"""Everything that a pass through somebody else's model may change, and how it is undone."""

import random
import sys
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_ydrop.torch_internals import (
    PLAIN_TENSORS,
    attributes_of_script,
    caches_off,
    copy_on_write,
    global_hooks_off,
    is_compiled,
    is_untouched,
    set_attribute_of_script,
    set_attributes,
    tensor_hooks_off,
    without_compilation,
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
# Objects of these libraries are machinery around a model, such as its Trainer and loggers, and some have threads of their
# own: they are no part of its state.
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
        read_raw: Tensors, by id, whose memory something asked for that did not write: to share it would cost a copy.
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


class _Kind(NamedTuple):
    """What matters here of a module's class."""

    ours: bool
    of_torch: bool
    logs: bool
    sharded: bool
    overrides_train: bool
    minds_attributes: bool
    script: bool


def _kind_of(module: object) -> _Kind:
    return _kind_of_class(type(module))  # type: ignore[arg-type] # mypy sees no hash in classes


@cache
def _kind_of_class(cls: Any) -> _Kind:
    bases = {base.__name__ for base in cls.__mro__}
    script = issubclass(cls, torch.jit.ScriptModule)
    return _Kind(
        ours=cls.__module__.startswith("lightning_ydrop.layers"),
        of_torch=cls.__module__.startswith("torch.nn."),
        logs="LightningModule" in bases,  # by name: `lightning` and `pytorch_lightning` have classes of their own
        sharded="FSDPModule" in bases,
        overrides_train=not script and (cls.train is not nn.Module.train or cls.eval is not nn.Module.eval),
        minds_attributes=not script and cls.__setattr__ is not nn.Module.__setattr__,
        script=script,
    )


def all_modules(model: nn.Module) -> list[nn.Module]:
    """List what `model.modules()` gives, in another order and in a fraction of the time: each step looks at them."""
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
        self._sharded = any(_kind_of(module).sharded for module in self.registered)
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
        """Copy what there is."""
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
        if any(_kind_of(module).overrides_train for module in self.registered):
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
        for module, attributes in self._modules:
            set_attributes(module, attributes)
        for container, copied in self._containers:
            _refill(container, copied)
        for value, slots in self._slotted:
            for name, held in slots.items():
                if getattr(value, name, None) is not held:
                    object.__setattr__(value, name, held)  # past a frozen class
        for generator, state in self._generators:
            _set_generator_state(generator, state)
        for tensor, copied_tensor, shares, version in self._shared:
            self._put_back_tensor(tensor, copied_tensor, shares, version)
        for name, tensor, version in self._watched:
            if tensor._version != version and self.observations is not None:
                self.observations.written.add(id(tensor))
                self.observations.unguarded.append(name)

    def _set_flags(self) -> None:
        for module in self.registered:
            if module.training:
                kind = _kind_of(module)
                if kind.minds_attributes:
                    self._minding.append(module)
                if kind.minds_attributes or kind.script:
                    module.training = False
                else:
                    module.__dict__["training"] = False  # what it comes down to, without a search among parameters

    def _take_module(self, module: nn.Module) -> list[object]:
        kind = _kind_of(module)
        if kind.script:
            attributes = attributes_of_script(module)  # type: ignore[arg-type]
            self._scripts.append((module, attributes))  # type: ignore[arg-type]
            return [*attributes.values(), *module._modules.values()]
        held = module.__dict__
        own = held.copy()
        for registry in REGISTRIES:
            own[registry] = held[registry].copy()
        if not self._sharded:  # FSDP2 puts what it gathers in the place of parameters, and knows what stands there
            own["_parameters"] = held["_parameters"].copy()
        for hooks in BACKWARD_HOOKS:
            if held[hooks]:
                own[hooks] = OrderedDict()
        if kind.logs:
            own["log"] = _ignore  # where it stands before the method of the class; `log_dict` comes here too
        self._modules.append((module, held))
        set_attributes(module, own)
        observations = self.observations
        for registry, always in (("_parameters", False), ("_buffers", not kind.of_torch)):
            for name, tensor in held[registry].items():
                if tensor is None or id(tensor) in self._seen:
                    continue
                self._seen.add(id(tensor))
                if self.learning or always or observations is None or id(tensor) in observations.written:
                    self._guard(tensor)
                elif type(tensor) in PLAIN_TENSORS and not tensor.is_inference():
                    self._watched.append((f"{type(module).__name__}.{name}", tensor, tensor._version))
        if kind.ours:  # which forward does not change
            return []
        return [
            *(value for name, value in held.items() if type(value) not in CONSTANT and name not in OF_EVERY_MODULE),
            *held["_modules"].values(),
        ]

    def _take_container(self, container: Any) -> Iterable[object]:
        self._containers.append(
            (container, _items_of(container) if self.learning or len(container) <= MOST_ITEMS else len(container))
        )
        if len(container) > MOST_ITEMS or isinstance(container, bytearray):
            return ()
        return list(container.values()) if isinstance(container, dict) else list(container)

    def _take_object(self, value: object) -> list[object]:
        state = _generator_state(value)
        if state is not None:
            self._generators.append((value, state))
            return []
        if type(value).__module__.partition(".")[0] in MACHINERY:
            return []
        slots = {name: getattr(value, name) for name in _slots_of(type(value)) if hasattr(value, name)}
        if slots:
            self._slotted.append((value, slots))
        attributes = getattr(value, "__dict__", None)
        if not isinstance(attributes, dict):
            return list(slots.values())
        self._containers.append((attributes, _items_of(attributes)))
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


@contextmanager
def leaving_no_trace(
    roots: Iterable[object],
    observations: Observations | None = None,
    *,
    learning: bool = False,
    evaluate: bool = True,
) -> Iterator[list[nn.Module]]:
    """Put modules in evaluation mode for forward passes that are none of the user's own, and undo what these do.

    Attributes, buffers, parameters, the objects in attributes, the random streams of Python and NumPy, and the caches
    of autocast and of parametrizations are afterwards what they were; what a LightningModule logs is dropped; hooks of
    backward passes don't fire, and anomaly detection is off. `nn.TransformerEncoderLayer` runs the layers inside it.

    Args:
        roots: The modules, and whatever else the passes may change. What these hold is searched for more.
        observations: As for `Snapshot`: None guards everything.
        learning: Whether these passes are observed.
        evaluate: Whether to put modules in evaluation mode, or leave them in their own.

    Yields:
        The modules among the roots, and those in them.

    """
    everything = learning or observations is None
    snapshot = Snapshot(roots, observations, learning)
    with ExitStack() as stack:
        stack.enter_context(_random_streams(observations, learning))
        stack.callback(snapshot.put_back)
        snapshot.take()
        stack.enter_context(caches_off())
        stack.enter_context(global_hooks_off())
        stack.enter_context(slow_attention())
        if torch.is_anomaly_enabled():
            stack.enter_context(torch.autograd.set_detect_anomaly(False))
        if everything or (observations is not None and observations.tensor_hooks):
            callers = stack.enter_context(tensor_hooks_off())
            if observations is not None:
                stack.callback(lambda: _note_hooks(observations, callers))
        if evaluate:
            snapshot.evaluate()
        yield snapshot.registered


def _note_hooks(observations: Observations, callers: Sequence[str]) -> None:
    observations.tensor_hooks = observations.tensor_hooks or bool(callers)


@contextmanager
def logging_muted(model: nn.Module) -> Iterator[None]:
    """Keep what LightningModules in a model log out of the logs, where a pass of ours is one of training."""
    modules = [module for module in all_modules(model) if _kind_of(module).logs]
    former = [module.__dict__.get("log") for module in modules]
    try:
        for module in modules:
            module.__dict__["log"] = _ignore
        yield
    finally:
        for module, log in zip(modules, former, strict=True):
            if log is None:
                del module.__dict__["log"]
            else:
                module.__dict__["log"] = log


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
    kind = _kind_of(module)
    if kind.minds_attributes or kind.script:
        module.training = training
    else:
        module.__dict__["training"] = training


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

    To copy the two takes 50 microseconds, so that an engine's steps do it where its dry run has seen them move.
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


@cache
def _slots_of(cls: Any) -> tuple[str, ...]:
    """List the attributes that a class and its bases keep in slots, without those of Python's own classes."""
    names = [
        name
        for base in cls.__mro__
        if base.__module__ != "builtins"
        for name in (
            (base.__dict__["__slots__"],)
            if isinstance(base.__dict__.get("__slots__"), str)
            else base.__dict__.get("__slots__", ())
        )
    ]
    return tuple(name for name in names if name not in ("__dict__", "__weakref__") and not name.startswith("__"))


def _items_of(container: Any) -> Any:
    """Copy what a container holds."""
    return dict(container) if isinstance(container, dict) else tuple(container)


def _refill(container: Any, items: Any) -> None:
    """Let a container hold again what it held: of a large one, whose length is all that is known, as many items."""
    if isinstance(items, int):
        if len(container) > items:
            if isinstance(container, dict):
                for _ in range(len(container) - items):
                    container.popitem()  # the last ones that came
            elif not isinstance(container, set):
                while len(container) > items:
                    container.pop()
        return
    if isinstance(container, dict):
        same = len(container) == len(items) and all(
            key is former_key and value is former_value
            for (key, value), (former_key, former_value) in zip(container.items(), items.items(), strict=True)
        )
        if not same:
            dict.clear(container)
            dict.update(container, items)
    elif isinstance(container, set):
        if container != set(items):
            container.clear()
            container.update(items)
    elif len(container) != len(items) or any(
        value is not former for value, former in zip(container, items, strict=True)
    ):
        container.clear()
        container.extend(items)


def _generator_state(value: object) -> Any:
    """Give the state of a source of random numbers: of what is none, None."""
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, random.Random):
        return value.getstate()
    numpy: Any = sys.modules.get("numpy")
    if numpy is not None:
        if isinstance(value, numpy.random.Generator):
            return value.bit_generator.state
        if isinstance(value, numpy.random.RandomState):
            return value.get_state()
    return None


def _set_generator_state(generator: Any, state: Any) -> None:
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif hasattr(generator, "bit_generator"):
        generator.bit_generator.state = state
    else:
        generator.set_state(state)


def _same_bits(one: Tensor, other: Tensor) -> bool:
    one = one.detach()
    # NaN differs from itself.
    return torch.equal(one, other) or (
        torch.equal(one != one, other != other) and torch.equal(one[one == one], other[other == other])
    )


def _ignore(*args: Any, **kwargs: Any) -> None:
    """Take what would have been logged."""
