import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from lightning_ydrop import ConfigurationError
from lightning_ydrop.analysis import mean_conductance, prune_units, removal_curve


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(24, 10), nn.ReLU(), nn.Linear(10, 3)
    )


X, Y = torch.randn(60, 1, 4, 4), torch.randint(0, 3, (60,))


def test_what_is_pruned_is_what_weakest_first_removes() -> None:
    model = network()
    scores = mean_conductance(model, [(X, Y)], layers=["0", "3"])
    weakest_first = {name: -values for name, values in scores.items()}
    curve = removal_curve(model, [(X, Y)], weakest_first, layers=["0", "3"], fractions=(0.0, 0.5))
    left = prune_units(model, scores, 0.5)
    assert {name: int(units.sum()) for name, units in left.items()} == {"0": 3, "3": 5}
    for name, values in scores.items():
        assert values[left[name]].min() >= values[~left[name]].max()
    assert float((model(X).argmax(1) == Y).float().mean()) == pytest.approx(curve.mean[1].item())


def test_what_is_pruned_stays_so_in_training_and_in_checkpoints() -> None:
    model = network()
    left = prune_units(model, {"3": torch.arange(10.0)}, 0.3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X), Y).backward()
        optimizer.step()
    layer: Any = model[3]
    for parameter in ("weight", "bias"):
        prune.remove(layer, parameter)
    assert torch.equal(layer.weight.abs().sum(1) > 0, left["3"])
    assert torch.equal(layer.bias != 0, left["3"])
    plain = network()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain(X), model(X))


def test_what_was_pruned_before_is_the_first_of_what_goes() -> None:
    model = network()
    prune_units(model, {"3": torch.arange(10.0)}, 0.3)
    # Measured anew, what is gone scores 0, and others may score less.
    left = prune_units(model, {"3": torch.tensor([0.0, 0.0, 0.0, -1, -2, 5, 6, 7, 8, 9])}, 0.4)
    assert left["3"].tolist() == 3 * [False] + [True, False] + 5 * [True]
    layer: Any = model[3]
    assert torch.equal(layer.weight.abs().sum(1) > 0, left["3"])
    assert torch.equal(prune_units(model, {"3": torch.rand(10)}, 0.1)["3"], left["3"])


def test_layers_have_the_names_that_they_are_measured_by() -> None:
    compiled: Any = torch.compile(network())
    scores = mean_conductance(compiled, [(X, Y)], layers="3")
    left = prune_units(compiled, scores, 0.5)
    assert int(left["3"].sum()) == 5


@pytest.mark.parametrize(
    ("scores", "fraction", "message"),
    [
        ({"0": torch.tensor([0.0, 1, 2, 3, 4, float("nan")])}, 0.5, "no NaN"),
        ({"0": torch.rand(6)}, 1.5, "fraction=1.5"),
        ({"0": torch.rand(7)}, 0.5, r"Tensor\(shape=\(7,\).*'0'"),
        ({"0": torch.rand(6), "1": torch.rand(6)}, 0.5, "'1', that is ReLU here"),
        ({"0": torch.rand(6), "body": torch.rand(6)}, 0.5, "'body', that is None here"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_pruned(scores: Any, fraction: float, message: str) -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ConfigurationError, match=message):
        prune_units(model, scores, fraction)
    assert model.state_dict().keys() == before.keys()
