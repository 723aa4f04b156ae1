"""The conductance of input features through one unit."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from captum.attr import NeuronConductance
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_ydrop import (
    ConductanceDropout,
    ConfigurationError,
    NegativeLoss,
    PredictedLogit,
    layer_conductance,
    neuron_conductance,
)
from lightning_ydrop.functional.attribution import Quadrature
from tests.counting import Counting
from tests.importance.test_batch_dim import CASES, pair_of, turned
from tests.importance.test_conductance import WAYS, Net, Y
from tests.importance.test_conductance import X as FEATURES
from tests.importance.test_tokens import IDS, Encoder, Recurrent, model_of
from tests.importance.test_tokens import Y as LABELS
from tests.networks import NETWORKS, leaves, network_and_batch, perceptron
from tests.oracles import conductance_through_a_neuron

KINDS = list(NETWORKS)
QUADRATURES: list[Quadrature] = ["right", "left", "trapezoid"]


def positions_of(model: nn.Module, layer: nn.Module, x: Tensor) -> list[tuple[int, ...]]:
    """Every position of a channel in the output of a layer."""
    shapes: list[torch.Size] = []
    handle = layer.register_forward_hook(lambda module, args, output: shapes.append(output.shape))
    model(x)
    handle.remove()
    return list(itertools.product(*map(range, shapes[0][2:])))


@pytest.mark.parametrize("quadrature", ["right", "left"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_captums_on_every_layer_summed_over_the_positions_of_a_channel(kind: str, quadrature: Any) -> None:
    model, x, y = network_and_batch(kind, torch.float64, batch=3)
    compared = 0.0
    for name, layer in leaves(model).items():
        measured: Any = {"n_steps": 6, "quadrature": quadrature, "baseline": 0.1}
        captum = NeuronConductance(model.eval(), layer)
        captums = {
            at: captum.attribute(x, (2, *at), 0.1, target=y, n_steps=6, method=f"riemann_{quadrature}")
            for at in positions_of(model, layer, x)
        }
        compared += sum(each.abs().sum().item() for each in captums.values())
        channel = neuron_conductance(model, x, y, layer=name, neuron=2, **measured)
        expected = sum(captums.values(), torch.zeros(()))
        assert torch.allclose(channel, expected, rtol=1e-5, atol=1e-7), name  # Captum's points are in single precision
        at, expected = list(captums.items())[-1]
        position = neuron_conductance(model, x, y, layer=name, neuron=(2, *at), **measured)
        assert torch.allclose(position, expected, rtol=1e-5, atol=1e-7), name
    assert compared > 0.1


@pytest.mark.parametrize(
    ("kind", "layer", "place"), [("residual", "blocks.1.2", (2,)), ("convolutional", "5", (2, 1, 3))]
)
def test_it_is_the_equation(kind: str, layer: str, place: tuple[int, ...]) -> None:
    model, x, y = network_and_batch(kind, torch.float64, batch=2)
    baseline = torch.full_like(x[0], 0.1)
    ours = neuron_conductance(model, x, y, layer=layer, neuron=place, n_steps=4, baseline=0.1)
    model.eval()
    for j in range(2):
        slow = conductance_through_a_neuron(
            model, model.get_submodule(layer), place, x[j], int(y[j]), baseline, n_steps=4
        )
        assert slow.abs().sum() > 0
        assert torch.allclose(ours[j], slow, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_all_features_together_have_the_conductance_of_the_unit(kind: str) -> None:
    model, x, y = network_and_batch(kind, torch.float64, batch=3)
    units = layer_conductance(model, x, y, layers=list(leaves(model)), n_steps=2000, quadrature="trapezoid")
    for name, scores in units.items():
        unit = scores[:, 1]
        for quadrature in QUADRATURES:
            errors = []
            for n_steps in (10, 200):
                features = neuron_conductance(model, x, y, layer=name, neuron=1, n_steps=n_steps, quadrature=quadrature)
                errors.append((features.flatten(1).sum(1) - unit).abs().max().item())
            assert errors[1] < max(errors[0] / 4, 5e-3 * scores.abs().max().item()), (name, quadrature)


@pytest.mark.parametrize("quadrature", QUADRATURES)
def test_at_an_affine_layer_the_sum_is_exact_for_any_number_of_steps(quadrature: Quadrature) -> None:
    model, x, y = network_and_batch("convolutional", torch.float64)
    units = layer_conductance(model, x, y, layers="1", n_steps=3, quadrature=quadrature)["1"]
    for neuron in range(4):
        features = neuron_conductance(model, x, y, layer="1", neuron=neuron, n_steps=3, quadrature=quadrature)
        assert torch.allclose(features.flatten(1).sum(1), units[:, neuron], rtol=0, atol=1e-12)


def test_positions_add_up_to_their_channel() -> None:
    model, x, y = network_and_batch("convolutional", torch.float64)
    channel = neuron_conductance(model, x, y, layer="6", neuron=4)
    positions = [
        neuron_conductance(model, x, y, layer="6", neuron=(4, *at)) for at in itertools.product(range(4), range(4))
    ]
    assert torch.allclose(sum(positions, torch.zeros(())), channel, rtol=0, atol=1e-12)


@pytest.mark.parametrize("quadrature", QUADRATURES)
@pytest.mark.parametrize("max_rows", [2, 3, 5, 11, 30, "batch"])
def test_chunks_stay_within_their_rows_and_give_the_same(quadrature: Quadrature, max_rows: Any) -> None:
    model, x, y = network_and_batch("convolutional", torch.float64)
    whole = neuron_conductance(model, x, y, layer="3", neuron=1, quadrature=quadrature, n_steps=10)
    counting = Counting(model)
    chunked = neuron_conductance(
        counting, x, y, layer="model.3", neuron=1, quadrature=quadrature, n_steps=10, max_rows=max_rows
    )
    assert max(counting.rows) <= (6 if max_rows == "batch" else max_rows)
    assert torch.allclose(chunked, whole, rtol=0, atol=1e-12)


def test_it_takes_one_forward_pass() -> None:
    model = Counting(perceptron())
    neuron_conductance(model, torch.randn(6, 12), 0, layer="model.2", neuron=0, n_steps=10)
    assert model.rows == [61]
    assert model.backwards == 1  # from F to the unit; the one on to the inputs begins at the unit


def copying_net(net: Net) -> Net:
    copy = Net(net.way, True, nn.Identity)
    copy.load_state_dict(net.state_dict())
    return copy


# One way writes over the output of a tanh, which torch can't differentiate: such a network can't be trained either.
@pytest.mark.parametrize("quadrature", QUADRATURES)
@pytest.mark.parametrize("way", [way for way in WAYS if way != "written over"])
def test_what_passes_beside_a_layer_is_not_the_units(way: str, quadrature: Quadrature) -> None:
    model = Net(WAYS[way].forward, False, nn.Identity)
    for name in {*WAYS[way].cuts[0], "front"}:
        measured: Any = {"layer": name, "neuron": 3, "n_steps": 7, "quadrature": quadrature, "baseline": 0.3}
        ours = neuron_conductance(model, FEATURES, Y, **measured)
        expected = neuron_conductance(copying_net(model), FEATURES, Y, **measured)
        assert ours.abs().sum() > 0
        assert torch.allclose(ours, expected, rtol=0, atol=1e-12), name


@pytest.mark.parametrize("make", [nn.Identity, nn.Dropout, ConductanceDropout])
def test_captum_credits_a_unit_of_a_layer_that_returns_its_input_with_what_passes_beside(
    make: Callable[[], nn.Module],
) -> None:
    model = Net(lambda net, h: net.a(net.one(h()).tanh()) + net.b(h().sin()), False, make).eval()
    measured: Any = {"neuron": 3, "n_steps": 50}
    captums = NeuronConductance(model, model.one).attribute(FEATURES, 3, 0.0, Y, n_steps=50, method="riemann_right")
    ours = neuron_conductance(model, FEATURES, Y, layer="one", **measured)
    copy = copying_net(model)
    theirs = NeuronConductance(copy, copy.one).attribute(FEATURES, 3, 0.0, Y, n_steps=50, method="riemann_right")
    assert torch.allclose(ours, theirs, atol=1e-6)  # where nothing is shared, Captum agrees
    assert not torch.allclose(captums, ours, atol=0.1)
    assert torch.allclose(captums, neuron_conductance(model, FEATURES, Y, layer="front", **measured), atol=1e-6)
    # The axiom tells which of the two is right.
    unit = layer_conductance(copy, FEATURES, Y, layers="one", n_steps=2000, quadrature="trapezoid")["one"][:, 3]
    fine = neuron_conductance(model, FEATURES, Y, layer="one", neuron=3, n_steps=2000, quadrature="trapezoid")
    assert torch.allclose(fine.sum(1), unit, atol=1e-5)


@pytest.mark.parametrize("case", list(CASES))
def test_time_first_models_have_the_features_of_batch_first_ones(case: str) -> None:
    features = []
    for model, inputs, target, own in pair_of(case):
        layer = next(name for name, module in model.named_modules() if isinstance(module, ConductanceDropout))
        measured: Any = {"layer": layer, "neuron": 1, "n_steps": 4, "max_rows": 7, "quadrature": "trapezoid"}
        found = neuron_conductance(model, inputs, target, **measured, **own)
        features.append(found if isinstance(found, tuple) else (found,))
    first, second = features
    for one, other in zip(first, second, strict=True):
        assert one.abs().sum() > 0
        assert torch.allclose(turned(other), one, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [Encoder, Recurrent])
def test_features_may_be_what_an_embedding_puts_out(kind: type[nn.Module]) -> None:
    model = model_of(kind)
    name = next(name for name, module in model.named_modules() if isinstance(module, ConductanceDropout))
    baseline = torch.randn(7, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    measured: Any = {"interpolate_at": "embedding", "n_steps": 500, "quadrature": "trapezoid", "baseline": baseline}
    features = neuron_conductance(model, IDS, LABELS, layer=name, neuron=2, **measured)
    unit = layer_conductance(model, IDS, LABELS, layers=name, **measured)[name][:, 2]
    assert features.shape == (6, 7, 8)
    assert torch.allclose(features.flatten(1).sum(1), unit, rtol=0, atol=1e-3 * unit.abs().max().item())


class Repeated(nn.Module):
    """Calls a layer twice, the second time on what the first has led to."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(12, 8), nn.Linear(8, 8), nn.Linear(8, 5)
        self.act = nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.act(self.second(self.act(self.first(x)))))
        return logits


