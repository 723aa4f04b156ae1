"""What passes through a layer is the layer's, and what passes beside it is not: the completeness axiom says so."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from captum.attr import LayerConductance
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_ydrop import ConductanceDropout, YDrop, layer_conductance
from lightning_ydrop.functional.attribution import Quadrature

QUADRATURES: list[Quadrature] = ["right", "left", "trapezoid"]
X = torch.randn(6, 5, generator=torch.Generator().manual_seed(1)).double()
Y = torch.arange(6) % 3


class First(nn.Module):
    """Returns one of its inputs as it is, as a selection or an early exit does."""

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        return one


class Own(nn.Module):
    """A dropout of the user's own, which returns its input in evaluation mode."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, 0.5, self.training)


class Net(nn.Module):
    """Features that a `way` hands on through some layers, and beside them.

    Args:
        way: Gives the logits, of this network and of a function that returns the features.
        copies: Whether each use of the features gets a copy of its own: the same function, without shared tensors.
        make: Makes the layers.

    """

    def __init__(
        self, way: Callable[["Net", Callable[[], Tensor]], Any], copies: bool, make: Callable[[], nn.Module]
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.way, self.copies = way, copies
        self.features = nn.Sequential(nn.Linear(5, 8), nn.Tanh())
        self.one, self.two, self.three = make(), make(), make()
        self.first, self.front = First(), make()
        self.a, self.b, self.c = nn.Linear(8, 3), nn.Linear(8, 3), nn.Linear(8, 8)
        self.double()

    def forward(self, x: Tensor) -> Any:
        features = self.front(self.features(x))
        return self.way(self, features.clone if self.copies else lambda: features)


def skip(net: Net, h: Callable[[], Tensor]) -> Tensor:
    return net.a(net.one(h()).tanh()) + net.b(net.two(h()).sigmoid())


def u_net(net: Net, h: Callable[[], Tensor]) -> Tensor:
    below = net.c(net.one(h())).tanh()
    return net.a((below * net.two(h())).sin())


def sum_of_samples(net: Net, h: Callable[[], Tensor]) -> Tensor:
    return sum((net.a(drop(h())).tanh() for drop in (net.one, net.two, net.three)), torch.zeros(())) / 3


def bare_skip(net: Net, h: Callable[[], Tensor]) -> Tensor:
    return net.a((net.one(h()) + net.two(h())).tanh())


def one_after_another(net: Net, h: Callable[[], Tensor]) -> Tensor:
    return net.a(net.two(net.one(h())).tanh()) + net.b(net.three(h()).sin())


def one_of_several(net: Net, h: Callable[[], Tensor]) -> Tensor:
    return net.a(net.first(h(), net.c(h())).tanh()) + net.b(net.two(h()).sin())


def called_twice(net: Net, h: Callable[[], Tensor]) -> Tensor:
    return net.a(net.one(h()).tanh()) + net.b(net.one(h()).sin()) + net.b(net.two(h()))


def in_place(net: Net, h: Callable[[], Tensor]) -> Tensor:
    scaled = net.one(h()) * 2
    return net.a(scaled.tanh_()) + net.b(net.two(h()).clone().sin_().mul_(0.5))


def written_over(net: Net, h: Callable[[], Tensor]) -> Tensor:
    features = h()
    scaled = net.one(features.clone() if net.copies else features) * 2
    return net.a(scaled) + net.b(net.two(features.add_(1.0)))


def in_checkpoints(net: Net, h: Callable[[], Tensor]) -> Any:
    def both(features: Tensor) -> Tensor:
        return skip(net, features.clone if net.copies else lambda: features)

    return checkpoint(both, h(), use_reentrant=False)


@dataclass(frozen=True)
class Way:
    """A way to hand features on, and sets of layers of which each path to F crosses exactly one."""

    forward: Callable[[Net, Callable[[], Tensor]], Any]
    cuts: tuple[tuple[str, ...], ...]


WAYS = {
    "skip": Way(skip, (("one", "two"),)),
    "U-Net": Way(u_net, (("one", "two"),)),
    "multi-sample dropout": Way(sum_of_samples, (("one", "two", "three"),)),
    "a sum of the same": Way(bare_skip, (("one", "two"),)),
    "an identity after an identity": Way(one_after_another, (("one", "three"), ("two", "three"))),
    "one of several inputs": Way(one_of_several, (("first", "two"),)),
    "called twice": Way(called_twice, (("one", "two"),)),
    "in place": Way(in_place, (("one", "two"),)),
    "written over": Way(written_over, (("one", "two"),)),
    "checkpoints": Way(in_checkpoints, (("one", "two"),)),
}
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "ConductanceDropout": ConductanceDropout,
    "Identity": nn.Identity,
    "Dropout": nn.Dropout,
    "own": Own,
}


def change_of(model: nn.Module, start: Tensor) -> Tensor:
    """How far F is from its value at the start."""
    training = model.training
    model.eval()
    change: Tensor = (model(X) - model(start.expand_as(X))).gather(1, Y.unsqueeze(1)).squeeze(1).detach()
    model.train(training)
    return change


@pytest.mark.parametrize(
    ("make", "quadrature"),
    [*((make, "trapezoid") for make in LAYERS), ("ConductanceDropout", "right"), ("ConductanceDropout", "left")],
)
@pytest.mark.parametrize("way", list(WAYS))
def test_the_layers_of_a_cut_carry_the_whole_change_of_f(way: str, make: str, quadrature: Quadrature) -> None:
    model = Net(WAYS[way].forward, copies=False, make=LAYERS[make])
    for cut in (*WAYS[way].cuts, ("front",)):
        for extra in ((), ("front", "features")):  # a layer in front that is recorded too changes nothing
            scores = layer_conductance(model, X, Y, layers=[*cut, *extra], quadrature=quadrature, n_steps=200)
            carried = sum((scores[name].sum(1) for name in cut), torch.zeros(()))
            tolerance = 2e-4 if quadrature == "trapezoid" else 4e-2
            assert torch.allclose(carried, change_of(model, torch.zeros(5).double()), atol=tolerance), (cut, extra)


