"""Models whose batch is not the first dimension: with batch_dim, their scores are the batch-first network's."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_ydrop import (
    Conductance,
    ConductanceDropout,
    ConductanceMonitor,
    NegativeLoss,
    Objective,
    OutputSum,
    PredictedLogit,
    TargetLogit,
    YDrop,
    YDropCallback,
    layer_conductance,
)
from lightning_ydrop.functional.attribution import Quadrature
from tests.callbacks.test_ydrop import trainer_of
from tests.sameness import assert_same

B, T, WIDTH, CLASSES = 6, 5, 8, 3
X = torch.randn(B, T, WIDTH, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(B) % CLASSES
TOKEN_LABELS = torch.arange(B * T).reshape(B, T) % CLASSES
LENGTHS = torch.tensor([5, 3, 4, 1, 2, 5])
PADDING = torch.arange(T) >= LENGTHS.unsqueeze(1)
SOFT = torch.rand(B, T, CLASSES, generator=torch.Generator().manual_seed(1)).softmax(-1)
QUADRATURES: list[Quadrature] = ["right", "left", "trapezoid"]


def turned(value: Any) -> Any:
    """Time first, with the batch in the second dimension, where it has both."""
    if isinstance(value, tuple):
        return tuple(map(turned, value))
    return value.transpose(0, 1).contiguous() if isinstance(value, Tensor) and value.ndim > 1 else value


class Net(nn.Module):
    """A network of either layout, of which the two share weights."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.batch_first = batch_first
        self.build()

    def build(self) -> None:
        self.body: nn.Module = nn.TransformerEncoderLayer(WIDTH, 2, 16, 0.0, batch_first=self.batch_first)
        self.drop = ConductanceDropout(0.2, unit_dim=-1, batch_dim=int(not self.batch_first))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, *given: Tensor) -> Any:
        return self.head(self.drop(self.body(*given)))


class Padded(Net):
    def forward(self, *given: Tensor) -> Any:
        x, padding = given
        # A mask (B, T) in either layout of the network, which is how torch takes it.
        padding = padding if self.batch_first else padding.T
        return self.head(self.drop(self.body(x, src_key_padding_mask=padding)))


class PaddedAsTorch(Net):
    """A mask (B, T) in either layout, as torch takes it."""

    def forward(self, *given: Tensor) -> Any:
        x, padding = given
        return self.head(self.drop(self.body(x, src_key_padding_mask=padding)))


class Sequence(Net):
    """An LSTM whose outputs are a sequence."""

    def build(self) -> None:
        self.body = nn.LSTM(WIDTH, 10, batch_first=self.batch_first)
        self.drop = ConductanceDropout(unit_dim=-1, batch_dim=int(not self.batch_first))
        self.head = nn.Linear(10, CLASSES)

    def forward(self, *given: Tensor) -> Any:
        return self.head(self.drop(self.body(*given)[0]))


class LastState(Sequence):
    """Logits (B, C) of the last state, with layers on sequences and on states."""

    def build(self) -> None:
        super().build()
        self.more = ConductanceDropout()

    def forward(self, *given: Tensor) -> Any:
        hidden = self.drop(self.body(*given)[0])
        return self.head(self.more(hidden[:, -1] if self.batch_first else hidden[-1]))


class Lengths(LastState):
    """The output at the last position of each sequence."""

    def forward(self, *given: Tensor) -> Any:
        x, lengths = given
        hidden = self.drop(self.body(x)[0])
        hidden = hidden if self.batch_first else hidden.transpose(0, 1)
        return self.head(self.more(hidden[torch.arange(len(lengths)), lengths - 1]))


class OneNumber(Sequence):
    """A number (T, B) or (B, T) for each position."""

    def forward(self, *given: Tensor) -> Any:
        return super().forward(*given)[..., 0]


