"""How much memory a training step with Y-Drop takes at its peak, against the same network with torch's dropout.

A ratio above 1 says that ours takes more. In Lightning's order: phase 1 finds the last step's gradients still there.
"""

import gc
import json
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jsonargparse import auto_cli
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.networks import MakeDropout, Transformer, paper_cnn, perceptron, resnet, small_cnn
from benchmarks.report import write_report
from lightning_ydrop import ConductanceDropout, YDrop


class Case(NamedTuple):
    """A network: how it is made, the shape of a sample, and the dimension of the units."""

    make: Callable[[MakeDropout], nn.Module]
    shape: tuple[int, ...]
    unit_dim: int = 1


CASES = {
    "FC_1": Case(lambda dropout: perceptron(784, (1024, 1024), 10, dropout), (784,)),
    "FC_2": Case(lambda dropout: perceptron(784, (2048, 2048, 2048), 10, dropout), (784,)),
    "S_1": Case(
        lambda dropout: paper_cnn((32, 32, 64), (1024, 1024), dropout, image_size=32, batch_norm=False), (3, 32, 32)
    ),
    "ResNet-18": Case(resnet, (3, 64, 64)),
    "Transformer": Case(lambda dropout: Transformer(28, 64, 2, 10, dropout), (28, 28), unit_dim=-1),
    "CNN": Case(small_cnn, (1, 28, 28)),
}
SETTINGS: dict[str, dict[str, Any]] = {"paper": {}, "recommended": {"n_steps": 1, "every_n_batches": 8}}
MIB = 2**20
# What runs in a step, in its order, by name.
Stages = Mapping[str, Callable[[], object]]


def main(device: str = "cpu", threads: int = 1, batch_size: int = 64, seed: int = 0) -> None:
    """Measure every network: on a CPU all that torch allocates, on a GPU what its allocator counts.

    Args:
        device: Where.
        threads: Of the CPU.
        batch_size: Samples in the batch.
        seed: Of weights and batch.

    """
    settings = dict(locals())
    torch.set_num_threads(threads)
    where = torch.device(device)
    _check_the_counting(where)
    rows: list[dict[str, Any]] = []
    for name, case in CASES.items():
        torch.manual_seed(seed)
        plain = _peaks(partial(_training, case, None, batch_size, where), 1, where)
        for setting, arguments in SETTINGS.items():
            torch.manual_seed(seed)
            warm_up = arguments.get("every_n_batches", 1)  # until phase 1 runs once more
            driven = _peaks(partial(_training, case, arguments, batch_size, where), warm_up, where)
            rows.append({"network": name, "setting": setting, **_row(plain, driven)})
    write_report("memory", where, settings, rows)


def _row(plain: Mapping[str, int], driven: Mapping[str, int]) -> dict[str, Any]:
    highest, ours = max(plain.values()), max(driven.values())
    return {
        "ratio": ours / highest,
        # Parameters, momentum, gradients and batch, which every step finds there, hide much of the difference.
        "ratio beyond what a step finds": (ours - driven["before"]) / (highest - plain["before"]),
        "a step finds MiB": plain["before"] / MIB,
        "nn.Dropout MiB": highest / MIB,
        "nn.Dropout's peak": max(plain, key=plain.__getitem__),
        "phase 1 MiB": driven["phase 1"] / MIB,
        "Y-Drop MiB": ours / MIB,
        "Y-Drop's peak": max(driven, key=driven.__getitem__),
    }


def _training(case: Case, arguments: Mapping[str, Any] | None, batch_size: int, where: torch.device) -> Stages:
    """Prepare to train a network on one batch: with Y-Drop, or with torch's dropout where `arguments` is None."""
    if arguments is None:
        model = case.make(lambda: nn.Dropout(0.5))
    else:
        model = case.make(lambda: ConductanceDropout(0.5, unit_dim=case.unit_dim))
    model.to(where)
    x, y = torch.randn(batch_size, *case.shape, device=where), torch.randint(10, (batch_size,), device=where)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    losses: list[Tensor] = []

    def forward() -> None:
        losses.append(nn.functional.cross_entropy(model(x), y))

    def backward() -> None:
        optimizer.zero_grad()
        losses.pop().backward()

    stages: dict[str, Callable[[], object]] = {"before": lambda: None}
    if arguments is not None:
        ydrop = YDrop(model, **arguments)
        stages["phase 1"] = lambda: ydrop.step(x, y)
    return {**stages, "forward": forward, "backward": backward, "optimizer": optimizer.step}


def _peaks(make: Callable[[], Stages], warm_up: int, where: torch.device) -> dict[str, int]:
    """Give the most bytes alive at once in each stage of a step, after so many whole steps."""
    gc.collect()  # what is released later was not allocated here
    if where.type == "cuda":
        return _peaks_of_a_gpu(make, warm_up, where)
    return _peaks_of_the_cpu(make, warm_up)


def _peaks_of_a_gpu(make: Callable[[], Stages], warm_up: int, where: torch.device) -> dict[str, int]:
    # What libraries keep for themselves from their first use on belongs to no network.
    nn.Linear(8, 8, device=where)(torch.ones(8, 8, device=where)).sum().backward()
    before = torch.cuda.memory_allocated(where)
    stages = make()
    _run(stages, warm_up)
    peaks = {}
    for name, stage in stages.items():
        torch.cuda.reset_peak_memory_stats(where)
        stage()
        peaks[name] = torch.cuda.max_memory_allocated(where) - before
    return peaks


def _peaks_of_the_cpu(make: Callable[[], Stages], warm_up: int) -> dict[str, int]:
    """Follow what is allocated and released since before the network is made: the sum is what is alive."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        stages = make()
        _run(stages, warm_up)
        for name, stage in stages.items():
            with record_function(f"stage {name}"):
                stage()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    spans = {
        event["name"]: (event["ts"], event["ts"] + event["dur"])
        for event in events
        if event.get("cat") == "user_annotation"
    }
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]")
    peaks = {}
    for name in stages:
        start, end = spans[f"stage {name}"]
        alive = peak = sum(size for time, size in changes if time < start)
        for size in (size for time, size in changes if start <= time <= end):
            alive += size
            peak = max(peak, alive)
        peaks[name] = peak
    return peaks


def _run(stages: Stages, times: int) -> None:
    for _ in range(times):
        for stage in stages.values():
            stage()


def _check_the_counting(where: torch.device) -> None:
    """Refuse to measure where tensors of known sizes are not counted as such."""
    kept: dict[str, Tensor] = {}

    def make() -> Stages:
        kept["first"] = torch.empty(4 * MIB, dtype=torch.uint8, device=where)

        def more() -> None:
            for _ in range(2):  # one after the other, so that they never are alive together
                torch.empty(8 * MIB, dtype=torch.uint8, device=where)
            kept["second"] = torch.empty(2 * MIB, dtype=torch.uint8, device=where)

        return {"before": lambda: None, "more": more, "less": kept.clear}

    peaks = _peaks(make, 0, where)
    if peaks != {"before": 4 * MIB, "more": 12 * MIB, "less": 6 * MIB}:
        raise RuntimeError(f"Tensors of 4, 8 and 2 MiB were counted as {peaks} bytes.")


if __name__ == "__main__":
    auto_cli(main)
