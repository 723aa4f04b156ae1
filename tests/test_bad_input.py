"""What a user can get wrong, and that it ends in words of ours before anything is trained."""

import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lightning_ydrop
from lightning_ydrop import (
    Adapter,
    Buckets,
    CaptumMeasure,
    Conductance,
    ConductanceDropout,
    ConfigurationError,
    HalfNormalRate,
    IndexAdapter,
    KeyAdapter,
    Measure,
    NegativeLoss,
    Objective,
    PredictedLogit,
    TargetLogit,
    YDrop,
    YDropCallback,
    convert_dropout,
)
from tests.callbacks.test_ydrop import trainer_of
from tests.networks import perceptron

B = 16
X = torch.randn(B, 12, generator=torch.Generator().manual_seed(0))
Y = torch.arange(B) % 5
TOKENS = torch.arange(B * 6).reshape(B, 6) % 9
FLOAT_NAN = float("nan")
# Newer releases of Lightning say so where nobody has chosen; older ones have no such choice.
LOADING: Any = {"weights_only": False} if "weights_only" in inspect.signature(Trainer.fit).parameters else {}


def check_sentences(error: ConfigurationError) -> None:
    """What was given, what is allowed, how to mend it."""
    assert len(error.args) == 3
    for sentence in error.args:
        assert isinstance(sentence, str)
        assert sentence.strip().endswith(".")
        assert len(sentence) > 10
    assert str(error) == " ".join(error.args)


# Constructors


def later(make: Any, *args: Any, **kwargs: Any) -> Any:
    """Call it in the test, with arguments that a type checker would refuse as well."""
    return partial(make, *args, **kwargs)


def told(owner: str, name: str, *values: Any) -> list[Any]:
    """Give an argument each of some wrong values: the message has to name both."""
    made = later(YDrop, perceptron()) if owner == "YDrop" else getattr(lightning_ydrop, owner)
    return [
        pytest.param(
            later(made, **{name: value}), f"{owner}({name}={value!r}) was given.", id=f"{owner}.{name}={value!r}"
        )
        for value in values
    ]


SETTINGS: dict[str, tuple[Any, ...]] = {
    "elasticity": (-1e-3, 1.5, FLOAT_NAN, "fast", None, True),
    "initial_drop_prob": (-0.1, 1.0, FLOAT_NAN, "half", True),
    "n_steps": (0, -5, 2.5, "5", None, True),
    "num_samples": (0, -1, 2.5, "12", True),
    "baseline": (FLOAT_NAN, float("inf"), "black", None, True),
    "quadrature": ("middle", 1, None),
    "seed": (-1, 0.5, "0", None),
    "buckets": (0.5, True),
    "measure": ("Conductance", None),
    "objective": ("TargetLogit", 1),
    "interpolate_at": (1, 0.5),
    "batch_dim": (-1, 0.5, "1", None, True),
}
OF_THE_SCHEDULE: dict[str, tuple[Any, ...]] = {
    "annealing_epochs": (-1, 1.5, "2", True),
    "annealing_steps": (-1, 1.5, "100", True),
    "transition": ("ramp", 1, None),
    "every_n_batches": (0, -1, 1.5, "1", None),
    "adapter": ("KeyAdapter", None),
}
CLASS_DIMS = (0, 1.5, "1", None, True)

