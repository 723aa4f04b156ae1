"""What the dry run finds in the first batch, and that nothing which it could have found ends training later."""

import math
import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torchvision.models.feature_extraction import create_feature_extractor

from lightning_ydrop import (
    ConductanceDropout,
    ConfigurationError,
    Measure,
    NegativeLoss,
    NoEffectWarning,
    Objective,
    OutputSum,
    PredictedLogit,
    TargetLogit,
    YDrop,
    layer_conductance,
)
from tests.networks import network_and_batch, perceptron
from tests.sameness import assert_same

X, Y = torch.randn(16, 12, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 5


class Around(nn.Module):
    """A function around a perceptron, which it is given."""

    def __init__(self, call: Callable[..., Any], body: nn.Module | None = None) -> None:
        super().__init__()
        self.call, self.body = call, body or perceptron()

    def forward(self, *inputs: Any) -> Any:
        return self.call(self.body, *inputs)


# Samples that influence each other


class Attending(nn.Module):
    """Attention over the first dimension, as torch has it by default."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.TransformerEncoderLayer(12, 2, 16, 0.0), nn.Linear(12, 5)
        self.drop = ConductanceDropout(unit_dim=-1)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.drop(self.body(x)))


class Recurring(Attending):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.LSTM(12, 12)  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Any:
        return self.head(self.drop(self.body(x)[0]))


def standardised(body: nn.Module, x: Tensor) -> Any:
    return body((x - x.mean(0)) / x.std(0))


MIXING: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "attention over the batch": (Attending(), (16, 4, 12)),
    "a recurrent layer over the batch": (Recurring(), (16, 4, 12)),
    "a batch standardised by hand": (Around(standardised), (16, 12)),
    "a softmax over the batch": (Around(lambda body, x: body(x).softmax(0)), (16, 12)),
    "a centred batch": (Around(lambda body, x: body(x - x.mean(0))), (16, 12)),
    "neighbours": (Around(lambda body, x: body(x) + body(x).roll(1, 0)), (16, 12)),
    "a running sum": (Around(lambda body, x: body(x).cumsum(0)), (16, 12)),
}


@pytest.mark.parametrize("kind", list(MIXING))
def test_samples_that_influence_each_other_are_told_of(kind: str) -> None:
    model, shape = MIXING[kind]
    with pytest.warns(UserWarning, match="samples influence each other") as caught:
        YDrop(model, objective=OutputSum()).step(torch.randn(shape))
    text = str(caught[0].message)
    assert "with batch_dim=0" in text
    assert "pass batch_dim=1." in text


def test_the_other_layout_is_proposed_where_batch_dim_was_given() -> None:
    model = nn.Sequential(nn.GRU(12, 12, batch_first=True))
    batch_first = Around(lambda body, x: body(x)[0], nn.Sequential())
    batch_first.body = model[0]
    batch_first.call = lambda body, x: ConductanceDropout.forward(drop, body(x)[0])
    drop = batch_first.drop = ConductanceDropout(unit_dim=-1)
    batch_first.call = lambda body, x: drop(body(x)[0])
    with pytest.warns(UserWarning, match=r"with batch_dim=1.*pass batch_dim=0\."):
        YDrop(batch_first, objective=OutputSum(), batch_dim=1).step(torch.randn(16, 4, 12))


def noise(body: nn.Module, x: Tensor) -> Any:
    return body(x) + torch.randn(len(x), 5)


def noise_of_python(body: nn.Module, x: Tensor) -> Any:
    return body(x) * random.uniform(0.5, 1.5)


def noise_of_numpy(body: nn.Module, x: Tensor) -> Any:
    return body(x) * float(np.random.rand())  # noqa: NPY002


def always_dropping(body: nn.Module, x: Tensor) -> Any:
    return body(nn.functional.dropout(x, 0.5, training=True))


def deep() -> nn.Module:
    torch.manual_seed(5)
    hidden = [part for _ in range(40) for part in (nn.Linear(64, 64), nn.ReLU())]
    return nn.Sequential(nn.Linear(12, 64), ConductanceDropout(), *hidden, nn.Linear(64, 5))


SOUND: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "BatchNorm": lambda: (network_and_batch("convolutional", batch=16)[0], torch.randn(16, 2, 8, 8)),
    "noise": lambda: (Around(noise), X),
    "noise of Python's": lambda: (Around(noise_of_python), X),
    "noise of NumPy's": lambda: (Around(noise_of_numpy), X),
    "dropout that is always on": lambda: (Around(always_dropping), X),
    "half precision": lambda: (perceptron().half(), X.half()),
    "bfloat16": lambda: (perceptron().bfloat16(), X.bfloat16()),
    "float16 outputs": lambda: (Around(lambda body, x: body(x).half()), X),
    "a deep ReLU network": lambda: (deep(), X),
    "outputs that are not finite": lambda: (Around(lambda body, x: body(x).masked_fill(x[:, :5] < 0, -math.inf)), X),
    "a single sample": lambda: (Around(lambda body, x: body(x).softmax(0)), X[:1]),
}


@pytest.mark.parametrize("kind", list(SOUND))
def test_sound_models_are_not_told_of(kind: str) -> None:
    model, x = SOUND[kind]()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", NoEffectWarning)
        YDrop(model).dry_run(x, Y[: len(x)])


def test_nor_are_models_in_autocast() -> None:
    for build in (perceptron, deep):
        model = build()
        with torch.autocast("cpu", torch.bfloat16):
            YDrop(model).step(X, Y)


# What the first batch shows does not end training


def squeezing(body: nn.Module, x: Tensor) -> Any:
    return body(x).unsqueeze(2).squeeze()


def masked(body: nn.Module, x: Tensor, mask: Tensor) -> Any:
    """A causal mask, without samples: (T, T) for x (B, T, 12)."""
    return body((mask.to(x) @ x).mean(1))


@pytest.mark.parametrize("sizes", [(16, 1), (16, 2, 3), (1, 16), (7, 6, 5, 1, 16)])
@pytest.mark.parametrize("call", [squeezing, lambda body, x: body(x)])
def test_batches_may_have_any_size(call: Callable[..., Any], sizes: tuple[int, ...]) -> None:
    engine = YDrop(Around(call), every_n_batches=1)
    for size in sizes:
        engine.step(X[:size], Y[:size])
    assert engine.state_dict()["steps_taken"] == len(sizes)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
@pytest.mark.parametrize("sizes", [(6, 6), (6, 4, 9), (4, 6, 9), (9, 6, 6)])
def test_a_mask_of_all_samples_may_have_as_many_rows_as_there_are_samples(
    dtype: torch.dtype, sizes: tuple[int, ...]
) -> None:
    steps = 6
    mask = torch.ones(steps, steps, dtype=torch.bool).tril().to(dtype)
    baseline: Any = [0.0, None] if dtype == torch.float32 else 0.0
    model = Around(masked)
    alike = Around(lambda body, x: masked(body, x, mask))
    alike.load_state_dict(model.state_dict())
    engine, expected = YDrop(model, baseline=baseline, num_samples="all"), YDrop(alike, num_samples="all")
    for size in sizes:
        x, y = torch.randn(size, steps, 12), torch.arange(size) % 5
        engine.step((x, mask), y)
        expected.step(x, y)
        for name, scores in expected.scores.items():
            assert torch.allclose(engine.scores[name], scores, atol=1e-5), (name, size)


def test_of_two_masks_the_one_without_samples_is_found() -> None:
    def call(body: nn.Module, x: Tensor, padding: Tensor, mask: Tensor) -> Any:
        return masked(body, x * ~padding.unsqueeze(2), mask)

    mask, padding = torch.ones(6, 6, dtype=torch.bool).tril(), torch.rand(6, 6) < 0.3
    x, y, model = torch.randn(6, 6, 12), torch.arange(6) % 5, Around(call)
    engine = YDrop(model, num_samples="all")
    engine.step((x, padding, mask), y)
    # Of a sample alone there is no doubt.
    alone = [layer_conductance(model, (x[[j]], padding[[j]], mask), y[[j]], n_steps=5) for j in range(6)]
    for name, scores in engine.scores.items():
        assert torch.allclose(scores, torch.cat([each[name] for each in alone]).mean(0), atol=1e-5)


class Sorted(nn.Module):
    """Takes sequences sorted by their lengths alone."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.drop, self.head = nn.LSTM(6, 8, batch_first=True), ConductanceDropout(), nn.Linear(8, 3)

    def forward(self, x: Tensor, lengths: Tensor) -> Any:
        packed = pack_padded_sequence(x, lengths, batch_first=True)
        return self.head(self.drop(self.lstm(packed)[1][0][-1]))


@pytest.mark.parametrize("seed", range(4))
def test_what_takes_rows_in_one_order_alone_fails_in_the_first_step_with_a_note(seed: int) -> None:
    torch.manual_seed(seed)
    lengths = torch.randint(1, 3, (18,)).sort(descending=True).values
    with pytest.raises(RuntimeError, match="sorted in decreasing order") as caught:
        YDrop(Sorted()).step((torch.randn(18, 5, 6), lengths), torch.randint(0, 3, (18,)))
    (note,) = caught.value.__notes__
    assert note.startswith("lightning_ydrop called Sorted.forward with 9 rows: tuple(Tensor(shape=(9, 5, 6)")
    assert "in any order and number" in note
    assert "`ydrop_forward`" in note


def test_labels_out_of_range_in_later_batches_count_for_nothing() -> None:
    engine, expected = (YDrop(perceptron(), num_samples="all") for _ in range(2))
    expected.model.load_state_dict(engine.model.state_dict())
    wrong, ignored = Y.clone(), Y.clone()
    wrong[3], wrong[5], wrong[7] = 5, -1, 255
    ignored[[3, 5, 7]] = -100
    for ours, theirs in ((Y, Y), (wrong, ignored), (wrong, ignored)):
        engine.step(X, ours)
        expected.step(X, theirs)
        assert_same(engine.scores, expected.scores)
    assert engine.unusable == 6
    assert expected.unusable == 0
    assert engine.state_dict()["unusable"] == 6
    resumed = YDrop(engine.model, num_samples="all")
    resumed.load_state_dict(engine.state_dict())
    assert resumed.unusable == 6
    resumed.step(X, Y)
    resumed.step(X, wrong)
    assert resumed.unusable == 9
    engine.reset()
    assert engine.unusable == 0


@pytest.mark.parametrize("labels", [torch.zeros(16, dtype=torch.long), Y % 2, torch.full((16,), -100)])
def test_integer_labels_for_a_single_logit_are_refused_whatever_they_are(labels: Tensor) -> None:
    with pytest.raises(ConfigurationError, match="a single logit"):
        YDrop(Around(lambda body, x: body(x)[:, :1])).step(X, labels)


class NeedsRows(Around):
    """Fails for fewer rows than it takes to estimate something."""

    def __init__(self, rows: int) -> None:
        super().__init__(lambda body, x: body(x))
        self.rows = rows

    def forward(self, *inputs: Any) -> Any:
        if len(inputs[0]) < self.rows:
            raise ValueError(f"fewer than {self.rows} rows")
        return super().forward(*inputs)


@pytest.mark.parametrize("progress", [0.5, 1.0])
def test_batches_that_are_too_small_for_the_model_are_passed_over(progress: float) -> None:
    model = NeedsRows(7)  # one sample and five steps are six
    engine = YDrop(model, elasticity=0.5)
    with pytest.warns(UserWarning, match=r"Phase 1 raised ValueError for a batch of a single sample: fewer than 7"):
        engine.step(X, Y, progress=progress)
    before = engine.state_dict()
    engine.step(X[:1], Y[:1], progress=progress)
    engine.step(X[:15], Y[:15], progress=progress)
    assert_same(engine.state_dict(), before | {"steps_taken": 3})
    engine.step(X, Y, progress=1.0)
    assert not torch.equal(engine.layers["body.1"].mean_drop_prob, before["layers"]["body.1"]["mean_drop_prob"])


def test_a_batch_without_samples_in_any_layout_is_passed_over() -> None:
    model = Attending()
    model.drop = ConductanceDropout(unit_dim=-1, batch_dim=1)
    engine = YDrop(model, objective=OutputSum(), batch_dim=1)
    engine.step(torch.randn(4, 0, 12))
    assert engine.findings is None
    engine.step(torch.randn(4, 16, 12))
    engine.step((torch.randn(4, 0, 12),))
    assert engine.state_dict()["steps_taken"] == 3


# What phase 1 can do itself


def forces(body: nn.Module, x: Tensor) -> Any:
    x = x.detach().requires_grad_()
    return -torch.autograd.grad(body(x).square().sum(), x, create_graph=True)[0]


def of_inputs(body: nn.Module, x: Tensor) -> Any:
    """Gradients of the inputs as they come, where they take some."""
    if not x.requires_grad:
        x = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(body(x).sum(), x, create_graph=True)
    return body(x) + slope[:, :5]


def adapted(body: nn.Module, x: Tensor) -> Any:
    """An inner loop, as in meta-learning: one step on the parameters, and the outputs after it."""
    weights = dict(body.named_parameters())
    loss = body(x).square().sum(1).mean() * 0 + sum(each.square().sum() for each in weights.values())
    slopes = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
    moved = {name: each - 0.01 * slope for (name, each), slope in zip(weights.items(), slopes, strict=True)}
    return torch.func.functional_call(body, moved, (x,))


def hooked(body: nn.Module, x: Tensor) -> Any:
    hidden = body[0](x)  # type: ignore[index]
    hidden.register_hook(lambda gradient: None)
    return body[1:](hidden)  # type: ignore[index]


def retained(body: nn.Module, x: Tensor) -> Any:
    hidden = body[0](x)  # type: ignore[index]
    hidden.retain_grad()
    return body[1:](hidden)  # type: ignore[index]


GRADIENTS = {"forces": forces, "inputs": of_inputs, "parameters": adapted, "hook": hooked, "retain_grad": retained}
# Hooks and retain_grad need a graph where training has one; so do the first three, each of something else.
OBJECTIVES: list[Objective] = [
    TargetLogit(),
    PredictedLogit(),
    OutputSum(),
    NegativeLoss(nn.CrossEntropyLoss(reduction="none")),
]


def smooth() -> nn.Module:
    return perceptron(nn.Tanh)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda each: type(each).__name__)
