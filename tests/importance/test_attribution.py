from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from captum.attr import LayerConductance
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision.models.convnext import LayerNorm2d

from lightning_ydrop import (
    ConductanceDropout,
    ConfigurationError,
    NegativeLoss,
    Objective,
    PredictedLogit,
    TargetLogit,
    YDrop,
    layer_conductance,
)
from lightning_ydrop.functional.attribution import Quadrature
from lightning_ydrop.importance import conductance as conductance_module
from tests.counting import Counting
from tests.networks import NETWORKS, leaves, network_and_batch, perceptron
from tests.oracles import conductance_of_one_sample

KINDS = list(NETWORKS)
QUADRATURES: list[Quadrature] = ["right", "left", "trapezoid"]


def units(values: Tensor) -> Tensor:
    return values.flatten(2).sum(2) if values.ndim > 2 else values


def relative_error(value: Tensor, expected: Tensor) -> float:
    return ((value - expected).norm() / expected.norm()).item()


def output_change(model: nn.Module, x: Tensor, y: Tensor, baseline: Tensor) -> Tensor:
    model.eval()
    change: Tensor = (model(x) - model(baseline.expand_as(x))).gather(1, y.unsqueeze(1)).squeeze(1).detach()
    return change


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-7)])
@pytest.mark.parametrize("kind", KINDS)
def test_left_is_captums_layer_conductance_on_every_layer(kind: str, dtype: torch.dtype, tolerance: float) -> None:
    model, x, y = network_and_batch(kind, dtype)
    layers = leaves(model)
    ours = layer_conductance(model, x, y, layers=list(layers), quadrature="left", n_steps=20)
    model.eval()
    assert list(ours) == list(layers)
    for name, layer in layers.items():
        captums = LayerConductance(model, layer).attribute(x, 0.0, target=y, n_steps=20, method="riemann_trapezoid")
        assert relative_error(ours[name], units(captums)) < tolerance, name


@pytest.mark.parametrize("kind", KINDS)
def test_right_is_equation_2(kind: str) -> None:
    model, x, y = network_and_batch(kind, torch.float64)
    baseline = torch.full_like(x[0], 0.1)
    layers = leaves(model)
    ours = layer_conductance(model, x, y, layers=list(layers), n_steps=7, baseline=0.1)
    model.eval()
    for name, layer in layers.items():
        slow = torch.stack(
            [conductance_of_one_sample(model, layer, x[j], int(y[j]), baseline, 7) for j in range(len(x))]
        )
        assert relative_error(ours[name], units(slow)) < 1e-12, name


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_that_all_paths_cross_carries_the_whole_change_of_the_output(kind: str) -> None:
    model, x, y = network_and_batch(kind, torch.float64)
    crossed = "stem" if kind == "residual" else "0"
    change = output_change(model, x, y, torch.zeros_like(x[:1]))
    for quadrature in QUADRATURES:
        errors = []
        for n_steps in (10, 100, 1000):
            scores = layer_conductance(model, x, y, layers=crossed, quadrature=quadrature, n_steps=n_steps)
            errors.append((scores[crossed].sum(1) - change).abs().mean().item())
        assert errors[0] > 2 * errors[1] > 4 * errors[2], quadrature


def test_trapezoid_converges_fastest() -> None:
    torch.manual_seed(3)
    model = perceptron(nn.Tanh).double()
    x, y = torch.randn(6, 12, dtype=torch.float64), torch.randint(0, 5, (6,))
    change = output_change(model, x, y, torch.zeros(1, 12).double())

    def error(quadrature: Quadrature, n_steps: int) -> float:
        scores = layer_conductance(model, x, y, layers="0", quadrature=quadrature, n_steps=n_steps)
        return (scores["0"].sum(1) - change).abs().mean().item()

    for one_sided in ("right", "left"):
        assert 8 < error(one_sided, 100) / error(one_sided, 1000) < 12  # first order
        assert error("trapezoid", 100) < error(one_sided, 100) / 10
    assert 80 < error("trapezoid", 100) / error("trapezoid", 1000) < 120  # second order


def test_trapezoid_is_the_mean_of_both_sides() -> None:
    model, x, y = network_and_batch("residual", torch.float64)
    right, left, both = (layer_conductance(model, x, y, quadrature=quadrature, n_steps=5) for quadrature in QUADRATURES)
    for name in both:
        assert torch.allclose(both[name], (right[name] + left[name]) / 2)
        assert not torch.allclose(right[name], left[name])


