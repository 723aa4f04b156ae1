"""How much memory a training step with Y-Drop takes at its peak, against the same network with torch's dropout.

A ratio above 1 says that ours takes more. In Lightning's order: phase 1 finds the last step's gradients still there.
"""

import gc
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks import step
from benchmarks.networks import (
    RECOMMENDED,
    CheckpointedInTraining,
    CheckpointedTransformer,
    Transformer,
    perceptron,
    resnet,
    small_cnn,
)
from benchmarks.report import write_report
from lightning_ydrop import YDrop

CASES = {
    "FC_1": step.CASES["FC_1"],
    "FC_1, tanh": step.Case(lambda dropout: perceptron(784, [1024, 1024], 10, dropout, nn.Tanh), (784,)),
    "six layers of 64": step.Case(lambda dropout: perceptron(784, [64] * 6, 10, dropout), (784,)),
    "FC_2": step.CASES["FC_2"],
    "S_1": step.CASES["S_1"],
    "ResNet-18": step.Case(resnet, (3, 64, 64)),
    "Transformer": step.Case(lambda dropout: Transformer(28, 64, 2, 10, dropout), (28, 28), unit_dim=-1),
    "Transformer, checkpoints": step.Case(
        lambda dropout: CheckpointedTransformer(28, 64, 4, 10, dropout), (28, 28), unit_dim=-1
    ),
    "Transformer, checkpoints in training": step.Case(
        lambda dropout: CheckpointedInTraining(28, 64, 4, 10, dropout), (28, 28), unit_dim=-1
    ),
    "CNN": step.Case(small_cnn, (1, 28, 28)),
}
SETTINGS: dict[str, dict[str, Any]] = {"paper": {}, "recommended": RECOMMENDED}
MIB = 2**20
# What runs in a step, in its order, by name.
Stages = Mapping[str, Callable[[], object]]


def main(
    device: str = "cpu", threads: int = 1, networks: Sequence[str] = tuple(CASES), batch_size: int = 64, seed: int = 0
) -> None:
    """Measure every network: on a CPU all that torch allocates, on a GPU what its allocator counts.

    Args:
        device: Where.
        threads: Of the CPU.
        networks: Which of them.
        batch_size: Samples in the batch.
        seed: Of weights and batch.

    """
    settings = dict(locals())
    torch.set_num_threads(threads)
    where = torch.device(device)
    _check_the_counting(where)
    rows: list[dict[str, Any]] = []
    for name in networks:
        case = CASES[name]
        torch.manual_seed(seed)
        plain = peaks_of(case, None, batch_size, where)
        for setting, arguments in SETTINGS.items():
            torch.manual_seed(seed)
            driven = peaks_of(case, arguments, batch_size, where)
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


def peaks_of(
    case: step.Case, arguments: Mapping[str, Any] | None, batch_size: int, where: torch.device
) -> dict[str, int]:
    """Give the most bytes alive at once in each stage of a training step, with Y-Drop unless `arguments` is None."""
    return _peaks(partial(_training, case, arguments, batch_size, where), where)


def _training(case: step.Case, arguments: Mapping[str, Any] | None, batch_size: int, where: torch.device) -> Stages:
    """Prepare to train a network on one batch: with Y-Drop, or with torch's dropout where `arguments` is None."""
    model = case.model("dropout" if arguments is None else "paper").to(where)
    x, y = torch.randn(batch_size, *case.shape, device=where), torch.randint(10, (batch_size,), device=where)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    losses: list[Tensor] = []

    def forward() -> None:
        losses.append(nn.functional.cross_entropy(model(x), y))

    def backward() -> None:
        optimizer.zero_grad()
        losses.pop().backward()

    training = {"forward": forward, "backward": backward, "optimizer": optimizer.step}
    if arguments is None:
        return {"before": _nothing} | training
    ydrop = YDrop(model, **arguments)

    def skip() -> None:
        for _ in range(ydrop.settings.every_n_batches - 1):  # so that the next step runs phase 1 too
            ydrop.skip()

    return {"before": _nothing, "phase 1": lambda: ydrop.step(x, y)} | training | {"after": skip}


def _nothing() -> None:
    """Show what is alive anyway."""


def _peaks(make: Callable[[], Stages], where: torch.device) -> dict[str, int]:
    """Give the most bytes alive at once in each stage of a step that is not the first."""
    gc.collect()  # or what is released later may have been allocated before
    return _peaks_of_a_gpu(make, where) if where.type == "cuda" else _peaks_of_the_cpu(make)


def _peaks_of_a_gpu(make: Callable[[], Stages], where: torch.device) -> dict[str, int]:
    # What libraries keep for themselves from their first use on belongs to no network.
    nn.Linear(8, 8, device=where)(torch.ones(8, 8, device=where)).sum().backward()
    before = torch.cuda.memory_allocated(where)
    stages = make()
    _run(stages)
    peaks = {}
    for name, stage in stages.items():
        torch.cuda.reset_peak_memory_stats(where)
        stage()
        peaks[name] = torch.cuda.max_memory_allocated(where) - before
    return peaks


def _peaks_of_the_cpu(make: Callable[[], Stages]) -> dict[str, int]:
    """Follow what is allocated and released since before the network is made: the sum is what is alive."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        stages = make()
        _run(stages)
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


def _run(stages: Stages) -> None:
    for stage in stages.values():
        stage()


def _check_the_counting(where: torch.device) -> None:
    """Refuse to measure where tensors of known sizes are not counted as such."""
    kept: dict[str, Tensor] = {}

    def allocate(mib: int) -> Tensor:
        return torch.empty(mib * MIB, dtype=torch.uint8, device=where)

    def more() -> None:
        kept["second"] = allocate(2)
        for _ in range(2):  # one after the other, so that they never are alive together
            allocate(8)

    def make() -> Stages:
        kept["first"] = allocate(4)
        return {"before": _nothing, "more": more, "less": lambda: kept.pop("second")}

    peaks = _peaks(make, where)
    if peaks != {"before": 4 * MIB, "more": 14 * MIB, "less": 6 * MIB}:
        raise RuntimeError(f"Tensors of 4, 2 and 8 MiB were counted as {peaks} bytes.")


if __name__ == "__main__":
    auto_cli(main)
