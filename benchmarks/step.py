"""What a training step costs with Y-Drop: against nn.Dropout, no dropout, and one captum call for each layer.

In a bare loop and in a Lightning Trainer, beside the floor of the paper's settings by counted operations. All figures
are ratios to the step with nn.Dropout(0.5) in the same loop.
"""

import gc
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from jsonargparse import auto_cli
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.layers import N_STEPS, num_samples_of
from benchmarks.measuring import in_turn, quartiles, ratios, training_step, wait_for
from benchmarks.networks import RECOMMENDED, MakeDropout, Transformer, paper_cnn, perceptron, resnet
from benchmarks.report import write_report
from lightning_ydrop import CaptumMeasure, ConductanceDropout, YDrop, YDropCallback

Arguments = dict[str, Any] | None

BATCH_SIZE = 64
ALTERNATIVES: dict[str, Arguments] = {
    "none": None,
    "dropout": None,
    "paper": {},
    "captum": {"measure": CaptumMeasure("LayerConductance")},
    # The two kinds of steps of the recommended settings: with phase 1, and with what the last one found.
    "due": {**RECOMMENDED, "every_n_batches": 1},
    "carried": {**RECOMMENDED, "every_n_batches": 1_000_000},
}
# Batches of a fit before those that are timed, the first of which runs phase 1 whatever its period.
WARM_UP = 2
TIMED = 3


@dataclass(frozen=True)
class Case:
    """A network, by the dropout in it, and the shape of one of its samples."""

    build: Callable[[MakeDropout], nn.Module]
    shape: tuple[int, ...]
    unit_dim: int = 1

    def model(self, alternative: str) -> nn.Module:
        """Build the network with the dropout that an alternative calls for."""
        if alternative == "none":
            return self.build(nn.Identity)
        if alternative == "dropout":
            return self.build(lambda: nn.Dropout(0.5))
        return self.build(lambda: ConductanceDropout(0.5, unit_dim=self.unit_dim))


CASES: dict[str, Case] = {
    "FC_1": Case(lambda dropout: perceptron(784, [1024] * 2, 10, dropout), (784,)),
    "FC_2": Case(lambda dropout: perceptron(784, [2048] * 3, 10, dropout), (784,)),
    "FC_3": Case(lambda dropout: perceptron(784, [4096] * 4, 10, dropout), (784,)),
    "FC_4": Case(lambda dropout: perceptron(784, [8192] * 4, 10, dropout), (784,)),
    "S_1": Case(lambda dropout: _s([1024] * 2, dropout), (3, 32, 32)),
    "S_2": Case(lambda dropout: _s([2048] * 3, dropout), (3, 32, 32)),
    "S_3": Case(lambda dropout: _s([4096] * 4, dropout), (3, 32, 32)),
    "S_4": Case(lambda dropout: _s([4096] * 6, dropout), (3, 32, 32)),
    "M_1": Case(lambda dropout: _m([2048] * 2, dropout), (3, 32, 32)),
    "M_2": Case(lambda dropout: _m([4096] * 3, dropout), (3, 32, 32)),
    "ResNet-18": Case(resnet, (3, 32, 32)),
    "Transformer": Case(lambda dropout: Transformer(28, 128, 4, 10, dropout), (28, 28), unit_dim=-1),
}


def _s(hidden: list[int], dropout: MakeDropout) -> nn.Module:
    return paper_cnn((32, 32, 64), hidden, dropout, image_size=32, batch_norm=False)


def _m(hidden: list[int], dropout: MakeDropout) -> nn.Module:
    return paper_cnn((96, 128, 256), hidden, dropout, image_size=32, batch_norm=True)


def main(
    device: str = "cpu",
    threads: int = 1,
    networks: Sequence[str] = tuple(CASES),
    seconds_for_each: float = 40.0,
    loops: Sequence[str] = ("bare", "trainer"),
) -> None:
    """Measure every network.

    Args:
        device: Where.
        threads: Of the CPU.
        networks: Which of them.
        seconds_for_each: About how long each loop of each network is measured.
        loops: "bare", "trainer" or both.

    """
    settings = dict(locals())
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    where = torch.device(device)
    rows = []
    for network in networks:
        for loop in loops:
            rows.append(measure(network, loop, where, seconds_for_each))
            print(rows[-1], flush=True)
    write_report("step", where, settings, rows)


def measure(network: str, loop: str, device: torch.device, seconds_for_each: float) -> dict[str, Any]:
    """Time the alternatives against each other, in a bare loop or in Trainers."""
    case = CASES[network]
    torch.manual_seed(0)
    x, y = torch.randn(BATCH_SIZE, *case.shape, device=device), torch.randint(10, (BATCH_SIZE,), device=device)
    start = _start_bare if loop == "bare" else _start_trainers
    models = _models_of_one_set_of_weights(case, device)
    timed = {name: start(models[name], x, y, arguments) for name, arguments in ALTERNATIVES.items()}
    began = time.perf_counter()
    in_turn(timed, rounds=0, warm_up=1)
    rounds = max(4, round(seconds_for_each / (time.perf_counter() - began)))
    seconds = in_turn(timed, rounds=rounds, warm_up=1)
    period = RECOMMENDED["every_n_batches"]
    seconds["recommended"] = [
        (due + (period - 1) * carried) / period for due, carried in zip(seconds["due"], seconds["carried"], strict=True)
    ]
    found = ratios(seconds, "dropout")
    return {
        "network": network,
        "loop": loop,
        "dropout ms": 1e3 * statistics.median(seconds["dropout"]),
        "none": found["none"],
        "paper": found["paper"],
        "paper quartiles": quartiles(seconds, "paper", "dropout"),
        "floor": floor(case, x, y),
        "captum": found["captum"],
        "paper/captum": found["paper"] / found["captum"],
        "recommended": found["recommended"],
        "recommended quartiles": quartiles(seconds, "recommended", "dropout"),
        "rounds": rounds,
    }