@pytest.mark.parametrize("kind", list(GRADIENTS))
def test_gradients_may_be_taken_inside_forward(kind: str, objective: Objective) -> None:
    model = Around(GRADIENTS[kind], smooth())
    scores = layer_conductance(model, X, Y, objective=objective, n_steps=5)
    engine = YDrop(model, objective=objective, num_samples="all")
    for _ in range(2):
        engine.step(X, Y)
    for name, expected in scores.items():
        assert expected.abs().sum() > 0
        assert torch.allclose(engine.scores[name], expected.mean(0), atol=1e-5)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_also_where_the_first_look_takes_no_graph() -> None:
    def penalised(body: nn.Module, x: Tensor) -> Any:
        output = body(x)
        if not torch.is_grad_enabled():
            return output
        (slope,) = torch.autograd.grad(output.sum(), body[6].weight, create_graph=True)  # type: ignore[index]
        return output + slope.square().sum()

    model = Around(penalised, smooth())
    model.gradient_checkpointing = True  # type: ignore[assignment] # so the dry run is careful with memory
    engine = YDrop(model)
    engine.step(X, Y)
    assert engine.layers["body.1"].active


class Tokens(nn.Module):
    """An embedding in front of a function that takes gradients."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.embedding, self.rest = nn.Embedding(9, 12), Around(GRADIENTS[kind], smooth())

    def forward(self, ids: Tensor) -> Any:
        return self.rest(self.embedding(ids).mean(1))


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda each: type(each).__name__)
@pytest.mark.parametrize("kind", list(GRADIENTS))
def test_also_behind_a_module_at_which_paths_end(kind: str, objective: Objective) -> None:
    engine = YDrop(Tokens(kind), objective=objective, interpolate_at="embedding")
    ids = torch.randint(0, 9, (16, 4))
    engine.step(ids, Y)
    engine.step(ids, Y)
    assert all(scores.any() for scores in engine.scores.values())


@pytest.mark.parametrize("trace", [torch.fx.symbolic_trace, lambda model: create_feature_extractor(model, ["6"])])
def test_traced_models_are_driven(trace: Callable[[nn.Module], nn.Module]) -> None:
    model = perceptron()
    traced = trace(model)
    expected = YDrop(model, num_samples="all")
    expected.step(X, Y)
    engine = YDrop(traced, num_samples="all")
    engine.step(X, Y)
    assert len(engine.scores) == 2
    for one, other in zip(engine.scores.values(), expected.scores.values(), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


# Notes


class Broken(Around):
    def __init__(self) -> None:
        super().__init__(lambda body, x: body(x).view(16, 5))


def note_of(call: Callable[[], object], kind: type[Exception], text: str) -> str:
    """Give the one note on what a call raises, whose type and words are the user's."""
    with pytest.raises(kind) as caught:
        call()
    assert type(caught.value) is kind
    assert str(caught.value).startswith(text)
    (note,) = caught.value.__notes__
    assert note.startswith("lightning_ydrop called ")
    return note


