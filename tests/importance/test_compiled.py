import copy
import functools
import itertools
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.networks import Transformer
from lightning_ydrop import (
    CaptumMeasure,
    Conductance,
    ConductanceDropout,
    ConfigurationError,
    Inverted,
    Objective,
    OutputSum,
    YDrop,
)
from lightning_ydrop.importance import compiled, conductance
from lightning_ydrop.importance.request import Request
from lightning_ydrop.models.calls import Target
from tests.networks import NETWORKS, network_and_batch, perceptron
from tests.sameness import assert_same

X = torch.randn(32, 12, generator=torch.Generator().manual_seed(0))
Y = torch.arange(32) % 5


def replay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the recorded graph run as it is: all but the compiler, which takes seconds."""
    monkeypatch.setattr(compiled, "compiled_graph", lambda graph, tensors: graph)


@pytest.fixture
def _replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    replay(monkeypatch)


def transformer() -> Transformer:
    return Transformer(12, 16, 2, 5, lambda: ConductanceDropout(unit_dim=-1))


def assert_close(scores: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert scores.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(scores[name], values, rtol=1e-4, atol=1e-5 * float(values.abs().max()))


def both(model: nn.Module, **arguments: Any) -> tuple[YDrop, YDrop]:
    return YDrop(model, compile_phase1=True, **arguments), YDrop(model, **arguments)


def compare(engines: tuple[YDrop, YDrop], *batch: Any) -> None:
    for engine in engines:
        step(engine, *batch)
    assert_close(engines[0].scores, engines[1].scores)


def step(engine: YDrop, *batch: Any) -> None:
    engine.take_over()
    engine.step(*batch)


def eager_passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count eager phases 1 from now on."""
    seen: list[int] = []
    measure = conductance.conductance_and_change

    def counted(request: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(request.num_samples)
        return measure(request, *args, **kwargs)

    monkeypatch.setattr(conductance, "conductance_and_change", counted)
    return seen


@pytest.mark.parametrize("compiles", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", [*NETWORKS, "transformer"])
def test_scores_are_those_of_the_eager_phase_1(kind: str, compiles: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiles:
        replay(monkeypatch)
    model, x, y = network_and_batch(kind, batch=32) if kind in NETWORKS else (transformer(), torch.randn(32, 6, 12), Y)
    engines = both(model)
    compare(engines, x, y)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    for parameter in list(model.parameters())[:2]:
        parameter.requires_grad = False
    compare(engines, x.roll(1, 0), y)
    seen = eager_passes(monkeypatch)
    step(engines[0], x, y)
    assert not seen


@pytest.mark.usefixtures("_replayed")
def test_a_step_changes_nothing_but_probabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y = network_and_batch("convolutional", batch=32)
    nn.functional.cross_entropy(model(x), y).backward()
    engine = YDrop(model, compile_phase1=True)
    calls: list[int] = []
    model.get_submodule("0").register_forward_hook(lambda *_: calls.append(1))
    engine.step(x, y)
    calls.clear()

    def state() -> Any:
        gradients = [parameter.grad for parameter in model.parameters()]
        return (
            model.state_dict(),
            gradients,
            torch.get_rng_state(),
            [dict(each._forward_hooks) for each in model.children()],
        )

    before = copy.deepcopy(model.state_dict()), *copy.deepcopy(state()[1:3]), state()[3]
    engine.step(x, y)
    assert_same(list(before), list(state()))
    assert model.training
    assert not calls


@pytest.mark.usefixtures("_replayed")
def test_a_batch_of_another_shape_runs_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    engines = both(perceptron())
    compare(engines, X, Y)
    seen = eager_passes(monkeypatch)
    compare(engines, X[:9], Y[:9])
    assert len(seen) == 2
    compare(engines, X, Y)
    assert len(seen) == 3


@pytest.mark.usefixtures("_replayed")
def test_other_measures_arguments_and_objectives() -> None:
    compare(both(perceptron(), measure=Inverted(Conductance())), X, Y)
    compare(both(perceptron(), objective=OutputSum()), X)
    compare(both(perceptron(), quadrature="trapezoid"), X, Y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        compare(both(perceptron()), X, Y)
    with pytest.raises(ConfigurationError) as raised:
        YDrop(perceptron(), measure=CaptumMeasure(), compile_phase1=True)
    assert str(raised.value) == (
        "YDrop(compile_phase1=True, measure=CaptumMeasure('InternalInfluence')) was given. "
        "Of the measures Conductance is compiled, also inside Inverted and Shuffled. "
        "Pass measure=Conductance(), or leave out compile_phase1."
    )


class OfAllOutputs(Conductance):
    def score(self, request: Request) -> dict[str, Tensor]:
        return super().score(replace(request, objective=self.objective))

    objective = OutputSum()


@pytest.mark.usefixtures("_replayed")
def test_a_measure_may_ask_for_another_objective() -> None:
    compare(both(perceptron(), measure=OfAllOutputs()), X, Y)


@pytest.mark.usefixtures("_replayed")
def test_sparse_inputs_are_refused() -> None:
    model = Scaled(lambda model, x: 1.0)
    model.register_buffer("graph", torch.eye(3).to_sparse())
    with pytest.raises(ConfigurationError, match="it works with tensors that are sparse"):
        YDrop(model, compile_phase1=True).step(X, Y)


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.body = nn.Sequential(nn.Linear(8, 16), ConductanceDropout(), nn.ReLU(), nn.Linear(16, 5))

    def forward(self, tokens: Tensor, mask: Tensor) -> Any:
        embedded = self.embedding(tokens) * mask.unsqueeze(-1)
        return self.body(embedded.sum(1) / mask.sum(1, keepdim=True))


@pytest.mark.usefixtures("_replayed")
def test_paths_through_an_embedding() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens, mask = torch.randint(20, (32, 7), generator=generator), torch.arange(7).expand(32, 7) < 5
    engines = both(Tokens(), interpolate_at="embedding")
    compare(engines, {"tokens": tokens, "mask": mask}, Y)
    compare(engines, {"tokens": tokens.roll(1, 0), "mask": mask.clone()}, Y)


@pytest.mark.usefixtures("_replayed")
def test_compiled_parts_are_recorded() -> None:
    model = perceptron()
    model[0] = torch.compile(model[0], backend="eager")  # type: ignore[assignment]
    compare(both(model), X, Y)


class Scaled(nn.Module):
    """A network whose forward depends on something else than the batch and parameters."""

    def __init__(self, scale: Callable[["Scaled", Tensor], Any]) -> None:
        super().__init__()
        self.body = perceptron()
        self.scale = scale
        self.factor = 1.0
        self.settings = {"factor": 1.0}
        self.unused = 0
        self.tensor = torch.ones(())
        self.numbers = itertools.count(1)
        self.many = [0.0] * 20_000
        self.absent: nn.Parameter | None = None
        self.heads = nn.ModuleList(nn.Linear(5, 5) for _ in range(2))
        self.head = self.heads[0]
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Any:
        return self.body(x) * self.scale(self, x)


def by_attribute(model: Scaled, x: Tensor) -> Any:
    return model.factor * model.settings["factor"]


@pytest.mark.usefixtures("_replayed")
def test_an_attribute_that_changes_ends_compilation_until_it_changes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    engines = both(model := Scaled(by_attribute))
    compare(engines, X, Y)
    model.unused = 1
    seen = eager_passes(monkeypatch)
    compare(engines, X, Y)
    assert len(seen) == 1  # that of the other engine
    model.factor = 2.0
    with pytest.warns(UserWarning, match=r"compiled for another Scaled.factor. It runs without compilation"):
        compare(engines, X, Y)
    model.factor, model.settings["factor"] = 1.0, 3.0
    compare(engines, X, Y)  # and no further warning
    model.settings["factor"] = 1.0
    assert len(seen) == 5
    compare(engines, X, Y)
    assert len(seen) == 6


@pytest.mark.usefixtures("_replayed")
def test_parameters_and_buffers_that_are_replaced_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """As load_state_dict(assign=True) does, and weight averaging with statistics."""
    model = nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), ConductanceDropout(), nn.Linear(16, 5))
    engines = both(model)
    compare(engines, X, Y)
    model[0].weight = nn.Parameter(torch.randn(16, 12))
    model[1].running_mean = torch.randn(16)
    seen = eager_passes(monkeypatch)
    compare(engines, X, Y)
    assert len(seen) == 1  # that of the other engine


class Asking(nn.Module):
    """It asks a buffer and an argument for no more than how long they are."""

    def __init__(self) -> None:
        super().__init__()
        self.body = perceptron()
        self.register_buffer("queue", torch.zeros(1))

    def forward(self, x: Tensor, kinds: Tensor) -> Any:
        return (self.body(x) * len(self.queue) * len(kinds)).sin()  # type: ignore[arg-type]


@pytest.mark.usefixtures("_replayed")
def test_shapes_of_tensors_are_compared_that_nothing_is_computed_from() -> None:
    engines = both(model := Asking())
    compare(engines, (X, torch.tensor([0])), Y)
    compare(engines, (X, torch.tensor([0, 1])), Y)
    model.queue = torch.zeros(3)
    with pytest.warns(UserWarning, match=r"compiled for another Asking\.queue"):
        compare(engines, (X, torch.tensor([0])), Y)


@pytest.mark.usefixtures("_replayed")
def test_tensors_that_were_one_and_are_two_run_eagerly() -> None:
    one, other = nn.Linear(12, 12), nn.Linear(12, 12)
    other.weight = one.weight
    engines = both(nn.Sequential(one, ConductanceDropout(), nn.ReLU(), other, ConductanceDropout(), nn.Linear(12, 5)))
    compare(engines, X, Y)
    other.weight = nn.Parameter(torch.randn(12, 12))
    with pytest.warns(UserWarning, match="compiled for another"):
        compare(engines, X, Y)


@pytest.mark.usefixtures("_replayed")
@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model[0], "weight", nn.Parameter(torch.randn(12, 16).T)),
        lambda model: model.__setitem__(2, nn.Tanh()),
        lambda model: model[0].register_forward_hook(lambda module, args, output: 2 * output),
    ],
)
def test_a_changed_model_runs_eagerly(change: Callable[[Any], Any]) -> None:
    engines = both(model := perceptron())
    compare(engines, X, Y)
    change(model)
    with pytest.warns(UserWarning, match="compiled for another"):
        compare(engines, X, Y)


