"""The package on a GPU that is there: it computes what it computes on the CPU, and makes nobody wait."""

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import methodcaller
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, TensorDataset

from lightning_ydrop import (
    ConductanceDropout,
    ConvPattern,
    Jumpout,
    PatternDropout,
    TokenPattern,
    YDrop,
    YDropCallback,
    layer_conductance,
    monte_carlo,
)
from tests.networks import perceptron
from tests.test_on_a_device import CASES, Ready, sequences, vectors

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="takes a GPU")


@contextmanager
def nobody_waits() -> Iterator[None]:
    """Fail where the host waits for the device."""
    torch.cuda.synchronize()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch calls it a prototype
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextmanager
def full_precision() -> Iterator[None]:
    """Compute with all bits of float32, by deterministic algorithms of cuDNN."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False, deterministic=True):
        yield


class Recurrent(nn.Module):
    """An LSTM of cuDNN, whose backward pass takes training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.LSTM(6, 7)
        self.drop, self.out = ConductanceDropout(unit_dim=-1, batch_dim=1), nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.drop(self.body(x)[0]))[-1]


def test_a_compiled_phase_1_is_a_cuda_graph_that_gives_the_eager_scores() -> None:
    torch.manual_seed(0)
    model = perceptron().cuda()
    x, y = torch.randn(32, 12, device="cuda"), torch.arange(32, device="cuda") % 5
    engines = YDrop(model, compile_phase1=True), YDrop(model)
    for step in range(4):
        for engine in engines:
            engine.take_over()
            with full_precision():
                if step and engine is engines[0]:
                    with nobody_waits():
                        engine.step(x, y)
                else:
                    engine.step(x, y)
        for name, scores in engines[1].scores.items():
            torch.testing.assert_close(engines[0].scores[name], scores, rtol=1e-3, atol=1e-5)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        x = x.roll(1, 0)


@pytest.mark.parametrize("name", CASES)
def test_scores_are_those_of_the_cpu_and_nobody_waits(name: str) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    model, (inputs, target) = case.build(), case.batch()
    if target.is_floating_point():  # soft labels
        target = target / target.sum(1, keepdim=True)
    with torch.device("cuda"):
        settings = case.settings()
    engines = []
    for device in ("cpu", "cuda"):
        here = copy.deepcopy(model).to(device)
        engine = YDrop(here, **(settings if device == "cuda" else case.settings()))
        there = tree_map_only(Tensor, methodcaller("to", device), inputs)
        if name.startswith("lengths"):  # which stay where they are
            there = {**there, "lengths": inputs["lengths"]} if isinstance(there, dict) else (inputs[0], *there[1:])
        ready = Ready(here, engine, there, target.to(device))
        engine.dry_run(ready.inputs, ready.target)
        with full_precision():
            ready.step(progress=0.5)  # what is first done may wait
            if device == "cuda":
                with nobody_waits():
                    ready.step()
                    engine.skip()
            else:
                ready.step()
                engine.skip()
        engines.append(engine)
    if name not in ("random", "shuffled"):
        for scores, expected in zip(engines[1].scores.values(), engines[0].scores.values(), strict=True):
            assert scores.is_cuda
            torch.testing.assert_close(scores.cpu(), expected, rtol=1e-3, atol=1e-5)


def test_cudnn_lstm_is_measured_as_on_the_cpu() -> None:
    torch.manual_seed(0)
    model, (x, y) = Recurrent(), sequences()
    twin, engine = copy.deepcopy(model).cuda(), YDrop(model, batch_dim=1)
    there = YDrop(twin, batch_dim=1)
    engine.step(x, y)
    with full_precision():
        there.step(x.cuda(), y.cuda())
    torch.testing.assert_close(there.scores["drop"].cpu(), engine.scores["drop"], rtol=1e-3, atol=1e-5)


def test_masks_drop_at_the_rates_that_were_set() -> None:
    layer = ConductanceDropout().cuda()
    rates = torch.tensor([0.1, 0.5, 0.9], device="cuda")
    layer.update(rates, elasticity=0.0, initial_drop_prob=0.5)
    layer.activate()
    dropped = (layer(torch.ones(20000, 3, device="cuda")) == 0).float().mean(0)
    torch.testing.assert_close(dropped, rates, rtol=0, atol=0.02)


