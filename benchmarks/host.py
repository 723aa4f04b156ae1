"""What the host does in a step beside the passes through the network: time, operators and kernels.

Timed within the callback's hook in a Trainer, on networks so small that nothing hides it.
"""

import logging
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
import torch
from jsonargparse import auto_cli
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.layers import NUM_CLASSES, bare_pass, batch_of, num_samples_of, paths
from benchmarks.measuring import interleaved, wait_for
from benchmarks.networks import RECOMMENDED, perceptron
from benchmarks.report import write_report
from benchmarks.step import fit
from lightning_ydrop import ConductanceDropout, YDrop, YDropCallback


def main(
    device: str = "cpu",
    threads: int = 1,
    steps: int = 960,
    depths: Sequence[int] = (1, 2, 4, 8),
    width: int = 32,
    batch_size: int = 64,
    seed: int = 0,
) -> None:
    """Measure perceptrons of some depths.

    Args:
        device: Where.
        threads: Of the CPU.
        steps: How many are timed, a multiple of the recommended period.
        depths: How many hidden layers, all of which are driven.
        width: Of the layers and inputs.
        batch_size: Samples in the batch.
        seed: Of weights and batch.

    """
    settings = dict(locals())
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    where = torch.device(device)
    write_report("host", where, settings, [measure(depth, where, steps, width, batch_size) for depth in depths])


def measure(depth: int, where: torch.device, steps: int, width: int, batch_size: int) -> dict[str, Any]:
    """Time the hook with the paper's and the recommended settings, and take away bare passes over as many rows."""
    x, y = batch_of(where, batch_size, width)
    driven = perceptron(width, [width] * depth, NUM_CLASSES, ConductanceDropout).to(where)
    network = perceptron(width, [width] * depth, NUM_CLASSES, nn.Identity).to(where)
    bare = bare_pass(network, range(depth), *paths(x, y, num_samples_of(batch_size)))
    bare_us = 1e6 * statistics.median(interleaved({"bare": bare}, rounds=steps, device=where)["bare"])
    paper_us = 1e6 * statistics.median(_seconds_in_hook(driven, x, y, steps, {}))
    recommended_us = 1e6 * statistics.fmean(_seconds_in_hook(driven, x, y, steps, RECOMMENDED))
    # One after the other: the engine that was made last drives the network.
    counted = {"bare": _count(bare, where), "step": _count(_step(driven, x, y), where)}
    counted["compiled"] = _count(_step(driven, x, y, compile_phase1=True), where)
    return {
        "layers": depth,
        "bare pass us": bare_us,
        "hook us, paper": paper_us,
        "host work us, paper": paper_us - bare_us,
        "hook us, recommended": recommended_us,
        "host work us, recommended": recommended_us - bare_us / RECOMMENDED["every_n_batches"],
        "operators": counted["step"][0],
        "operators beside a compiled phase 1": counted["compiled"][0],
        "operators, bare": counted["bare"][0],
        "kernels": counted["step"][1],
        "kernels, bare": counted["bare"][1],
    }


def _step(model: nn.Module, x: Tensor, y: Tensor, **arguments: Any) -> Callable[[], None]:
    engine = YDrop(model, **arguments)
    engine.step(x, y)
    return lambda: engine.step(x, y)


def _seconds_in_hook(model: nn.Module, x: Tensor, y: Tensor, steps: int, arguments: dict[str, Any]) -> list[float]:
    """Fit, and give the seconds of each call of the callback's hook except the first ones."""
    callback = _Timed(annealing_epochs=0, **arguments)
    warm_up = 2 * RECOMMENDED["every_n_batches"]
    fit(model, x, y, warm_up + steps, [callback])
    return callback.seconds[warm_up:]


class _Timed(YDropCallback):
    """The callback, with a clock."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.seconds: list[float] = []

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        start = time.perf_counter()
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        wait_for(batch[0].device)
        self.seconds.append(time.perf_counter() - start)


class _Operators(TorchDispatchMode):
    """Counts operators, and those that are a kernel on a GPU: no views, and nothing that the host draws.

    Where the device is the CPU, what the host draws cannot be told apart, and counts.
    """

    def __init__(self, where: torch.device) -> None:
        super().__init__()
        self.where = where
        self.all = 0
        self.kernels = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        there = any(
            isinstance(each, Tensor) and each.device.type == self.where.type for each in tree_leaves((args, result))
        )
        self.all += 1
        self.kernels += there and not func.is_view
        return result


def _count(run: Callable[[], object], where: torch.device) -> tuple[int, int]:
    with _Operators(where) as operators:
        run()
    return operators.all, operators.kernels


if __name__ == "__main__":
    auto_cli(main)