def test_a_layer_that_is_called_twice_counts_as_the_sum_of_its_calls() -> None:
    torch.manual_seed(3)
    model, x = Repeated().double(), torch.randn(6, 12, dtype=torch.float64)
    measured: Any = {"n_steps": 2000, "quadrature": "trapezoid"}
    unit = layer_conductance(model, x, 1, layers="act", **measured)["act"][:, 2]
    features = neuron_conductance(model, x, 1, layer="act", neuron=2, **measured)
    assert torch.allclose(features.sum(1), unit, rtol=0, atol=1e-5 * unit.abs().max().item())


class TwoInputs(nn.Module):
    """Adds features of two inputs, and writes over the first one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 8), nn.Conv1d(2, 8, 3), nn.Linear(8, 5)
        self.drop = nn.Identity()

    def forward(self, x: Tensor, z: Tensor, scale: Tensor) -> Tensor:
        x *= 2
        mixed = self.drop(self.first(x) + self.second(z).mean(2)).tanh() * scale
        logits: Tensor = self.head(mixed)
        return logits


def test_each_input_on_the_path_has_its_features() -> None:
    model = TwoInputs().double()
    x, z, scale = (torch.randn(6, *shape, dtype=torch.float64) for shape in ((4,), (2, 7), (1,)))
    kept = x.clone()
    measured: Any = {"layer": "drop", "neuron": 5, "n_steps": 5}
    of_x, of_z = neuron_conductance(model, (x, z, scale), 1, baseline=[0.1, torch.ones(2, 7), None], **measured)
    assert torch.equal(x, kept)
    assert (of_x.shape, of_z.shape) == (x.shape, z.shape)
    unit = layer_conductance(model, (x, z, scale), 1, baseline=[0.1, torch.ones(2, 7), None], layers="drop", n_steps=5)[
        "drop"
    ][:, 5]
    assert torch.allclose(of_x.sum(1) + of_z.flatten(1).sum(1), unit, rtol=0, atol=1e-12)
    (by_name,) = neuron_conductance(
        model,
        {"x": x, "z": z, "scale": scale},
        1,
        baseline=[0.0, None, None],
        **measured,
    )
    assert by_name.shape == x.shape


def test_the_objective_is_looked_at() -> None:
    model, x, y = network_and_batch("perceptron", torch.float64)
    found = {
        name: neuron_conductance(model, x, y, layer="2", neuron=1, objective=objective)
        for name, objective in {
            "logit": None,
            "loss": NegativeLoss(nn.CrossEntropyLoss(reduction="none")),
            "predicted": PredictedLogit(),
        }.items()
    }
    predicted = model.eval()(x).argmax(1)
    assert torch.allclose(found["predicted"], neuron_conductance(model, x, predicted, layer="2", neuron=1))
    assert not torch.allclose(found["logit"], found["loss"], atol=1e-3)


def test_the_model_is_given_back_as_it_was() -> None:
    model, x, y = network_and_batch("convolutional")
    model.train()
    model[0].weight.grad = torch.ones_like(model[0].weight)  # type: ignore[index]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.inference_mode():
        features = neuron_conductance(model, x.clone(), y.clone(), layer="3", neuron=1)
    assert torch.allclose(features, neuron_conductance(model, x.requires_grad_(), y, layer="3", neuron=1))
    assert not features.requires_grad
    assert x.grad is None
    assert model.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))  # type: ignore[index]


def test_half_precision_gives_float32() -> None:
    model, x, y = network_and_batch("perceptron", torch.bfloat16)
    features = neuron_conductance(model, x, y, layer="2", neuron=1)
    assert features.dtype == torch.float32
    assert torch.allclose(features, neuron_conductance(model.float(), x.float(), y, layer="2", neuron=1), atol=1e-2)


class Cut(nn.Module):
    """Hands on features that autograd does not see, and holds a layer that forward leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.drop, self.head = nn.Linear(12, 8), nn.Identity(), nn.Linear(8, 5)
        self.unused = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.drop(self.features(x).detach()))
        return logits