@pytest.mark.parametrize("depth", [1, 2, 12])
def test_one_forward_and_one_backward_however_many_layers(depth: int) -> None:
    hidden = [part for _ in range(depth) for part in (nn.Linear(12, 12), ConductanceDropout(), nn.ReLU())]
    model = Counting(nn.Sequential(*hidden, nn.Linear(12, 5)))
    x, y = torch.randn(6, 12), torch.randint(0, 5, (6,))
    assert len(layer_conductance(model, x, y, n_steps=10)) == depth
    assert model.rows == [10 * 6 + 1]
    assert model.backwards == 1


@pytest.mark.parametrize("quadrature", QUADRATURES)
@pytest.mark.parametrize("max_rows", [2, 3, 5, 11, 30, 66, 1000])
def test_chunks_stay_within_their_rows_and_give_the_same(quadrature: Quadrature, max_rows: int) -> None:
    model, x, y = network_and_batch("convolutional", torch.float64)
    whole = layer_conductance(model, x, y, quadrature=quadrature, n_steps=10)
    counting = Counting(model)
    chunked = layer_conductance(counting, x, y, quadrature=quadrature, n_steps=10, max_rows=max_rows)
    assert max(counting.rows) <= max_rows
    for name, scores in whole.items():
        assert torch.allclose(chunked[f"model.{name}"], scores, atol=1e-12)