CONSTRUCTORS = [
    *(
        case
        for owner in ("YDropCallback", "YDrop")
        for name, wrong in SETTINGS.items()
        for case in told(owner, name, *wrong)
    ),
    *(case for name, wrong in OF_THE_SCHEDULE.items() for case in told("YDropCallback", name, *wrong)),
    *told("ConductanceDropout", "p", -0.1, 1.0, 1, "half", None, True),
    *told("ConductanceDropout", "unit_dim", 0, 1.5, "last", None, True),
    *told("Jumpout", "p_min", -0.1, 1.0, "half", None, True),
    *told("Jumpout", "p_max", -0.1, 1.0, 1, None),
    *told("Jumpout", "sigma", -0.1, float("inf"), "wide", None),
    *told("Jumpout", "scale_exponent", -1, float("nan"), None),
    *told("Jumpout", "granularity", "unit", None),
    *told("PatternDropout", "pattern", "all", None, 0.5),
    *told("Buckets", "strong_fraction", -0.1, 1.1, "half", None),
    *told("Buckets", "low", 0.1, None),
    *told("Buckets", "high", 0.6, None),
    *told("TargetLogit", "class_dim", *CLASS_DIMS),
    *told("PredictedLogit", "class_dim", *CLASS_DIMS),
    *told("NegativeLoss", "loss", None, "mse", 1),
    *told("Inverted", "measure", None, "Conductance"),
    *told("Shuffled", "measure", None, "Conductance"),
    *told("CaptumMeasure", "attribution", "Nothing", "LayerLRP", 3, None),
    *(
        pytest.param(make, text, id=text)
        for make, text in [
            (later(YDropCallback, measure=Conductance), "YDropCallback(measure=the class Conductance)"),
            (later(YDropCallback, objective=nn.MSELoss()), "YDropCallback(objective=MSELoss)"),
            (later(YDropCallback, objective=TargetLogit), "YDropCallback(objective=the class TargetLogit)"),
            (later(YDropCallback, adapter=KeyAdapter), "YDropCallback(adapter=the class KeyAdapter)"),
            (later(YDropCallback, adapter=len), "An adapter is an instance of a subclass of lightning_ydrop.Adapter"),
            (later(YDropCallback, buckets={"strong_fraction": 0.5}), "buckets=dict('strong_fraction': 0.5)"),
            (later(YDropCallback, baseline=[0.0, "black"]), "baseline=list(0.0, 'black')"),
            (later(YDropCallback, baseline=torch.tensor(FLOAT_NAN)), "baseline=Tensor(shape=()"),
            (later(YDropCallback, interpolate_at=nn.Linear(2, 2)), "interpolate_at=Linear"),
            (later(YDropCallback, 1, annealing_steps=9), "Annealing is counted in epochs or in optimiser steps."),
            (later(YDropCallback, include="classifier.*"), "`include` and `exclude` say what to convert."),
            (later(YDropCallback, exclude=["head"]), "convert=False, include=None, exclude=list('head')"),
            (later(YDrop, nn.Linear(2, 2)), "Linear holds no ConductanceDropout; dropout-like modules in it: none."),
            (later(YDrop, nn.Sequential(nn.Dropout())), "dropout-like modules in it: 0 (Dropout)."),
            (later(YDrop, perceptron(), interpolate_at="embedding"), "YDrop(interpolate_at='embedding') was given."),
            (later(YDrop, perceptron(), interpolate_at=""), "YDrop(interpolate_at='') was given."),
            (later(HalfNormalRate, -0.1, 0.0, 0.5), "HalfNormalRate(mean=-0.1)"),
            (later(HalfNormalRate, "low", 0.0, 0.5), "HalfNormalRate(mean='low')"),
            (later(HalfNormalRate, 0.1, -1.0, 0.5), "HalfNormalRate(std=-1.0)"),
            (later(HalfNormalRate, 0.1, FLOAT_NAN, 0.5), "HalfNormalRate(std=nan)"),
            (later(HalfNormalRate, 0.1, 0.0, 1.0), "HalfNormalRate(max=1.0)"),
            (later(HalfNormalRate, 0.5, 0.0, 0.4), "`max` caps the rate, so it is at least `mean`."),
            (later(Buckets, HalfNormalRate(0.7, 0, 0.8)), "Strong units are dropped more often"),
            (later(KeyAdapter, inputs=1), "KeyAdapter(inputs=1, target='labels')"),
            (later(KeyAdapter, inputs=[]), "KeyAdapter(inputs=list(), target='labels')"),
            (later(KeyAdapter, inputs=("a", 1)), "KeyAdapter(inputs=tuple('a', 1), target='labels')"),
            (later(KeyAdapter, target=2), "KeyAdapter(inputs='pixel_values', target=2)"),
            (later(IndexAdapter, inputs="x"), "IndexAdapter(inputs='x', target=1)"),
            (later(IndexAdapter, inputs=True), "IndexAdapter(inputs=True, target=1)"),
            (later(IndexAdapter, inputs=None), "IndexAdapter(inputs=None, target=1)"),
            (later(IndexAdapter, target=0.5), "IndexAdapter(inputs=0, target=0.5)"),
            (later(convert_dropout, nn.Dropout()), "convert_dropout(Dropout(p=0.5, inplace=False)) was given."),
            (later(convert_dropout, perceptron(), include="head"), "The pattern 'head' was given"),
            (later(convert_dropout, perceptron(), exclude=["1", "head"]), "The pattern 'head' was given"),
            (later(convert_dropout, perceptron(), include=[3]), "convert_dropout(include=list(3)) was given."),
            (later(convert_dropout, perceptron(), unit_dim={"head": 1}), "The pattern 'head' was given"),
            (
                later(convert_dropout, perceptron(), unit_dim={"head": 1}),
                'Pass, for example, unit_dim={"1": -1}.',
            ),
            (later(convert_dropout, perceptron(), exclude="head"), 'Pass, for example, exclude="1".'),
        ]
    ),
]


# What is let through, or ends in Python's words: whoever mends one moves it up, with its text.
OTHERS = [
    pytest.param(make, text, id=name)
    for name, (make, text) in {
        "YDropCallback.convert": (later(YDropCallback, convert="yes"), "YDropCallback(convert='yes')"),
        "YDropCallback.include": (later(YDropCallback, convert=True, include=3), "YDropCallback(include=3)"),
        "YDropCallback.interpolate_at": (later(YDropCallback, interpolate_at=""), "YDropCallback(interpolate_at='')"),
        "YDropCallback.baseline": (later(YDropCallback, baseline=[]), "YDropCallback(baseline=list())"),
        "YDrop.model": (later(YDrop, None), "YDrop(None)"),
        "YDrop.forward": (later(YDrop, perceptron(), forward=3), "YDrop(forward=3)"),
        "KeyAdapter.keywords": (later(KeyAdapter, keywords="yes"), "KeyAdapter(keywords='yes')"),
        "TargetLogit.ignore_index": (later(TargetLogit, ignore_index="none"), "TargetLogit(ignore_index='none')"),
        "NegativeLoss.loss": (later(NegativeLoss, nn.MSELoss), "NegativeLoss(loss=the class MSELoss)"),
        "CaptumMeasure.attribution": (later(CaptumMeasure, ["LayerDeepLift"]), "CaptumMeasure(attribution=list("),
        "CaptumMeasure.arguments": (later(CaptumMeasure, arguments=3), "arguments=3)"),
        "CaptumMeasure.arguments that captum lacks": (
            later(CaptumMeasure, arguments={"steps": 3}),
            "arguments=dict('steps': 3)) was given. `arguments` names some of captum's: inputs, baselines",
        ),
        "ConductanceDropout.elementwise": (
            later(ConductanceDropout, elementwise="no"),
            "ConductanceDropout(elementwise='no')",
        ),
        "convert_dropout.model": (later(convert_dropout, None), "convert_dropout(None)"),
        "convert_dropout.include": (later(convert_dropout, perceptron(), include=3), "convert_dropout(include=3)"),
        "convert_dropout.unit_dim": (later(convert_dropout, perceptron(), unit_dim=[1]), "unit_dim=list(1))"),
    }.items()
]