MODEL, X = perceptron(), torch.randn(6, 12)
IMAGES = network_and_batch("convolutional")


def of(neuron: Any, layer: Any = "2", model: nn.Module = MODEL, x: Tensor = X) -> Tensor:
    return neuron_conductance(model, x, 0, layer=layer, neuron=neuron)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: of(-1), r"neuron_conductance\(neuron=-1\)"),
        (lambda: of(1.5), r"neuron=1\.5"),
        (lambda: of(True), "neuron=True"),
        (lambda: of(()), r"neuron=tuple\(\)"),
        (lambda: of((1, -2)), r"neuron=tuple\(1, -2\)"),
        (lambda: of("first"), "neuron='first'"),
        (
            lambda: of(16),
            r"layer='2', neuron=16\) was given\. The layer puts out \(16,\) for each sample, with 16 units",
        ),
        (lambda: of((0, 0)), r"neuron=\(0, 0\)"),
        (lambda: of(4, "3", *IMAGES[:2]), r"puts out \(4, 8, 8\) for each sample, with 4 units"),
        (lambda: of((3, 8, 0), "3", *IMAGES[:2]), r"Pass a unit from 0 to 3, or a tuple of 3 such indices"),
        (lambda: of((3,), "3", *IMAGES[:2]), r"neuron=\(3,\)"),
        (lambda: of(0, "9"), "layer='9'.* 0, 1, 2"),
        (lambda: of(0, MODEL[2]), r"layer=an instance of ReLU\).*Pass its name: layer='2'"),
        (lambda: of(0, nn.ReLU), "layer=the class ReLU"),
        (lambda: of(0, "drop", Cut()), r"layer='drop'\) was given, and what this layer put out has no gradient"),
        (lambda: of(0, "unused", Cut()), "'unused'"),
        (lambda: neuron_conductance(MODEL, X, 5, layer="2", neuron=0), "classes from 5 to 5"),
        (lambda: neuron_conductance(MODEL, X, 0, layer="2", neuron=0, n_steps=0), r"neuron_conductance\(n_steps=0\)"),
        (lambda: neuron_conductance(MODEL, X, 0, layer="2", neuron=0, max_rows=1), "max_rows=1"),
    ],
)
def test_what_does_not_fit_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        call()


