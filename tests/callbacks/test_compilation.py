"""Compiled models: as many graphs as with nn.Dropout, whole ones, and the same conductance."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.data import DataLoader, TensorDataset

from lightning_ydrop import ConductanceDropout, YDropCallback
from tests.callbacks.test_ydrop import trainer_of
from tests.networks import perceptron

X = torch.randn(70, 12, generator=torch.Generator().manual_seed(0))  # four batches of 16, and one of 6
Y = torch.arange(70) % 5


class Net(LightningModule):
    """Compiles a part of itself, all of itself, or nothing."""

    def __init__(self, dropout: type[nn.Module]) -> None:
        super().__init__()
        self.body: Any = perceptron(dropout=dropout)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.body(x)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


class Graphs:
    """A backend that counts graphs and differentiates them as real ones do."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        from torch._dynamo.backends.debugging import aot_eager

        self.count += 1
        compiled: Callable[..., Any] = aot_eager(graph, inputs)
        return compiled


def inner(net: Net, backend: Graphs) -> Any:
    net.body = torch.compile(net.body, backend=backend)
    return net


def in_place(net: Net, backend: Graphs) -> Any:
    net.compile(backend=backend)
    return net


def whole(net: Net, backend: Graphs) -> Any:
    return torch.compile(net, backend=backend)


def fit(way: Callable[[Net, Graphs], Any], dropout: type[nn.Module], *callbacks: YDropCallback) -> tuple[Graphs, int]:
    """Train for four epochs with validation, the last batch of each smaller than the others."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    counters.clear()
    backend = Graphs()
    data = DataLoader(TensorDataset(X, Y), batch_size=16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the compiler says to itself
        trainer_of(*callbacks, max_epochs=4).fit(way(Net(dropout), backend), data, data)
    return backend, sum(counters["graph_break"].values())


@pytest.mark.parametrize("way", [inner, in_place, whole])
def test_there_are_no_more_graphs_and_breaks_than_with_nn_dropout(way: Callable[[Net, Graphs], Any]) -> None:
    plain, plain_breaks = fit(way, nn.Dropout)
    assert plain.count > 0
    for transition in ("step", "linear"):
        ours, our_breaks = fit(way, ConductanceDropout, YDropCallback(annealing_epochs=2, transition=transition))
        assert (ours.count, our_breaks) == (plain.count, plain_breaks)


def test_compiled_layers_follow_the_probabilities_in_one_graph() -> None:
    layer, backend, rates = ConductanceDropout(), Graphs(), torch.linspace(0, 0.9, 16)
    compiled: Any = torch.compile(layer, backend=backend, fullgraph=True)
    layer.prepare(16, torch.device("cpu"))

    def dropped() -> Tensor:
        share: Tensor = (compiled(torch.ones(2000, 16)) == 0).float().mean(0)
        return share

    assert (dropped() - 0.5).abs().max() < 0.06  # five standard deviations of a share of 2000
    layer.update(rates, elasticity=0.5, initial_drop_prob=0.35)
    assert (dropped() - rates).abs().max() < 0.06
    layer.deactivate()
    assert (dropped() - 0.5).abs().max() < 0.06
    layer.activate(0.5)
    assert (dropped() - (0.5 + rates) / 2).abs().max() < 0.06
    assert backend.count == 1


class Watched(YDropCallback):
    """Keeps the scores of each phase 1."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(annealing_epochs=1, **arguments)
        self.scores: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, *args: Any) -> None:
        assert self.engine is not None
        if self.engine.active:
            self.scores.append(dict(self.engine.scores))


@pytest.mark.parametrize(
    ("precision", "compiles"),
    [("32-true", False), ("bf16-mixed", False), pytest.param("32-true", True, marks=pytest.mark.slow)],
)
def test_a_fit_with_a_compiled_phase_1_is_that_with_an_eager_one(
    precision: str, compiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiles:  # the recorded graph, without torch's compiler, which takes seconds
        monkeypatch.setattr("lightning_ydrop.importance.compiled.compiled_graph", lambda graph, tensors: graph)
    callbacks, nets = (Watched(), Watched(compile_phase1=True)), []
    for callback in callbacks:
        torch.manual_seed(0)
        nets.append(net := Net(ConductanceDropout))
        data = DataLoader(TensorDataset(X, Y), batch_size=16)  # the last batch is smaller
        trainer_of(callback, max_epochs=3, precision=precision).fit(net, data, data)
    eager, compiled = (callback.scores for callback in callbacks)
    assert len(eager) == 2 * 5
    for one, other in zip(eager, compiled, strict=True):
        for name, scores in one.items():
            torch.testing.assert_close(other[name], scores, rtol=1e-4, atol=1e-6)
    for parameter, twin in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(parameter, twin)
    assert callbacks[1].engine is not None
    assert callbacks[1].engine.findings is not None
    assert callbacks[1].engine.findings.plan.compiled is not None


def test_scores_are_those_of_the_eager_model() -> None:
    engines = []
    for compiles in (False, True):
        torch.manual_seed(1)
        net = Net(ConductanceDropout)
        if compiles:
            inner(net, Graphs())
        callback = YDropCallback(annealing_epochs=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer_of(callback, max_steps=1).fit(net, DataLoader(TensorDataset(X, Y), batch_size=16))
        assert callback.engine is not None
        engines.append(callback.engine)
    for name, scores in engines[0].scores.items():
        assert torch.allclose(scores, engines[1].scores[name], atol=1e-6)
    assert list(engines[0].state_dict()["layers"]) == list(engines[1].state_dict()["layers"])
