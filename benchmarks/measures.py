"""What each measure of importance costs: a training step with it, against one with nn.Dropout(0.5).

Conductance takes one pass through the network for all layers. Captum's measures take a call for each layer.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from jsonargparse import auto_cli
from torch import Tensor

from benchmarks.measuring import interleaved, quartiles, ratios, training_step
from benchmarks.report import write_report
from benchmarks.step import BATCH_SIZE, CASES
from experiments.measures import ActivationMagnitude, DeepLift, GradientTimesActivation, InternalInfluence
from lightning_ydrop import RandomImportance, YDrop

# What YDrop is given, by measure. A single step takes the gradient at the samples alone: 13 rows, where five take 61.
MEASURES: dict[str, Callable[[], dict[str, Any]]] = {
    "conductance": dict,
    "conductance, n_steps=1": lambda: {"n_steps": 1, "num_samples": 12},
    "internal influence": lambda: {"measure": InternalInfluence()},
    "gradient times activation": lambda: {"measure": GradientTimesActivation()},
    "DeepLift": lambda: {"measure": DeepLift()},
    "activation magnitude": lambda: {"measure": ActivationMagnitude()},
    "random": lambda: {"measure": RandomImportance()},
}


def main(
    device: str = "cpu",
    threads: int = 1,
    networks: Sequence[str] = ("FC_1", "FC_2", "S_1"),
    rounds: int = 15,
    seed: int = 0,
) -> None:
    """Time every measure on every network.

    Args:
        device: Where.
        threads: Of the CPU.
        networks: Of those of `step`.
        rounds: How often each is timed.
        seed: Of weights and batch.

    """
    settings = dict(locals())
    torch.set_num_threads(threads)
    where = torch.device(device)
    write_report("measures", where, settings, [measured(name, where, rounds, seed) for name in networks])


def measured(network: str, where: torch.device, rounds: int, seed: int) -> dict[str, Any]:
    """Time steps of one network, in turn."""
    case = CASES[network]
    torch.manual_seed(seed)
    x, y = torch.randn(BATCH_SIZE, *case.shape, device=where), torch.randint(10, (BATCH_SIZE,), device=where)
    runs: dict[str, Callable[[], None]] = {"dropout": training_step(case.model("dropout").to(where), x, y)}
    for name, make in MEASURES.items():
        model = case.model("paper").to(where)
        runs[name] = partial(_step, YDrop(model, **make()), training_step(model, x, y), x, y)
    seconds = interleaved(runs, rounds=rounds, device=where)
    found = ratios(seconds, "dropout")
    row: dict[str, Any] = {"network": network}
    for name in MEASURES:
        row |= {name: found[name], f"{name} quartiles": quartiles(seconds, name, "dropout")}
    return row


def _step(driver: YDrop, train: Callable[[], None], x: Tensor, y: Tensor) -> None:
    driver.step(x, y)
    train()


if __name__ == "__main__":
    auto_cli(main)