@pytest.mark.parametrize("quadrature", QUADRATURES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_its_samples_one_by_one(kind: str, quadrature: Quadrature) -> None:
    model, x, y = network_and_batch(kind, torch.float64)
    together = layer_conductance(model, x, y, quadrature=quadrature, n_steps=5)
    for j in range(len(x)):
        alone = layer_conductance(model, x[[j]], y[[j]], quadrature=quadrature, n_steps=5)
        for name in together:
            assert torch.allclose(together[name][[j]], alone[name])


def test_targets_may_be_classes_soft_labels_or_nothing() -> None:
    model, x, y = network_and_batch("perceptron", torch.float64)
    by_class = layer_conductance(model, x, y)
    one_hot = nn.functional.one_hot(y, 5).double()
    assert torch.allclose(layer_conductance(model, x, one_hot)["1"], by_class["1"])
    summed = layer_conductance(model, x)["1"]
    each_class = [layer_conductance(model, x, c)["1"] for c in range(5)]
    assert torch.allclose(summed, sum(each_class, torch.zeros(())))
    soft = torch.rand(6, 5, dtype=torch.float64).softmax(1)
    weighted = sum((soft[:, [c]] * each_class[c] for c in range(5)), torch.zeros(()))
    assert torch.allclose(layer_conductance(model, x, soft)["1"], weighted)
    assert not torch.allclose(summed, by_class["1"])


@pytest.mark.parametrize("quadrature", QUADRATURES)
def test_baselines_may_be_a_number_a_tensor_or_a_tuple(quadrature: Quadrature) -> None:
    model, x, y = network_and_batch("perceptron", torch.float64)

    def scores(baseline: Any) -> Tensor:
        return layer_conductance(model, x, y, baseline=baseline, quadrature=quadrature, n_steps=5)["1"]

    expected = scores(0.5)
    for same in (
        torch.full((12,), 0.5),
        torch.full((1, 12), 0.5),
        torch.full((6, 12), 0.5),
        (0.5,),
        [torch.full((12,), 0.5)],
    ):
        assert torch.allclose(scores(same), expected)
    assert not torch.allclose(scores(0.0), expected)
    own = torch.randn(6, 12, dtype=torch.float64)
    for j in range(6):
        alone = layer_conductance(model, x[[j]], y[[j]], baseline=own[j], quadrature=quadrature, n_steps=5)["1"]
        assert torch.allclose(scores(own)[[j]], alone)


class TwoInputs(nn.Module):
    """Adds features of two inputs of different shape."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Conv1d(2, 8, 3)
        self.drop, self.head = ConductanceDropout(), nn.Linear(8, 5)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        mixed = self.drop(self.first(x) + self.second(z).mean(2)).tanh()
        logits: Tensor = self.head(mixed)
        return logits


def test_several_inputs_walk_together() -> None:
    model = TwoInputs().double()
    x, z = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 2, 7, dtype=torch.float64)
    y = torch.randint(0, 5, (6,))
    ours = layer_conductance(model, (x, z), y, baseline=(0.1, torch.ones(2, 7)), quadrature="left", n_steps=20)["drop"]
    captums = LayerConductance(model.eval(), model.drop).attribute(
        (x, z), (torch.full_like(x, 0.1), torch.ones_like(z)), target=y, n_steps=20, method="riemann_trapezoid"
    )
    assert relative_error(ours, captums) < 1e-7


def test_layers_are_chosen_by_name_or_type_in_the_order_of_the_model() -> None:
    model, x, y = network_and_batch("perceptron")
    assert list(layer_conductance(model, x, y)) == ["1", "4"]
    assert list(layer_conductance(model, x, y, layers="3")) == ["3"]
    assert list(layer_conductance(model, x, y, layers=["6", nn.ReLU, "0"])) == ["0", "2", "5", "6"]


def test_a_layer_called_twice_counts_as_the_sum_of_its_calls() -> None:
    class Shared(nn.Module):
        def __init__(self, first: nn.Module, second: nn.Module) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(12, 8), nn.Linear(8, 8), nn.Linear(8, 5)
            self.first, self.second = first, second

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.c(self.second(self.b(self.first(self.a(x)).relu())).relu())
            return logits

    one = ConductanceDropout()
    shared = Shared(one, one)
    apart = Shared(ConductanceDropout(), ConductanceDropout())
    apart.load_state_dict(shared.state_dict())
    x, y = torch.randn(6, 12), torch.randint(0, 5, (6,))
    each = layer_conductance(apart, x, y)
    assert torch.allclose(layer_conductance(shared, x, y)["first"], each["first"] + each["second"])
    shared.b, shared.c = nn.Linear(8, 6), nn.Linear(6, 5)
    with pytest.raises(ConfigurationError, match=r"'first'.* was called several times, and put out 8 and 6 units\."):
        layer_conductance(shared, x, y)


def test_a_layer_that_the_output_does_not_depend_on_scores_zero() -> None:
    class Aside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.main, self.aside = nn.Linear(12, 5), nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            self.aside(x)
            logits: Tensor = self.main(x)
            return logits

    scores = layer_conductance(Aside(), torch.randn(6, 12), 0, layers=nn.Linear)
    assert torch.equal(scores["aside"], torch.zeros(6, 3))
    assert scores["main"].abs().sum() > 0


@pytest.mark.parametrize(
    "behind", [nn.ELU(inplace=True), nn.SiLU(inplace=True), nn.Hardtanh(inplace=True), nn.ReLU(inplace=True)]
)
def test_in_place_activations_behind_a_layer_do_not_overwrite_the_record(behind: nn.Module) -> None:
    torch.manual_seed(3)
    in_place, copying = perceptron(lambda: behind), perceptron(lambda: type(behind)())
    copying.load_state_dict(in_place.state_dict())
    x, y = 3 * torch.randn(6, 12), torch.randint(0, 5, (6,))
    for layers in (None, nn.Linear):
        expected = layer_conductance(copying, x, y, layers=layers)
        for name, scores in layer_conductance(in_place, x, y, layers=layers).items():
            assert torch.allclose(scores, expected[name], atol=1e-6), name


class Reused(nn.Module):
    """Writes over what went into a layer, after the layer has passed it on."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.first, self.drop, self.head = nn.Linear(12, 16), ConductanceDropout(), nn.Linear(16, 5)
        self.in_place = in_place

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        dropped = self.drop(hidden) * 2
        logits: Tensor = self.head(dropped + (hidden.relu_() if self.in_place else hidden.relu()))
        return logits


def test_what_is_written_over_in_front_of_a_layer_is_recorded_as_it_was() -> None:
    in_place, copying = Counting(Reused(True)), Counting(Reused(False))
    copying.load_state_dict(in_place.state_dict())
    x, y = torch.randn(6, 12), torch.randint(0, 5, (6,))
    expected = layer_conductance(copying, x, y)["model.drop"]
    assert torch.allclose(layer_conductance(in_place, x, y)["model.drop"], expected, atol=1e-6)
    assert (len(copying.rows), len(in_place.rows)) == (1, 2)


def test_the_engine_learns_once_what_is_written_over() -> None:
    model = Counting(Reused(True))
    engine = YDrop(model)
    x, y = torch.randn(6, 12), torch.randint(0, 5, (6,))
    engine.step(x, y)
    before = len(model.rows)
    engine.step(x, y)
    assert len(model.rows) == before + 1


@pytest.mark.parametrize("frozen", [1, 4, 7])
def test_frozen_parts_change_nothing(frozen: int) -> None:
    model, x, y = network_and_batch("perceptron", torch.float64)
    expected = layer_conductance(model, x, y)
    for part in list(model.children())[:frozen]:
        part.requires_grad_(False)
    with torch.no_grad():
        scores = layer_conductance(model, x, y)
    for name in expected:
        assert torch.allclose(scores[name], expected[name])


def test_small_activations_are_measured_side_by_side_as_each_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = nn.Linear(12, 12)
    model = nn.Sequential(shared, nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), shared, nn.ReLU(), nn.Linear(12, 5))
    x, y = torch.randn(6, 12, dtype=torch.float64), torch.randint(0, 5, (6,))
    together = layer_conductance(model.double(), x, y, layers=["0", "1", "2", "5"])
    monkeypatch.setattr(conductance_module, "SMALL", 0)
    alone = layer_conductance(model, x, y, layers=["0", "1", "2", "5"])
    assert list(together) == list(alone)
    for name, scores in alone.items():
        assert scores.abs().sum() > 0
        assert torch.allclose(together[name], scores, rtol=1e-12), name


