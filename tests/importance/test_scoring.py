from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_ydrop import ConductanceDropout, YDrop

X, Y = torch.randn(10, 6, generator=torch.Generator().manual_seed(1)), torch.arange(10) % 3


class Penalised(nn.Module):
    """Takes gradients inside its forward, after a warm-up."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.inner, self.drop, self.head = nn.Linear(6, 8), ConductanceDropout(), nn.Linear(8, 3)
        self.kind, self.is_warm = kind, False

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.inner(x))
        if self.is_warm and self.kind == "retain_grad":
            hidden.retain_grad()
        if self.is_warm and self.kind == "hook":
            hidden.register_hook(self.hook)
        if self.is_warm and self.kind == "weight":
            (gradient,) = torch.autograd.grad(hidden.sum(), self.inner.weight, retain_graph=True)
            hidden = hidden + 0 * gradient.sum()
        if self.is_warm and self.kind == "error":
            raise ValueError("out of order")
        logits: Tensor = self.head(self.drop(hidden))
        return logits

    def hook(self, gradient: Tensor) -> None:
        raise AssertionError


@pytest.mark.parametrize("kind", ["retain_grad", "hook", "weight"])
def test_a_forward_may_start_to_take_gradients_after_the_dry_run(kind: str) -> None:
    model, reference = Penalised(kind), Penalised(kind)
    reference.load_state_dict(model.state_dict())
    engines = [YDrop(each) for each in (model, reference)]
    for step in range(4):
        model.is_warm = step > 0
        for each in engines:
            each.step(X, Y)
        torch.testing.assert_close(*(each.scores["drop"] for each in engines))
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_the_graph_is_recorded_from_then_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Penalised("weight")
    ydrop = YDrop(model)
    ydrop.step(X, Y)
    model.is_warm = True
    ydrop.step(X, Y)
    calls: list[int] = []
    forward = model.forward
    monkeypatch.setattr(Penalised, "forward", lambda self, x: (_noted(calls), forward(x))[1])
    ydrop.step(X, Y)
    assert calls == [1]


CALLS: list[int] = []


def _noted(calls: list[int]) -> Any:
    calls.append(1)


def test_other_errors_are_raised() -> None:
    model = Penalised("error")
    ydrop = YDrop(model)
    ydrop.step(X, Y)
    model.is_warm = True
    with pytest.raises(ValueError, match="out of order") as raised:
        ydrop.step(X, Y)
    assert raised.value.__notes__
