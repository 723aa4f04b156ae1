"""What phase 1 gives back of the objects that a model holds: however many, however deep, and made whenever."""

import dataclasses
import gc
import itertools
import queue
import weakref
from array import array
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_ydrop import ConductanceDropout, YDrop, layer_conductance
from lightning_ydrop.models.contents import MOST_ITEMS, MOST_OBJECTS_OF_A_STEP
from tests.counting import recorder

X, Y = torch.randn(10, 6, generator=torch.Generator().manual_seed(1)), torch.arange(10) % 3


class Net(nn.Module):
    """A network around something that happens in each pass."""

    made: Any
    boxes: Any
    averages: Any
    count: Any
    cycle: Any
    chain: Any
    queue: Any
    array: Any
    sobol: Any

    def __init__(self, happens: Callable[["Net", Tensor], None], **attributes: Any) -> None:
        super().__init__()
        self.inner, self.drop, self.head = nn.Linear(6, 8), ConductanceDropout(), nn.Linear(8, 3)
        for name, value in attributes.items():
            setattr(self, name, value)
        self.happens = happens

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.inner(x))
        self.happens(self, hidden)
        logits: Tensor = self.head(self.drop(hidden))
        return logits


class Box:
    """An object of the user's."""

    def __init__(self) -> None:
        self.held: Any = None
        self.itself = self


# A training step makes something anew, and each pass fills it.


def fill_list(net: Any, hidden: Tensor) -> None:
    net.made.append(hidden)


def fill_dict(net: Any, hidden: Tensor) -> None:
    net.made["hidden"] = hidden


def fill_box(net: Any, hidden: Tensor) -> None:
    net.made.held = hidden


def add_to_tensor(net: Any, hidden: Tensor) -> None:
    net.made["sum"].add_(1)


MADE: dict[str, tuple[Callable[[], Any], Callable[[Any, Tensor], None]]] = {
    "list": (list, fill_list),
    "dict": (dict, fill_dict),
    "object with a cycle": (Box, fill_box),
    "tensor": (lambda: {"sum": torch.zeros(3)}, add_to_tensor),
}


@pytest.mark.parametrize("kind", list(MADE))
def test_what_each_training_step_makes_anew_is_not_kept_alive(kind: str) -> None:
    make, fill = MADE[kind]
    tell = recorder()

    def happens(net: Any, hidden: Tensor) -> None:
        fill(net, hidden)
        tell(weakref.ref(hidden))

    model = Net(happens, made=make())
    ydrop = YDrop(model)
    for _ in range(5):
        model.made = make()
        ydrop.step(X, Y)
        expected = make()
        if kind == "tensor":
            assert torch.equal(model.made["sum"], expected["sum"])
        elif kind == "object with a cycle":
            assert model.made.held is None
        else:
            assert model.made == expected
        model(X)
    model.made = make()
    gc.collect()
    assert len(tell.seen) > 10
    assert all(each() is None for each in tell.seen)
    assert ydrop.unguarded == []


# More objects than a step looks at.


@dataclasses.dataclass
class Stats:
    n: int = 0


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.stats = nn.Linear(6, 6), Stats()
        self.calls: dict[int, int] = defaultdict(int)
        self.seen: list[int] = []
        self.generator = torch.Generator()

    def forward(self, x: Tensor) -> Tensor:
        self.stats.n += 1
        self.calls[1] += 1
        self.seen.append(1)
        torch.rand((), generator=self.generator)
        moved: Tensor = x + self.linear(x)
        return moved


@pytest.mark.parametrize("anew", [False, True])
def test_all_that_a_pass_was_seen_to_change_is_given_back(anew: bool) -> None:
    count = MOST_OBJECTS_OF_A_STEP
    layers = [Layer() for _ in range(count)]
    model = nn.Sequential(*layers, ConductanceDropout(), nn.Linear(6, 3))
    ydrop = YDrop(model)
    for _ in range(3):
        for layer in layers if anew else ():
            layer.stats, layer.seen = Stats(), []
        expected = [(layer.stats.n, len(layer.seen), layer.calls[1]) for layer in layers]
        streams = [layer.generator.get_state() for layer in layers]
        ydrop.step(X, Y)
        assert [(layer.stats.n, len(layer.seen), layer.calls[1]) for layer in layers] == expected
        assert all(torch.equal(each.generator.get_state(), one) for each, one in zip(layers, streams, strict=True))
        model(X)
    assert ydrop.unguarded == []


@pytest.mark.parametrize("count", [MOST_OBJECTS_OF_A_STEP + 100, MOST_ITEMS + 100])
def test_so_are_the_tensors_in_a_large_dictionary(count: int) -> None:
    def happens(net: Any, hidden: Tensor) -> None:
        for each in net.averages.values():
            each.add_(1)

    model = Net(happens, averages={place: torch.zeros(1) for place in range(count)})
    ydrop = YDrop(model)
    for _ in range(2):
        ydrop.step(X, Y)
    assert all(float(each) == 0 for each in model.averages.values())


