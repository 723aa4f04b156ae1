import copy
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_ydrop import ConductanceDropout, ConfigurationError, KeyAdapter, layer_conductance
from lightning_ydrop.analysis import RemovalCurve, mean_conductance, removal_curve
from tests.analysis.test_spread import Own
from tests.containers import DictConfig, ListConfig
from tests.sameness import assert_same

FRACTIONS = (0.0, 0.25, 0.5, 0.75, 1.0)


@pytest.fixture
def trained() -> tuple[nn.Sequential, list[tuple[Tensor, Tensor]]]:
    """A network with two layers to remove units from, trained a little, and its data in two batches."""
    model = nn.Sequential(
        nn.Linear(8, 16), nn.BatchNorm1d(16), ConductanceDropout(), nn.ReLU(),
        nn.Linear(16, 12), ConductanceDropout(), nn.ReLU(), nn.Linear(12, 4),
    )  # fmt: skip
    x = torch.randn(120, 8)
    y = (x @ torch.randn(8, 4)).argmax(1)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model, [(x[:70], y[:70]), (x[70:], y[70:])]


def accuracy_without(model: nn.Sequential, x: Tensor, y: Tensor, removed: dict[int, Tensor]) -> float:
    """Run the network layer by layer, and set units to 0 by hand."""
    model = copy.deepcopy(model).eval()
    for place, layer in enumerate(model):
        x = layer(x)
        if place in removed:
            x = x.clone()
            x[:, removed[place]] = 0
    return float((x.argmax(1) == y).double().mean())


def test_the_strongest_units_go_first(trained: Any) -> None:
    model, data = trained
    x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    curve = removal_curve(model, data, "conductance", fractions=FRACTIONS, n_steps=20)
    assert curve.accuracy.shape == (1, 5)
    orders = {
        int(name): scores.mean(0).argsort(descending=True)
        for name, scores in layer_conductance(model, x, y, n_steps=20).items()
    }
    for place, fraction in enumerate(FRACTIONS):
        removed = {at: order[: round(fraction * len(order))] for at, order in orders.items()}
        assert curve.mean[place].item() == pytest.approx(accuracy_without(model, x, y, removed))
    assert curve.mean[0] > 0.8 > curve.mean[-2]


def test_units_go_in_the_order_of_scores_that_are_given(trained: Any) -> None:
    model, data = trained
    x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    scores = {"2": torch.arange(16.0)}
    curve = removal_curve(model, data, scores, layers="2", fractions=(0, 0.25))
    assert curve.mean[1].item() == pytest.approx(accuracy_without(model, x, y, {2: torch.arange(12, 16)}))


def test_random_units_differ_between_repeats_and_grow_from_share_to_share(trained: Any) -> None:
    model, data = trained
    x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    curve = removal_curve(model, data, fractions=FRACTIONS, repeats=6, seed=3)
    assert curve.accuracy.shape == (6, 5)
    assert curve.accuracy.dtype == torch.float64  # counts over counts, so that `threshold` is exact
    assert torch.equal(curve.accuracy, removal_curve(model, data, fractions=FRACTIONS, repeats=6, seed=3).accuracy)
    assert not torch.equal(curve.accuracy, removal_curve(model, data, fractions=FRACTIONS, repeats=6, seed=4).accuracy)
    assert curve.std[0] == curve.std[-1] == 0
    assert curve.std[2] > 0
    assert curve.mean[0].item() == pytest.approx(accuracy_without(model, x, y, {}))
    everything = {2: torch.arange(16), 5: torch.arange(12)}
    assert curve.mean[-1].item() == pytest.approx(accuracy_without(model, x, y, everything))


@pytest.mark.parametrize("listed", [list, tuple, ListConfig, np.array])
def test_settings_of_numpy_and_omegaconf_are_kept_as_plain_ones(trained: Any, listed: Any) -> None:
    model, data = trained
    settings: dict[str, Any] = {"repeats": np.int64(2), "seed": np.int64(3), "fractions": listed([0.0, 0.25, 0.5])}
    curve = removal_curve(model, data, **settings)
    assert repr(curve.fractions) == "(0.0, 0.25, 0.5)"
    assert torch.equal(curve.accuracy, removal_curve(model, data, fractions=(0, 0.25, 0.5), repeats=2, seed=3).accuracy)
    scores = {"2": torch.arange(16.0)}
    by_scores = removal_curve(model, data, DictConfig(scores), layers="2", fractions=(0, 0.25))
    assert torch.equal(by_scores.accuracy, removal_curve(model, data, scores, layers="2", fractions=(0, 0.25)).accuracy)


