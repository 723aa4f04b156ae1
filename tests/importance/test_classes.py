"""Conductance for several classes from one forward pass."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_ydrop import (
    ConfigurationError,
    NegativeLoss,
    Objective,
    OutputSum,
    PredictedLogit,
    TargetLogit,
    layer_conductance,
)
from lightning_ydrop.models.calls import Target
from tests.counting import Counting
from tests.importance.test_conductance import WAYS, Net
from tests.networks import NETWORKS, leaves, network_and_batch, perceptron

KINDS = list(NETWORKS)
MODEL, X = perceptron().double(), torch.randn(6, 12, dtype=torch.float64)


class ClassesFirst(nn.Module):
    """Turns logits (B, T, C) into (B, C, T)."""

    def forward(self, logits: Tensor) -> Tensor:
        return logits.transpose(1, 2)


class Margin(Objective):
    """A logit less the mean of all logits."""

    def __call__(self, output: Tensor, target: Target) -> Tensor:
        assert target is not None
        return output.gather(1, target[:, None]).squeeze(1) - output.mean(1)


@pytest.mark.parametrize("max_rows", [None, 2, 7, "batch"])
@pytest.mark.parametrize("quadrature", ["right", "left", "trapezoid"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_class_has_what_a_call_for_it_alone_gives(kind: str, quadrature: Any, max_rows: Any) -> None:
    model, x, _ = network_and_batch(kind, torch.float64)
    measured: Any = {"layers": list(leaves(model)), "quadrature": quadrature, "n_steps": 5, "max_rows": max_rows}
    classes = [3, 0, 4]
    together = layer_conductance(model, x, classes=classes, **measured)
    for place, each in enumerate(classes):
        for name, scores in layer_conductance(model, x, each, **measured).items():
            assert together[name].shape == (len(x), len(classes), scores.shape[1])
            assert scores.abs().sum() > 0
            assert torch.allclose(together[name][:, place], scores, rtol=0, atol=1e-12), (name, each)


@pytest.mark.parametrize("objective", [TargetLogit(), NegativeLoss(nn.CrossEntropyLoss(reduction="none")), Margin()])
def test_all_are_those_of_the_output_whatever_the_objective(objective: Objective) -> None:
    every = layer_conductance(MODEL, X, classes="all", objective=objective)
    listed = layer_conductance(MODEL, X, classes=range(5), objective=objective)
    single = layer_conductance(MODEL, X, 3, objective=objective)
    for name, scores in every.items():
        assert torch.equal(scores, listed[name])
        assert torch.allclose(scores[:, 3], single[name], rtol=0, atol=1e-12)
    assert layer_conductance(MODEL, X, classes=np.array([2, 1]))["1"].shape == (6, 2, 16)  # type: ignore[call-overload]


@pytest.mark.parametrize(("num_classes", "max_rows", "passes"), [(1, None, 1), (5, None, 1), (5, 33, 2)])
def test_all_share_a_forward_pass(num_classes: int, max_rows: int | None, passes: int) -> None:
    model = Counting(MODEL)
    layer_conductance(model, X, classes=list(range(num_classes)), n_steps=10, max_rows=max_rows)
    assert len(model.rows) == passes
    assert sum(model.rows) == 10 * 6 + passes
    assert model.backwards == num_classes * passes


def test_classes_of_soft_labels_add_up() -> None:
    soft = torch.rand(6, 5, dtype=torch.float64).softmax(1)
    by_class = layer_conductance(MODEL, X, classes="all")["1"]
    weighted = (soft.unsqueeze(2) * by_class).sum(1)
    assert torch.allclose(layer_conductance(MODEL, X, soft)["1"], weighted)


@pytest.mark.parametrize("max_rows", [None, 4])
@pytest.mark.parametrize("class_dim", [-1, 1])
def test_a_class_of_dense_outputs_is_that_of_all_positions(class_dim: int, max_rows: int | None) -> None:
    of_positions = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    model = of_positions if class_dim == -1 else nn.Sequential(*of_positions, ClassesFirst())
    x = torch.randn(6, 7, 4, dtype=torch.float64)
    measured: Any = {"layers": "0", "max_rows": max_rows, "return_convergence_delta": True}
    objective = TargetLogit(class_dim=class_dim)
    scores, deltas = layer_conductance(model, x, classes="all", objective=objective, **measured)
    assert scores["0"].shape == (6, 3, 8)
    for each in range(3):
        labels = torch.full((6, 7), each)
        single, delta = layer_conductance(of_positions, x, labels, objective=TargetLogit(class_dim=-1), **measured)
        assert torch.allclose(scores["0"][:, each], single["0"], rtol=0, atol=1e-12)
        assert torch.allclose(deltas["0"][:, each], delta["0"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("way", ["checkpoints", "in place", "written over", "called twice"])
def test_the_graph_serves_every_class(way: str) -> None:
    model, x = Net(WAYS[way].forward, False, nn.Identity), X[:, :5]
    names = [name for name in WAYS[way].cuts[0] if name != "first"]
    together = layer_conductance(model, x, classes="all", layers=names)
    for each in range(3):
        for name, scores in layer_conductance(model, x, each, layers=names).items():
            assert scores.abs().sum() > 0
            assert torch.allclose(together[name][:, each], scores, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: layer_conductance(MODEL, X, classes=[]), r"classes=list\(\)"),
        (lambda: layer_conductance(MODEL, X, classes=3), "classes=3"),  # type: ignore[call-overload]
        (lambda: layer_conductance(MODEL, X, classes="every"), "classes='every'"),  # type: ignore[arg-type]
        (lambda: layer_conductance(MODEL, X, classes=[0, -1]), r"classes=list\(0, -1\)"),
        (lambda: layer_conductance(MODEL, X, classes=[0, 1.5]), r"classes=list\(0, 1\.5\)"),  # type: ignore[list-item]
        (lambda: layer_conductance(MODEL, X, classes=[True]), r"classes=list\(True\)"),
        (lambda: layer_conductance(MODEL, X, 1, classes=[0]), r"target=1, classes=list\(0\)"),
        (lambda: layer_conductance(MODEL, X, classes="all", objective=OutputSum()), r"objective=OutputSum\(\)"),
        (lambda: layer_conductance(MODEL, X, classes=[1], objective=PredictedLogit()), "objective=PredictedLogit"),
    ],
)
def test_what_names_no_classes_is_refused_before_the_model_is_called(call: Callable[[], object], message: str) -> None:
    def call_of_the_model(*_: object) -> None:
        raise AssertionError

    handle = MODEL.register_forward_pre_hook(call_of_the_model)
    try:
        with pytest.raises(ConfigurationError, match=message):
            call()
    finally:
        handle.remove()


def test_what_the_output_does_not_have_is_refused() -> None:
    for objective in (None, TargetLogit(ignore_index=5)):
        with pytest.raises(
            ConfigurationError,
            match=r"^layer_conductance\(classes=\[0, 5, 1\]\) was given.* 5 classes\. `classes` lie from 0 to 4\.",
        ) as caught:
            layer_conductance(MODEL, X, classes=[0, 5, 1], objective=objective)
        assert "ignore_index" not in str(caught.value)
    flat = nn.Sequential(nn.Linear(12, 1), nn.Flatten(0)).double()
    with pytest.raises(
        ConfigurationError, match=r'classes="all"\) was given, and the model\'s forward returned Tensor'
    ):
        layer_conductance(flat, X, classes="all", layers="0")
    with pytest.raises(
        ConfigurationError, match=r"classes=\[0\]\) was given, and the model\'s forward returned Tensor"
    ):
        layer_conductance(flat, X, classes=[0], layers="0")
    for classes in ("all", [0]):
        with pytest.raises(ConfigurationError, match=r"layer_conductance\(classes=.*a single logit"):
            layer_conductance(nn.Sequential(nn.Linear(12, 1)).double(), X, classes=classes, layers="0")


def test_the_whole_message() -> None:
    with pytest.raises(ConfigurationError) as raised:
        layer_conductance(MODEL, X, torch.zeros(6, dtype=torch.long), classes=[0])
    assert str(raised.value) == (
        "layer_conductance(target=Tensor(shape=(6,), dtype=torch.int64, device=cpu), classes=list(0)) was given. "
        "`classes` takes the place of the target: each of them is the target of all samples in turn. "
        "Pass one of the two."
    )