class FirstInside(Sequence):
    """A layer whose rows are first, whatever the layout of the network."""

    def build(self) -> None:
        super().build()
        self.drop = ConductanceDropout(unit_dim=-1)

    def forward(self, *given: Tensor) -> Any:
        hidden = self.body(*given)[0]
        hidden = self.drop(hidden if self.batch_first else hidden.transpose(0, 1))
        return self.head(hidden if self.batch_first else hidden.transpose(0, 1))


class Embedded(Net):
    def build(self) -> None:
        super().build()
        self.embedding = nn.Embedding(11, WIDTH)

    def forward(self, *given: Tensor) -> Any:
        return super().forward(self.embedding(*given))


IDS = torch.randint(0, 11, (B, T), generator=torch.Generator().manual_seed(3))
OF_TOKENS = TargetLogit(class_dim=-1)
LOSS = NegativeLoss(lambda output, target: nn.functional.cross_entropy(output.mT, target, reduction="none"))
# Kind of network, inputs, target, and settings.
CASES: dict[str, tuple[type[Net], Any, Tensor | None, dict[str, Any]]] = {
    "transformer": (Net, X, TOKEN_LABELS, {"objective": OF_TOKENS}),
    "transformer, soft labels": (Net, X, SOFT, {"objective": OF_TOKENS}),
    "transformer, prediction": (Net, X, None, {"objective": PredictedLogit(class_dim=-1)}),
    "transformer, sum": (Net, X, None, {"objective": OutputSum()}),
    "transformer, loss": (Net, X, TOKEN_LABELS, {"objective": LOSS}),
    "padding": (Padded, (X, PADDING), TOKEN_LABELS, {"objective": OF_TOKENS}),
    "sequence": (Sequence, X, TOKEN_LABELS, {"objective": OF_TOKENS}),
    "last state": (LastState, X, LABELS, {}),
    "last state, prediction": (LastState, X, None, {"objective": PredictedLogit()}),
    "lengths": (Lengths, (X, LENGTHS), LABELS, {}),
    "tokens": (Embedded, IDS, TOKEN_LABELS, {"objective": OF_TOKENS, "interpolate_at": "embedding"}),
    "baseline of one sample": (LastState, X, LABELS, {"baseline": X[0].cos()}),
    "baseline of all samples": (LastState, X, LABELS, {"baseline": X.cos()}),
}


def pair_of(case: str) -> tuple[tuple[Net, Any, Any, dict[str, Any]], tuple[Net, Any, Any, dict[str, Any]]]:
    """Give the batch-first network with its batch and settings, and the time-first one with its own."""
    kind, inputs, target, settings = CASES[case]
    first, second = kind(True), kind(False)
    second.load_state_dict(first.state_dict())
    baseline = settings.get("baseline", 0.0)
    own = settings | {"batch_dim": 1}
    if isinstance(baseline, Tensor):
        own["baseline"] = turned(baseline) if baseline.ndim == 3 else baseline
    return (first, inputs, target, settings), (second, turned(inputs), turned(target), own)


