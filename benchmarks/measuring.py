"""Timing alternatives against each other."""

import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def training_step(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], None]:
    """Make a step of a bare training loop on one batch: cross-entropy, and SGD with momentum."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def interleaved(
    runs: Mapping[str, Callable[[], object]], *, rounds: int, device: torch.device, warm_up: int = 3
) -> dict[str, list[float]]:
    """Time each run once in every round, so that what slows the machine for a while slows all of them.

    Args:
        runs: What to time, by name.
        rounds: How often.
        device: Where it runs: a GPU is waited for before each look at the clock.
        warm_up: Rounds before that which do not count.

    Returns:
        Seconds of every round, by name.

    """
    timed = {name: partial(_seconds_of, run, device) for name, run in runs.items()}
    return in_turn(timed, rounds=rounds, warm_up=warm_up)


def in_turn(timed: Mapping[str, Callable[[], float]], *, rounds: int, warm_up: int) -> dict[str, list[float]]:
    """Do as `interleaved` does with what tells by itself how many seconds it took."""
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    names = list(timed)
    for number in range(-warm_up, rounds):
        # Each comes first in turn: what runs after a large one finds caches that it has emptied.
        first = number % len(names)
        for name in names[first:] + names[:first]:
            took = timed[name]()
            if number >= 0:
                seconds[name].append(took)
    return seconds


def _seconds_of(run: Callable[[], object], device: torch.device) -> float:
    wait_for(device)
    start = time.perf_counter()
    run()
    wait_for(device)
    return time.perf_counter() - start


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ratios(seconds: Mapping[str, list[float]], baseline: str) -> dict[str, float]:
    """Give the ratio of each median to that of the baseline."""
    base = statistics.median(seconds[baseline])
    return {name: statistics.median(values) / base for name, values in seconds.items()}


def quartiles(seconds: Mapping[str, list[float]], name: str, baseline: str) -> tuple[float, float]:
    """Give the quartiles of the ratio within single rounds, which say how far it can be trusted."""
    each = [one / other for one, other in zip(seconds[name], seconds[baseline], strict=True)]
    low, _, high = statistics.quantiles(each, n=4)
    return low, high