def test_channels_are_removed_as_units() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), ConductanceDropout(), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    x, y = torch.randn(50, 1, 4, 4), torch.randint(0, 3, (50,))
    scores = torch.tensor([0.0, 3.0, 1.0, 2.0])
    curve = removal_curve(model, [(x, y)], {"1": scores}, fractions=(0, 0.5))
    assert curve.mean[1].item() == pytest.approx(accuracy_without(model, x, y, {1: torch.tensor([1, 3])}))


def test_any_model_and_batch_will_do() -> None:
    class Tokens(nn.Module):
        """Logits inside an object, of sequences of features."""

        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Linear(4, 10)
            self.head = nn.Linear(10, 3)

        def forward(self, x: Tensor) -> Any:
            return SimpleNamespace(logits=self.head(self.encoder(x).tanh().mean(1)))

    model, x, y = Tokens(), torch.randn(30, 5, 4), torch.randint(0, 3, (30,))
    scores = torch.rand(10)
    batches = [{"features": x[:20], "class": y[:20]}, {"features": x[20:], "class": y[20:]}]
    removing: Any = {"layers": "encoder", "fractions": (0, 0.5), "adapter": KeyAdapter("features", "class")}
    curve = removal_curve(model, batches, {"encoder": scores}, **removing)
    strongest = scores.argsort(descending=True)[:5]
    encoded = model.encoder(x)
    encoded[:, :, strongest] = 0
    right = model.head(encoded.tanh().mean(1)).argmax(1) == y
    assert curve.mean[1].item() == pytest.approx(right.double().mean().item())
    # The same layer, seen as one whose units are tokens.
    by_token = removal_curve(model, batches, {"encoder": torch.arange(5.0)}, unit_dim=1, **removing)
    encoded = model.encoder(x)
    encoded[:, 3:] = 0
    right = model.head(encoded.tanh().mean(1)).argmax(1) == y
    assert by_token.mean[1].item() == pytest.approx(right.double().mean().item())
    strongest_tokens = removal_curve(model, batches, "conductance", unit_dim=1, n_steps=5, **removing)
    tokens = mean_conductance(model, batches, layers="encoder", adapter=removing["adapter"], unit_dim=1, n_steps=5)
    assert torch.equal(
        strongest_tokens.accuracy, removal_curve(model, batches, tokens, unit_dim=1, **removing).accuracy
    )


@pytest.mark.parametrize("order", ["random", "conductance"])
def test_it_works_in_inference_mode_too(trained: Any, order: Any) -> None:
    model, data = trained
    expected = removal_curve(model, data, order, fractions=FRACTIONS, repeats=2)
    with torch.inference_mode():
        made_there = [(x.clone(), y.clone()) for x, y in data]
        assert torch.equal(
            removal_curve(model, made_there, order, fractions=FRACTIONS, repeats=2).accuracy, expected.accuracy
        )


def test_own_methods_are_called() -> None:
    model, x, scores = Own(), torch.randn(12, 6), torch.rand(9)
    y = model.body(x + 1).argmin(1)
    model.ydrop_forward = lambda x: -model.body(x)  # type: ignore[method-assign]
    batches = [{"features": x, "class": y}]
    removing: Any = {"layers": nn.ReLU, "fractions": FRACTIONS}
    own = removal_curve(model, batches, {"body.1": scores}, **removing)
    assert own.mean[0] == 1
    given = removal_curve(model, batches, {"body.1": scores}, forward=model.body, **removing)
    by_hand = removal_curve(model.body, [(x + 1, y)], {"1": scores}, layers="1", fractions=FRACTIONS)
    assert torch.equal(given.accuracy, by_hand.accuracy)
    measured = mean_conductance(model, batches, layers=nn.ReLU, forward=model.body)
    ordered = [
        removal_curve(model, batches, order, forward=model.body, **removing) for order in ("conductance", measured)
    ]
    assert torch.equal(ordered[0].accuracy, ordered[1].accuracy)
    other = removal_curve(model, batches, "conductance", forward=lambda x: model.body(-x), **removing)
    assert not torch.equal(other.accuracy, ordered[0].accuracy)


