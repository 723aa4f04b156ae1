import copy
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
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
        ({"1": torch.rand(6)}, 0.5, r"before it: mean_conductance\(model, data, layers='0'\)\.$"),
        ({"nothing": torch.rand(6)}, 0.5, r"Measure these layers: mean_conductance\(model, data, layers=\"...\"\)\.$"),
        ({"0": torch.rand(5)}, 0.5, r"Measure these layers: mean_conductance\(model, data, layers=\"...\"\)\.$"),
        ({"0": torch.rand(6), "body": torch.rand(6)}, 0.5, "'body', that is None here"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_pruned(scores: Any, fraction: float, message: str) -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ConfigurationError, match=message):
        prune_units(model, scores, fraction)
    assert model.state_dict().keys() == before.keys()


def parts_of(model: nn.Module) -> list[Any]:
    """List all that pruning may change: attributes, parameters, buffers and hooks of every module."""
    parts: list[Any] = []
    for module in model.modules():
        for name, value in vars(module).items():
            parts.append((name, {key: id(item) for key, item in value.items()} if isinstance(value, dict) else value))
    return parts


def same_parts(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(
        mine[0] == theirs[0] and (mine[1] is theirs[1] or (not isinstance(mine[1], Tensor) and mine[1] == theirs[1]))
        for mine, theirs in zip(one, other, strict=True)
    )


class Same(nn.Module):
    """A parametrization that changes nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning", "ignore:Lazy modules")
@pytest.mark.parametrize(
    ("change", "shown"),
    [
        (nn.utils.parametrizations.weight_norm, "weight is computed from other parameters"),
        (nn.utils.weight_norm, "weight is computed from other parameters"),
        (nn.utils.parametrizations.spectral_norm, "weight is computed from other parameters"),
        (nn.utils.spectral_norm, "weight is computed from other parameters"),
        (nn.utils.parametrizations.orthogonal, "weight is computed from other parameters"),
        (
            lambda layer: nn.utils.parametrize.register_parametrization(layer, "bias", Same()),
            "bias is computed from other parameters",
        ),
        (lambda layer: nn.LazyLinear(10), "weight has no shape before the first forward pass"),
    ],
)
@pytest.mark.parametrize("pruned_before", [False, True])
def test_what_torch_cannot_prune_is_refused_and_nothing_pruned(change: Any, shown: str, pruned_before: bool) -> None:
    model = network()
    if pruned_before:
        prune_units(model, {"0": torch.rand(6)}, 0.3)
    model[3] = change(model[3])
    before = parts_of(model)
    with pytest.raises(ConfigurationError) as caught:
        prune_units(model, {"0": torch.rand(6), "3": torch.rand(10)}, 0.5)
    assert str(caught.value) == (
        f"prune_units(scores=...) has scores for '3', a {type(model[3]).__name__} whose {shown}. "
        "Layers are pruned whose weight and bias are parameters. "
        "Leave this layer out of `scores`. Or remove a parametrization with "
        "torch.nn.utils.parametrize.remove_parametrizations or torch.nn.utils.remove_weight_norm, and run a lazy layer "
        "once."
    )
    assert same_parts(parts_of(model), before)


@pytest.mark.parametrize("scores", [[0.0] * 6, None, {"0": [0.0] * 6}, {"0": torch.ones(6, dtype=torch.complex64)}])
def test_what_are_no_scores_is_refused(scores: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"prune_units\(scores="):
        prune_units(network(), scores, 0.5)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("times_before", [0, 1, 2, 3])
def test_what_was_pruned_is_undone_if_torch_raises_half_way(
    error: type[BaseException], times_before: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = network()
    scores = {"0": torch.rand(6), "3": torch.rand(10)}
    for time in range(times_before):
        prune_units(model, scores, 0.2 * time)
    expected = model(X)
    before = parts_of(model)  # a forward pass makes new masked weights
    containers = [
        (hook, hook._pruning_methods)
        for module in model.modules()
        for hook in module._forward_pre_hooks.values()
        if isinstance(hook, prune.PruningContainer)
    ]
    assert len(containers) == (3 if times_before > 1 else 0)
    original = prune.custom_from_mask

    def raising(layer: nn.Module, name: str, mask: Tensor) -> None:
        original(layer, name, mask)
        if name == "bias":  # of the second layer, which is the last to be pruned
            raise error(name)

    with monkeypatch.context() as patch:
        patch.setattr(prune, "custom_from_mask", raising)
        with pytest.raises(error):
            prune_units(model, scores, 0.9)
    assert same_parts(parts_of(model), before)
    assert all(container._pruning_methods == methods for container, methods in containers)
    assert torch.equal(model(X), expected)
    left = prune_units(model, scores, 0.9)
    assert int(left["3"].sum()) == 1
    assert int((model[3](torch.rand(1, 24)) != 0).sum()) == 1


@pytest.mark.parametrize(("fraction", "left"), [(0, 10), (1, 0), (numpy.float64(0.5), 5)])
def test_the_ends_of_the_range_and_numpys_numbers(fraction: float, left: int) -> None:
    assert int(prune_units(network(), {"3": torch.rand(10)}, fraction)["3"].sum()) == left
