"""What `compile_phase1` saves: a step of Y-Drop with phase 1 run eagerly, and compiled."""

import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from jsonargparse import auto_cli
from torch import Tensor

from benchmarks import step
from benchmarks.layers import NUM_CLASSES
from benchmarks.measuring import interleaved, quartiles, ratios, training_step
from benchmarks.networks import perceptron
from benchmarks.report import write_report
from lightning_ydrop import YDrop


def main(
    networks: Sequence[str] = ("2x16", "2x32", "FC_1"),
    device: str = "cpu",
    threads: int = 1,
    rounds: int = 200,
    batch_size: int = 64,
    seed: int = 0,
) -> None:
    """Measure some networks.

    Args:
        networks: Names of those of `benchmarks.step`, or hidden layers of a width, such as "2x16".
        device: Where.
        threads: Of the CPU.
        rounds: How often each alternative is timed.
        batch_size: Samples in the batch.
        seed: Of weights and batch.

    """
    settings = dict(locals())
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    where = torch.device(device)
    rows = []
    for network in networks:
        torch.manual_seed(seed)
        rows.append({"network": network, **measure(network, where, rounds, batch_size)})
    write_report("compiled", where, settings, rows)


def measure(network: str, where: torch.device, rounds: int, batch_size: int) -> dict[str, Any]:
    """Time a training step with nn.Dropout, with Y-Drop, and phase 1 alone, in turn."""
    case = _case(network)
    x, y = torch.randn(batch_size, *case.shape, device=where), torch.randint(NUM_CLASSES, (batch_size,), device=where)
    runs: dict[str, Callable[[], None]] = {"dropout": training_step(case.model("dropout").to(where), x, y)}
    start = 0.0
    for name, compiles in (("eager", False), ("compiled", True)):
        model = case.model("paper").to(where)
        engine = YDrop(model, compile_phase1=compiles)
        start = time.perf_counter()
        engine.dry_run(x, y)
        runs[f"phase 1, {name}"] = partial(engine.step, x, y)
        runs[name] = partial(_both, engine, training_step(model, x, y), x, y)
    compilation = time.perf_counter() - start
    seconds = interleaved(runs, rounds=rounds, device=where)
    found = ratios(seconds, "dropout")
    low, high = quartiles(seconds, "phase 1, compiled", "phase 1, eager")
    return {
        "dropout ms": 1e3 * statistics.median(seconds["dropout"]),
        "phase 1 ms, eager": 1e3 * statistics.median(seconds["phase 1, eager"]),
        "phase 1 ms, compiled": 1e3 * statistics.median(seconds["phase 1, compiled"]),
        "compiled / eager": ratios(seconds, "phase 1, eager")["phase 1, compiled"],
        "quartiles": [low, high],
        "step / dropout, eager": found["eager"],
        "step / dropout, compiled": found["compiled"],
        "dry run s, compiled": compilation,
    }


def _both(engine: YDrop, train: Callable[[], None], x: Tensor, y: Tensor) -> None:
    engine.step(x, y)
    train()


def _case(name: str) -> step.Case:
    if name in step.CASES:
        return step.CASES[name]
    depth, width = map(int, name.split("x"))
    return step.Case(lambda dropout: perceptron(width, [width] * depth, NUM_CLASSES, dropout), (width,))


if __name__ == "__main__":
    auto_cli(main)
