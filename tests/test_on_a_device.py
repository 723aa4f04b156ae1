"""The package on a CUDA device: whatever training does at every step stays there, and never makes the host wait."""

import re
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_ydrop import (
    Conductance,
    ConductanceDropout,
    ConductanceMonitor,
    ConvPattern,
    Inverted,
    Jumpout,
    NegativeLoss,
    NoEffectWarning,
    Objective,
    OutputSum,
    PatternDropout,
    PredictedLogit,
    RandomImportance,
    Shuffled,
    TargetLogit,
    TokenPattern,
    YDrop,
    YDropCallback,
    layer_conductance,
    monte_carlo,
)
from lightning_ydrop.callbacks import monitor as monitor_module
from lightning_ydrop.functional import conductance_spread, monte_carlo_divergence
from lightning_ydrop.functional.attribution import QUADRATURES
from lightning_ydrop.functional.masking import Granularity
from lightning_ydrop.functional.rates import bucket_probabilities
from lightning_ydrop.importance import compilable, compiled
from lightning_ydrop.importance import engine as engine_module
from lightning_ydrop.importance.attribution import MaxRows
from lightning_ydrop.layers import pattern_dropout
from lightning_ydrop.layers.patterns import Pattern
from lightning_ydrop.torch_internals import PLAIN_TENSORS
from tests.fake_device import REFUSED, Finding, Values, Watch, fake_cuda, gradients
from tests.networks import Residual, perceptron

pytestmark = pytest.mark.skipif(torch.__version__ < "2.8", reason="older releases ask for a driver, and may abort")

# The functions of the package that may look at values, in a dry run or once in each call of `layer_conductance`.
LOOKING = {"check_baseline", "check", "differ", "warn_of_equal_scores", "_warn_of_baseline"}


class Tokens(nn.Module):
    """A network on tokens (B, T), with lengths (B,) that stay on the CPU, as packed sequences want them."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.hidden = nn.Embedding(20, 8), nn.Linear(8, 8)
        self.drop, self.out = ConductanceDropout(unit_dim=-1, elementwise=True), nn.Linear(8, 5)

    def forward(self, lengths: Tensor, tokens: Tensor) -> Tensor:
        on_device = lengths.to(tokens.device, non_blocking=True)
        is_there = torch.arange(tokens.shape[1], device=tokens.device) < on_device[:, None]
        return self.out((self.drop(self.hidden(self.embedding(tokens))) * is_there.unsqueeze(-1)).sum(1))


class TimeFirst(nn.Module):
    """A recurrent network on (T, B, F) with one output for each sample; written out, since cuDNN needs a driver."""

    def __init__(self, **of_dropout: Any) -> None:
        super().__init__()
        self.read, self.repeat = nn.Linear(6, 7), nn.Linear(7, 7)
        self.drop, self.out = ConductanceDropout(unit_dim=-1, batch_dim=1, **of_dropout), nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        states = [x.new_zeros(x.shape[1], 7)]
        for step in self.read(x):
            states.append((step + self.repeat(states[-1])).tanh())
        return self.out(self.drop(torch.stack(states[1:])))[-1]


class ThreeInputs(nn.Module):
    """Takes vectors, the same number of scales, and a shift that paths do not run through, all floating."""

    def __init__(self) -> None:
        super().__init__()
        self.body = perceptron()

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return self.body(x * scale + shift)


class Counter(nn.Module):
    """Writes to a buffer in evaluation mode too, over a recorded output, and holds a part that is frozen."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(1))
        self.frozen = nn.Linear(12, 10).requires_grad_(False)
        self.first, self.hidden, self.second = ConductanceDropout(), nn.Linear(10, 10), ConductanceDropout()
        self.out = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        hidden = self.hidden(self.first(self.frozen(x)).relu())
        return self.out(F.relu(self.second(hidden), inplace=True))


class Margin(Objective):
    def __call__(self, output: Tensor, target: Tensor | None) -> Tensor:
        return output[:, 0] - output[:, 1]


def convolutional() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), ConductanceDropout(), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(64, 8), ConductanceDropout(), nn.ReLU(inplace=True), nn.Linear(8, 5)),
    )


def dense() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), ConductanceDropout(), nn.ReLU(), nn.Conv2d(4, 5, 1))


def vectors() -> tuple[Any, Tensor]:
    return torch.randn(32, 12), torch.randint(5, (32,))