@pytest.mark.parametrize("entry", [lambda model: YDrop(model).step(X, Y), lambda model: layer_conductance(model, X, Y)])
def test_what_forward_raises_has_a_note(entry: Callable[[nn.Module], object]) -> None:
    note = note_of(lambda: entry(Broken()), RuntimeError, "shape '[16, 5]' is invalid")
    assert "called Broken.forward with" in note
    assert "dtype=torch.float32" in note
    assert "`ydrop_inputs(batch)`" in note


def test_what_another_function_raises_has_a_note() -> None:
    def own_forward(x: Tensor) -> Any:
        raise KeyError("missing")

    note = note_of(lambda: YDrop(perceptron(), forward=own_forward).step(X, Y), KeyError, "'missing'")
    assert "own_forward with 16 rows: tuple(Tensor(shape=(16, 12)" in note
    assert "pass forward=...." in note


def failing_loss(output: Tensor, target: Tensor) -> Tensor:
    if len(output) > 16:
        raise ZeroDivisionError("too many rows")
    return nn.functional.cross_entropy(output, target, reduction="none")


def test_what_a_loss_raises_has_a_note() -> None:
    note = note_of(
        lambda: layer_conductance(perceptron(), X, Y, objective=NegativeLoss(failing_loss)),
        ZeroDivisionError,
        "too many rows",
    )
    assert "called NegativeLoss(" in note
    assert "Let it take any number of rows" in note