class ByClass(Scaled):
    level = 1.0


def by_all(model: Any, x: Tensor) -> Any:
    later = 1.0 if model.absent is None else model.absent
    buffer = 1.0 if model.empty is None else model.empty
    return later * buffer * model.level * getattr(model, "later", 1.0) * model.head(model.body(x)).tanh()


def add_parameter(model: Any) -> None:
    model.absent = nn.Parameter(torch.arange(5.0))


def add_attribute(model: Any) -> None:
    model.later = torch.arange(5.0)


def use_another_head(model: Any) -> None:
    model.head = model.heads[1]


def change_the_head(model: Any) -> None:
    model.head.forward = lambda x: x.square()


@pytest.mark.usefixtures("_replayed")
@pytest.mark.parametrize(
    "change",
    [
        add_parameter,
        add_attribute,
        use_another_head,
        change_the_head,
        lambda model: setattr(model, "empty", torch.arange(5.0)),
        lambda model: setattr(model, "level", torch.arange(5.0)),
        lambda model: setattr(type(model), "level", torch.arange(5.0)),
        lambda model: setattr(type(model), "forward", lambda self, x: self.body(x).sin()),
        lambda model: setattr(model.body[2], "negative_slope", -3.0),
    ],
)
def test_what_a_forward_reads_in_other_places_is_compared(change: Callable[[Any], Any]) -> None:
    class Net(ByClass): ...

    model = Net(by_all)
    model.body = perceptron(nn.LeakyReLU)
    model.register_buffer("empty", None)
    engines = both(model)
    compare(engines, X, Y)
    change(model)
    with pytest.warns(UserWarning, match="compiled for another"):
        compare(engines, X, Y)


