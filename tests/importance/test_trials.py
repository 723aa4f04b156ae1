"""The passes of the dry run, one for each question."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_ydrop import ConductanceDropout, ConfigurationError, OutputSum, PredictedLogit, TargetLogit, YDrop
from lightning_ydrop.importance.arrangement import Batch, arrange
from lightning_ydrop.importance.path import PathSettings
from lightning_ydrop.importance.subject import Subject, subject_of
from lightning_ydrop.importance.trials import in_training, look_at, output_of, rows_first, smallest_batch
from lightning_ydrop.models.observations import Observations
from tests.counting import Counting, recorder
from tests.networks import perceptron

X, Y = torch.randn(8, 12), torch.arange(8) % 5


def set_up(
    model: nn.Module, inputs: Any = X, target: Any = None, **settings: Any
) -> tuple[Subject, PathSettings, Batch]:
    path = PathSettings("YDrop", objective=settings.pop("objective", OutputSum()), **settings)
    layers = {name: each for name, each in model.named_modules() if isinstance(each, ConductanceDropout)}
    unit_dims = {name: layer.unit_dim for name, layer in layers.items()}
    subject = subject_of(model, model, layers, unit_dims, path.objective, Observations())
    signature = inspect.signature(model.forward)
    return subject, path, arrange(model, signature, inputs, target, batch_dim=path.batch_dim)


def test_a_look_sees_the_whole_batch_once_in_evaluation() -> None:
    model = Counting(perceptron())
    look = look_at(*set_up(model))
    assert model.rows == [8]
    with torch.no_grad():
        assert torch.equal(look.output, model.eval()(X))
    assert look.num_units == {"model.1": 16, "model.4": 10}
    assert look.plan.output is not None
    assert (look.plan.output.shape, look.plan.output.device.type) == ((8, 5), "meta")
    assert look.recorded == 8 * (16 + 10) * 4


def test_it_looks_at_a_copy_of_the_inputs() -> None:
    class Writing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = perceptron()

        def forward(self, x: Tensor) -> Any:
            return self.body(x.mul_(2))

    x = X.clone()
    look_at(*set_up(Writing(), x))
    YDrop(Writing()).step(x, Y)
    assert torch.equal(x, X)


def test_in_place_operations_are_learned() -> None:
    class Reused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.drop, self.head = nn.Linear(12, 6), ConductanceDropout(), nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Any:
            hidden = self.first(x)
            return self.head(self.drop(hidden) * 2 + hidden.relu_())

    assert look_at(*set_up(Reused())).plan.overwritten == {"drop"}
    assert look_at(*set_up(perceptron())).plan.overwritten == set()


@pytest.mark.parametrize("rows", [[7], [3, 0], [0, 0, 1]])
def test_some_samples_pass_by_themselves(rows: list[int]) -> None:
    look = look_at(*set_up(perceptron()))
    assert torch.allclose(output_of(look, torch.tensor(rows)), look.output[rows], atol=1e-6)


def test_draws_move_the_random_stream_inside_alone() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = perceptron()

        def forward(self, x: Tensor) -> Any:
            return self.body(x) + torch.randn(len(x), 5)

    look = look_at(*set_up(Noisy()))
    state = torch.get_rng_state()
    assert torch.equal(output_of(look, torch.arange(8)), look.output)
    assert not torch.equal(output_of(look, torch.arange(8), draws=1), look.output)
    assert torch.equal(torch.get_rng_state(), state)


class AtLeast(nn.Module):
    """Takes so many rows or more."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.body, self.rows = perceptron(), rows

    def forward(self, x: Tensor) -> Any:
        if len(x) < self.rows:
            raise ValueError(f"{len(x)} rows")
        return self.body(x)


@pytest.mark.parametrize(("rows", "smallest"), [(1, 1), (2, 1), (6, 1), (7, 8)])
def test_phase_1_is_tried_on_a_single_sample(rows: int, smallest: int) -> None:
    subject, path, batch = set_up(AtLeast(rows))
    look = look_at(subject, path, batch)
    if smallest == 1:
        assert smallest_batch(subject, path, look.plan, batch) == 1  # with one start and five steps: six rows
    else:
        with pytest.warns(UserWarning, match=r"ValueError for a batch of a single sample: 6 rows.*drop_last=True"):
            assert smallest_batch(subject, path, look.plan, batch) == 8


