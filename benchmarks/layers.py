"""What phase 1 costs as more layers are driven, against one handwritten forward and backward pass over the same rows.

A second report, "host", has what a small network, or a GPU, waits for: time beside the passes, and operators called.
"""

import statistics
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from jsonargparse import auto_cli
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.measuring import interleaved, quartiles, ratios
from benchmarks.networks import perceptron
from benchmarks.report import write_report
from lightning_ydrop import ConductanceDropout, YDrop

NUM_CLASSES = 10
N_STEPS = 5
EVERY = 8
Step = Callable[[], None]
Row = dict[str, Any]


def main(
    device: str = "cpu",
    threads: int = 1,
    rounds: int = 50,
    counts: Sequence[int] = (1, 2, 4, 8, 16, 32),
    depth: int = 32,
    width: int = 512,
    batch_size: int = 64,
    host_rounds: int = 500,
    host_depths: Sequence[int] = (1, 2, 4, 8),
    host_width: int = 32,
    seed: int = 0,
) -> None:
    """Measure a deep network with some of its hidden layers driven, then small ones with all of them.

    Args:
        device: Where.
        threads: Of the CPU.
        rounds: How often each alternative is timed on the deep network.
        counts: How many of its hidden layers are driven.
        depth: How many hidden layers it has.
        width: Of its layers and inputs.
        batch_size: Samples in the batch, of which phase 1 draws as many as the paper does.
        host_rounds: How often each alternative is timed on the small networks.
        host_depths: How many hidden layers they have.
        host_width: Of their layers and inputs.
        seed: Of weights and batch.

    """
    settings = dict(locals())
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    where = torch.device(device)
    write_report("layers", where, settings, _deep(where, rounds, counts, depth, width, batch_size))
    print()
    small = [_small(where, host_rounds, layers, host_width, batch_size) for layers in host_depths]
    write_report("host", where, settings, small)


def _deep(
    where: torch.device, rounds: int, counts: Sequence[int], depth: int, width: int, batch_size: int
) -> list[Row]:
    """Time all placements against each other."""
    network = perceptron(width, [width] * depth, NUM_CLASSES, nn.Identity).to(where)
    x, y = _batch(where, batch_size, width)
    runs: dict[str, Step] = {}
    placements = [(placement, count) for placement in ("last", "spread") for count in counts]
    for placement, count in placements:
        hidden = _last(depth, count) if placement == "last" else _spread(depth, count)
        runs[f"{placement} {count}"] = _step(YDrop(_with_layers(network, hidden)), x, y)
        runs[f"{placement} {count} bare"] = _bare(network, hidden, *_rows_on_the_path(x, y, N_STEPS))
    seconds = interleaved(runs, rounds=rounds, device=where)
    rows: list[Row] = []
    for placement, count in placements:
        step, bare = f"{placement} {count}", f"{placement} {count} bare"
        rows.append(
            {
                "placement": placement,
                "layers": count,
                "against bare": ratios(seconds, bare)[step],
                "quartiles": quartiles(seconds, step, bare),
                "step ms": 1e3 * statistics.median(seconds[step]),
                "bare ms": 1e3 * statistics.median(seconds[bare]),
                f"against {counts[0]} layer(s)": ratios(seconds, f"{placement} {counts[0]}")[step],
            }
        )
    return rows


def _small(where: torch.device, rounds: int, depth: int, width: int, batch_size: int) -> Row:
    """Time what is left when a bare pass is taken away, and count operators."""
    network = perceptron(width, [width] * depth, NUM_CLASSES, nn.Identity).to(where)
    hidden = range(depth)
    x, y = _batch(where, batch_size, width)
    seldom = YDrop(_with_layers(network, hidden), n_steps=1, every_n_batches=EVERY)
    runs: dict[str, Step] = {
        "step": _step(YDrop(_with_layers(network, hidden)), x, y),
        "bare": _bare(network, hidden, *_rows_on_the_path(x, y, N_STEPS)),
        "eight steps": _step(seldom, x, y, times=EVERY),
        "bare, one step of the path": _bare(network, hidden, *_rows_on_the_path(x, y, 1)),
    }
    seconds = interleaved(runs, rounds=rounds, device=where)
    micro = {name: round(1e6 * statistics.median(values)) for name, values in seconds.items()}
    counted = {name: _count_operators(runs[name], where) for name in ("step", "bare")}
    host_of_eight = micro["eight steps"] - micro["bare, one step of the path"]
    return {
        "layers": depth,
        "against bare": ratios(seconds, "bare")["step"],
        "quartiles": quartiles(seconds, "step", "bare"),
        "step us": micro["step"],
        "bare us": micro["bare"],
        "host work us": micro["step"] - micro["bare"],
        f"host work us, n_steps=1, every_n_batches={EVERY}": round(host_of_eight / EVERY),
        "operators": counted["step"][0],
        "operators, bare": counted["bare"][0],
        "kernels": counted["step"][1],
        "kernels, bare": counted["bare"][1],
    }


def _batch(where: torch.device, batch_size: int, width: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch_size, width, device=where), torch.randint(NUM_CLASSES, (batch_size,), device=where)


def _last(depth: int, count: int) -> list[int]:
    """Choose the last hidden layers: the backward pass goes no further down than them."""
    return list(range(depth - count, depth))


def _spread(depth: int, count: int) -> list[int]:
    """Choose hidden layers that lie evenly and begin with the first: the backward pass always goes all the way."""
    return [place * depth // count for place in range(count)]


def _places(hidden: Collection[int]) -> set[int]:
    """Say where in the stack of `perceptron` the dropout of these hidden layers is."""
    return {2 + 3 * place for place in hidden}


def _with_layers(network: nn.Sequential, hidden: Collection[int]) -> nn.Sequential:
    """Drive some hidden layers. The weights are shared, so that no alternative finds them in a cache of its own."""
    places = _places(hidden)
    return nn.Sequential(*[ConductanceDropout() if i in places else module for i, module in enumerate(network)])


def _rows_on_the_path(x: Tensor, y: Tensor, n_steps: int) -> tuple[Tensor, Tensor]:
    """Give as many rows as phase 1 has, and their targets: those of the baseline and of each step to some samples."""
    num_samples = (len(x) - 1) // n_steps
    samples, labels = x[:num_samples], y[:num_samples]
    steps = [samples * step / n_steps for step in range(1, n_steps + 1)]
    return torch.cat([torch.zeros_like(x[:1]), *steps]), torch.cat([labels[:1], labels.repeat(n_steps)])


def _step(ydrop: YDrop, x: Tensor, y: Tensor, times: int = 1) -> Step:
    def step() -> None:
        for _ in range(times):
            ydrop.step(x, y)

    return step


def _bare(network: nn.Sequential, hidden: Collection[int], rows: Tensor, target: Tensor) -> Step:
    """Do what no conductance of these layers can do without, and nothing else."""
    places, index = _places(hidden), target.unsqueeze(1)

    def bare() -> None:
        values, kept = rows, []
        for place, module in enumerate(network):
            values = module(values)
            if place in places:
                kept.append(values)
        torch.autograd.grad(values.gather(1, index).sum(), kept)

    return bare


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operators, and those that are a kernel on a GPU: no views, and nothing that the host draws.

    Where the device is the CPU, what the host draws cannot be told apart, and counts.
    """

    def __init__(self, where: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
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


def _count_operators(run: Step, where: torch.device) -> tuple[int, int]:
    with _Operators(where) as operators:
        run()
    return operators.all, operators.kernels


if __name__ == "__main__":
    auto_cli(main)
