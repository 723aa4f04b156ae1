"""What it costs to average scores over processes, against the same steps in the same processes without that.

A round ends when its slowest process does, since the others wait for that one in training anyway. With fewer free cores
than processes, what is measured is how long they wait for one.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from jsonargparse import auto_cli
from torch import Tensor
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.measuring import in_turn, quartiles, ratios, training_step, wait_for
from benchmarks.memory import CASES
from benchmarks.report import write_report
from lightning_ydrop import YDrop
from lightning_ydrop.importance import engine, ranks

Row = dict[str, Any]


def main(
    device: str = "cpu",
    threads: int = 1,
    rounds: int = 60,
    processes: Sequence[int] = (2, 4),
    networks: Sequence[str] = ("FC_1", "FC_2", "Transformer"),
    batch_size: int = 64,
    seed: int = 0,
) -> None:
    """Start so many processes, and measure every network in them.

    Args:
        device: Where: "cpu", or "cuda" with a GPU for each process.
        threads: Of the CPU, in each process.
        rounds: How often each alternative is timed.
        processes: How many.
        networks: Which of those of `memory`.
        batch_size: Samples in the batch of each process.
        seed: Of weights and batches.

    """
    settings = dict(locals())
    torch.set_num_threads(threads)
    where = torch.device(device)
    if where.type == "cuda" and torch.cuda.device_count() < max(processes):
        raise SystemExit(f"{max(processes)} processes take as many GPUs; here are {torch.cuda.device_count()}.")
    rows: list[Row] = []
    for count in processes:
        with tempfile.TemporaryDirectory() as folder:
            # Through a file: of a process that fails, a queue would wait for an answer for ever.
            arguments = (count, Path(folder), where.type, threads, rounds, networks, batch_size, seed)
            spawn(_process, arguments, nprocs=count)
            rows += json.loads((Path(folder) / "rows.json").read_text())
    write_report("ranks", where, settings, rows)


def _process(
    rank: int,
    count: int,
    folder: Path,
    device_type: str,
    threads: int,
    rounds: int,
    networks: Sequence[str],
    batch_size: int,
    seed: int,
) -> None:
    torch.set_num_threads(threads)
    meeting = f"file://{folder / 'meeting'}"
    if device_type == "cuda":
        where = torch.device(device_type, rank)
        torch.cuda.set_device(where)
        dist.init_process_group("nccl", meeting, rank=rank, world_size=count, device_id=where)
    else:
        where = torch.device(device_type)
        dist.init_process_group("gloo", meeting, rank=rank, world_size=count)
    try:
        rows = [_measure(name, where, rounds, batch_size, seed) for name in networks]
    finally:
        dist.destroy_process_group()
    if rank == 0:
        (folder / "rows.json").write_text(json.dumps(rows))


def _measure(name: str, where: torch.device, rounds: int, batch_size: int, seed: int) -> Row:
    case = CASES[name]
    torch.manual_seed(seed)
    model = case.model("paper").to(where)
    torch.manual_seed(seed + dist.get_rank())
    x, y = torch.randn(batch_size, *case.shape, device=where), torch.randint(10, (batch_size,), device=where)
    ydrop = YDrop(model)
    ydrop.dry_run(x, y)
    train = training_step(DistributedDataParallel(model), x, y)

    def synchronised() -> None:
        ydrop.step(x, y)

    def without_exchange() -> None:
        with _replaced("add_over_ranks", _ignore):
            ydrop.step(x, y)

    def alone() -> None:
        # Also without what is done to the scores for the sake of one message.
        with _replaced("world_size", _one):
            ydrop.step(x, y)

    size = _bytes_exchanged(synchronised)
    message = torch.zeros(size, dtype=torch.uint8, device=where).view(torch.float32)

    def exchange() -> None:
        dist.all_reduce(message)

    runs = {
        "synchronised": synchronised,
        "without exchange": without_exchange,
        "alone": alone,
        "exchange": exchange,
        "train": train,
    }
    timed = {run: partial(_seconds_of_all, call, where) for run, call in runs.items()}
    seconds = in_turn(timed, rounds=rounds, warm_up=3)
    micro = {run: 1e6 * statistics.median(values) for run, values in seconds.items()}
    synchronisation = micro["synchronised"] - micro["alone"]
    return {
        "network": name,
        "processes": dist.get_world_size(),
        "with against without": ratios(seconds, "alone")["synchronised"],
        "quartiles": quartiles(seconds, "synchronised", "alone"),
        "synchronisation us": round(synchronisation),
        "of which exchange us": round(micro["synchronised"] - micro["without exchange"]),
        "exchange by itself us": round(micro["exchange"]),
        "bytes": size,
        "step ms": micro["synchronised"] / 1e3,
        "DDP training step ms": micro["train"] / 1e3,
        "synchronisation against DDP training step": synchronisation / micro["train"],
    }


def _seconds_of_all(run: Callable[[], None], where: torch.device) -> float:
    """Time from when the last process starts to when the last one ends; they share a machine, and so its clock.

    What one of them waits for because another was late to start is no cost of what is timed.
    """
    wait_for(where)
    dist.barrier()
    start = time.perf_counter()
    run()
    wait_for(where)
    spans = [(start, time.perf_counter())] * dist.get_world_size()
    dist.all_gather_object(spans, spans[0])
    return max(end for _, end in spans) - max(start for start, _ in spans)


def _bytes_exchanged(step: Callable[[], None]) -> int:
    sizes: list[int] = []

    def note(values: Tensor) -> None:
        sizes.append(values.numel() * values.itemsize)

    with _replaced("add_over_ranks", note):
        step()
    return sum(sizes)


@contextmanager
def _replaced(name: str, function: Callable[..., object]) -> Iterator[None]:
    """Let the engine, and what it calls, use another function of `ranks`."""
    modules = (engine, ranks)
    former = getattr(ranks, name)
    try:
        for module in modules:
            setattr(module, name, function)
        yield
    finally:
        for module in modules:
            setattr(module, name, former)


def _ignore(values: Tensor) -> None:
    """Leave the scores of this process what they are."""


def _one() -> int:
    return 1


if __name__ == "__main__":
    auto_cli(main)