def test_of_a_first_batch_of_one_sample_nothing_is_to_be_tried() -> None:
    model = Counting(perceptron())
    subject, path, batch = set_up(model, X[:1])
    look = look_at(subject, path, batch)
    model.forget()
    assert smallest_batch(subject, path, look.plan, batch) == 1
    assert model.rows == []


class Switching(nn.Module):
    """Does something in training mode alone."""

    def __init__(self, what: Callable[["Switching", Tensor], Any]) -> None:
        super().__init__()
        self.what, self.drop, self.block = what, ConductanceDropout(), nn.Sequential(nn.Linear(12, 12), nn.Tanh())
        self.more = nn.Sequential(nn.Linear(12, 12), nn.Tanh())
        self.head, self.tell = nn.Linear(12, 5), recorder()

    def forward(self, x: Tensor) -> Any:
        self.tell(self.training)
        return self.what(self, x)


def drops(model: Switching, x: Tensor) -> Any:
    return model.head(model.drop(x) if model.training else x)


def checkpoints(model: Switching, x: Tensor) -> Any:
    for block in (model.block, model.more):
        x = checkpoint(block, x, use_reentrant=False) if model.training else block(x)
    return model.head(model.drop(x))


def always_checkpoints(model: Switching, x: Tensor) -> Any:
    return model.head(model.drop(checkpoint(model.block, x, use_reentrant=False)))


def wants_targets(model: Switching, x: Tensor) -> Any:
    if model.training:
        raise TypeError("targets are missing")
    return model.head(model.drop(x))


@pytest.mark.parametrize(
    ("what", "called", "checkpointed"),
    [(drops, {"drop"}, ()), (checkpoints, {"drop"}, ("block", "more")), (always_checkpoints, {"drop"}, ())],
)
def test_training_shows_what_it_does_alone(what: Any, called: set[str], checkpointed: tuple[str, ...]) -> None:
    model = Switching(what)
    look = look_at(*set_up(model))
    plan, found = in_training(look, look.plan)
    assert found == called
    assert plan.checkpointed == tuple(getattr(model, name) for name in checkpointed)
    assert model.tell.seen[-2:] == [True, False]  # and a pass in evaluation, to compare what it keeps
    assert model.training


def test_a_forward_that_takes_more_in_training_shows_nothing() -> None:
    look = look_at(*set_up(Switching(wants_targets)))
    assert in_training(look, look.plan) == (look.plan, frozenset())


def test_a_model_without_forward_is_told() -> None:
    class Nothing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop = ConductanceDropout()

    with pytest.raises(ConfigurationError, match=r"Nothing has no forward.*`ydrop_forward`"):
        YDrop(Nothing()).step(X)


class TimeFirst(nn.Module):
    """A sequence, a last state and logits of it, in (T, B, F)."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.drop, self.last = nn.LSTM(4, 6), ConductanceDropout(unit_dim=-1), ConductanceDropout()
        self.head, self.tell = nn.Linear(6, 3), recorder()

    def forward(self, x: Tensor) -> Any:
        self.tell(x.shape[1])
        return self.head(self.last(self.drop(self.lstm(x)[0])[-1]))


@pytest.mark.parametrize(("size", "passes"), [(8, [8]), (6, [6, 7]), (3, [3, 4]), (5, [5, 6]), (1, [2])])
def test_rows_that_are_first_are_named(size: int, passes: list[int]) -> None:
    model = TimeFirst()
    subject, path, batch = set_up(model, torch.randn(5, size, 4), batch_dim=1)
    assert rows_first(subject, path, batch) == {"", "last"}
    assert model.tell.seen == passes  # once more where there are as many units, classes or steps


def test_where_the_batch_is_first_nothing_is_tried() -> None:
    model = Counting(perceptron())
    assert rows_first(*set_up(model)) == frozenset()
    assert model.rows == []


class Inside(nn.Module):
    """Takes a gradient inside its forward, with respect to an activation after a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.drop, self.head = nn.Linear(12, 8), ConductanceDropout(), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.drop(self.inner(x))
        (gradient,) = torch.autograd.grad((hidden**2).sum(), hidden, create_graph=True)
        logits: Tensor = self.head(hidden + gradient)
        return logits


@pytest.mark.parametrize("objective", [TargetLogit(), PredictedLogit()])
def test_gradients_inside_of_activations_are_taken_in_every_pass(objective: Any) -> None:
    model = Inside()
    ydrop = YDrop(model, objective=objective)
    ydrop.step(X, Y)
    ydrop.step(X[:1], Y[:1])
    assert ydrop.scores["drop"].abs().sum() > 0
