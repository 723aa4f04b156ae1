import copy
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_ydrop import ConductanceDropout, YDrop, layer_conductance
from lightning_ydrop.importance.recording import borrowed, recording
from lightning_ydrop.models.modules import all_modules
from tests.models.stateful import Values
from tests.networks import perceptron
from tests.sameness import assert_same


class Awkward(nn.Module):
    """Everything that phase 1 could disturb: BatchNorm, some of it frozen, noise, a metric and in-place activations."""

    rows: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), ConductanceDropout(), nn.ReLU(inplace=True))
        self.backbone.requires_grad_(False)
        self.backbone[1].eval()
        self.norm = nn.BatchNorm1d(8)
        self.drop, self.act, self.head = ConductanceDropout(), nn.ELU(inplace=True), nn.Linear(8, 3)
        self.accuracy = MulticlassAccuracy(3)
        self.register_buffer("rows", torch.zeros(()))
        self.backbone[0].register_buffer("rows", self.rows)  # the same in another place
        self.register_buffer("last", torch.zeros(20, 6))
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        self.rows += len(x)
        self.last = x.detach()
        x = x + torch.randn_like(x) * 0.1
        x = nn.functional.dropout(self.backbone(x), 0.1)
        logits: Tensor = self.head(self.act(self.drop(self.norm(x))))
        self.accuracy(logits, torch.zeros(len(logits), dtype=torch.long))
        if self.fails:
            raise RuntimeError("out of order")
        return logits


def state_of(model: nn.Module) -> dict[str, Any]:
    """All that phase 1 must leave as it is, copied."""
    metrics = [module for module in model.modules() if isinstance(module, MulticlassAccuracy)]
    return {
        "state": copy.deepcopy(model.state_dict()),
        "gradients": {name: copy.deepcopy(parameter.grad) for name, parameter in model.named_parameters()},
        "requires_grad": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "training": {name: module.training for name, module in model.named_modules()},
        "metrics": [copy.deepcopy(metric.metric_state) for metric in metrics],
        "updates": [metric.update_count for metric in metrics],
        "hooks": [len(module._forward_hooks) for module in model.modules()],
        "random": torch.get_rng_state(),
        "grad_enabled": torch.is_grad_enabled(),
        "fastpath": torch.backends.mha.get_fastpath_enabled(),
    }


@pytest.fixture
def model() -> Awkward:
    model = Awkward()
    x, y = torch.randn(20, 6), torch.randint(0, 3, (20,))
    nn.functional.cross_entropy(model(x), y).backward()  # gradients, statistics and metric states of a run under way
    return model


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield torch.randn(20, 6), torch.randint(0, 3, (20,))


PHASE1: dict[str, Callable[[nn.Module, Tensor, Tensor], object]] = {
    "engine": lambda model, x, y: YDrop(model).step(x, y),
    "function": lambda model, x, y: layer_conductance(model, x, y),
}


@pytest.mark.parametrize("way", list(PHASE1))
def test_phase_1_leaves_everything_as_it_was(model: Awkward, way: str) -> None:
    x, y = next(batches())
    before = state_of(model)
    PHASE1[way](model, x, y)
    assert_same(before, state_of(model))


@pytest.mark.parametrize("way", list(PHASE1))
def test_also_when_the_model_raises(model: Awkward, way: str) -> None:
    x, y = next(batches())
    model.fails = True
    before = state_of(model)
    with pytest.raises(RuntimeError, match="out of order"):
        PHASE1[way](model, x, y)
    assert_same(before, state_of(model))


def test_also_where_gradients_are_off(model: Awkward) -> None:
    x, y = next(batches())
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            scores = layer_conductance(model, x, y)
        assert all(values.abs().sum() > 0 for values in scores.values())


def test_a_training_run_with_phase_1_observing_is_the_run_without_it() -> None:
    finals = []
    for observed in (False, True):
        torch.manual_seed(1)
        model = Awkward()
        engine = YDrop(model)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
        for _, (x, y) in zip(range(10), batches(), strict=False):
            if observed:
                engine.step(x, y)
                engine.deactivate()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        finals.append(state_of(model))
    assert_same(*finals)


