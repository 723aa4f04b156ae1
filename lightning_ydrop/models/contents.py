"""What the attributes of modules hold, as far as Python objects reach, and how it is put back."""

import sys
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from types import BuiltinFunctionType, CellType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ydrop.models.objects import (
    CONTAINERS,
    UNSET,
    array_type,
    generator_state,
    holds_attributes,
    items_of,
    refill,
    refill_array,
    set_cell,
    set_class_attributes,
    set_generator_state,
    set_slots,
    slots_of,
)
from lightning_ydrop.models.observations import Observations, Place
from lightning_ydrop.models.tensors import Tensors

# Values that can't be changed in place, and what is no part of a model's state.
CONSTANT = frozenset(
    {
        *(bool, int, float, complex, str, bytes, type(None), type(...), range, type, BuiltinFunctionType),
        *(ModuleType, torch.device, torch.dtype, torch.Size, torch.layout, torch.memory_format),
    }
)
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
# A step does not search containers with more items than this, except where a pass has changed something inside.
MOST_ITEMS = 1000
# Nor does a pass that learns, with more than this: they hold data.
MOST_ITEMS_EVER = 20_000
# A step looks at no more objects than this in places where no pass has changed anything: a model may hold its data.
MOST_OBJECTS_OF_A_STEP = 200
FORWARD_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
OF_PARAMETERS: Place = (nn.Parameter, "__dict__")

Start = tuple[Place, object]