def images() -> tuple[Any, Tensor]:
    return torch.randn(32, 2, 8, 8), torch.randint(5, (32,))


def labelled_pixels() -> tuple[Any, Tensor]:
    return torch.randn(32, 2, 8, 8), torch.randint(5, (32, 8, 8))


def soft_labels() -> tuple[Any, Tensor]:
    return torch.randn(32, 12), torch.rand(32, 5)


def sequences() -> tuple[Any, Tensor]:
    return torch.randn(3, 32, 6), torch.randint(5, (32,))


def tokens() -> tuple[Any, Tensor]:
    return (torch.randint(1, 5, (32,), device="cpu"), torch.randint(20, (32, 4))), torch.randint(5, (32,))


def by_name() -> tuple[Any, Tensor]:
    lengths, ids = tokens()[0]
    return {"tokens": ids, "lengths": lengths}, torch.randint(5, (32,))


def three_inputs() -> tuple[Any, Tensor]:
    return (torch.randn(32, 12), torch.rand(32, 12), torch.rand(32, 12)), torch.randint(5, (32,))


def weighted_loss() -> Objective:
    return NegativeLoss(nn.CrossEntropyLoss(weight=torch.ones(5, device="cpu"), reduction="none"))


def zeros() -> Tensor:
    return torch.zeros(12, device="cpu")


@dataclass(frozen=True)
class Case:
    """A network, its batches, and settings of an engine for it. All three are made where the device is the default."""

    build: Callable[[], nn.Module] = perceptron
    batch: Callable[[], tuple[Any, Tensor]] = vectors
    settings: Callable[[], Mapping[str, Any]] = dict


CASES: dict[str, Case] = {
    **{each: Case(settings=partial(dict, quadrature=each)) for each in QUADRATURES},
    "several passes": Case(settings=lambda: {"num_samples": "all", "quadrature": "left"}),
    "more steps than rows": Case(settings=lambda: {"num_samples": 2, "n_steps": 20}),
    "every second batch": Case(settings=lambda: {"every_n_batches": 2}),
    "no target": Case(settings=lambda: {"objective": OutputSum()}),
    "predicted": Case(settings=lambda: {"objective": PredictedLogit()}),
    "own objective": Case(settings=lambda: {"objective": Margin()}),
    "ignored class": Case(settings=lambda: {"objective": TargetLogit(ignore_index=0)}),
    "class weights on the CPU": Case(settings=lambda: {"objective": weighted_loss()}),
    "random": Case(settings=lambda: {"measure": RandomImportance()}),
    "inverted": Case(settings=lambda: {"measure": Inverted(Conductance())}),
    "shuffled": Case(settings=lambda: {"measure": Shuffled(Conductance())}),
    "soft labels": Case(batch=soft_labels),
    "baseline on the CPU": Case(settings=lambda: {"baseline": zeros()}),
    "baseline of each sample on the CPU": Case(settings=lambda: {"baseline": torch.zeros(32, 12, device="cpu")}),
    "baseline of each input": Case(ThreeInputs, three_inputs, lambda: {"baseline": [zeros(), 1.0, None]}),
    "residual": Case(Residual),
    "writes a buffer": Case(Counter),
    "images": Case(convolutional, images),
    "labelled pixels": Case(dense, labelled_pixels),
    "predicted pixels": Case(dense, labelled_pixels, lambda: {"objective": PredictedLogit()}),
    "time first": Case(TimeFirst, sequences, lambda: {"batch_dim": 1}),
    "time first, elementwise": Case(lambda: TimeFirst(elementwise=True), sequences, lambda: {"batch_dim": 1}),
    "lengths on the CPU": Case(Tokens, tokens, lambda: {"interpolate_at": "embedding"}),
    "lengths on the CPU, by name": Case(Tokens, by_name, lambda: {"interpolate_at": "embedding"}),
    "lengths and class weights on the CPU": Case(
        Tokens,
        tokens,
        lambda: {
            "interpolate_at": "embedding",
            "objective": weighted_loss(),
            "baseline": torch.zeros(4, 8, device="cpu"),
        },
    ),
}


@dataclass
class Ready:
    """A case on the device, after the dry run of its engine."""

    model: nn.Module
    engine: YDrop
    inputs: Any
    target: Tensor
    findings: list[Finding] = field(default_factory=list)

    def step(self, progress: float = 1.0) -> None:
        """Run phase 1, and a training step."""
        self.engine.step(self.inputs, self.target, progress=progress)
        if isinstance(self.inputs, dict):
            output = self.model(**self.inputs)
        else:
            output = self.model(*self.inputs) if isinstance(self.inputs, tuple) else self.model(self.inputs)
        loss = output.square().mean()
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        torch.autograd.grad(loss, trained, torch.ones_like(loss))


