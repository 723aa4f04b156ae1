import copy
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from lightning_ydrop import ConductanceDropout, ConfigurationError, YDrop
from lightning_ydrop.analysis import prune_units, shrink_units

pytest.importorskip("torch_pruning")

X = torch.randn(7, 1, 4, 4)


def network() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(24, 10), ConductanceDropout(0.2), nn.ReLU(), nn.Linear(10, 3)),
    )


class Residual(nn.Module):
    """Adds what a branch makes to what went into it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branch = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        x = self.stem(x)
        return {"logits": scale * self.head((x + self.branch(x)).relu().mean((2, 3)))}


def masked(model: nn.Module, layers: dict[str, Tensor], inputs: Tensor) -> Any:
    """What the whole network gives where units are 0 behind a layer: booleans (U,) say which are left."""
    hooks = []
    for name, left in layers.items():
        keep = left.float().view(1, -1, *[1] * (0 if isinstance(model.get_submodule(name), nn.ReLU) else 2))

        def hook(module: nn.Module, args: Any, output: Tensor, keep: Tensor = keep) -> Tensor:
            return output * keep.view(1, -1, *[1] * (output.ndim - 2))

        hooks.append(model.get_submodule(name).register_forward_hook(hook))
    try:
        return model(inputs)
    finally:
        for handle in hooks:
            handle.remove()


def strongest(scores: Tensor, fraction: float) -> Tensor:
    left = torch.ones(len(scores), dtype=torch.bool)
    left[scores.argsort()[: round(fraction * len(scores))]] = False
    return left


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.5, 0.99])
def test_the_smaller_network_gives_what_the_whole_one_gives_without_these_units(fraction: float) -> None:
    torch.manual_seed(0)
    model = network()
    model(X)  # so that the norm has seen something
    model.eval()
    scores = {"0": torch.rand(6), "4": torch.rand(10)}
    smaller = shrink_units(model, scores, fraction, X[:2])
    counts = [max(1, size - round(fraction * size)) for size in (6, 10)]
    first, second = (smaller.get_submodule(name) for name in ("0", "4"))
    assert [first.out_channels, second.out_features] == counts
    left = {
        relu: scores[name] >= scores[name].sort(descending=True).values[count - 1]
        for (relu, name), count in zip((("2", "0"), ("6", "4")), counts, strict=True)
    }
    torch.testing.assert_close(smaller(X), masked(model, left, X))
    assert network().load_state_dict(model.state_dict())  # which is still whole


def test_channels_that_are_added_go_together_by_the_sum_of_their_scores() -> None:
    torch.manual_seed(0)
    model = Residual().eval()
    scores = {"stem": torch.arange(8.0), "branch": torch.tensor([90.0, 0, 0, 0, 0, 0, 0, -50])}
    smaller: Any = shrink_units(model, scores, 0.25, {"x": X, "scale": 2.0})
    assert smaller.stem.out_channels == smaller.branch.in_channels == smaller.branch.out_channels == 6
    left = torch.tensor([1, 0, 1, 1, 1, 1, 1, 0]).bool()
    expected = masked(model, {"stem": left, "branch": left}, X)["logits"]
    torch.testing.assert_close(smaller(X)["logits"], expected)


def test_a_layer_without_scores_goes_with_the_one_that_it_is_added_to() -> None:
    smaller: Any = shrink_units(Residual(), {"branch": torch.arange(8.0)}, 0.5, (X,))
    assert smaller.stem.out_channels == smaller.branch.out_channels == smaller.head.in_features == 4


def test_y_drop_starts_anew_and_trains_on() -> None:
    model = network()
    labels = torch.randint(3, (7,))
    YDrop(model).step(X, labels)
    smaller = shrink_units(model, {"4": torch.rand(10)}, 0.5, X)
    assert smaller.training
    layer: Any = smaller[5]  # type: ignore[index]
    assert len(layer.mean_drop_prob) == 0
    driver = YDrop(smaller)
    driver.step(X, labels)
    nn.functional.cross_entropy(smaller(X), labels).backward()
    assert driver.scores["5"].shape == (5,)


def test_bad_input_is_refused_and_the_model_stays_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    pruned, grouped = network(), nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 1, groups=2), nn.Flatten())
    prune_units(pruned, {"4": torch.rand(10)}, 0.5)
    for network_, scores, fraction, message in (
        (model, {"7": torch.rand(3)}, 0.5, "Leave out the last layer"),
        (model, {"4": torch.rand(9)}, 0.5, "has Tensor"),
        (model, {"2": torch.rand(6)}, 0.5, "Measure the linear or convolutional layer before it"),
        (model, {"4": torch.rand(10)}, 1.5, "fraction"),
        (model, [torch.rand(10)], 0.5, "is a mapping"),
        (pruned, {"4": torch.rand(10)}, 0.5, "prune.remove"),
        (grouped, {"1": torch.rand(4)}, 0.5, "with groups=2"),
        (nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))), {"0": torch.rand(4)}, 0.5, "computed"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            shrink_units(network_, scores, fraction, X)  # type: ignore[arg-type]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for parameter in ("weight", "bias"):
        prune.remove(pruned[4], parameter)
    assert shrink_units(pruned, {"4": torch.rand(10)}, 0.5, X)[4].out_features == 5  # type: ignore[index]
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(ConfigurationError, match=r"lightning-ydrop\[shrink\]"):
        shrink_units(model, {"4": torch.rand(10)}, 0.5, X)


@pytest.mark.parametrize(
    ("inputs", "shown"),
    [
        (None, r"inputs=None\)"),
        (torch.randn(2, 3, 4, 4), r"inputs=Tensor\(shape=\(2, 3, 4, 4\).* raised RuntimeError"),
        ([X], r"inputs=list\(Tensor.* raised TypeError"),
        ({"x": X}, r"inputs=dict\('x': Tensor.* raised TypeError"),
    ],
)
def test_inputs_that_the_model_cannot_take_are_named(inputs: Any, shown: str) -> None:
    model = network()
    with pytest.raises(ConfigurationError, match=rf"shrink_units\({shown}.*`inputs` is a small batch.*inputs=x for"):
        shrink_units(model, {"4": torch.rand(10)}, 0.5, inputs)
    assert model.training


class Heads(nn.Module):
    """Attention of two heads, of which the number of units tells how many there are."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Any:
        q, k, v = (layer(x).unflatten(-1, (-1, 4)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        return self.last(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Twice(nn.Module):
    """Calls a layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.last = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Any:
        return self.last(self.body(self.body(x).relu()).relu())


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.middle, self.again = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 16)
        self.again.weight = self.body.weight
        self.last = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Any:
        return self.last(self.again(self.middle(self.body(x).relu())).relu())


@pytest.mark.parametrize(
    ("model", "names", "message"),
    [
        (Heads, ["query"], r"gives something else than the whole one\..*attention heads"),
        (Twice, ["body"], "There it fails"),
        (Tied, ["body"], r"body\.weight and again\.weight are the same parameter"),
    ],
)
def test_layers_that_must_keep_their_units_are_refused(model: Any, names: list[str], message: str) -> None:
    torch.manual_seed(0)
    whole = model()
    scores = {name: torch.rand(len(whole.get_submodule(name).weight)) for name in names}
    with pytest.raises(ConfigurationError, match=message):
        shrink_units(whole, scores, 0.5, torch.randn(2, 5, 8))


def test_layers_that_share_a_weight_go_on_sharing_it() -> None:
    scores = torch.rand(16)
    smaller: Any = shrink_units(Tied(), {"body": scores, "again": scores}, 0.5, torch.randn(2, 8))
    assert smaller.body.weight is smaller.again.weight
    assert smaller.body.weight.shape == (8, 8)


def test_a_frozen_network_becomes_smaller_and_stays_frozen() -> None:
    model = network()
    model[0].requires_grad_(False)
    model[4].requires_grad_(False)
    smaller = shrink_units(model, {"4": torch.rand(10)}, 0.5, X)
    assert smaller.get_submodule("4").out_features == 5
    assert {name: each.requires_grad for name, each in smaller.named_parameters()} == {
        name: each.requires_grad for name, each in model.named_parameters()
    }


def test_norms_over_units_have_other_statistics_and_no_units_are_lost_to_the_check() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 3))
    smaller = shrink_units(model, {"0": torch.rand(16)}, 0.5, torch.randn(2, 8))
    assert smaller.get_submodule("1").normalized_shape == (8,)