class Watching(nn.Module):
    """Says whether a gradient would be recorded where it stands, to a list that is no part of it."""

    def __init__(self, tell: Callable[[bool], None]) -> None:
        super().__init__()
        self.tell = tell

    def forward(self, x: Tensor) -> Tensor:
        self.tell(x.requires_grad)
        return x


def test_before_the_first_layer_and_for_parameters_nothing_is_recorded() -> None:
    seen: list[bool] = []
    recorded: dict[str, list[bool]] = {"before": [], "behind": []}
    before, behind = (Watching(recorded[place].append) for place in ("before", "behind"))
    model = nn.Sequential(nn.Linear(6, 8), before, ConductanceDropout(), nn.ReLU(), nn.Linear(8, 3), behind)
    model.register_forward_hook(lambda *_: seen.append(any(each.requires_grad for each in model.parameters())))
    layer_conductance(model, torch.randn(20, 6), 0)
    assert recorded == {"before": [False], "behind": [True]}
    assert seen == [False]
    assert all(each.requires_grad for each in model.parameters())


def test_a_measure_of_ones_own_may_differentiate_parameters(model: Awkward) -> None:
    with borrowed(model, torch.device("cpu")):
        (gradient,) = torch.autograd.grad(model(torch.randn(20, 6)).sum(), [model.head.weight])
    assert gradient.abs().sum() > 0


def test_only_modules_that_were_training_train_again(model: Awkward) -> None:
    with borrowed(model, torch.device("cpu")):
        assert not any(module.training for module in model.modules())
    assert model.norm.training
    assert not model.backbone[1].training


def test_overridden_train_and_eval_are_not_called() -> None:
    class Stubborn(nn.Linear):
        def train(self, mode: bool = True) -> "Stubborn":
            raise AssertionError

    model = nn.Sequential(Stubborn(6, 8), ConductanceDropout(), nn.Linear(8, 3))
    layer_conductance(model, torch.randn(4, 6), 0)


def test_modules_that_mind_their_attributes_hear_of_the_change() -> None:
    class Minding(nn.Module):
        heard: ClassVar[list[Any]] = []

        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value)
            self.heard.append((name, value))

    model = nn.Sequential(nn.Linear(2, 2), Minding())
    Minding.heard.clear()
    with borrowed(model, torch.device("cpu")):
        assert not any(module.training for module in model.modules() if module is not model)
    assert Minding.heard == [("training", False), ("training", True)]


def test_all_modules_are_found_once() -> None:
    shared = nn.Linear(2, 2)
    model = nn.ModuleDict({"one": nn.Sequential(shared, nn.ReLU()), "other": nn.ModuleList([shared])})
    model["one"].register_module("missing", None)
    found = all_modules(model)
    assert len(found) == len(set(found)) == 5
    assert set(found) == set(model.modules())


def test_metrics_that_update_in_place_are_kept() -> None:
    class Collecting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.drop, self.counter = nn.Linear(6, 3), ConductanceDropout(), Values()

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.drop(self.fc(x))
            self.counter.update(logits.detach())
            return logits

    model = Collecting()
    model(torch.randn(4, 6))
    layer_conductance(model, torch.randn(4, 6), 0)
    assert model.counter.total == 4
    assert len(model.counter.seen) == 1
    assert model.counter.update_count == 1
    model(torch.randn(4, 6))
    assert model.counter.compute() == 8


def test_a_buffer_in_two_places_stays_one() -> None:
    class Part(nn.Module):
        rows: Tensor

        def __init__(self, rows: Tensor) -> None:
            super().__init__()
            self.register_buffer("rows", rows)

    class Whole(Part):
        def __init__(self) -> None:
            super().__init__(torch.zeros(()))
            self.part, self.body = Part(self.rows), perceptron()

        def forward(self, x: Tensor) -> Tensor:
            self.rows.add_(len(x))
            assert self.part.rows == self.rows
            logits: Tensor = self.body(x)
            return logits

    model = Whole()
    rows = model.rows
    YDrop(model).step(torch.randn(8, 12))
    assert rows == 0
    assert model.rows is model.part.rows is rows