def test_units_of_a_sequence_are_its_features() -> None:
    model = nn.Sequential(nn.Linear(4, 8), ConductanceDropout(unit_dim=-1), nn.Tanh(), nn.Flatten(), nn.Linear(24, 5))
    x, y = torch.randn(6, 3, 4), torch.randint(0, 5, (6,))
    assert layer_conductance(model, x, y)["1"].shape == (6, 8)
    by_feature = layer_conductance(model, x, y, layers="0")["0"]
    by_token = layer_conductance(model, x, y, layers="0", unit_dim=1)["0"]
    assert by_feature.shape == (6, 8)
    assert by_token.shape == (6, 3)
    assert torch.allclose(by_feature.sum(1), by_token.sum(1), atol=1e-5)
    norms = nn.Sequential(nn.LayerNorm(4), nn.Unflatten(1, (3, 1)), LayerNorm2d(3), nn.Flatten(), nn.Linear(12, 5))
    found = layer_conductance(norms, x, y, layers=nn.LayerNorm)
    assert (found["0"].shape, found["2"].shape) == ((6, 4), (6, 3))
    # Of other layers nothing tells: a dropout of ours behind them does, or the caller.
    assert layer_conductance(model, x, y, layers=nn.Tanh)["2"].shape == (6, 3)


def test_no_more_rows_than_the_batch_has_pass_through_the_model_at_once() -> None:
    rows = []
    model = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 5))
    model.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    x, y = torch.randn(9, 12), torch.randint(0, 5, (9,))
    at_once = layer_conductance(model, x, y, layers=nn.ReLU, n_steps=20)["1"]
    assert rows == [181]
    in_parts = layer_conductance(model, x, y, layers=nn.ReLU, n_steps=20, max_rows="batch")["1"]
    assert max(rows[1:]) <= 9
    assert torch.allclose(at_once, in_parts, atol=1e-6)


@pytest.mark.parametrize("objective", [TargetLogit(), NegativeLoss(nn.CrossEntropyLoss(reduction="none"))])
def test_it_measures_in_inference_mode_what_it_measures_elsewhere(objective: Objective) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 5))

        def forward(self, x: Tensor, factors: Tensor, scale: Tensor) -> Any:
            return self.body(x * factors) * scale

    model, y = Scaled(), torch.randint(0, 5, (6,))
    inputs = torch.randn(6, 12), torch.rand(6, 12), torch.tensor(2.0)
    measuring: Any = {"layers": nn.ReLU, "objective": objective, "baseline": [0.0, None], "quadrature": "trapezoid"}
    expected = layer_conductance(model, inputs, y, **measuring)["body.1"]
    with torch.inference_mode():
        made_there = tuple(tensor.clone() for tensor in inputs)
        assert torch.equal(layer_conductance(model, made_there, y.clone(), **measuring)["body.1"], expected)