@pytest.mark.parametrize("quadrature", QUADRATURES)
@pytest.mark.parametrize("way", list(WAYS))
def test_scores_are_those_of_the_same_network_with_copies(way: str, quadrature: Quadrature) -> None:
    plain, copying = (Net(WAYS[way].forward, copies, ConductanceDropout) for copies in (False, True))
    measured: Any = {"layers": sorted({*WAYS[way].cuts[0], "front"}), "quadrature": quadrature, "baseline": 0.3}
    ours, expected = (layer_conductance(model, X, Y, n_steps=7, **measured) for model in (plain, copying))
    for name, scores in expected.items():
        assert scores.abs().sum() > 0
        assert torch.allclose(ours[name], scores, rtol=0, atol=1e-12), name


@pytest.mark.filterwarnings("ignore:The layer 'one.0' is one instance")  # whose copies of the features are two tensors
@pytest.mark.parametrize("way", list(WAYS))
def test_the_engine_scores_them_so(way: str) -> None:
    rates = []
    for copies in (False, True):
        engine = YDrop(Net(WAYS[way].forward, copies, lambda: nn.Sequential(ConductanceDropout())), num_samples="all")
        with_all = {name: layer for name, layer in engine.layers.items() if name.split(".")[0] in used_by(way)}
        engine.layers = with_all
        engine.take_over()
        engine.step(X, Y)
        rates.append(engine.scores)
    assert rates[0].keys() == rates[1].keys() == with_all.keys()
    for name in rates[0]:
        assert torch.allclose(rates[0][name], rates[1][name], atol=1e-7), name


def used_by(way: str) -> set[str]:
    """Layers of ours that a way calls."""
    return {name for cut in WAYS[way].cuts for name in cut if name != "first"} | {"front"}


def freeze(model: Net) -> None:
    model.requires_grad_(False)


def freeze_features(model: Net) -> None:
    model.features.requires_grad_(False)


def without_gradients(model: Net) -> None:
    features = model.features.forward
    model.features.forward = torch.no_grad()(features)  # type: ignore[method-assign]


@pytest.mark.parametrize("part", [freeze, freeze_features, without_gradients])
@pytest.mark.parametrize("way", list(WAYS))
def test_parts_that_are_not_trained_change_nothing(way: str, part: Callable[[Net], None]) -> None:
    expected = layer_conductance(Net(WAYS[way].forward, False, ConductanceDropout), X, Y, layers=[*WAYS[way].cuts[0]])
    model = Net(WAYS[way].forward, False, ConductanceDropout)
    part(model)
    if way == "written over" and part is not freeze_features:
        # Features without a gradient are leaves that the network may still write to.
        assert not model.features(X).requires_grad
    with torch.no_grad():
        scores = layer_conductance(model, X, Y, layers=[*WAYS[way].cuts[0]])
    for name, values in expected.items():
        assert torch.allclose(scores[name], values, rtol=0, atol=1e-12), name


class Heads(Net):
    """Two heads on one trunk, of which the first alone is F."""

    def __init__(self) -> None:
        super().__init__(lambda net, h: (net.a(net.one(h())), net.b(net.two(h()))), False, ConductanceDropout)


def test_a_head_that_is_no_part_of_f_scores_zero() -> None:
    scores = layer_conductance(Heads(), X, Y, layers=["one", "two", "front"])
    assert not scores["two"].any()
    assert torch.allclose(scores["one"], scores["front"])
    assert scores["one"].abs().sum() > 0


def with_a_way_beside(net: Net, h: Callable[[], Tensor]) -> Tensor:
    return net.a(net.one(h()).tanh()) + net.b(net.two(h()).sin())


@pytest.mark.parametrize("make", list(LAYERS))
def test_captum_credits_a_layer_that_returns_its_input_with_what_passes_beside_it(make: str) -> None:
    model = Net(with_a_way_beside, False, LAYERS[make]).eval()
    measured: Any = {"n_steps": 50, "quadrature": "left"}
    ours = layer_conductance(model, X, Y, layers=["one", "two", "front"], **measured)
    copying = Net(with_a_way_beside, True, LAYERS[make]).eval()

    def captums(model: Net, layer: Any) -> Tensor:
        scores: Tensor = LayerConductance(model, layer).attribute(
            X, 0.0, target=Y, n_steps=50, method="riemann_trapezoid"
        )
        return scores

    # Where each use has a tensor of its own, Captum is right, and we agree.
    right = captums(copying, copying.one)
    assert torch.allclose(ours["one"], right, atol=1e-6)
    # Where the layer's output is its input, Captum measures the trunk, which the layer and the other way share.
    wrong = captums(model, model.one)
    assert not torch.allclose(wrong, right, atol=0.1)
    assert torch.allclose(wrong, ours["front"], atol=1e-6)
    # The axiom decides: both ways together carry the change of F. Captum's two count it twice.
    change = change_of(model, torch.zeros(5).double())
    fine = layer_conductance(model, X, Y, layers=["one", "two"], n_steps=500, quadrature="trapezoid")
    assert torch.allclose(fine["one"].sum(1) + fine["two"].sum(1), change, atol=1e-4)
    twice = captums(model, model.one).sum(1) + captums(model, model.two).sum(1)
    assert torch.allclose(twice, 2 * change, atol=0.1)