class Contents:
    """The objects that some places hold, taken before a pass and put back after it.

    Args:
        observations: What earlier passes have changed, to be added to. None looks at everything.
        learning: Whether to look at everything all the same.
        tensors: Takes the tensors among the contents.
        take_module: Takes a module among them, and gives what is to be searched for it.

    """

    def __init__(
        self,
        observations: Observations | None,
        learning: bool,
        tensors: Tensors,
        take_module: Callable[[nn.Module], Iterable[Start]],
    ) -> None:
        self._observations = observations
        self._takes_all = learning or observations is None
        self._tensors = tensors
        self._take_module = take_module
        self._seen = tensors.seen
        self._known: list[Start] = []  # where something was seen to change
        self._others: deque[Start] = deque()
        self._containers: list[tuple[Any, Any, Place]] = []
        self._slotted: list[tuple[Any, dict[str, Any], Place]] = []
        self._arrays: list[tuple[Any, Any, Place]] = []
        self._cells: list[tuple[CellType, Any, Place]] = []
        self._generators: list[tuple[Any, Any]] = []
        self._classes: list[tuple[type, dict[str, Any]]] = []

    def add(self, starts: Iterable[Start]) -> None:
        """Search what these places hold, later."""
        for start in starts:
            (self._known if self._is_known(start[0]) else self._others).append(start)

    def add_class(self, cls: type) -> None:
        """Take the attributes of a class, but not what they hold: all modules of that class share it."""
        if id(cls) not in self._seen and self._is_known((cls, "")):
            self._seen.add(id(cls))
            self._classes.append((cls, dict(vars(cls))))

    def search(self) -> None:
        """Take all that was added and what it holds: in places where nothing was seen to change, up to a limit."""
        self._search_known()
        if not self._others:
            return
        left, observations = MOST_OBJECTS_OF_A_STEP, self._observations
        self._others.rotate(-self._offset(len(self._others)))
        while self._others and left > 0:
            left = self._search(*self._others.popleft(), left)
            self._search_known()
        if left <= 0 and observations is not None:
            observations.searches_cut_short += 1

    def put_back(self) -> None:
        """Let everything hold what it held."""
        for container, copied, place in self._containers:
            if refill(container, copied):
                self._note(place)
        for value, slots, place in self._slotted:
            if set_slots(value, slots):
                self._note(place)
        for array, copied, place in self._arrays:
            if refill_array(array, copied):
                self._note(place)
        for cell, content, place in self._cells:
            if set_cell(cell, content):
                self._note(place)
        for cls, attributes in self._classes:
            if set_class_attributes(cls, attributes):
                self._note((cls, ""))
        for generator, state in self._generators:
            set_generator_state(generator, state)

    def _is_known(self, place: Place) -> bool:
        observations = self._observations
        if self._takes_all or observations is None:
            return True
        return place in observations.changing or place in observations.rewritten

    def _note(self, place: Place) -> None:
        """Remember where a pass has changed something: later ones look there first."""
        observations = self._observations
        if observations is None or place in observations.changing:
            return
        observations.changing.add(place)
        if place is OF_PARAMETERS:
            observations.parameters = True
        if observations.searches_cut_short and not self._takes_all:  # it may have changed unseen
            observations.unguarded.append(f"{place[0].__name__}.{place[1]}")

    def _offset(self, size: int) -> int:
        """Say where to start among more objects than a step looks at: elsewhere in each step, to see all in time."""
        observations = self._observations
        turn = 0 if observations is None else observations.searches_cut_short
        return hash((turn, size)) % size if turn else 0

    def _search_known(self) -> None:
        while self._known:
            self._search(*self._known.pop(), sys.maxsize)

    def _search(self, place: Place, start: object, left: int) -> int:
        """Take an object and what it holds, up to a number of objects, and give the rest of that number."""
        ahead: list[Any] = [start]
        seen = self._seen
        while ahead and left > 0:
            value = ahead.pop()
            cls = type(value)
            if cls in CONSTANT or id(value) in seen:
                continue
            seen.add(id(value))
            left -= 1
            found = self._take(value, cls, place)
            if len(found) > left:
                offset = self._offset(len(found))
                found = [*found[offset:], *found[:offset]]
            ahead += found
        return left

    def _take(self, value: Any, cls: type, place: Place) -> "list[Any] | tuple[Any, ...]":
        if isinstance(value, Tensor):
            self._tensors.take_inside(value, place)
            return ()
        if isinstance(value, nn.Module):
            self.add(self._take_module(value))
            return [child for child in value._modules.values() if child is not None]
        if isinstance(value, CONTAINERS):
            return self._take_container(value, place)
        if isinstance(value, (tuple, frozenset)):
            return tuple(value) if len(value) <= MOST_ITEMS else ()
        if cls is FunctionType:
            return self._take_function(value, place)
        if cls is MethodType:
            return (value.__self__, value.__func__)
        if cls is partial:
            return (value.func, *value.args, *value.keywords.values())
        if cls is array_type():
            return self._take_array(value, place)
        return self._take_object(value, place)

    def _take_container(self, container: Any, place: Place) -> list[Any]:
        is_small, inside = len(container) <= MOST_ITEMS, (place[0], f"{place[1]}[...]")
        is_copied = is_small or self._is_known(place)
        self._containers.append((container, items_of(container) if is_copied else len(container), place))
        if not isinstance(container, (dict, list, set, deque)):
            return []
        if not is_small and (len(container) > MOST_ITEMS_EVER or not self._is_known(inside)):
            return []
        items = container.values() if isinstance(container, dict) else container
        if is_small:
            return list(items)
        self._known += [(inside, item) for item in items if type(item) not in CONSTANT]
        return []

    def _take_array(self, array: Any, place: Place) -> list[Any]:
        """Take one of NumPy, which can't share its memory: a large one where a pass was seen to change something."""
        if array.size <= MOST_ITEMS or self._is_known(place):
            self._arrays.append((array, array.copy(), place))
        return list(array.ravel().tolist()) if array.dtype.hasobject and array.size <= MOST_ITEMS else []

    def _take_function(self, function: FunctionType, place: Place) -> list[Any]:
        """Take what a user's function keeps from call to call: in its closure, its defaults and its attributes.

        Functions that replace a method are looked into. Hooks, functions in other attributes and a `forward=` are not:
        with these a user looks at a model from outside, and counts all passes.
        """
        cls, name = place
        if not name or not hasattr(cls, name):
            return []
        if function.__module__ is not None and function.__module__.partition(".")[0] in MACHINERY:
            return []
        held: list[Any] = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values(), vars(function)]
        for cell in function.__closure__ or ():
            if id(cell) not in self._seen:
                self._seen.add(id(cell))
                try:
                    content: Any = cell.cell_contents
                except ValueError:
                    content = UNSET
                self._cells.append((cell, content, place))
                held.append(content)
        return held

    def _take_object(self, value: object, place: Place) -> "list[Any] | tuple[Any, ...]":
        state = generator_state(value)
        if state is not None:
            self._generators.append((value, state))
            if self._takes_all:  # which costs less than a look at what it has drawn
                self._note(place)
            return ()
        if type(value).__module__.partition(".")[0] in MACHINERY and not holds_attributes(value):
            return ()
        slots = self.take_slots(value, place)
        attributes = getattr(value, "__dict__", None)
        if not isinstance(attributes, dict):
            return slots
        self._containers.append((attributes, items_of(attributes), place))
        return (*attributes.values(), *slots)

    def take_slots(self, value: object, place: Place) -> list[object]:
        """Take what an object keeps in slots, and give it."""
        names = slots_of(type(value))  # type: ignore[arg-type] # mypy sees no hash in classes
        if not names:
            return []
        slots = {name: getattr(value, name, UNSET) for name in names}
        self._slotted.append((value, slots, place))
        return list(slots.values())