def test_outputs_that_are_one_number_for_each_sample_need_no_target() -> None:
    model = nn.Sequential(nn.Linear(12, 8), ConductanceDropout(), nn.Tanh(), nn.Linear(8, 1), nn.Flatten(0))
    assert layer_conductance(model, torch.randn(6, 12))["1"].shape == (6, 8)


MODEL, X, Y = perceptron(), torch.randn(6, 12), torch.zeros(6, dtype=torch.long)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: layer_conductance(MODEL, X, Y, n_steps=0), r"layer_conductance\(n_steps=0\)"),
        (lambda: layer_conductance(MODEL, X, Y, quadrature="middle"), "quadrature='middle'"),  # type: ignore[call-overload]
        (lambda: layer_conductance(MODEL, X, Y, max_rows=1), "max_rows=1"),
        (lambda: layer_conductance(MODEL, X, Y, layers="9"), "layers='9'.*0, 1, 2"),
        (lambda: layer_conductance(MODEL, X, Y, layers=nn.LSTM), "layers=LSTM"),
        (lambda: layer_conductance(MODEL, X, Y, layers=[]), r"layers=list\(\)"),
        (lambda: layer_conductance(MODEL, X, Y, layers=MODEL[0]), "layers=an instance of Linear"),  # type: ignore[call-overload]
        (lambda: layer_conductance(MODEL, X, Y, objective="sum"), "objective='sum'"),  # type: ignore[call-overload]
        (lambda: layer_conductance(MODEL, X, Y, interpolate_at="9"), "interpolate_at='9'"),
        (lambda: layer_conductance(MODEL, X, Y, baseline="black"), "baseline='black'"),  # type: ignore[arg-type]
        (lambda: layer_conductance(MODEL, X, Y + 5), "classes from 5 to 5 for an output of 5 classes"),
        (lambda: layer_conductance(MODEL, X, Y - 1), "classes from -1 to -1"),
        (lambda: layer_conductance(MODEL, X, Y[:3]), "for 6 samples"),
        (lambda: layer_conductance(MODEL, X, torch.rand(6, 4)), "soft labels"),
        (lambda: layer_conductance(MODEL, X, baseline=torch.zeros(11)), r"shape=\(11,\)"),
        (lambda: layer_conductance(MODEL, X, baseline=torch.zeros(5, 12)), r"shape=\(5, 12\)"),
        (lambda: layer_conductance(MODEL, X, baseline=(0.0, 0.0)), "for 1 floating input"),
        (lambda: layer_conductance(MODEL, (X, X), Y), r"forward takes \(input"),
        (lambda: layer_conductance(MODEL, X.long(), Y), "between whole numbers"),
        (lambda: layer_conductance(MODEL, X, Y, layers="0", unit_dim=2), "unit_dim=2"),
        (lambda: layer_conductance(MODEL, X, Y, layers="0", unit_dim=0), "unit_dim=0"),
        (lambda: layer_conductance(MODEL, X, Y, layers="0", unit_dim="last"), "unit_dim='last'"),  # type: ignore[call-overload]
        (lambda: layer_conductance(MODEL, X, Y, layers="0", max_rows="all"), "max_rows='all'"),  # type: ignore[call-overload]
    ],
)
def test_what_does_not_fit_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        call()


def test_without_our_layers_others_are_to_be_named() -> None:
    model = nn.Sequential(nn.Linear(12, 8), nn.Dropout(), nn.Linear(8, 5))
    with pytest.raises(ConfigurationError, match=r"Sequential holds no ConductanceDropout.*layers=nn\.Linear"):
        layer_conductance(model, X, Y)


def test_a_layer_that_is_not_called_is_named() -> None:
    model = nn.Sequential(nn.Linear(12, 5))
    model[0].register_module("unused", ConductanceDropout())
    with pytest.raises(ConfigurationError, match=r"'0\.unused'"):
        layer_conductance(model, X, Y)