@pytest.mark.parametrize(("make", "text"), [*CONSTRUCTORS, *OTHERS])
def test_a_wrong_argument_is_refused_when_it_is_given(make: Callable[[], Any], text: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        make()
    assert text in str(caught.value)
    check_sentences(caught.value)


@pytest.mark.parametrize("unit_dim", [0, "last", 1.5])
def test_a_wrong_dimension_for_a_converted_layer_is_refused(unit_dim: Any) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    with pytest.raises(ConfigurationError) as caught:
        convert_dropout(model, unit_dim={"1": unit_dim})
    assert f"(unit_dim={unit_dim!r}) was given." in str(caught.value)
    check_sentences(caught.value)


# Fits


class Batches:
    """Hands out batches as they are: any object can be one."""

    def __init__(self, *batches: Any) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


class Net(LightningModule):
    """Classifies by a body, and counts its training steps."""

    def __init__(self, body: nn.Module | None = None) -> None:
        super().__init__()
        self.body = perceptron() if body is None else body
        self.training_steps = 0

    def forward(self, x: Any) -> Any:
        return self.body(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.training_steps += 1
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def net(forward: Callable[..., Any]) -> Net:
    """A network whose forward returns something else than its logits."""

    class Odd(Net):
        def forward(self, x: Any) -> Any:
            return forward(self.body(x))

    return Odd()


def reading(value: Any) -> Net:
    """A network that reads its batches so."""

    class Reading(Net):
        def ydrop_inputs(self, batch: Any) -> Any:
            return value

    return Reading()


class Attributed(Net):
    """A network with something else in the place of one of its own methods for Y-Drop."""

    def __init__(self, name: str) -> None:
        super().__init__()
        setattr(self, name, 3)


class NoForward(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.body = perceptron()
        self.training_steps = 0

    training_step = Net.training_step
    configure_optimizers = Net.configure_optimizers


class TwoArguments(Net):
    def forward(self, x: Tensor, other: Tensor) -> Any:  # type: ignore[override]
        return self.body(x + other.mean())


class Named(Net):
    def forward(self, **inputs: Tensor) -> Any:  # type: ignore[override]
        return self.body(inputs["x"])


class OwnBatches(Net):
    def training_step(self, dataloader_iter: Any) -> Tensor:  # type: ignore[override]
        raise AssertionError("nothing is to be trained")


class NotCalling(Net):
    def forward(self, x: Tensor) -> Any:
        return self.body[6](self.body[3](self.body[0](x).relu()).relu())  # type: ignore[index]


class Tokens(Net):
    """Embeds tokens, normalises twice by one and the same layer, and looks at neither of two others."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(9, 12), nn.LayerNorm(12)
        self.keep, self.lstm, self.unused = nn.Identity(), nn.LSTM(12, 12, batch_first=True), nn.Embedding(9, 12)

    def forward(self, x: Tensor) -> Any:
        embedded = self.norm(self.norm(self.embedding(self.keep(x))))
        return self.body(self.lstm(embedded)[0].mean(1))


class BatchSecond(nn.Module):
    """Recurrent, and as torch's recurrent layers are by default."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.drop, self.head = nn.LSTM(4, 8), ConductanceDropout(unit_dim=-1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Any:
        hidden, _ = self.lstm(x.reshape(len(x), 3, 4).transpose(0, 1))
        return self.head(self.drop(hidden)[-1])


class OneNumber(nn.Module):
    """Drops single numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.drop = nn.Linear(12, 5), ConductanceDropout()

    def forward(self, x: Tensor) -> Any:
        return self.linear(x) * self.drop(x.sum(1)).unsqueeze(1)


class Reentrant(Net):
    def forward(self, x: Tensor) -> Any:
        return checkpoint(self.body[3:], self.body[:3](x), use_reentrant=True)  # type: ignore[index]


class Giving(Measure):
    """Scores the layers so."""

    def __init__(self, **scores: Any) -> None:
        self.scores = scores

    def score(self, phase1: Any) -> dict[str, Tensor]:
        return {name.replace("_", "."): scores for name, scores in self.scores.items()}


class Nothing(Measure):
    """Forgets to return its scores."""

    def score(self, phase1: Any) -> Any:
        return None


class F(Objective):
    """Any function of the outputs."""

    def __init__(self, of: Callable[[Tensor], Any]) -> None:
        self.of = of

    def __call__(self, output: Tensor, target: Any) -> Any:
        return self.of(output)


class Read(Adapter):
    """Reads any batch so."""

    def __init__(self, read: Any) -> None:
        self.as_read = read

    def read(self, batch: Any) -> Any:
        return self.as_read


class TwoWidths(nn.Module):
    """Calls one layer twice, with features of different width."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.drop, self.second = nn.Linear(12, 8), ConductanceDropout(), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Any:
        return self.drop(self.second(self.drop(self.first(x))))


def loss_that_is_a_number(output: Tensor, target: Tensor) -> Any:
    return float(nn.functional.cross_entropy(output, target))


@dataclass(frozen=True)
class Fit:
    """A fit that is refused.

    Attributes:
        name: What is wrong with it.
        text: A distinctive part of the message.
        net: Builds the LightningModule.
        batch: The batch of every step.
        settings: Arguments of the callback.

    """

    name: str
    text: str
    net: Callable[[], LightningModule] = Net
    batch: Any = (X, Y)
    settings: dict[str, Any] = field(default_factory=dict)


def wrong(name: str, text: str, *marks: Any, **kwargs: Any) -> Any:
    """A Fit, as a parameter of a test."""
    return pytest.param(Fit(name, text, **kwargs), id=name, marks=marks)


def body(*layers: nn.Module) -> Callable[[], Net]:
    return lambda: Net(nn.Sequential(*layers))


FITS = [
    # Models
    wrong(
        "no layers",
        "Net holds no ConductanceDropout; dropout-like modules in it: body.1 (Dropout), body.4 (Dropout).",
        net=lambda: Net(perceptron(dropout=nn.Dropout)),
    ),
    wrong("no dropout at all", "dropout-like modules in it: none.", net=body(nn.Linear(12, 5))),
    wrong(
        "nothing to convert",
        "dropout-like modules in it: none. With convert=True nothing was converted.",
        net=body(nn.Linear(12, 5)),
        settings={"convert": True},
    ),
    wrong("no forward", "NoForward has no forward.", net=NoForward),
    wrong("forward returns nothing", "forward returned None.", net=lambda: net(lambda y: None)),
    wrong("forward returns text", "forward returned 'done'.", net=lambda: net(lambda y: "done")),
    wrong(
        "forward returns classes",
        "forward returned Tensor(shape=(16,), dtype=torch.int64",
        net=lambda: net(lambda y: y.argmax(1)),
    ),
    wrong(
        "forward returns a loss",
        "forward returned Tensor(shape=(), dtype=torch.float32",
        net=lambda: net(lambda y: y.mean()),
    ),
    wrong(
        "forward returns (B*T, C)",
        "returned Tensor(shape=(48, 5), dtype=torch.float32, device=cpu) for 16 rows.",
        net=lambda: net(lambda y: y.repeat(3, 1)),
    ),
    wrong(
        "forward returns (1, C)",
        "returned Tensor(shape=(1, 5), dtype=torch.float32, device=cpu) for 16 rows.",
        net=lambda: net(lambda y: y.mean(0, keepdim=True)),
    ),
    wrong(
        "forward returns (C, B)",
        "returned Tensor(shape=(5, 16), dtype=torch.float32, device=cpu) for 16 rows.",
        net=lambda: net(lambda y: y.T),
    ),
    wrong("forward takes more", "the model's forward takes (x: ", net=TwoArguments),
    wrong(
        "unit_dim out of range",
        "The layer 'body.1' (ConductanceDropout, unit_dim=2) put out Tensor(shape=(16, 8)",
        net=body(nn.Linear(12, 8), ConductanceDropout(unit_dim=2), nn.Linear(8, 5)),
    ),
    wrong(
        "unit_dim is the batch",
        "unit_dim=-2) put out Tensor(shape=(16, 8)",
        net=body(nn.Linear(12, 8), ConductanceDropout(unit_dim=-2), nn.Linear(8, 5)),
    ),
    wrong(
        "batch second",
        "The layer 'body.drop' (ConductanceDropout, unit_dim=-1) put out Tensor(shape=(3, 16, 8)",
        net=lambda: Net(BatchSecond()),
    ),
    wrong(
        "no dimension of units",
        "The layer 'body.drop' (ConductanceDropout, unit_dim=1) put out Tensor(shape=(16,)",
        net=lambda: Net(OneNumber()),
    ),
    wrong("layers are not called", "Phase 1 of NotCalling scores none of 'body.1', 'body.4'.", net=NotCalling),
    wrong(
        "takes its batches itself",
        "OwnBatches.training_step(dataloader_iter) takes its batches itself.",
        net=OwnBatches,
    ),
    wrong("reentrant checkpointing", "The model checkpoints activations with use_reentrant=True.", net=Reentrant),
    # Batches
    wrong("batch is a number", "The batch is 3.", batch=3),
    wrong("batch is empty", "The batch is tuple().", batch=()),
    wrong("batch is text", "The batch is 'a photo'.", batch="a photo"),
    wrong("batch is an object", "The batch is object.", batch=object()),
    wrong("batch of unknown names", "The batch is dict('photo': Tensor(shape=(16, 12)", batch={"photo": X, "kind": Y}),
    wrong("batch of two inputs", "with one known input", batch={"x": X, "image": X, "y": Y}),
    wrong(
        "batch of two targets", "and at most one known target: y, target, targets", batch={"x": X, "y": Y, "label": Y}
    ),
    wrong("integer inputs", "between whole numbers there is no path.", batch=(TOKENS, Y)),
    wrong(
        "pixels as bytes",
        "The inputs are Tensor(shape=(16, 12), dtype=torch.uint8",
        batch=(torch.zeros(B, 12, dtype=torch.uint8), Y),
    ),
    wrong("inputs are arrays", "Convert arrays with torch.from_numpy(x).", batch=(X.numpy(), Y)),
    wrong(
        "inputs of a tokenizer",
        'adapter=KeyAdapter(inputs=["input_ids", "attention_mask"], target="labels", keywords=True).',
        batch={"input_ids": TOKENS, "attention_mask": TOKENS > 0, "labels": Y},
    ),
    wrong(
        "inputs by position for a forward that takes names",
        "KeyAdapter(..., keywords=True) passes them by name.",
        net=Named,
        batch={"x": X, "image": X, "y": Y},
        settings={"adapter": KeyAdapter(["x", "image"], "y")},
    ),
    wrong("inputs are text", "The inputs are 'a photo'.", batch=("a photo", Y)),
    wrong("inputs are a number", "The inputs are Tensor(shape=(), dtype=torch.float32", batch=(torch.tensor(1.0), Y)),
    wrong(
        "sparse inputs",
        "not all of them dense",
        batch=(X.to_sparse(), Y),
    ),
    wrong(
        "inputs of different lengths",
        "All floating inputs have the same number of samples",
        net=lambda: TwoArguments(),
        batch=([X, X[:3]], Y),
    ),
    wrong("too many inputs", "the model's forward takes (x: ", batch=([X, X], Y)),
    # How batches are read
    wrong(
        "key of input not there",
        "It reads a batch with something at 'image'.",
        batch={"x": X, "y": Y},
        settings={"adapter": KeyAdapter("image", "y")},
    ),
    wrong(
        "key of target not there",
        "It reads a batch with something at 'labels'.",
        batch={"x": X, "y": Y},
        settings={"adapter": KeyAdapter("x")},
    ),
    wrong(
        "keys for a tuple",
        "KeyAdapter(inputs='x', target='y', keywords=False) was given, and the batch is tuple(",
        settings={"adapter": KeyAdapter("x", "y")},
    ),
    wrong("position not there", "It reads a batch with something at 2.", settings={"adapter": IndexAdapter([0, 2])}),
    wrong(
        "positions for a mapping",
        "IndexAdapter(inputs=0, target=1) was given, and the batch is dict(",
        batch={"x": X, "y": Y},
        settings={"adapter": IndexAdapter()},
    ),
    wrong(
        "keywords that forward lacks",
        "the model's forward takes (x: ",
        net=TwoArguments,
        batch={"x": X, "y": Y},
        settings={"adapter": KeyAdapter(["x"], "y", keywords=True)},
    ),
    wrong("own inputs without target", "Reading.ydrop_inputs returned Tensor(shape=(16, 12)", net=lambda: reading(X)),
    wrong("own inputs are no method", "Attributed.ydrop_inputs is 3.", net=lambda: Attributed("ydrop_inputs")),
    wrong("own forward is no method", "Attributed.ydrop_forward is 3.", net=lambda: Attributed("ydrop_forward")),
    wrong("own inputs are nothing", "Reading.ydrop_inputs returned None.", net=lambda: reading(None)),
    wrong("own inputs are three", "Reading.ydrop_inputs returned tuple(", net=lambda: reading((X, Y, Y))),
    # Targets
    wrong(
        "labels too high",
        "The target holds classes from 0 to 7 for an output of 5 classes.",
        batch=(X, torch.arange(B) % 8),
    ),
    wrong("labels below 0", "The target holds classes from -1 to 3 for an output of 5 classes.", batch=(X, Y - 1)),
    wrong("labels as floats", "The floating target Tensor(shape=(16,), dtype=torch.float32", batch=(X, Y.float())),
    wrong(
        "one-hot integers",
        "Turn one-hot rows into soft labels with target.float()",
        batch=(X, nn.functional.one_hot(Y, 5)),
    ),
    wrong("labels as columns", "with target.squeeze(1) for example", batch=(X, Y.unsqueeze(1))),
    wrong("labels as booleans", "The target is Tensor(shape=(16,), dtype=torch.bool", batch=(X, Y > 2)),
    wrong("soft labels below 0", "that are not negative and sum to 1", batch=(X, torch.randn(B, 5))),
    wrong("soft labels of other classes", "The floating target Tensor(shape=(16, 4)", batch=(X, torch.rand(B, 4))),
    wrong("labels as text", "The target is list('cat', 'dog'", batch=(X, ["cat", "dog"] * (B // 2))),
    wrong(
        "labels as numbers",
        "Convert it in the dataset or in collate_fn, for example with torch.as_tensor",
        batch=(X, Y.tolist()),
    ),
    wrong(
        "labels of another batch",
        "The target is Tensor(shape=(15,), dtype=torch.int64, device=cpu) for 16 samples.",
        batch=(X, Y[1:]),
    ),
    wrong(
        "one label for all",
        "The target is Tensor(shape=(), dtype=torch.int64, device=cpu) for 16 samples.",
        batch=(X, torch.tensor(3)),
    ),
    # Where paths start and end
    wrong(
        "baselines too many",
        "baseline=list(0.0, 0.0) was given for 1 floating input(s).",
        settings={"baseline": [0.0, 0.0]},
    ),
    wrong(
        "baselines too few",
        "baseline=list(0.0) was given for 2 floating input(s).",
        net=TwoArguments,
        batch=([X, X], Y),
        settings={"baseline": [0.0]},
    ),
    wrong(
        "baselines too many, one of them null",
        "baseline=list(0.0, None) was given for 1 floating input(s).",
        settings={"baseline": [0.0, None]},
    ),
    wrong("no baseline at all", "not all of them None.", settings={"baseline": [None]}),
    wrong(
        "baseline of another shape",
        "Pass a tensor of shape (12,) or (16, 12), or 0.0.",
        settings={"baseline": torch.zeros(7)},
    ),
    wrong(
        "interpolate_at names nothing",
        "YDrop(interpolate_at='embeddings') was given.",
        net=Tokens,
        batch=(TOKENS, Y),
        settings={"interpolate_at": "embeddings"},
    ),
    wrong(
        "interpolate_at is not called",
        "this module put out list().",
        net=Tokens,
        batch=(TOKENS, Y),
        settings={"interpolate_at": "unused"},
    ),
    wrong(
        "interpolate_at is called twice",
        "The path starts at a module that is called once",
        net=Tokens,
        batch=(TOKENS, Y),
        settings={"interpolate_at": "norm"},
    ),
    wrong(
        "interpolate_at puts out a tuple",
        "this module put out list(tuple(Tensor(shape=(",
        net=Tokens,
        batch=(TOKENS, Y),
        settings={"interpolate_at": "lstm"},
    ),
    wrong(
        "interpolate_at puts out integers",
        "6), dtype=torch.int64, device=cpu)). The path starts at a module",
        net=Tokens,
        batch=(TOKENS, Y),
        settings={"interpolate_at": "keep"},
    ),
    wrong(
        "baselines behind interpolate_at",
        "was given for paths to 1 tensor(s).",
        net=Tokens,
        batch=(TOKENS, Y),
        settings={"interpolate_at": "embedding", "baseline": [0.0, 1.0]},
    ),
    # Objectives and measures
    wrong(
        "loss is averaged",
        "NegativeLoss(loss=CrossEntropyLoss()) was given, and the loss of 16 samples is Tensor(shape=()",
        settings={"objective": NegativeLoss(nn.CrossEntropyLoss())},
    ),
    wrong(
        "loss is a number",
        'Make it with reduction="none",',
        settings={"objective": NegativeLoss(loss_that_is_a_number)},
    ),
    wrong(
        "loss without target",
        "A loss needs a target.",
        batch=X,
        settings={"objective": NegativeLoss(nn.CrossEntropyLoss(reduction="none"))},
    ),
    wrong(
        "classes elsewhere",
        "TargetLogit(class_dim=2, ignore_index=-100) was given",
        settings={"objective": TargetLogit(class_dim=2)},
    ),
    wrong(
        "predicted classes elsewhere",
        "PredictedLogit(class_dim=2) was given",
        settings={"objective": PredictedLogit(class_dim=2)},
    ),
    wrong(
        "one class to predict",
        "A prediction is the largest of two logits or more",
        net=lambda: net(lambda y: y[:, :1]),
        settings={"objective": PredictedLogit()},
    ),
    wrong(
        "scores without rows",
        "A measure gives each layer floating (N, U) scores; 'body.1' has 16 units.",
        settings={"measure": Giving(body_1=torch.rand(16))},
    ),
    wrong(
        "scores of another width",
        "scored 'body.4' with Tensor(shape=(1, 9)",
        settings={"measure": Giving(body_4=torch.rand(1, 9))},
    ),
    wrong(
        "scores of positions",
        "Sum over positions in Measure.score",
        settings={"measure": Giving(body_1=torch.rand(4, 16, 3))},
    ),
    wrong("scores of another layer", "'head' has None units.", settings={"measure": Giving(head=torch.rand(1, 16))}),
    wrong("no scores", "scores none of 'body.1', 'body.4'.", settings={"measure": Giving()}),
    # Conversion
    wrong(
        "include fits nothing",
        "The pattern 'head.*' was given to convert Net.",
        settings={"convert": True, "include": "head.*"},
    ),
    wrong(
        "exclude fits nothing",
        "The pattern 'head.*' was given to convert Net.",
        settings={"convert": True, "exclude": ["body.1", "head.*"]},
    ),
]


STRATEGIES_OF_OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "no dictionary of scores": ("Nothing() gave", {"settings": {"measure": Nothing()}}),
    "scores are lists": ("with list(", {"settings": {"measure": Giving(body_1=[0.5] * 16)}}),
    "scores are integers": ("torch.int64", {"settings": {"measure": Giving(body_1=torch.arange(16).unsqueeze(0))}}),
    "scores of no sample": ("shape=(0, 16)", {"settings": {"measure": Giving(body_1=torch.rand(0, 16))}}),
    "objective of all rows": ("one number for each row", {"settings": {"objective": F(lambda output: output.sum())}}),
    "objective of each output": ("one number for each row", {"settings": {"objective": F(lambda output: output)}}),
    "objective of nothing": ("gave None for", {"settings": {"objective": F(lambda output: None)}}),
    "adapter reads nothing": (".read returned None", {"settings": {"adapter": Read(None)}}),
    "adapter reads no pair": (".read returned Tensor", {"settings": {"adapter": Read(X)}}),
    "a layer of two widths": (
        "was called several times, and put out 8 and 5 units.",
        {"net": lambda: Net(TwoWidths())},
    ),
    "complex targets": ("torch.complex64", {"batch": (X, Y.to(torch.complex64))}),
}
FITS_OF_OTHERS = [wrong(name, text, **kwargs) for name, (text, kwargs) in STRATEGIES_OF_OTHERS.items()]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a good fit of one epoch."""
    file: Path = tmp_path_factory.mktemp("good") / "good.ckpt"
    trainer = trainer_of(YDropCallback(annealing_epochs=0), max_epochs=1)
    trainer.fit(Net(), Batches((X, Y), (X, Y)))
    trainer.save_checkpoint(file)
    return file


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def check_untouched(model: LightningModule, before: dict[str, Tensor]) -> None:
    """Nothing was trained, and no layer is left as Y-Drop drives it."""
    assert model.training_steps == 0
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(layer.active for layer in model.modules() if isinstance(layer, ConductanceDropout))


def check_good_fit(callback: YDropCallback, ckpt_path: Path | None = None) -> None:
    model = Net()
    trainer_of(callback, max_epochs=2).fit(model, Batches((X, Y), (X, Y)), ckpt_path=ckpt_path, **LOADING)
    assert model.training_steps == (4 if ckpt_path is None else 2)
    assert callback.engine is not None
    assert callback.engine.state_dict()["steps_taken"] == 4


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor")  # as Lightning says, too
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")  # of a checkpoint without gradients
@pytest.mark.parametrize("fit", [*FITS, *FITS_OF_OTHERS])
def test_a_fit_that_cannot_work_ends_before_it_trains(fit: Fit, saved: Path) -> None:
    model, callback = fit.net(), YDropCallback(annealing_epochs=0, **fit.settings)
    before = weights_of(model)
    trainer = trainer_of(callback)
    with pytest.raises(ConfigurationError) as caught:
        trainer.fit(model, Batches(fit.batch, fit.batch))
    assert fit.text in str(caught.value)
    check_sentences(caught.value)
    assert trainer.global_step == 0
    check_untouched(model, before)
    # What went wrong leaves nothing behind: neither in the callback, nor in what was saved before.
    if not fit.settings:
        check_good_fit(callback)
    check_good_fit(YDropCallback(annealing_epochs=0), saved)


@pytest.mark.filterwarnings("ignore:Training is to end before the annealing")
@pytest.mark.parametrize("annealing_epochs", [1, 5])
def test_what_phase_1_refuses_is_refused_before_annealing(annealing_epochs: int) -> None:
    model = Net()
    before = weights_of(model)
    with pytest.raises(ConfigurationError, match="between whole numbers there is no path"):
        trainer_of(YDropCallback(annealing_epochs)).fit(model, Batches((TOKENS, Y)))
    check_untouched(model, before)


def half_converted() -> Net:
    """The network of the checkpoint, weight for weight, with a layer that is nn.Dropout now."""
    model = Net()
    model.body[4] = nn.Dropout()  # type: ignore[operator]
    return model


def turned() -> Net:
    """The same with units in another dimension, of another number: of the batch of two rows times eight."""
    model = Net()
    model.body[1] = nn.Sequential(nn.Unflatten(1, (2, 8)), ConductanceDropout(unit_dim=2), nn.Flatten())  # type: ignore[operator]
    return model


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (half_converted, "A Y-Drop state of the layers 'body.1', 'body.4' was given to a model with 'body.1'."),
        (turned, "A Y-Drop state of the layers 'body.1', 'body.4' was given to a model with 'body.1.1', 'body.4'."),
    ],
)
def test_the_state_of_another_network_is_refused(build: Callable[[], Net], text: str, saved: Path) -> None:
    model = build()
    with pytest.raises(ConfigurationError) as caught:
        trainer_of(YDropCallback(annealing_epochs=0)).fit(model, Batches((X, Y), (X, Y)), ckpt_path=saved, **LOADING)
    assert text in str(caught.value)
    check_sentences(caught.value)
    check_untouched(model, torch.load(saved, weights_only=False)["state_dict"])
    check_good_fit(YDropCallback(annealing_epochs=0), saved)


def test_the_state_of_layers_of_another_width_is_refused(saved: Path, tmp_path: Path) -> None:
    content = torch.load(saved, weights_only=False)
    (state,) = (state for key, state in content["callbacks"].items() if "YDrop" in key)
    for name in ("drop_prob", "mean_drop_prob"):
        state["layers"]["body.1"][name] = state["layers"]["body.1"][name][:9]
    state["layers"]["body.1"]["active"] = True  # as in a checkpoint of the middle of a fit
    torch.save(content, tmp_path / "narrow.ckpt")
    model = Net()
    with pytest.raises(ConfigurationError) as caught:
        trainer_of(YDropCallback(annealing_epochs=0)).fit(
            model, Batches((X, Y), (X, Y)), ckpt_path=tmp_path / "narrow.ckpt", **LOADING
        )
    assert "A ConductanceDropout of 9 units was given probabilities for 16." in str(caught.value)
    check_sentences(caught.value)
    check_untouched(model, content["state_dict"])


# YAML


class TinyData(LightningDataModule):
    def train_dataloader(self) -> Any:
        return Batches((X, Y), (X, Y))


class TinyModel(Net):
    """The network in a form that the command line can build."""

    def __init__(self, p: float = 0.5) -> None:
        super().__init__(perceptron(dropout=lambda: ConductanceDropout(p)))


QUIET = {
    "accelerator": "cpu",
    "max_epochs": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


@pytest.fixture
def fit_from_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, Any]], LightningCLI]:
    """Fit from a YAML file with the callback, as a user of LightningCLI does."""

    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning calls it by an older name

    def fit(init_args: dict[str, Any]) -> LightningCLI:
        callback = {"class_path": "lightning_ydrop.YDropCallback", "init_args": init_args}
        file = tmp_path / "config.yaml"
        file.write_text(yaml.safe_dump({"trainer": QUIET | {"callbacks": [callback]}}))
        # Not by `args=`: LightningCLI warns of that wherever the program at work has arguments of its own.
        monkeypatch.setattr(sys, "argv", ["train.py", "fit", f"--config={file}"])
        return LightningCLI(TinyModel, TinyData, save_config_callback=None, seed_everything_default=0)

    return fit


@pytest.mark.filterwarnings("ignore:Training is to end before the annealing")
@pytest.mark.parametrize(
    ("init_args", "texts"),
    [
        # In our words, where the type is right and the value is not
        ({"elasticity": 1.5}, ["YDropCallback(elasticity=1.5) was given. `elasticity` is a number in [0, 1]."]),
        ({"annealing_epochs": -1}, ["YDropCallback(annealing_epochs=-1) was given."]),
        ({"annealing_epochs": 1, "annealing_steps": 5}, ["YDropCallback(annealing_epochs=1, annealing_steps=5)"]),
        ({"initial_drop_prob": 1.0}, ["YDropCallback(initial_drop_prob=1.0) was given."]),
        ({"n_steps": 0}, ["YDropCallback(n_steps=0) was given."]),
        ({"num_samples": 0}, ["YDropCallback(num_samples=0) was given."]),
        ({"every_n_batches": 0}, ["YDropCallback(every_n_batches=0) was given."]),
        ({"seed": -1}, ["YDropCallback(seed=-1) was given."]),
        ({"batch_dim": -1}, ["YDropCallback(batch_dim=-1) was given."]),
        ({"baseline": float("nan")}, ["YDropCallback(baseline=nan) was given."]),
        ({"include": "body.*"}, ["`include` and `exclude` say what to convert."]),
        ({"buckets": {"strong_fraction": 1.5}}, ["Buckets(strong_fraction=1.5) was given."]),
        ({"buckets": {"low": {"mean": 0.7, "std": 0.0, "max": 0.8}}}, ["Strong units are dropped more often"]),
        ({"buckets": {"high": {"mean": 0.7, "std": 0.0, "max": 1.0}}}, ["HalfNormalRate(max=1.0) was given."]),
        (
            {"measure": {"class_path": "lightning_ydrop.CaptumMeasure", "init_args": {"attribution": "Nothing"}}},
            ["CaptumMeasure(attribution='Nothing') was given."],
        ),
        (
            {"objective": {"class_path": "lightning_ydrop.TargetLogit", "init_args": {"class_dim": 0}}},
            ["TargetLogit(class_dim=0) was given."],
        ),
        (
            {"adapter": {"class_path": "lightning_ydrop.KeyAdapter", "init_args": {"inputs": []}}},
            ["KeyAdapter(inputs=list(), target='labels') was given."],
        ),
        # In our words, once the fit starts
        ({"interpolate_at": "embedding"}, ["YDrop(interpolate_at='embedding') was given."]),
        ({"convert": True, "include": ["head.*"]}, ["The pattern 'head.*' was given to convert TinyModel."]),
        ({"baseline": [0.0, 1.0]}, ["was given for 1 floating input(s)."]),
        ({"adapter": "lightning_ydrop.KeyAdapter"}, ["It reads a batch with something at 'pixel_values'."]),
        # In jsonargparse's words, where the type is wrong
        ({"elasticity": "fast"}, ["elasticity", "fast"]),
        ({"n_steps": 2.5}, ["n_steps", "2.5"]),
        ({"annealing_epochs": "two"}, ["annealing_epochs", "two"]),
        ({"quadrature": "middle"}, ["quadrature", "middle"]),
        ({"transition": "ramp"}, ["transition", "ramp"]),
        ({"convert": "perhaps"}, ["convert", "perhaps"]),
        ({"include": {"body": 1}, "convert": True}, ["include", "body"]),
        ({"measure": "lightning_ydrop.Nothing"}, ["measure", "lightning_ydrop.Nothing"]),
        ({"measure": "lightning_ydrop.OutputSum"}, ["measure", "lightning_ydrop.OutputSum"]),
        ({"objective": "torch.nn.CrossEntropyLoss"}, ["objective", "torch.nn.CrossEntropyLoss"]),
        ({"adapter": 3}, ["adapter", "3"]),
        ({"buckets": 0.5}, ["buckets", "0.5"]),
        ({"buckets": {"middle": 0.5}}, ["buckets", "middle"]),
        ({"anealing_epochs": 2}, ["anealing_epochs"]),
    ],
    ids=str,
)
def test_a_wrong_yaml_file_names_what_is_wrong(
    init_args: dict[str, Any],
    texts: list[str],
    fit_from_yaml: Callable[[dict[str, Any]], LightningCLI],
    capsys: pytest.CaptureFixture[str],
) -> None:
    # What is found when the callback is made comes as jsonargparse's own ValueError, which cites ours.
    with pytest.raises((SystemExit, ValueError)) as caught:
        fit_from_yaml(init_args)
    said = capsys.readouterr().err + str(caught.value)
    if isinstance(caught.value, ConfigurationError):
        check_sentences(caught.value)
    for text in texts:
        assert text in said


def test_a_right_yaml_file_fits(fit_from_yaml: Callable[[dict[str, Any]], LightningCLI]) -> None:
    right = {"annealing_epochs": 0, "buckets": {"strong_fraction": 0.25}, "baseline": [0.0], "include": ["body.*"]}
    done = fit_from_yaml(right | {"convert": True})
    assert done.trainer.global_step == 2