def ready(case: Case, as_expected: bool = True) -> Ready:
    with torch.device("cuda"):
        model, (inputs, target) = case.build(), case.batch()
        with Values():
            engine = YDrop(model, **case.settings())
    with Watch(as_expected) as watch:
        engine.dry_run(inputs, target)
    return Ready(model, engine, inputs, target, watch.findings)


def places(*nested: Any) -> set[str]:
    return {tensor.device.type for tensor in tree_leaves(nested) if isinstance(tensor, Tensor)}


def looks(findings: list[Finding]) -> set[str]:
    """Name the functions that may look at values and did. Others have no name here."""
    return {next((name for name in finding.functions if name in LOOKING), "") for finding in findings}


@pytest.mark.parametrize("name", CASES)
def test_training_stays_on_the_device_and_never_waits(name: str) -> None:
    with fake_cuda():
        case = ready(CASES[name])
        assert looks([finding for finding in case.findings if finding.kind == "reads a value"]) <= LOOKING
        assert {finding.kind for finding in case.findings} <= {"reads a value", "waits for a copy"}
        engine = case.engine
        with Watch() as watch:
            case.step(progress=0.5)
            engine.skip()
            state = engine.state_dict()
            engine.load_state_dict(state)
            case.step()
            engine.deactivate()
        assert watch.findings == []
        assert watch.num_operators > 100
        for layer in engine.layers.values():
            kept = (layer.drop_prob, layer.mean_drop_prob, layer._applied_drop_prob, layer._applied_mean)
            assert places(kept) == {"cuda"}
            assert all(len(tensor) > 0 for tensor in kept)
        assert places(engine.scores, engine.nonfinite, engine.unusable, state) == {"cuda"}


@pytest.mark.parametrize("name", ["right", "several passes", "random", "shuffled", "lengths on the CPU"])
def test_training_does_not_wait_where_the_device_is_the_default(name: str) -> None:
    with fake_cuda():
        case = ready(CASES[name])
        with torch.device("cuda"), Watch() as watch:
            case.step(progress=0.5)
        assert watch.findings == []


def test_a_compiled_phase_1_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "compiled_graph", lambda graph, tensors: graph)
    monkeypatch.setattr(compilable, "PLAIN_TENSORS", (*PLAIN_TENSORS, FakeTensor))
    replays: list[None] = []  # of a CUDA graph, if there were one
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: replays.append(None))
    with fake_cuda():
        case = ready(Case(settings=lambda: {"compile_phase1": True}))
        assert looks([finding for finding in case.findings if finding.kind == "reads a value"]) <= LOOKING
        replays.clear()
        with Watch() as watch:
            case.step()
        assert watch.findings == []
        assert len(replays) == 1


def test_a_dry_run_that_finds_much_to_worry_about_looks_in_the_same_places() -> None:
    with fake_cuda():
        with pytest.warns(NoEffectWarning, match="same score"):
            case = ready(Case(Counter), as_expected=False)
        assert looks([finding for finding in case.findings if finding.kind == "reads a value"]) == LOOKING - {
            "check_baseline"
        }
        with Watch() as watch:
            case.step()
        assert watch.findings == []


def test_a_state_on_the_cpu_is_brought_to_the_device() -> None:
    with fake_cuda():
        case, twin = ready(Case()), ready(Case())
        with Values():
            case.step()
            state = tree_map_only(Tensor, Tensor.cpu, case.engine.state_dict())
            assert places(state) == {"cpu"}
            twin.engine.load_state_dict(state)
        assert places(twin.engine.state_dict()) == {"cuda"}
        with Watch() as watch:
            twin.step()
        assert watch.findings == []


def test_rates_given_as_numbers_are_not_copied() -> None:
    with fake_cuda():
        scores = torch.rand(6, device="cuda")
        with Watch() as watch:
            probabilities = bucket_probabilities(scores, low=0.1, high=0.6, strong_fraction=0.5)
        assert watch.findings == []
        assert places(probabilities) == {"cuda"}