def test_what_a_later_batch_is_the_first_to_change_among_many_is_told_and_given_back_from_then_on() -> None:
    def happens(net: Any, hidden: Tensor) -> None:
        if net.warm:
            net.boxes[5]["n"] += 1

    boxes = [{"n": 0} for _ in range(3 * MOST_OBJECTS_OF_A_STEP)]
    model = Net(happens, boxes=boxes, warm=False)
    ydrop = YDrop(model)
    ydrop.step(X, Y)
    model.warm = True  # type: ignore[assignment]
    for _ in range(40):
        ydrop.step(X, Y)
    assert ydrop.unguarded == ["Net.boxes"]
    before = boxes[5]["n"]
    for _ in range(5):
        ydrop.step(X, Y)
    assert boxes[5]["n"] == before


def test_an_attribute_of_one_layer_hides_none_of_another() -> None:
    model = nn.Sequential(nn.Linear(6, 8), ConductanceDropout(), nn.Linear(8, 8), nn.Linear(8, 3))
    model[0].rank, model[0].calls = 8, 16  # type: ignore[assignment] # what can't change in place
    model[2].rank, model[2].calls = 8, {}  # type: ignore[assignment]
    model[2].register_forward_hook(lambda module, args, output: module.calls.update(n=len(module.calls)))
    ydrop = YDrop(model)
    ydrop.step(X, Y)
    ydrop.step(X, Y)
    assert model[2].calls == {}


# Closures and classes.


def test_a_hook_counts_all_passes_in_its_closure() -> None:
    model = Net(lambda net, hidden: None)
    rows: list[int] = []
    model.inner.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    ydrop = YDrop(model)
    ydrop.step(X, Y)
    rows.clear()
    ydrop.step(X, Y)
    assert len(rows) == 1


def test_closures_of_a_forward_that_replaces_the_method_are_given_back() -> None:
    model = Net(lambda net, hidden: None)
    rows: list[int] = []
    former = model.inner.forward

    def forward(x: Tensor, cache: dict[str, int] = {}) -> Tensor:  # noqa: B006
        rows.append(len(x))
        cache["n"] = cache.get("n", 0) + 1
        return former(x)

    model.inner.forward = forward  # type: ignore[method-assign, assignment]
    ydrop = YDrop(model)
    for _ in range(3):
        ydrop.step(X, Y)
    assert (rows, forward.__defaults__) == ([], ({},))


class Shared(nn.Module):
    """Counts in an attribute of its class."""

    count = 0

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), ConductanceDropout(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        Shared.count += 1
        logits: Tensor = self.net(x)
        return logits


def test_attributes_of_classes_are_given_back() -> None:
    model = Shared()
    ydrop = YDrop(model)
    for _ in range(3):
        ydrop.step(X, Y)
    assert Shared.count == 0


def test_so_are_those_that_an_eval_of_its_own_changes() -> None:
    class Dual(nn.Module):
        """As torchvision's feature extractors: its mode is a method of its class."""

        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(6, 8), ConductanceDropout(), nn.Linear(8, 3))

        def train(self, mode: bool = True) -> "Dual":
            type(self).scale = lambda self: 2.0 if mode else 1.0  # type: ignore[method-assign]
            return super().train(mode)

        def scale(self) -> float:
            return 0.0

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.net(x) * self.scale()
            return logits

    model = Dual().train()
    ydrop = YDrop(model)
    for _ in range(2):
        ydrop.step(X, Y)
        assert model.scale() == 2
    layer_conductance(model, X, Y, n_steps=2)
    assert model.scale() == 2


# Objects of Python's own and of torch.


def test_iterators_queues_and_arrays_go_on_from_where_they_were() -> None:
    def happens(net: Any, hidden: Tensor) -> None:
        next(net.count)
        next(net.cycle)
        next(net.chain)
        net.queue.put(1)
        net.array[0] += 1
        net.sobol.draw(1)

    model = Net(
        happens,
        count=itertools.count(),
        cycle=itertools.cycle("abc"),
        chain=itertools.chain(iter("abcdefgh"), "ij"),
        queue=queue.Queue(),
        array=array("l", [0]),
        sobol=torch.quasirandom.SobolEngine(2),
    )
    ydrop = YDrop(model)
    for _ in range(4):
        ydrop.step(X, Y)
        model(X)
    assert (next(model.count), next(model.cycle), next(model.chain)) == (4, "b", "e")
    assert (model.queue.qsize(), model.array[0], model.sobol.num_generated) == (4, 4, 4)
