"""Buffers that an operation makes larger itself, while they share their memory with a copy."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_ydrop import ConductanceDropout, YDrop, layer_conductance, monte_carlo
from lightning_ydrop.analysis import removal_curve
from lightning_ydrop.models.sharing import may_be_shared, note_lost_memory, parameters_shared_alone, without_lost_memory

pytestmark = pytest.mark.filterwarnings("ignore:.*resized", "ignore:monte_carlo was given")
X, Y = torch.randn(10, 6, generator=torch.Generator().manual_seed(1)), torch.arange(10) % 3


class Scratch(nn.Module):
    """Has a buffer that grows with the longest batch."""

    places: Tensor

    def __init__(self, size: int = 1) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), ConductanceDropout(), nn.ReLU(), nn.Linear(8, 3))
        self.register_buffer("places", torch.full((size,), 7.0))
        self.view = self.places[:1]

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > len(self.places):
            torch.arange(len(x), dtype=torch.float32, out=self.places)
        logits: Tensor = self.net(x) + 0 * self.places[: len(x), None]
        return logits


WAYS: dict[str, Callable[[nn.Module], object]] = {
    "step": lambda model: YDrop(model).step(X, Y),
    "function": lambda model: layer_conductance(model, X, Y, n_steps=3),
    "masks": lambda model: monte_carlo(model, X, 3),
    "removal": lambda model: removal_curve(model, [(X, Y)], fractions=(0, 0.5), repeats=1),
}


@pytest.mark.parametrize("way", list(WAYS))
def test_a_buffer_that_an_operation_resizes_is_as_it_was(way: str) -> None:
    model = Scratch()
    WAYS[way](model)
    assert model.places.tolist() == [7.0]
    model.view.add_(1)  # over the same memory
    assert model.places.tolist() == [8.0]
    model(X).sum().backward()
    assert len(model.places) == 10


def test_also_where_a_later_batch_is_the_first_to_do_so() -> None:
    model = Scratch(10)
    ydrop = YDrop(model)
    ydrop.step(X, Y)
    for _ in range(2):
        ydrop.step(torch.cat([X, X]), torch.cat([Y, Y]))
        assert model.places.tolist() == [7.0] * 10
    model(torch.cat([X, X]))
    assert len(model.places) == 20


def test_another_try_is_made_where_memory_was_lost_alone() -> None:
    tries: list[bool] = []

    def call() -> int:
        tries.append(may_be_shared(torch.zeros(1)))
        if tries[-1]:
            note_lost_memory()
            raise RuntimeError
        return 3

    assert without_lost_memory(call) == 3
    assert tries == [True, False]
    assert may_be_shared(torch.zeros(1))
    with parameters_shared_alone():
        assert may_be_shared(nn.Parameter(torch.zeros(1)))
        assert not may_be_shared(torch.zeros(1))

    def fail() -> None:
        tries.append(True)
        raise RuntimeError

    with pytest.raises(RuntimeError):
        without_lost_memory(fail)
    assert len(tries) == 3