def test_a_tape_keeps_every_call_in_order() -> None:
    layer = nn.Linear(3, 3)
    model = nn.Sequential(layer, layer)
    x = torch.randn(2, 3)
    with recording({"both": layer, "never": nn.Linear(1, 1)}) as tape:
        model(x)
    assert list(tape) == ["both"]
    first, second = tape["both"]
    assert torch.equal(first, layer(x))
    assert torch.equal(second, layer(layer(x)))


def test_transformer_layers_are_measured_inside() -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
            for layer in self.encoder.layers:
                layer.register_module("dropout", ConductanceDropout(unit_dim=-1))
            self.head = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            padding = torch.tensor([False, False, False, True]).expand(len(x), -1)
            logits: Tensor = self.head(self.encoder(x, src_key_padding_mask=padding)[:, 0])
            return logits

    # Frozen, in evaluation: torch would take a fast path over packed sequences, past the dropout layers.
    scores = layer_conductance(Padded().requires_grad_(False), torch.randn(5, 4, 8), 0)
    for values in scores.values():
        assert values.shape == (5, 16)
        assert values.abs().sum() > 0


def test_compiled_parts_are_measured_eagerly() -> None:
    torch._dynamo.reset()
    plain = nn.Sequential(nn.Linear(6, 8), ConductanceDropout(), nn.ReLU(), nn.Linear(8, 3))
    compiled: Any = torch.compile(plain, backend="aot_eager")
    outer = nn.Sequential(compiled)
    x = torch.randn(4, 6)
    outer(x)
    expected = layer_conductance(plain, x, 0)
    assert torch.allclose(layer_conductance(outer, x, 0)["0.1"], expected["1"])


@pytest.mark.parametrize("copied", [None, frozenset[str]()])
@pytest.mark.parametrize("needs_gradient", [True, False])
def test_what_a_layer_returns_unchanged_is_recorded_behind_the_layer(copied: Any, needs_gradient: bool) -> None:
    layer, x = nn.Identity(), torch.randn(3, 2, requires_grad=needs_gradient)
    with recording({"layer": layer}, copied) as tape:
        output = layer(x)
        value = (output * 2 + x * 5).sum()
    (recorded,) = tape["layer"]
    assert recorded is not x
    assert torch.equal(output, x)
    (gradient,) = torch.autograd.grad(value, [recorded])
    assert torch.equal(gradient, torch.full((3, 2), 2.0))  # without the 5 that pass beside it


@pytest.mark.parametrize("needs_gradient", [True, False])
def test_layers_that_are_written_over_are_named_until_their_outputs_are_copied(needs_gradient: bool) -> None:
    layers = {"one": nn.Identity(), "two": nn.Identity()}
    x = torch.randn(3, 2, requires_grad=needs_gradient) * 1
    copied: set[str] = set()
    with recording(layers, copied) as tape:
        for expected in ({"two"}, set[str]()):
            one, two = layers["one"](x * 1), layers["two"](x * 1)
            before = two.detach().clone()
            (one.exp() + two.relu_()).sum()
            assert tape.overwritten == expected
            copied |= tape.overwritten
            assert torch.equal(tape["two"][0], before) is not bool(expected)
            tape.clear()
    assert not any(layer._forward_hooks for layer in layers.values())


def test_a_closed_tape_records_nothing_until_it_is_cleared() -> None:
    layer = nn.Linear(2, 3)
    with recording({"layer": layer}) as tape:
        layer(torch.ones(1, 2))
        assert len(tape["layer"]) == 1
        tape.close()
        assert layer(torch.ones(1, 2)).requires_grad
        assert tape == {}
        tape.clear()
        layer(torch.ones(1, 2))
        assert len(tape["layer"]) == 1
