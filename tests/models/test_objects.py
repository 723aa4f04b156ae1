import argparse
import random
from collections import Counter, OrderedDict, UserDict, defaultdict, deque
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lightning_ydrop.models.objects import (
    UNSET,
    generator_state,
    holds_attributes,
    items_of,
    refill,
    refill_array,
    set_generator_state,
    set_slots,
    slots_of,
)


class Tracked(list[int]):
    """Refuses what a program of its user's would have to go through."""

    def clear(self) -> None:
        raise AssertionError

    def extend(self, items: Any) -> None:
        raise AssertionError


class Guarded(OrderedDict[str, int]):
    def clear(self) -> None:
        raise AssertionError

    def __setitem__(self, key: str, value: int) -> None:
        assert not key.startswith("new")
        super().__setitem__(key, value)


CONTAINERS: dict[str, Any] = {
    "list": lambda: [1, 2],
    "list of a class of its own": lambda: Tracked([1, 2]),
    "dict": lambda: {"a": 1, "b": 2},
    "ordered": lambda: OrderedDict(a=1, b=2),
    "ordered of a class of its own": lambda: Guarded(a=1, b=2),
    "default": lambda: defaultdict(list, a=1, b=2),  # type: ignore[arg-type]
    "counter": lambda: Counter("aab"),
    "set": lambda: {1, 2},
    "deque": lambda: deque([1, 2], maxlen=2),
    "bytearray": lambda: bytearray(b"ab"),
}


def change(container: Any) -> None:
    if isinstance(container, dict):
        dict.__setitem__(container, "c", 3) if not isinstance(container, OrderedDict) else OrderedDict.__setitem__(
            container, "c", 3
        )
        del container["a"]
    elif isinstance(container, set):
        container.add(3)
        container.discard(1)
    else:
        container.append(3)
        container.reverse()


@pytest.mark.parametrize("kind", list(CONTAINERS))
def test_a_container_holds_what_it_held_in_its_order(kind: str) -> None:
    container, expected = CONTAINERS[kind](), CONTAINERS[kind]()
    items = items_of(container)
    assert not refill(container, items)
    change(container)
    assert refill(container, items)
    assert container == expected
    assert list(container) == list(expected)
    if isinstance(container, OrderedDict):
        container.move_to_end("a")  # of one whose links are broken, this would fail
        assert list(reversed(container)) == ["a", "b"]


def test_an_order_is_put_back() -> None:
    container = OrderedDict(a=1, b=2)
    items = items_of(container)
    container.move_to_end("a")
    assert refill(container, items)
    assert list(container) == ["a", "b"]


def test_items_are_compared_by_identity() -> None:
    one, other = torch.zeros(2), torch.zeros(2)
    container = [one]
    items = items_of(container)
    container[0] = other
    assert refill(container, items)
    assert container[0] is one


@pytest.mark.parametrize("container", [[1, 2, 3], {"a": 1, "b": 2, "c": 3}, deque([1, 2, 3]), bytearray(b"abc")])
def test_of_a_large_one_the_last_that_came_go(container: Any) -> None:
    expected = list(container)[:2]
    assert refill(container, 2)
    assert list(container) == expected
    assert not refill(container, 2)
    assert refill(container, 5)  # something is missing, which can't be put back


class Base:
    __slots__ = ("__private", "first")

    def __init__(self) -> None:
        self.__private = 1
        self.first = 2

    def private(self) -> int:
        return self.__private

    def change(self) -> None:
        self.__private = 5


class Derived(Base):
    __slots__ = "second"

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "second":
            raise AttributeError
        super().__setattr__(name, value)


def test_slots_of_all_bases_are_put_back_past_setattr() -> None:
    value = Derived()
    assert set(slots_of(Derived)) == {"_Base__private", "first", "second"}
    slots = {name: getattr(value, name, UNSET) for name in slots_of(Derived)}
    value.change()
    value.first = 7
    object.__setattr__(value, "second", 3)
    set_slots(value, slots)
    assert (value.private(), value.first, hasattr(value, "second")) == (1, 2, False)


@pytest.mark.parametrize(
    "array", [np.zeros(3), np.array([np.nan, 1]), np.array(["a", None], dtype=object), np.zeros((2, 2), np.int64)]
)
def test_an_array_holds_what_it_held(array: Any) -> None:
    copied = array.copy()
    assert not refill_array(array, copied)
    array[0] = 5
    assert refill_array(array, copied)
    assert array.tolist()[1:] == copied.tolist()[1:]
    assert str(array) == str(copied)


def test_an_array_that_was_resized_has_its_size() -> None:
    array = np.arange(3.0)
    copied = array.copy()
    array.resize(5, refcheck=False)
    assert refill_array(array, copied)
    assert array.tolist() == [0, 1, 2]


SOURCES: dict[str, Any] = {
    "torch": (torch.Generator().manual_seed(1), lambda source: torch.rand((), generator=source).item()),
    "python": (random.Random(1), lambda source: source.gauss(0, 1)),
    "numpy": (np.random.default_rng(1), lambda source: source.random()),
    "legacy": (np.random.RandomState(1), lambda source: source.rand()),
}


@pytest.mark.parametrize("kind", list(SOURCES))
def test_sources_of_random_numbers_go_on_from_where_they_were(kind: str) -> None:
    source, draw = SOURCES[kind]
    state = generator_state(source)
    first = draw(source)
    assert draw(source) != first
    set_generator_state(source, state)
    assert draw(source) == first


def test_other_objects_are_no_sources() -> None:
    assert generator_state(object()) is None


@pytest.mark.parametrize("value", [SimpleNamespace(), argparse.Namespace(), UserDict()], ids=repr)
def test_objects_of_pythons_own_hold_what_their_user_has_put_there(value: object) -> None:
    assert holds_attributes(value)
    assert not holds_attributes(random.Random())


def test_an_optimizer_holds_state() -> None:
    assert holds_attributes(torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.1))