class Failing(Measure):
    def score(self, request: Any) -> dict[str, Tensor]:
        raise LookupError("no scores")


def test_what_a_measure_raises_has_a_note() -> None:
    note = note_of(lambda: YDrop(perceptron(), measure=Failing()).step(X, Y), LookupError, "no scores")
    assert "Failing" in note


def test_our_own_errors_need_none() -> None:
    for call in (
        lambda: YDrop(perceptron()).step(X, Y + 9),
        lambda: YDrop(Around(lambda body, x: body(x).mean())).step(X, Y),
        lambda: layer_conductance(perceptron(), X, Y[:3]),
    ):
        with pytest.raises(ConfigurationError) as caught:
            call()
        assert not hasattr(caught.value, "__notes__")


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_of_either_layout_are_refused(layout: torch.layout) -> None:
    nested = torch.nested.nested_tensor([torch.randn(2, 12), torch.randn(5, 12)], layout=layout)
    for inputs in (nested, (nested,), {"input": nested}):
        with pytest.raises(ConfigurationError, match=r"not all of them dense.*to_padded_tensor"):
            YDrop(perceptron()).step(inputs)


def test_a_packed_sequence_is_refused_too() -> None:
    packed = pack_padded_sequence(torch.randn(3, 5, 12), torch.tensor([5, 3, 1]), batch_first=True)
    for inputs in (packed, (packed,), [packed]):
        with pytest.raises(ConfigurationError, match=r"not all of them dense.*pad_packed_sequence"):
            YDrop(perceptron()).step(inputs)


