import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_ydrop import ConductanceDropout, YDrop
from lightning_ydrop.models import streams
from lightning_ydrop.models.streams import (
    numpy_state,
    python_state,
    random_streams_from_torch,
    random_streams_kept,
    set_numpy_state,
    set_python_state,
)

X, Y = torch.randn(10, 6, generator=torch.Generator().manual_seed(1)), torch.arange(10) % 3

DRAWS: dict[str, Callable[[], Any]] = {
    "python": random.random,
    "a pair of Python's": lambda: random.gauss(0, 1),
    "numpy": lambda: np.random.rand(),  # noqa: NPY002
    "a pair of NumPy's": lambda: np.random.randn(),  # noqa: NPY002
    "many": lambda: (random.randbytes(9999), np.random.rand(9999)),  # noqa: NPY002
    "seed": lambda: (random.seed(3), np.random.seed(3)),  # noqa: NPY002
}


def states() -> tuple[Any, str]:
    return random.getstate(), str(np.random.get_state())  # noqa: NPY002


@pytest.fixture(params=["read", "asked"])
def _reader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "asked":
        monkeypatch.setattr(streams, "_reads_python", lambda: False)
        monkeypatch.setattr(streams, "_place_of_pair", lambda cls: None)


@pytest.mark.usefixtures("_reader")
@pytest.mark.parametrize("drawn_before", range(3))
@pytest.mark.parametrize("kind", list(DRAWS))
def test_streams_go_on_from_where_they_were(kind: str, drawn_before: int) -> None:
    for _ in range(drawn_before):
        random.gauss(0, 1)
        np.random.randn()  # noqa: NPY002
    before = states()
    with random_streams_kept():
        DRAWS[kind]()
        assert states() != before
    assert states() == before


def test_memory_is_read_where_this_python_and_this_numpy_keep_it() -> None:
    assert streams._reads_python()
    assert streams._place_of_pair(np.random.RandomState) is not None


def test_a_generator_of_another_kind_is_asked() -> None:
    numpy: Any = np.random  # whose types don't know these two
    former = numpy.get_bit_generator()
    numpy.set_bit_generator(np.random.PCG64(1))
    try:
        with random_streams_kept():
            first = np.random.rand()  # noqa: NPY002
        assert np.random.rand() == first  # noqa: NPY002
    finally:
        numpy.set_bit_generator(former)


def test_a_state_is_put_back() -> None:
    python, numpy = python_state(), numpy_state()
    first = random.random(), np.random.rand()  # noqa: NPY002
    set_python_state(python)
    set_numpy_state(numpy)
    assert (random.random(), np.random.rand()) == first  # noqa: NPY002


def test_streams_follow_from_torchs() -> None:
    def drawn() -> tuple[float, float]:
        with random_streams_kept(), random_streams_from_torch():
            return random.random(), np.random.rand()  # noqa: NPY002

    torch.manual_seed(1)
    first, second = drawn(), drawn()
    assert first != second
    torch.manual_seed(1)
    assert drawn() == first
    state = torch.get_rng_state()
    with random_streams_from_torch():
        pass
    assert torch.equal(state, torch.get_rng_state())  # nothing was drawn


@pytest.mark.parametrize("kind", list(DRAWS))
def test_they_do_also_where_a_later_batch_is_the_first_to_draw(kind: str) -> None:
    class Cropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(6, 8), ConductanceDropout(), nn.ReLU(), nn.Linear(8, 3))
            self.draws = False

        def forward(self, x: Tensor) -> Tensor:
            if self.draws:
                DRAWS[kind]()
            logits: Tensor = self.net(x)
            return logits

    model = Cropping()
    ydrop = YDrop(model)
    ydrop.step(X, Y)
    model.draws = True
    before = states()
    ydrop.step(X, Y)
    assert states() == before
