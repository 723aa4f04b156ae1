from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_ydrop.models.looks import SHAPES, VALUES, seeing_looks

GIVEN = torch.tensor([0.0, 1.0, 2.0])


def written(x: Tensor) -> Any:
    return torch.zeros(3).add_(x).tolist()


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (lambda x: x.sum().item(), VALUES),
        (lambda x: bool(x[0] > 0), VALUES),
        (lambda x: x.tolist(), VALUES),
        (lambda x: x.numpy(), VALUES),
        (lambda x: torch.equal(x, torch.zeros(3)), VALUES),
        (written, VALUES),
        (lambda x: torch.rand(3).tolist(), VALUES),
        (lambda x: x[x > 0], SHAPES),
        (lambda x: x.nonzero(), SHAPES),
    ],
)
def test_looks_at_values_are_seen(run: Callable[[Tensor], Any], reason: str) -> None:
    with seeing_looks() as looks:
        run(GIVEN)
    assert looks.reasons
    assert set(looks.reasons) == {reason}


@pytest.mark.parametrize(
    "run",
    [
        lambda x: x[torch.tensor([0, 2])],
        lambda x: torch.tensor([1.0, 2.0]).sum().item(),
        lambda x: torch.arange(3).tolist(),
        lambda x: torch.ones(3).nonzero(),
        lambda x: x.softmax(0),
    ],
)
def test_constants_of_the_pass_are_no_looks(run: Callable[[Tensor], Any]) -> None:
    with seeing_looks() as looks:
        run(GIVEN)
    assert not looks.reasons
    assert GIVEN.tolist() == [0.0, 1.0, 2.0]