def test_a_layer_that_puts_out_several_tensors_is_refused() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head = nn.LSTM(12, 8, batch_first=True), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.head(self.lstm(x.unsqueeze(1))[0][:, -1])
            return logits

    with pytest.raises(ConfigurationError, match=r"'lstm' \(LSTM\) put out tuple"):
        layer_conductance(Recurrent(), X, Y, layers="lstm")


@pytest.mark.parametrize("max_rows", [None, 2, 3, 7, 30, "batch"])
@pytest.mark.parametrize("quadrature", QUADRATURES)
@pytest.mark.parametrize("kind", KINDS)
def test_deltas_are_what_the_sum_of_units_is_off_by(kind: str, quadrature: Quadrature, max_rows: Any) -> None:
    model, x, y = network_and_batch(kind, torch.float64)
    measured: Any = {"layers": list(leaves(model)), "n_steps": 5, "quadrature": quadrature, "baseline": 0.1}
    plain = layer_conductance(model, x, y, **measured)
    counting = Counting(model)
    measured["layers"] = [f"model.{name}" for name in plain]
    scores, deltas = layer_conductance(counting, x, y, return_convergence_delta=True, max_rows=max_rows, **measured)
    with_deltas, counting.seen()[0][:] = list(counting.rows), []
    layer_conductance(counting, x, y, max_rows=max_rows, **measured)
    assert counting.rows == with_deltas  # they take no pass of their own
    change = output_change(model, x, y, torch.full_like(x[:1], 0.1))
    for name, expected in plain.items():
        assert torch.allclose(scores[f"model.{name}"], expected, rtol=0, atol=1e-12)
        assert deltas[f"model.{name}"].shape == (6,)
        assert torch.allclose(deltas[f"model.{name}"], expected.sum(1) - change, rtol=0, atol=1e-12), name


def test_deltas_vanish_with_more_steps_where_all_paths_cross_and_tell_what_passes_beside() -> None:
    model, x, y = network_and_batch("residual", torch.float64)
    for n_steps, bound in ((10, 1.0), (1000, 1e-3)):
        _, deltas = layer_conductance(
            model, x, y, layers=["stem", "blocks.0.3", "head"], n_steps=n_steps, return_convergence_delta=True
        )
        assert deltas["stem"].abs().max() < bound
        assert deltas["head"].abs().max() < bound
        assert deltas["blocks.0.3"].abs().max() > 0.1  # a skip connection leads around it


def test_deltas_of_each_class_are_those_of_a_call_for_it() -> None:
    model, x, _ = network_and_batch("convolutional", torch.float64)
    for max_rows in (None, 4):
        measured: Any = {"return_convergence_delta": True, "n_steps": 5, "max_rows": max_rows}
        _, together = layer_conductance(model, x, classes=[4, 1], **measured)
        for place, each in enumerate((4, 1)):
            _, alone = layer_conductance(model, x, each, **measured)
            for name, deltas in alone.items():
                assert together[name].shape == (6, 2)
                assert deltas.abs().sum() > 0
                assert torch.allclose(together[name][:, place], deltas, rtol=0, atol=1e-12)


@pytest.mark.parametrize("quadrature", QUADRATURES)
@pytest.mark.parametrize("max_rows", [None, 4])
def test_deltas_are_of_the_objective_along_the_path_with_what_is_carried(quadrature: Quadrature, max_rows: Any) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 5))

        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            logits: Tensor = self.body(x) * scale
            return logits

    model, y = Scaled().double(), torch.randint(0, 5, (6,))
    x, scale = torch.randn(6, 12, dtype=torch.float64), torch.rand(6, 1, dtype=torch.float64)
    loss = nn.CrossEntropyLoss(reduction="none")
    change = loss(model(torch.zeros_like(x), scale), y) - loss(model(x, scale), y)
    for layer in ("body.0", "body.2"):
        scores, deltas = layer_conductance(
            model,
            (x, scale),
            y,
            layers=layer,
            baseline=[0.0, None],
            objective=NegativeLoss(loss),
            quadrature=quadrature,
            max_rows=max_rows,
            return_convergence_delta=True,
        )
        assert torch.allclose(deltas[layer], scores[layer].sum(1) - change.detach(), rtol=0, atol=1e-12)