@pytest.mark.usefixtures("_replayed")
def test_a_hook_that_takes_the_place_of_another_is_seen() -> None:
    engines = both(model := perceptron())
    handle = model[0].register_forward_hook(lambda module, args, output: output)
    compare(engines, X, Y)
    handle.remove()
    model[0].register_forward_hook(lambda module, args, output: output.square())
    with pytest.warns(UserWarning, match="set of modules or hooks"):
        compare(engines, X, Y)


class Turned(Objective):
    def __init__(self) -> None:
        self.factor = 1.0

    def __call__(self, output: Tensor, target: Target) -> Tensor:
        return (self.factor * output).sin().sum(1)


@pytest.mark.usefixtures("_replayed")
def test_callers_and_objectives_that_change_are_seen() -> None:
    model, objective = perceptron(), Turned()
    caller = functools.partial(lambda x, factor: model(x) * factor["is"], factor=(factors := {"is": 1.0}))
    engines = both(model, objective=objective, forward=caller)
    compare(engines, X, Y)
    objective.factor = 4.0
    with pytest.warns(UserWarning, match="another state of Turned"):
        compare(engines, X, Y)
    objective.factor, factors["is"] = 1.0, 4.0
    compare(engines, X, Y)


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = perceptron()

    def forward(self, x: Tensor, added: Any = 0.0, factor: Any = 1.0) -> Any:
        return self.body(x).tanh() * factor + added


@pytest.mark.usefixtures("_replayed")
def test_arguments_by_other_names_are_others() -> None:
    engines = both(Named())
    more = torch.rand(32, 5)
    compare(engines, {"x": X, "added": more}, Y)
    compare(engines, {"x": X, "factor": more}, Y)


def test_a_compiler_that_fails_is_named_in_the_dry_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(graph: Any, tensors: Any) -> Any:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(compiled, "compiled_graph", fail)
    with pytest.raises(ConfigurationError, match="torch could not compile it"):
        YDrop(perceptron(), compile_phase1=True).step(X, Y)


@pytest.mark.usefixtures("_replayed")
def test_copies_of_an_engine_compile_anew() -> None:
    engine = YDrop(perceptron(), compile_phase1=True)
    engine.step(X, Y)
    for copied in (copy.deepcopy(engine), pickle.loads(pickle.dumps(engine))):
        assert copied.findings is None
        step(copied, X, Y)
        assert vars(copied)["findings"].plan.compiled is not None
