"""A request is complete when it is made, and calls the model in one way alone."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_ydrop import (
    Conductance,
    ConductanceDropout,
    ConfigurationError,
    Objective,
    PredictedLogit,
    Request,
    YDrop,
)
from lightning_ydrop.importance.path import PathSettings
from lightning_ydrop.importance.request import request_from
from lightning_ydrop.importance.subject import Plan, subject_of
from tests.counting import recorder
from tests.networks import perceptron

X, Y = torch.randn(16, 12), torch.arange(16) % 5


class Seeing(Conductance):
    """Keeps the requests."""

    def __init__(self) -> None:
        self.seen: list[Request] = []

    def score(self, request: Request) -> dict[str, Tensor]:
        self.seen.append(request)
        return super().score(request)


def requested(
    model: nn.Module, inputs: Any, target: Any = None, plan: Plan = Plan(), **settings: Any
) -> Request | None:
    path = PathSettings("YDrop", **settings)
    layers = {name: each for name, each in model.named_modules() if isinstance(each, ConductanceDropout)}
    subject = subject_of(model, model, layers, dict.fromkeys(layers, 1), path.objective)
    return request_from(
        subject, path, plan, inputs, target, lambda purpose: torch.Generator().manual_seed(len(purpose))
    )


def made(*args: Any, **settings: Any) -> Request:
    request = requested(*args, **settings)
    assert request is not None
    return request


@pytest.mark.parametrize(
    ("size", "settings", "samples"),
    [
        *((16, {"n_steps": n}, max(1, 15 // n)) for n in (1, 2, 5, 15, 16, 40)),
        *((16, {"quadrature": "left", "n_steps": n}, max(1, 16 // (n + 1))) for n in (1, 3, 5, 40)),
        (16, {"baseline": X, "n_steps": 3}, 4),
        (16, {"num_samples": 7}, 7),
        (16, {"num_samples": 99}, 16),
        (16, {"num_samples": "all"}, 16),
        (1, {}, 1),
    ],
)
def test_as_many_samples_are_drawn_as_there_are_rows_for(size: int, settings: dict[str, Any], samples: int) -> None:
    request = made(perceptron(), X[:size], Y[:size], **settings)
    assert request.num_samples == len(request.inputs[0]) == samples
    assert request.target is not None
    assert len(request.target) == samples


def test_no_more_rows_pass_at_once_than_training_has() -> None:
    assert made(perceptron(), X, Y).max_rows == 16
    assert made(perceptron(), X[:2], Y[:2], n_steps=9).max_rows == 10  # of one path, which can't be fewer
    assert made(perceptron(), X, Y, Plan(memory=0.5)).max_rows == 8
    assert made(perceptron(), X, Y, Plan(memory=0.01)).max_rows == 2


def test_a_batch_that_is_too_small_makes_none() -> None:
    assert requested(perceptron(), X[:3], Y[:3], Plan(smallest_batch=4)) is None
    assert requested(perceptron(), X[:4], Y[:4], Plan(smallest_batch=4)) is not None


def test_it_cannot_be_changed() -> None:
    request = made(perceptron(), X, Y)
    for name in ("inputs", "starts", "target", "plan", "max_rows"):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(request, name, None)


def test_a_prediction_is_made_with_it() -> None:
    model = perceptron()
    request = made(model, X, Y, objective=PredictedLogit(), num_samples=4)
    with torch.no_grad():
        assert torch.equal(request.target, model.eval()(request.inputs[0]).argmax(1))  # type: ignore[arg-type]


def test_a_part_keeps_what_belongs_to_its_samples() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = perceptron()

        def forward(self, x: Tensor, place: Tensor) -> Any:
            return self.body(x) * place.unsqueeze(1)

    request = made(Two(), (X, torch.arange(16)), Y, baseline=X + 1, num_samples="all")
    part = request.part(3, 7)
    assert torch.equal(part.inputs[0], X[3:7])
    assert torch.equal(part.starts[0], X[3:7] + 1)
    assert torch.equal(part.carried[0], torch.arange(3, 7))
    assert torch.equal(part.target, Y[3:7])  # type: ignore[arg-type]
    shared = made(perceptron(), X, None, num_samples="all").part(3, 7)
    assert len(shared.starts[0]) == 1
    assert shared.target is None


def test_a_single_row_goes_in_twice() -> None:
    class Squeezing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.tell = perceptron(), recorder()

        def forward(self, x: Tensor) -> Any:
            self.tell(len(x))
            return self.body(x).squeeze()

    model = Squeezing()
    request = made(model, X[:1], Y[:1])
    assert request.output(request.inputs, request.carried).shape == (1, 5)
    assert model.tell.seen == [2]


class OfRows(Objective):
    """Gives what a function makes of the outputs."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def __call__(self, output: Tensor, target: Any) -> Any:
        return self.function(output)


@pytest.mark.parametrize("function", [lambda y: y, lambda y: y.sum(), lambda y: y.sum(1)[1:], lambda y: None])
def test_an_objective_gives_a_number_for_each_row(function: Any) -> None:
    request = made(perceptron(), X, Y, objective=OfRows(function))
    with pytest.raises(ConfigurationError, match="An objective gives one number for each row"):
        request.value(request.inputs, request.carried, request.target)


def test_the_plan_is_made_once_and_cannot_be_changed() -> None:
    measure = Seeing()
    engine = YDrop(perceptron(), measure=measure)
    for size in (16, 7, 1):
        engine.step(X[:size], Y[:size])
    plans = [request.plan for request in measure.seen[1:]]
    assert all(plan is plans[0] for plan in plans)
    for field in dataclasses.fields(Plan):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(plans[0], field.name, None)
    assert plans[0].num_units == {"1": 16, "4": 10}
    assert plans[0].output is not None
    assert plans[0].output.device.type == "meta"
