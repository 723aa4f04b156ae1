import array
import functools
import itertools
import random
import weakref
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer

from lightning_ydrop.models.descriptions import Describer, NotComparable


def described(value: object) -> object:
    return Describer()(value)


class Slotted:
    __slots__ = ("rate",)

    def __init__(self) -> None:
        self.rate = 1.0


class Hashed:
    def __init__(self) -> None:
        self.rate = 1.0


KEPT = Hashed()


def nested() -> Any:
    return SimpleNamespace(model=SimpleNamespace(layers=[{"rate": {"is": 1.0}}]))


@pytest.mark.parametrize(
    ("make", "change"),
    [
        (nested, lambda value: value.model.layers[0]["rate"].update({"is": 2.0})),
        (lambda: {1}, lambda value: value.add(2)),
        (lambda: {Hashed()}, lambda value: setattr(next(iter(value)), "rate", 2.0)),
        (lambda: {Hashed(): 1}, lambda value: setattr(next(iter(value)), "rate", 2.0)),
        (lambda: deque([1]), lambda value: value.append(2)),
        (lambda: np.ones(3), lambda value: value.fill(2)),
        (lambda: np.array([[1]], object), lambda value: value.fill(2)),
        (lambda: array.array("d", [1.0]), lambda value: value.append(2.0)),
        (lambda: bytearray(b"1"), lambda value: value.append(2)),
        (lambda: weakref.ref(KEPT), lambda value: setattr(value(), "rate", 2.0)),
        (lambda: Hashed, lambda value: setattr(value, "factor", 2.0)),
        (lambda: torch.optim.SGD([torch.zeros(1)], 0.1), lambda value: value.param_groups[0].update(lr=0.2)),
        (lambda: random.Random(0), lambda value: value.random()),
        (lambda: functools.partial(max, rate=1), lambda value: value.keywords.update(rate=2)),
        (Slotted, lambda value: setattr(value, "rate", 2.0)),
    ],
)
def test_a_change_anywhere_is_seen(make: Callable[[], Any], change: Callable[[Any], object]) -> None:
    value = make()
    before = described(value)
    assert described(value) == before
    change(value)
    assert described(value) != before


def test_functions_hold_what_they_close_over() -> None:
    rates = [1.0]
    before = described(function := lambda: rates[0])
    assert described(function) == before
    rates.append(2.0)
    assert described(function) != before


def test_an_object_in_the_place_of_another_is_another() -> None:
    """Python gives the memory of an object that is gone to the next one."""
    before = described(eval("lambda x: 2 * x"))
    assert all(described(eval("lambda x: 3 * x")) != before for _ in range(20))


def test_of_tensors_the_identity_counts() -> None:
    tensor = torch.zeros(2)
    before = described([tensor, {"a": tensor}])
    assert described((tensor, {})) != before
    tensor.add_(1)
    one, other = described(tensor), described(torch.ones(2))
    assert one == described(tensor)
    assert one != other


@pytest.mark.parametrize(
    "value",
    [
        Trainer(logger=False, enable_checkpointing=False),
        itertools.count(),
        np.random.default_rng(0),
        [0] * 20_000,
        np.ones(9999),
    ],
)
def test_what_does_not_show_its_state_is_refused(value: object) -> None:
    with pytest.raises(NotComparable):
        described([value])