@pytest.mark.parametrize("order", ["random", "conductance"])
def test_the_model_is_given_back_as_it_was(trained: Any, order: Any) -> None:
    model, data = trained
    before = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    removal_curve(model, data, order, fractions=(0, 0.5), repeats=2)
    assert_same(before, model.state_dict())
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random)


def test_the_threshold_is_the_last_share_before_accuracy_is_lost() -> None:
    accuracy = torch.tensor([[0.9, 0.9, 0.895, 0.7, 0.9], [0.9, 0.88, 0.895, 0.7, 0.9]])
    curve = RemovalCurve(FRACTIONS, accuracy)
    assert curve.threshold(0.02) == 0.5
    assert curve.threshold(0.001) == 0.0
    assert curve.threshold(0.5) == 1.0


@pytest.mark.parametrize("right", range(9000, 10000, 7))
def test_the_threshold_is_no_more_than_a_loss_to_the_last_sample(right: int) -> None:
    curve = RemovalCurve(
        (0.0, 0.5, 0.9), torch.tensor([[right, right - 100, right - 101]], dtype=torch.float64) / 10000
    )
    assert curve.threshold(0.01) == 0.5


X, Y = torch.randn(6, 8), torch.zeros(6, dtype=torch.long)
MODEL = nn.Sequential(nn.Linear(8, 4), ConductanceDropout(), nn.Linear(4, 3))
MODEL[0].register_module("unused", nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"repeats": 0}, "repeats=0"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 0.5}, "seed=0.5"),
        ({"fractions": 0.5}, r"removal_curve\(fractions=0.5\)"),
        ({"fractions": "0, 0.5"}, r"removal_curve\(fractions='0, 0.5'\)"),
        ({"fractions": ListConfig([0.0, True])}, "fractions=True"),
        ({"fractions": (0.5, 1.0)}, "ascend from 0"),
        ({"fractions": (0.0, 0.5, 0.2)}, "ascend from 0"),
        ({"fractions": ()}, "ascend from 0"),
        ({"fractions": (0.0, 1.5)}, "fractions=1.5"),
        ({"order": "weakest"}, "order='weakest'"),
        ({"order": {"1": torch.ones(3)}}, "shape"),
        ({"data": []}, "gave no batch"),
        ({"data": [(X, None)]}, "target None"),
        ({"data": [(X, torch.rand(6, 3))]}, r"class index \(B,\)"),
        ({"data": [(X, torch.rand(6))]}, r"class index \(B,\)"),
        ({"forward": lambda x: MODEL(x)[:, :1]}, "at least two classes"),
        ({"forward": lambda x: MODEL(x)[:, 0]}, "at least two classes"),
        ({"forward": lambda x: MODEL(x).unsqueeze(1).expand(6, 8, 3)}, r"logits \(B, C\)"),
        ({"unit_dim": 0}, "unit_dim=0"),
        ({"unit_dim": 2, "layers": "0"}, r"'0' \(Linear, unit_dim=2\)"),
        ({"layers": ["0", "0.unused"]}, r"chose '0\.unused'"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"model": MODEL, "data": [(X, Y)]} | arguments
    with pytest.raises(ConfigurationError, match=message):
        removal_curve(**given)


@pytest.mark.parametrize("order", ["random", {"1": torch.ones(8)}])
def test_arguments_that_serve_no_order_are_refused(order: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 8), ConductanceDropout(), nn.Linear(8, 2))
    with pytest.raises(ConfigurationError, match=r"removal_curve\(order=.*, fraction=\.\.\.\)"):
        removal_curve(model, [(torch.rand(2, 4), torch.tensor([0, 1]))], order, fraction=(0, 0.5))