def test_layers_are_updated_and_run_on_the_device() -> None:
    with fake_cuda(), Watch() as watch:
        for shape, layer in (
            ((8, 6), ConductanceDropout()),
            ((8, 6, 5), ConductanceDropout()),
            ((8, 5, 6), ConductanceDropout(unit_dim=-1, elementwise=True)),
            ((5, 8, 6), ConductanceDropout(unit_dim=2, batch_dim=1)),
        ):
            x = torch.randn(shape, device="cuda", requires_grad=True)
            layer(x)
            for progress in (0.3, 1.0):
                drop_prob = torch.rand(6, device="cuda")
                accept = drop_prob.sum() > 0
                layer.update(drop_prob, elasticity=0.1, initial_drop_prob=0.3, progress=progress, accept=accept)
                layer.activate(progress)
                y = layer(x).sum()
                torch.autograd.grad(y, [x], torch.ones_like(y))
            with layer.dropping_at_mean():
                layer(x)
            layer.deactivate()
            layer.p = 0.2
            layer.reset()
    assert watch.findings == []


def test_a_layer_follows_its_model_to_the_device_and_back() -> None:
    with fake_cuda():
        layer = ConductanceDropout()
        layer.update(torch.full((6,), 0.5), elasticity=0.1, initial_drop_prob=0.3)
        for device in ("cuda", "cpu"):
            layer.to(device)
            with Watch() as watch:
                assert layer(torch.ones(4, 6, device=device)).device.type == device
            assert watch.findings == []


@pytest.mark.parametrize("granularity", ["element", "channel"])
def test_jumpout_stays_on_the_device(granularity: Granularity) -> None:
    with fake_cuda():
        x = torch.randn(4, 3, 5, 5, device="cuda", requires_grad=True)
        with Watch() as watch:
            y = Jumpout(granularity=granularity)(x).sum()
            torch.autograd.grad(y, [x], torch.ones_like(y))
        assert watch.findings == []


@pytest.mark.parametrize(
    ("pattern", "shape"),
    [
        (ConvPattern(0.25, repeat=2, rotate=22.5), (6, 3, 9, 8)),
        (ConvPattern.stochastic_depth(0.5), (6, 3, 9, 8)),
        (TokenPattern(2, 3, share_t=True, rate=0.6), (6, 9, 5)),
        (TokenPattern.dropout(0.5), (6, 3, 9, 9)),
    ],
    ids=str,
)
def test_dropout_of_a_pattern_stays_on_the_device(pattern: Pattern, shape: tuple[int, ...]) -> None:
    pattern_dropout._stencils.clear()
    with fake_cuda():
        layer = PatternDropout(pattern).to("cuda")
        assert layer._applied_progress.device.type == "cuda"  # so that a CUDA graph reads it
        x = torch.randn(shape, device="cuda", requires_grad=True)
        with Watch() as watch:
            layer.progress = 0.5
            y = layer(x).sum()
            torch.autograd.grad(y, [x], torch.ones_like(y))
            if len(shape) == 3:
                layer(x, torch.zeros(shape[:2], dtype=torch.bool, device="cuda"))
        assert watch.findings == []
        assert watch.num_operators > 5
        with torch.device("cuda"), Watch() as watch:
            PatternDropout(pattern)(x)
        assert watch.findings == []
    assert not pattern_dropout._stencils  # those have no values


@pytest.mark.parametrize("max_rows", [None, "batch", 5])
def test_conductance_looks_at_the_target_once(max_rows: MaxRows) -> None:
    with fake_cuda():
        with torch.device("cuda"):
            model, x, y = perceptron(), torch.randn(2, 12), torch.randint(5, (2,))
        with Watch() as watch:
            scores = layer_conductance(model, x, y, n_steps=5, max_rows=max_rows)
        assert looks(watch.findings) == {"check"}
        assert len(watch.findings) == 3  # the labels that count, the lowest and the highest
        assert {tuple(each.shape) for each in scores.values()} == {(2, 16), (2, 10)}
        assert places(scores) == {"cuda"}
        with Watch() as watch:
            layer_conductance(model, x, 3, objective=OutputSum(), max_rows=max_rows)
        assert watch.findings == []
        with Watch() as watch:
            scores, deltas = layer_conductance(
                model, x, classes="all", n_steps=5, max_rows=max_rows, return_convergence_delta=True
            )
        assert looks(watch.findings) == {"check"}
        assert len(watch.findings) == 6  # of the first class and the last
        assert {tuple(each.shape) for each in (*scores.values(), *deltas.values())} == {(2, 5, 16), (2, 5, 10), (2, 5)}
        assert places(scores, deltas) == {"cuda"}