def assert_alike(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, scores in one.items():
        assert scores.abs().sum() > 0
        assert torch.allclose(other[name], scores, rtol=1e-5, atol=1e-5), name


@pytest.mark.parametrize("max_rows", [None, 7, "batch"])
@pytest.mark.parametrize("quadrature", QUADRATURES)
@pytest.mark.parametrize("case", list(CASES))
def test_conductance_is_that_of_the_batch_first_network(case: str, quadrature: Quadrature, max_rows: Any) -> None:
    scores = [
        layer_conductance(model, inputs, target, n_steps=4, quadrature=quadrature, max_rows=max_rows, **settings)
        for model, inputs, target, settings in pair_of(case)
    ]
    assert_alike(*scores)


# Any number of rows may be that of classes, units or time steps, too.
@pytest.mark.parametrize("max_rows", [2, 3, 4, 5, 8, 10])
@pytest.mark.parametrize("kind", [LastState, OneNumber, FirstInside])
def test_rows_are_told_from_what_is_as_many(kind: type[Net], max_rows: int) -> None:
    target = LABELS if kind is LastState else None
    scores = []
    for batch_first in (True, False):
        inputs = X if batch_first else turned(X)
        measured: Any = {"quadrature": "trapezoid", "max_rows": max_rows, "batch_dim": int(not batch_first)}
        scores.append(layer_conductance(kind(batch_first), inputs, target, n_steps=9, **measured))
    assert_alike(*scores)


@pytest.mark.parametrize("batch", [2, 3, 4, 5, 8, 10])
@pytest.mark.parametrize("kind", [LastState, OneNumber, FirstInside])
def test_the_dry_run_tells_them_for_all_batches(kind: type[Net], batch: int) -> None:
    x = torch.randn(batch, T, WIDTH)
    later = [torch.randn(size, T, WIDTH) for size in (3, 5, 10)]
    scores: list[list[dict[str, Tensor]]] = []
    for batch_first in (True, False):
        engine = YDrop(kind(batch_first), objective=OutputSum(), num_samples="all", batch_dim=int(not batch_first))
        scores.append([])
        for inputs in (x, *later):
            engine.step(inputs if batch_first else turned(inputs))
            scores[-1].append(engine.scores.copy())
    for one, other in zip(*scores, strict=True):
        assert_alike(one, other)


@pytest.mark.parametrize("case", list(CASES))
def test_the_engine_drives_both_alike(case: str) -> None:
    engines = []
    for model, inputs, target, settings in pair_of(case):
        engine = YDrop(model, num_samples=4, **settings)  # with warnings as errors
        for _ in range(2):
            engine.step(inputs, target)
        engines.append(engine)
    first, second = engines
    assert_alike(first.scores, second.scores)
    for name, layer in first.layers.items():
        assert torch.equal(layer.drop_prob, second.layers[name].drop_prob)


@pytest.mark.parametrize("sizes", [(T, 6), (6, T), (T, T)])
def test_a_mask_may_have_its_samples_first_though_there_are_as_many_steps(sizes: tuple[int, ...]) -> None:
    engines = [
        YDrop(PaddedAsTorch(first), objective=OF_TOKENS, num_samples="all", batch_dim=int(not first))
        for first in (True, False)
    ]
    for size in sizes:
        x, padding, y = X[:size], PADDING[:size], TOKEN_LABELS[:size]
        engines[0].step((x, padding), y)
        engines[1].step((turned(x), padding), turned(y))
        assert_alike(engines[0].scores, engines[1].scores)


def test_samples_of_a_larger_batch_than_the_path_takes_go_in_parts() -> None:
    (first, x, y, settings), (second, xt, yt, own) = pair_of("sequence")
    rows: list[int] = []
    second.register_forward_hook(lambda module, args, output: rows.append(args[0].shape[1]))
    engines = [YDrop(first, num_samples="all", **settings), YDrop(second, num_samples="all", **own)]
    engines[0].step(x, y)
    engines[1].step(xt, yt)
    assert_alike(engines[0].scores, engines[1].scores)
    assert max(rows) <= B


class Lit(LightningModule):
    """A network in a Trainer; `body` is of either layout."""

    def __init__(self, net: Net, objective: Objective) -> None:
        super().__init__()
        self.net, self.objective = net, objective

    def forward(self, x: Tensor) -> Any:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        output = self(batch[0])
        return nn.functional.cross_entropy(output.flatten(0, -2), batch[1].flatten())

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Leave it to the monitor."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Batches:
    """A loader of one batch, some times."""

    def __init__(self, batch: Any, times: int) -> None:
        self.batches = [batch] * times

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


@pytest.mark.parametrize("case", ["sequence", "last state"])
def test_the_callback_and_the_monitor_do(case: str) -> None:
    scores, logged = [], []
    for model, inputs, target, settings in pair_of(case):
        callback = YDropCallback(annealing_epochs=0, num_samples=4, **settings)
        monitor = ConductanceMonitor(figures=False, **settings)
        trainer = trainer_of(callback, monitor, max_epochs=1)
        trainer.fit(Lit(model, TargetLogit()), Batches((inputs, target), 2), Batches((inputs, target), 1))
        assert callback.engine is not None
        scores.append(callback.engine.scores)
        logged.append({name: value for name, value in trainer.callback_metrics.items() if "conductance" in name})
    assert_alike(*scores)
    assert logged[0]
    assert_alike(*logged)


class Inside(nn.Module):
    """A batch-first network with a time-first part."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.batch_first = batch_first
        self.lstm = nn.LSTM(WIDTH, 10, batch_first=batch_first)
        self.drop = ConductanceDropout(0.5, unit_dim=-1, batch_dim=0 if batch_first else 1)
        self.more, self.head = ConductanceDropout(), nn.Linear(10, CLASSES)

    def forward(self, x: Tensor) -> Any:
        hidden = self.drop(self.lstm(x if self.batch_first else x.transpose(0, 1))[0])
        return self.head(self.more(hidden[:, -1] if self.batch_first else hidden[-1]))


@pytest.mark.parametrize("batch", [B, T])  # where there are as many samples as time steps, too
@pytest.mark.parametrize("quadrature", QUADRATURES)
def test_a_layer_may_have_its_batch_elsewhere_than_the_model(quadrature: Quadrature, batch: int) -> None:
    x, y = X[:batch], LABELS[:batch]
    first, second = Inside(True), Inside(False)
    assert_alike(*(layer_conductance(model, x, y, n_steps=5, quadrature=quadrature) for model in (first, second)))
    engines = [YDrop(model, num_samples="all") for model in (first, second)]
    for engine in engines:
        engine.step(x, y)
    assert_alike(engines[0].scores, engines[1].scores)


@pytest.mark.parametrize("batch", [B, T, 10])  # as many as time steps, and as units, too
def test_a_layer_that_draws_one_mask_for_all_samples_is_told_of(batch: int) -> None:
    x, y = torch.randn(T, batch, WIDTH), torch.arange(batch) % CLASSES
    model = LastState(False)
    YDrop(model, batch_dim=1).step(x, y)  # silent, though `more` is given (B, U)
    model.drop = ConductanceDropout(unit_dim=-1)
    with pytest.warns(UserWarning, match="would draw one mask") as caught:
        YDrop(model, batch_dim=1).step(x, y)
    assert [str(each.message) for each in caught] == [
        "The layer 'drop' (batch_dim=0) would draw one mask for all samples, which are dimension 1 of what it puts "
        "out. Pass ConductanceDropout(batch_dim=1), for a mask of each sample's own."
    ]
    model.drop = ConductanceDropout(unit_dim=-1, elementwise=True)
    YDrop(model, batch_dim=1).step(x, y)


def test_so_is_one_that_takes_another_dimension_for_the_batch() -> None:
    model = LastState(True)
    model.drop = ConductanceDropout(unit_dim=-1, batch_dim=1)
    with pytest.warns(UserWarning, match=r"'drop' \(batch_dim=1\).* dimension 0 .*ConductanceDropout\(batch_dim=0\)"):
        YDrop(model).step(X, LABELS)


def test_it_is_a_setting_of_the_request() -> None:
    seen = []

    class Seeing(Conductance):
        def score(self, phase1: Any) -> dict[str, Tensor]:
            seen.append(phase1)
            return super().score(phase1)

    _, (model, inputs, target, settings) = pair_of("sequence")
    YDrop(model, measure=Seeing(), num_samples=4, **settings).step(inputs, target)
    request = seen[-1]
    assert request.batch_dim == 1
    assert request.inputs[0].shape == (4, T, WIDTH)  # a measure sees the batch first
    assert request.target.shape == (4, T)
    assert request.output(request.inputs, request.carried).shape == (4, T, CLASSES)
    assert_same(request.value(request.inputs, request.carried, request.target).shape, torch.Size([4]))
