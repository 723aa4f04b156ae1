import weakref
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_ydrop.importance.passes import gradients, hand_over_gradients


def handed_over(value: Tensor, activations: dict[str, Tensor], *, keep_graph: bool = False) -> dict[str, Tensor]:
    handed: dict[str, Tensor] = {}

    def take(key: str, gradient: Tensor) -> None:
        assert key not in handed
        handed[key] = gradient.clone()

    hand_over_gradients(value, activations, take, keep_graph=keep_graph)
    return handed


def network(weight_has_gradient: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Two branches from a leaf, one of them twice, one activation after a parameter alone, and one that F ignores."""
    weight = torch.randn(3, requires_grad=weight_has_gradient)
    activations = {"leaf": torch.randn(5, 3, requires_grad=True)}
    activations["left"] = activations["leaf"].sin()
    activations["right"] = activations["leaf"].exp() * activations["left"]
    activations["ignored"] = activations["left"] * 2
    if weight_has_gradient:
        activations["of a parameter"] = (weight * 3).expand(5, 3) * 1
    value = (activations["left"] * activations["right"]).sum(1)
    return value + activations.get("of a parameter", torch.zeros(5, 3)).pow(2).sum(1), activations


@pytest.mark.parametrize("weight_has_gradient", [False, True])
def test_gradients_are_handed_over_one_by_one(weight_has_gradient: bool) -> None:
    value, activations = network(weight_has_gradient)
    expected = dict(zip(activations, gradients(value, list(activations.values()), keep_graph=True), strict=True))
    for keep_graph in (True, False):
        handed = handed_over(value, activations, keep_graph=keep_graph)
        assert handed.keys() == activations.keys()
        for key, gradient in handed.items():
            assert torch.equal(gradient, expected[key])
    assert not expected["ignored"].any()
    assert not any(each._backward_hooks for each in activations.values())


def test_of_a_value_without_a_graph_they_are_zeros() -> None:
    handed = handed_over(torch.ones(5), {"a": torch.randn(5, 3, requires_grad=True)})
    assert torch.equal(handed["a"], torch.zeros(5, 3))


def test_what_was_handed_over_is_let_go() -> None:
    first = torch.randn(5, 3, requires_grad=True)
    activations = {0: first * 1}
    for place in range(1, 4):
        activations[place] = activations[place - 1] * 2
    value = activations[3].sum(1)
    alive: list[weakref.ref[Tensor]] = []
    counts: list[int] = []

    def take(place: int, gradient: Tensor) -> None:
        counts.append(sum(each() is not None for each in alive))
        alive.append(weakref.ref(gradient))
        activations.pop(place)

    hand_over_gradients(value, activations, partial(take))
    assert len(alive) == 4
    assert max(counts) <= 1  # the one before, which the backward pass has just used
    assert not activations


class First(torch.autograd.Function):
    """Gives back its input, and a second output that no gradient passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.set_materialize_grads(False)
        return x * 1, x * 2

    @staticmethod
    def backward(ctx: Any, first: Any, second: Any) -> Any:
        return first


def test_an_autograd_function_may_give_no_gradient() -> None:
    weight = torch.tensor(2.0, requires_grad=True)
    activation = weight * torch.ones(3)
    _, second = First.apply(activation)
    taken: dict[str, Tensor] = {}
    hand_over_gradients(second, {"layer": activation}, taken.__setitem__)
    assert taken["layer"].tolist() == [0, 0, 0]