@pytest.mark.parametrize(
    "make",
    [
        lambda: (ConductanceDropout(0.3), (64, 6)),
        lambda: (Jumpout(), (64, 6)),
        lambda: (PatternDropout(ConvPattern(0.25, repeat=2, rotate=22.5)), (6, 3, 9, 8)),
        lambda: (PatternDropout(TokenPattern(2, 3, share_t=True, rate=0.6)), (6, 9, 5)),
    ],
    ids=["conductance", "jumpout", "images", "tokens"],
)
def test_layers_run_without_waiting(make: Callable[[], tuple[nn.Module, tuple[int, ...]]]) -> None:
    made, shape = make()
    layer = made.cuda()
    x = torch.randn(shape, device="cuda", requires_grad=True)
    layer(x)
    with nobody_waits():
        layer(x).square().sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_attribution_and_averages_are_those_of_the_cpu() -> None:
    torch.manual_seed(0)
    model, (x, y) = perceptron(dropout=nn.Dropout), vectors()
    twin = copy.deepcopy(model).cuda()
    expected = layer_conductance(model, x, y, layers=nn.Linear)
    for name, scores in layer_conductance(twin, x.cuda(), y.cuda(), layers=nn.Linear).items():
        torch.testing.assert_close(scores.cpu(), expected[name], rtol=1e-3, atol=1e-5)
    ours, theirs = (
        monte_carlo(each, x.to(device), 4000).probabilities.cpu() for each, device in ((model, "cpu"), (twin, "cuda"))
    )
    torch.testing.assert_close(theirs, ours, rtol=0, atol=0.02)


class Net(L.LightningModule):
    """A classifier with the usual dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 5))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loader() -> DataLoader[Any]:
    torch.manual_seed(1)
    return DataLoader(TensorDataset(torch.randn(96, 12), torch.randint(5, (96,))), 32)


def fit(path: Path, precision: Any, epochs: int, ckpt: Path | None = None, compiles: bool = False) -> Net:
    L.seed_everything(0)
    model, callback = Net(), YDropCallback(convert=True, annealing_epochs=1)
    trainer = L.Trainer(
        accelerator="gpu",
        devices=1,
        precision=precision,
        max_epochs=epochs,
        callbacks=[callback],
        default_root_dir=path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    if compiles:
        model.net = torch.compile(model.net)  # type: ignore[assignment]
    trainer.fit(model, loader(), ckpt_path=ckpt, weights_only=False)
    trainer.save_checkpoint(path / f"{epochs}.ckpt")
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed", "bf16-true"])
def test_fits_in_each_precision_and_goes_on_as_if_it_had_not_stopped(tmp_path: Path, precision: str) -> None:
    whole = fit(tmp_path, precision, 4)
    fit(tmp_path, precision, 2)
    resumed = fit(tmp_path, precision, 4, tmp_path / "2.ckpt")
    for ours, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert ours.isfinite().all()
        assert ours.shape == theirs.shape
    states = [torch.load(tmp_path / f"{n}.ckpt", weights_only=False)["callbacks"] for n in (2, 4)]
    assert all(any("YDrop" in name for name in state) for state in states)


@pytest.mark.filterwarnings("ignore")
def test_compiled_networks_train(tmp_path: Path) -> None:
    model = fit(tmp_path, "32-true", 3, compiles=True)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_a_cuda_graph_of_training_follows_the_rates() -> None:
    layer = ConductanceDropout().cuda()
    x = torch.ones(4096, 2, device="cuda")
    layer.update(torch.tensor([0.1, 0.8], device="cuda"), elasticity=0.0, initial_drop_prob=0.4)
    layer.activate()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        layer(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
    for rates in ([0.1, 0.8], [0.7, 0.2]):
        layer.update(torch.tensor(rates, device="cuda"), elasticity=0.0, initial_drop_prob=0.4)
        graph.replay()
        torch.testing.assert_close((y == 0).float().mean(0).cpu(), torch.tensor(rates), rtol=0, atol=0.05)