def test_monte_carlo_stays_on_the_device() -> None:
    with fake_cuda():
        with torch.device("cuda"):
            model, (x, _) = perceptron(dropout=nn.Dropout), vectors()
        with Watch() as watch:
            average = monte_carlo(model, x, num_samples=300)
            divergence = monte_carlo_divergence(model(x), average.probabilities)
        assert looks(watch.findings) <= {"differ"}  # whether samples influence each other
        assert places(average.probabilities, average.entropy, divergence) == {"cuda"}


class Trained(LightningModule):
    """A LightningModule that keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.body = perceptron()
        self.logged: dict[str, Any] = {}

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)

    def log_dict(self, values: Any, **_: Any) -> None:  # type: ignore[override]
        self.logged.update(values)


def stub_trainer(**changed: Any) -> Any:
    """Give what the hooks of one batch ask of a Trainer."""
    plain = {
        "fast_dev_run": False,
        "global_step": 0,
        "current_epoch": 5,
        "num_training_batches": 10,
        "log_every_n_steps": 1,
        "loggers": [object()],
        "precision_plugin": SimpleNamespace(forward_context=nullcontext),
        "state": SimpleNamespace(fn=TrainerFn.VALIDATING),
    }
    return SimpleNamespace(**(plain | changed))


def test_the_callback_runs_a_batch_and_logs_without_waiting() -> None:
    with fake_cuda():
        with torch.device("cuda"):
            model, batch = Trained(), vectors()
        trainer, callback = stub_trainer(), YDropCallback(annealing_epochs=5)
        callback.engine = YDrop.from_settings(model, callback.settings)
        with Values():
            callback.on_train_batch_start(trainer, model, batch, 0)
        with Watch() as watch:
            for index in range(1, 4):
                callback.on_train_batch_start(trainer, model, batch, index)
                model(batch[0])
            callback.state_dict()
        assert watch.findings == []
        assert {"ydrop/nonfinite", "ydrop/body.1/drop_prob", "ydrop/body.4/top20_share"} <= model.logged.keys()
        assert places(model.logged) == {"cuda"}


def test_the_monitor_looks_at_the_target_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: dict[str, Tensor] = {}
    # Torchmetrics copies the memory of a metric's defaults, and a fake tensor has none.
    monkeypatch.setattr(monitor_module, "update_spreads", lambda spreads, scores: measured.update(scores))
    with fake_cuda():
        with torch.device("cuda"):
            model, batch = Trained(), vectors()
        trainer, monitor = stub_trainer(), ConductanceMonitor(figures=False)
        with Watch() as watch:
            monitor.on_validation_batch_end(trainer, model, None, batch, 0)
        assert looks(watch.findings) == {"check"}
        assert measured.keys() == {"body.1", "body.4"}
        with Watch() as watch:
            spreads = [conductance_spread(scores.sum(0), len(scores)) for scores in measured.values()]
        assert watch.findings == []
        assert places(measured, spreads) == {"cuda"}


def planted_read(scores: Tensor, *rest: Any) -> Tensor:
    return bucket_probabilities(scores, *rest) if scores.sum() > 0 else scores


def planted_mask(scores: Tensor, *rest: Any) -> Tensor:
    scores[scores > 0].sum()
    return bucket_probabilities(scores, *rest)


def planted_shape(scores: Tensor, *rest: Any) -> Tensor:
    scores.nonzero()
    return bucket_probabilities(scores, *rest)


def planted_comparison(scores: Tensor, *rest: Any) -> Tensor:
    torch.equal(scores, scores)
    return bucket_probabilities(scores, *rest)


def planted_copy_to_the_host(scores: Tensor, *rest: Any) -> Tensor:
    scores.to("cpu", non_blocking=True)  # which would hold nothing yet, were it looked at
    return bucket_probabilities(scores, *rest)


def planted_constant(scores: Tensor, *rest: Any) -> Tensor:
    return bucket_probabilities(scores * torch.tensor([2.0], device=scores.device), *rest)


def planted_copy(scores: Tensor, *rest: Any) -> Tensor:
    scores.copy_(torch.ones(scores.shape))
    return bucket_probabilities(scores, *rest)


def planted_copy_of_many(scores: Tensor, *rest: Any) -> Tensor:
    torch._foreach_copy_([scores], [torch.ones(scores.shape)])
    return bucket_probabilities(scores, *rest)


def planted_index(scores: Tensor, *rest: Any) -> Tensor:
    return bucket_probabilities(scores[:, torch.arange(scores.shape[1])], *rest)


def planted_cumsum(scores: Tensor, *rest: Any) -> Tensor:
    return bucket_probabilities(scores.cumsum(-1), *rest)


def planted_put(scores: Tensor, *rest: Any) -> Tensor:
    first = torch.zeros(1, dtype=torch.int64, device=scores.device)
    return bucket_probabilities(scores.put_(first, scores.new_ones(1)), *rest)


@pytest.mark.parametrize(
    ("planted", "kind", "operator"),
    [
        (planted_read, "reads a value", "aten::_local_scalar_dense"),
        (planted_mask, "reads a value", "aten::index"),
        (planted_shape, "reads a value", "aten::nonzero"),
        (planted_comparison, "reads a value", "aten::equal"),
        (planted_copy_to_the_host, "copies to the host", "aten::_to_copy"),
        (planted_constant, "waits for a copy", "aten::_to_copy"),
        (planted_copy, "waits for a copy", "aten::copy_"),
        (planted_copy_of_many, "waits for a copy", "aten::_foreach_copy_"),
        (planted_index, "waits for a copy", "aten::index"),
        (planted_cumsum, "is refused", "aten::cumsum"),
        (planted_put, "is refused", "aten::put_"),
    ],
)
def test_the_watch_finds_what_is_planted(
    planted: Callable[..., Tensor], kind: str, operator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fake_cuda():
        case = ready(Case())
        monkeypatch.setattr(engine_module, "bucket_probabilities", planted)
        with Watch() as watch:
            case.engine.step(case.inputs, case.target)
    assert {(finding.kind, finding.operator) for finding in watch.findings} == {(kind, operator)}
    assert all(finding.functions[:2] == ("_update", "step") for finding in watch.findings)


def test_the_watch_finds_a_tensor_of_the_cpu_among_those_of_the_device() -> None:
    with fake_cuda():
        x, y = torch.randn(3, 4, device="cuda"), torch.randn(3, 4)
        with Watch() as watch, pytest.raises(RuntimeError, match="device"):
            x + y
        assert [finding.kind for finding in watch.findings] == ["mixes devices"]
        with Watch() as watch:
            x + torch.tensor(2.0)  # which is a number to a device
            y + y
        assert watch.findings == []


def test_the_watch_finds_what_is_refused_in_the_backward_pass() -> None:
    with fake_cuda():
        with torch.device("cuda"):
            x = torch.randn(2, 3, 4, 4, requires_grad=True)
            labels = torch.randint(3, (2, 4, 4))
        with Watch() as watch:
            value = F.interpolate(x, scale_factor=2, mode="bilinear").sum()
            torch.autograd.grad(value, [x], torch.ones_like(value))
            F.cross_entropy(x, labels)
        assert [finding.operator.removeprefix("aten::") for finding in watch.findings] == [
            "upsample_bilinear2d_backward",
            "nll_loss2d_forward",
        ]
        assert {finding.kind for finding in watch.findings} == {"is refused"}


def test_torch_documents_no_other_operator_as_refused() -> None:
    documented = (torch.use_deterministic_algorithms.__doc__ or "").partition("operations will throw a")[2]
    names = re.findall(r"\* :(?:class|func):`([\w.]+)`", documented.partition("In addition")[0])
    assert len(names) > 15
    assert set(names) <= REFUSED.keys()
    for operators in REFUSED.values():
        assert all(hasattr(torch.ops.aten, operator) for operator in operators)


def test_gradients_are_those_of_torch() -> None:
    first, second, head = nn.Linear(3, 4).double(), nn.Linear(4, 4).double(), nn.Linear(4, 2).double()
    unused = torch.zeros(2, requires_grad=True)
    hidden = first(torch.randn(5, 3).double())
    left, right = hidden.tanh().chunk(2, 1)
    joined = torch.cat([left * right, hidden.sin()[:, :2]], 1)
    value = (head(second(joined).relu()) + joined[:, 1:3]).sum(1)
    inputs = [hidden, left, joined, first.weight, head.bias, unused]
    ones = torch.ones_like(value)
    expected = torch.autograd.grad(value, inputs, ones, retain_graph=True, materialize_grads=True)
    torch.testing.assert_close(gradients(value, inputs, ones, materialize_grads=True), expected)
    assert gradients(value, inputs, ones)[-1] is None
