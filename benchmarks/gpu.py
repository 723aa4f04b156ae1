"""What takes a GPU to measure, in one command: waiting, launches, time, memory, precisions and recurrent layers.

    python -m benchmarks.gpu

It takes a few minutes, and leaves one JSON file. Networks are those of `benchmarks.step`; ratios are to the step with
nn.Dropout(0.5) in the same loop.
"""

import gc
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jsonargparse import auto_cli
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks import memory, step
from benchmarks.measuring import interleaved, quartiles, ratios
from benchmarks.networks import MakeDropout
from benchmarks.report import last_record, write_report
from lightning_ydrop import YDrop

NAMES = ("FC_1", "FC_2", "FC_3", "FC_4", "S_1", "M_1", "ResNet-18", "Transformer")
MODES = ("float32", "tf32", "bf16", "16")
SETTINGS: dict[str, dict[str, Any] | None] = {"dropout": None, "paper": {}, "every 4": {"every_n_batches": 4}}
ROUNDS, STEPS = 12, 8  # 8 is a multiple of the period


class Recurrent(nn.Module):
    """Two layers of cuDNN's LSTM with dropout behind each, over (B, T, features)."""

    def __init__(self, dropout: MakeDropout) -> None:
        super().__init__()
        self.first, self.second = nn.LSTM(28, 256, batch_first=True), nn.LSTM(256, 256, batch_first=True)
        self.drop, self.drop_again, self.head = dropout(), dropout(), nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Give the logits (B, C)."""
        states = self.drop(self.first(x.flatten(2))[0])
        logits: Tensor = self.head(self.drop_again(self.second(states)[0])[:, -1])
        return logits


CASES = {**step.CASES, "LSTM": step.Case(Recurrent, (28, 28), unit_dim=-1)}


def main(
    networks: Sequence[str] = (*NAMES, "LSTM"),
    modes: Sequence[str] = MODES,
    compiled: Sequence[str] = ("FC_1", "Transformer"),
    device: str = "cuda",
    batch_size: int = 64,
) -> None:
    """Measure every network in every mode, and its memory.

    Args:
        networks: Which of them.
        modes: Of "float32", "tf32" (products of float32 by the tensor cores), "bf16" and "16" (autocast; "16" with a
            scaler of gradients).
        compiled: Networks that are measured with torch.compile too, which takes most of the time.
        device: Where; without a GPU the counts of waiting and of launches are empty.
        batch_size: Samples in the batch.

    """
    settings = dict(locals())
    warnings.simplefilter("ignore")
    where = torch.device(device)
    before = last_record("gpu", where)  # or the first row would replace what the others are compared with
    rows: list[dict[str, Any]] = []
    for network in dict.fromkeys((*networks, *compiled)):
        for mode in (*modes, *(("compiled",) if network in compiled else ())):
            gc.collect()
            try:
                row = measure(network, mode, where, batch_size)
            except Exception as error:
                row = {"failed": f"{type(error).__name__}: {str(error)[:200]}"}
            rows.append({"network": network, "mode": mode, **row})
            columns = list(dict.fromkeys(column for row in rows for column in row))
            # Each time, so that what is cut off has left what there was time for.
            filled = [{column: row.get(column, "") for column in columns} for row in rows]
            write_report("gpu", where, settings, filled, before)


def measure(network: str, mode: str, where: torch.device, batch_size: int) -> dict[str, Any]:
    """Time a training step with nn.Dropout, and with Y-Drop in two settings, in turn."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = mode == "tf32"
    case = CASES[network]
    torch.manual_seed(0)
    x = torch.randn(batch_size, *case.shape, device=where)
    y = torch.randint(10, (batch_size,), device=where)
    runs: dict[str, Callable[[], None]] = {}
    drivers: dict[str, YDrop] = {}
    for name, arguments in SETTINGS.items():
        model = case.model("dropout" if arguments is None else "paper").to(where)
        train = _training_step(model, x, y, mode)
        if arguments is not None:
            with _autocast(mode, where):
                drivers[name] = driver = YDrop(model, **arguments)
            train = _driven(driver, train, x, y, mode)
        runs[name] = partial(_repeat, train, STEPS)
    seconds = interleaved(runs, rounds=ROUNDS, device=where)
    found = ratios(seconds, "dropout")
    row = {
        "dropout ms": 1e3 * statistics.median(seconds["dropout"]) / STEPS,
        "paper": found["paper"],
        "paper quartiles": quartiles(seconds, "paper", "dropout"),
        "every 4": found["every 4"],
        "every 4 quartiles": quartiles(seconds, "every 4", "dropout"),
    }
    phase1 = partial(_phase1, drivers["paper"], x, y, mode)
    if where.type == "cuda":
        row |= {"host waits": _waits(phase1), "launches of phase 1": _launches(phase1)}
        row |= {"launches of a step": _launches(partial(_repeat, runs["dropout"], 1)) / STEPS}
    row["host ms of phase 1"] = _host_ms(phase1, where)
    if mode == "float32":
        row |= _memory(case, batch_size, where)
    return row


def _driven(driver: YDrop, train: Callable[[], None], x: Tensor, y: Tensor, mode: str) -> Callable[[], None]:
    def run() -> None:
        _phase1(driver, x, y, mode)
        train()

    return run


def _phase1(driver: YDrop, x: Tensor, y: Tensor, mode: str) -> None:
    with _autocast(mode, x.device):
        driver.step(x, y)


def _training_step(model: nn.Module, x: Tensor, y: Tensor, mode: str) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    forward: Callable[[Tensor], Tensor] = torch.compile(model) if mode == "compiled" else model
    scaler = torch.amp.GradScaler(x.device.type, enabled=mode == "16")

    def train() -> None:
        optimizer.zero_grad()
        with _autocast(mode, x.device):
            loss = F.cross_entropy(forward(x), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    return train


def _autocast(mode: str, where: torch.device) -> AbstractContextManager[Any]:
    kinds = {"bf16": torch.bfloat16, "16": torch.float16}
    return torch.autocast(where.type, kinds[mode]) if mode in kinds else nullcontext()


def _repeat(run: Callable[[], None], times: int) -> None:
    for _ in range(times):
        run()


def _waits(run: Callable[[], None]) -> int:
    """Count how often the host waits for the GPU."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(each.message) for each in caught)


def _launches(run: Callable[[], None]) -> int:
    """Count the kernels that are started."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        run()
        torch.cuda.synchronize()
    return sum(event.count for event in profiled.key_averages() if event.key.startswith(("cudaLaunch", "cuLaunch")))


def _host_ms(run: Callable[[], None], where: torch.device) -> float:
    """Time what the host does until all is launched."""
    times = []
    for _ in range(20):
        if where.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def _memory(case: step.Case, batch_size: int, where: torch.device) -> dict[str, float]:
    """Compare the peaks of a step with nn.Dropout and with Y-Drop, in bytes."""
    plain, driven = memory.peaks_of(case, None, batch_size, where), memory.peaks_of(case, {}, batch_size, where)
    return {
        "peak MiB of dropout": max(plain.values()) / memory.MIB,
        "memory": max(driven.values()) / max(plain.values()),
    }


if __name__ == "__main__":
    auto_cli(main)
