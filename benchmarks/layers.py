"""What phase 1 costs as more layers are driven, against one handwritten forward and backward pass of the same rows."""

import statistics
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import torch
from jsonargparse import auto_cli
from torch import Tensor, nn

from benchmarks.measuring import interleaved, quartiles, ratios
from benchmarks.networks import perceptron
from benchmarks.report import write_report
from lightning_ydrop import ConductanceDropout, YDrop

NUM_CLASSES = 10
N_STEPS = 5
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
    seed: int = 0,
) -> None:
    """Measure a deep network with some of its hidden layers driven.

    Args:
        device: Where.
        threads: Of the CPU.
        rounds: How often each alternative is timed.
        counts: How many hidden layers are driven.
        depth: How many there are.
        width: Of its layers and inputs.
        batch_size: Samples in the batch, of which phase 1 draws as many as the paper does.
        seed: Of weights and batch.

    """
    settings = dict(locals())
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    where = torch.device(device)
    write_report("layers", where, settings, _deep(where, rounds, counts, depth, width, batch_size))


def _deep(
    where: torch.device, rounds: int, counts: Sequence[int], depth: int, width: int, batch_size: int
) -> list[Row]:
    """Time all placements against each other."""
    network = perceptron(width, [width] * depth, NUM_CLASSES, nn.Identity).to(where)
    x, y = batch_of(where, batch_size, width)
    runs: dict[str, Step] = {}
    placements = [(placement, count) for placement in ("last", "spread") for count in counts]
    for placement, count in placements:
        hidden = _last(depth, count) if placement == "last" else _spread(depth, count)
        runs[f"{placement} {count}"] = partial(YDrop(_with_layers(network, hidden)).step, x, y)
        runs[f"{placement} {count} bare"] = bare_pass(network, hidden, *paths(x, y, num_samples_of(batch_size)))
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


def batch_of(where: torch.device, batch_size: int, width: int) -> tuple[Tensor, Tensor]:
    """Make a batch for a perceptron of one width."""
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


def num_samples_of(batch_size: int, n_steps: int = N_STEPS) -> int:
    """Say for how many samples a batch has rows where one start serves all of them."""
    return (batch_size - 1) // n_steps


def paths(x: Tensor, y: Tensor, num_samples: int) -> tuple[Tensor, Tensor]:
    """Give the rows of the first samples' paths from a baseline of zeros, and the target of each row."""
    x, y = x[:num_samples], y[:num_samples]
    steps = [x * step / N_STEPS for step in range(1, N_STEPS + 1)]
    return torch.cat([torch.zeros_like(x[:1]), *steps]), torch.cat([y[:1], y.repeat(N_STEPS)])


def bare_pass(network: nn.Sequential, hidden: Collection[int], rows: Tensor, target: Tensor) -> Step:
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


if __name__ == "__main__":
    auto_cli(main)