def _models_of_one_set_of_weights(case: Case, device: torch.device) -> dict[str, nn.Module]:
    """Build the network for every alternative: FC_4 would not fit into memory six times."""
    models: dict[str, nn.Module] = {}
    for name in ALTERNATIVES:
        models[name] = case.model(name).to(device)
        for key, parameter in models["none"].named_parameters():
            place, _, attribute = key.rpartition(".")
            setattr(models[name].get_submodule(place), attribute, parameter)
    return models


def floor(case: Case, x: Tensor, y: Tensor, rows: int | None = None) -> float:
    """Count operations of matrix products and convolutions: a step with phase 1, to one without.

    Phase 1 at its leanest is one forward pass of its rows, and the backward pass of as many down to the first dropout
    layer, without the gradients of weights.

    Args:
        case: The network.
        x: The batch.
        y: Its labels.
        rows: Of phase 1. None takes the paper's, n_steps * num_samples + 1.

    """
    model = case.model("paper").to(x.device)
    with FlopCounterMode(display=False) as step:
        F.cross_entropy(model(x), y).backward()
    recorded: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, ConductanceDropout):
            module.register_forward_hook(lambda module, args, output: recorded.append(output))
    model.eval()
    rows = N_STEPS * num_samples_of(len(x)) + 1 if rows is None else rows
    points = x[torch.arange(rows, device=x.device) % len(x)]
    with FlopCounterMode(display=False) as phase1:
        torch.autograd.grad(model(points).sum(), recorded)
    return 1 + float(phase1.get_total_flops() / step.get_total_flops())


def _start_bare(model: nn.Module, x: Tensor, y: Tensor, arguments: Arguments) -> Callable[[], float]:
    """Make a training loop of one batch, of which each call runs and times some steps."""
    ydrop = None if arguments is None else YDrop(model, **arguments)
    train = training_step(model, x, y)

    def step() -> None:
        if ydrop is not None:
            ydrop.step(x, y)
        train()

    step()
    began = time.perf_counter()
    step()
    times = max(1, round(0.05 / (time.perf_counter() - began)))

    def run() -> float:
        wait_for(x.device)
        start = time.perf_counter()
        for _ in range(times):
            step()
        wait_for(x.device)
        return (time.perf_counter() - start) / times

    return run


def _start_trainers(model: nn.Module, x: Tensor, y: Tensor, arguments: Arguments) -> Callable[[], float]:
    """Make fits of which each call runs one and times its last TIMED batches."""

    def run() -> float:
        stopwatch = _Stopwatch(x.device)
        callbacks: list[Callback] = [stopwatch]
        if arguments is not None:
            callbacks.append(YDropCallback(annealing_epochs=0, **arguments))
        fit(model, x, y, WARM_UP + TIMED, callbacks)
        gc.collect()  # trainers refer to themselves, and hold on to the momentum of their optimisers
        return stopwatch.seconds / TIMED

    return run


def fit(model: nn.Module, x: Tensor, y: Tensor, times: int, callbacks: list[Callback]) -> None:
    """Train a network in a Trainer that does nothing else, on one batch, so many times."""
    L.Trainer(
        accelerator="gpu" if x.is_cuda else "cpu",
        devices=1,
        max_epochs=1,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(_Classifier(model), DataLoader(_Repeated(x.cpu(), y.cpu(), times), batch_size=None))


class _Stopwatch(Callback):
    """Times the last batches of a fit; as the first callback it starts before the others' work."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = 0.0

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == WARM_UP:
            wait_for(self.device)
            self.seconds = -time.perf_counter()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        wait_for(self.device)
        self.seconds += time.perf_counter()


class _Repeated(Dataset[list[Tensor]]):
    """One batch, so many times."""

    def __init__(self, x: Tensor, y: Tensor, times: int) -> None:
        self.batch = [x, y]
        self.times = times

    def __len__(self) -> int:
        return self.times

    def __getitem__(self, index: int) -> list[Tensor]:
        if index >= len(self):
            raise IndexError(index)
        return self.batch


class _Classifier(L.LightningModule):
    """Trains a network."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """Give the logits (B, C)."""
        logits: Tensor = self.network(x)
        return logits

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy of a batch."""
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD with momentum."""
        return torch.optim.SGD(self.parameters(), lr=1e-3, momentum=0.9)


if __name__ == "__main__":
    auto_cli(main)