# What has no effect


@pytest.mark.parametrize(
    "call",
    [
        lambda body, x: body(x / x.norm(dim=1, keepdim=True)),
        lambda body, x: body((x - x.mean(1, True)) / x.std(1, keepdim=True)),
        lambda body, x: body(x.square().log()),
    ],
)
def test_a_baseline_at_which_the_model_has_no_value_is_named(call: Callable[..., Any]) -> None:
    with pytest.warns(NoEffectWarning, match="not finite at the baseline, 0.0") as caught:
        YDrop(Around(call)).step(X, Y)
    assert any(str(each.message).endswith("such as baseline=0.1.") for each in caught)
    engine = YDrop(Around(call), baseline=torch.linspace(0.1, 0.7, 12))  # warnings are errors
    engine.step(X, Y)
    assert engine.nonfinite == 0


def test_a_sample_that_is_not_finite_is_not_the_baselines_fault() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        YDrop(perceptron(), num_samples="all").step(X * math.inf, Y)


class InTraining(nn.Module):
    """Calls a layer in training mode alone."""

    def __init__(self, other: bool) -> None:
        super().__init__()
        self.body, self.drop, self.other = nn.Linear(12, 5), ConductanceDropout(), other
        self.second = ConductanceDropout()

    def forward(self, x: Tensor) -> Any:
        hidden = self.body(x)
        if self.other:
            hidden = self.second(hidden)
        return self.drop(hidden) if self.training else hidden


def test_a_layer_that_is_called_in_training_alone_is_named() -> None:
    engine = YDrop(InTraining(True))
    with pytest.warns(NoEffectWarning, match=r"no score for 'drop': .*in training mode alone.*`if self.training`"):
        engine.step(X, Y)
    assert (engine.layers["second"].active, engine.layers["drop"].active) == (True, False)
    model = InTraining(False)
    del model.second
    with pytest.raises(ConfigurationError, match=r"scores none of 'drop'.*It calls 'drop' in training mode alone"):
        YDrop(model).step(X, Y)
    assert model.training