def test_deltas_of_a_prediction_are_of_the_class_that_is_predicted_for_the_sample() -> None:
    model, x, _ = network_and_batch("perceptron", torch.float64)
    predicted = model.eval()(x).argmax(1)
    expected = layer_conductance(model, x, predicted, return_convergence_delta=True)[1]
    deltas = layer_conductance(model, x, objective=PredictedLogit(), return_convergence_delta=True)[1]
    for name in expected:
        assert torch.equal(deltas[name], expected[name])


def test_deltas_of_half_precision_are_float32() -> None:
    x = torch.tensor([[1.0], [-2.5], [300.0]], dtype=torch.bfloat16)
    measured: Any = {"layers": "0", "baseline": 0.3, "n_steps": 7, "return_convergence_delta": True}
    scores, deltas = layer_conductance(nn.Sequential(nn.Identity()), x, **measured)
    assert scores["0"].dtype == deltas["0"].dtype == torch.float32
    change = x.float() - torch.tensor(0.3, dtype=torch.bfloat16).float()
    assert torch.allclose(scores["0"] - change, deltas["0"][:, None], rtol=0, atol=1e-6)


def test_captums_deltas_are_ours_where_captum_is_right() -> None:
    model, x, y = network_and_batch("residual", torch.float64)
    _, ours = layer_conductance(
        model, x, y, layers=["stem", "head"], quadrature="left", n_steps=20, return_convergence_delta=True
    )
    model.eval()
    for name, deltas in ours.items():
        _, captums = LayerConductance(model, model.get_submodule(name)).attribute(
            x, 0.0, target=y, n_steps=20, method="riemann_trapezoid", return_convergence_delta=True
        )
        assert torch.allclose(deltas, captums, rtol=1e-5, atol=1e-7)


def test_a_layer_whose_output_paths_run_through_carries_the_whole_change() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(9, 4), nn.Linear(4, 5)

        def forward(self, ids: Tensor) -> Tensor:
            logits: Tensor = self.head(self.embedding(ids).tanh().mean(1))
            return logits

    scores, deltas = layer_conductance(
        Tokens(),
        torch.arange(6).view(2, 3),
        1,
        layers="embedding",
        interpolate_at="embedding",
        n_steps=2000,
        return_convergence_delta=True,
    )
    assert scores["embedding"].abs().sum() > 0.1
    assert deltas["embedding"].abs().max() < 1e-3


def test_return_convergence_delta_is_a_flag() -> None:
    with pytest.raises(ConfigurationError, match=r"layer_conductance\(return_convergence_delta='yes'\)"):
        layer_conductance(MODEL, X, Y, return_convergence_delta="yes")  # type: ignore[call-overload]


@settings(max_examples=40, deadline=None)
@given(
    widths=st.lists(st.integers(1, 6), min_size=2, max_size=4),
    batch=st.integers(1, 5),
    n_steps=st.integers(1, 9),
    quadrature=st.sampled_from(QUADRATURES),
    max_rows=st.one_of(st.none(), st.integers(2, 30)),
    baseline=st.floats(-1, 1),
    seed=st.integers(0, 1000),
)
def test_the_last_hidden_layer_is_complete_whatever_the_steps(
    widths: list[int],
    batch: int,
    n_steps: int,
    quadrature: Quadrature,
    max_rows: int | None,
    baseline: float,
    seed: int,
) -> None:
    # F is an affine function of this layer, so no step is too long.
    torch.manual_seed(seed)
    sizes = [3, *widths]
    hidden = [part for pair in pairwise(sizes) for part in (nn.Linear(*pair), nn.Tanh())]
    model, x = nn.Sequential(*hidden, nn.Linear(sizes[-1], 4)).double(), torch.randn(batch, 3, dtype=torch.float64)
    last = str(len(hidden) - 1)
    scores, deltas = layer_conductance(
        model,
        x,
        classes="all",
        layers=[last, "0"],
        n_steps=n_steps,
        quadrature=quadrature,
        max_rows=max_rows,
        baseline=baseline,
        return_convergence_delta=True,
    )
    change = (model(x) - model(torch.full_like(x, baseline))).detach()
    assert torch.allclose(scores[last].sum(2), change, rtol=0, atol=1e-12)
    assert torch.allclose(deltas[last], torch.zeros(()).double(), rtol=0, atol=1e-12)
    assert torch.allclose(deltas["0"], scores["0"].sum(2) - change, rtol=0, atol=1e-12)