def test_a_neuron_may_be_named_with_numbers_of_numpy() -> None:
    assert torch.equal(of(np.int64(3)), of(3))
    assert torch.equal(of(np.array([3])), of((3,)))


def test_the_whole_message() -> None:
    with pytest.raises(ConfigurationError) as raised:
        of(16)
    assert str(raised.value) == (
        "neuron_conductance(layer='2', neuron=16) was given. The layer puts out (16,) for each sample, with 16 units. "
        "Pass a unit from 0 to 15, or a tuple of 1 such indices."
    )


@settings(max_examples=40, deadline=None)
@given(
    shape=st.sampled_from([(3,), (2, 3), (1, 2, 3)]),
    batch=st.integers(1, 4),
    n_steps=st.integers(1, 8),
    quadrature=st.sampled_from(QUADRATURES),
    max_rows=st.one_of(st.none(), st.integers(2, 20)),
    seed=st.integers(0, 1000),
)
def test_features_share_the_conductance_of_any_unit_of_an_affine_layer(
    shape: tuple[int, ...], batch: int, n_steps: int, quadrature: Quadrature, max_rows: int | None, seed: int
) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2), nn.Flatten(), nn.LazyLinear(3)).double()
    x = torch.randn(batch, *shape, dtype=torch.float64)
    model(x)
    measured: Any = {"n_steps": n_steps, "quadrature": quadrature, "max_rows": max_rows, "unit_dim": -1}
    units = layer_conductance(model, x, 1, layers="0", **measured)["0"]
    for neuron in range(4):
        features = neuron_conductance(model, x, 1, layer="0", neuron=neuron, **measured)
        assert features.shape == x.shape
        assert torch.allclose(features.flatten(1).sum(1), units[:, neuron], rtol=0, atol=1e-12)
