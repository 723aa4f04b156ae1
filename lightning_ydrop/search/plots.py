"""Pictures of a search: its rewards, and patterns on a map. They take matplotlib, of lightning-ydrop[plots]."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_ydrop.layers.pattern_dropout import PatternDropout
from lightning_ydrop.layers.patterns import ConvPattern, Pattern

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import FigureBase

# What a pattern is drawn on: the sides of a map, and tokens and channels of a sequence.
MAP = 32
TOKENS, CHANNELS = 32, 12
DRAWS = 3
PLACES_IN_A_ROW = 4
# Trials that a point of the mean covers.
WINDOW = 20


def draw_rewards(rewards: Mapping[str, Sequence[float]], file: Path) -> None:
    """Draw rewards over trials: a point for each, and the mean of the last trials as a line.

    Args:
        rewards: By label, in the order of trials.
        file: Picture to write.

    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for index, (label, values) in enumerate(rewards.items()):
        color = f"C{index % 10}"
        axes.plot(range(1, len(values) + 1), values, ".", color=color, alpha=0.3, markersize=4)
        means = [statistics.fmean(values[max(0, end - WINDOW) : end]) for end in range(1, len(values) + 1)]
        axes.plot(range(1, len(values) + 1), means, color=color, label=label)
    everything = sorted(value for values in rewards.values() for value in values)
    if len(everything) > 20:  # a few trainings that failed to learn would squeeze all others
        low, high = everything[len(everything) // 50], everything[-1]
        margin = 0.08 * (high - low) or 1.0
        axes.set_ylim(low - margin, high + margin)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="trials", ylabel="reward", title=f"each trial, and the mean of the last {WINDOW}")
    axes.legend()
    figure.savefig(file, dpi=120)


def draw_patterns(patterns: Mapping[str, Pattern], file: Path) -> None:
    """Draw the patterns of a network, place by place: what is dropped is black.

    Args:
        patterns: By place.
        file: Picture to write.

    """
    from matplotlib.figure import Figure

    rows, columns = grid_of(len(patterns))
    figure = Figure(figsize=(3.3 * columns, 1.75 * rows + 0.3), layout="constrained")
    draw_masks(patterns, figure)
    figure.savefig(file, dpi=120)


def grid_of(count: int) -> tuple[int, int]:
    """Tell in how many rows and columns so many places are drawn."""
    return math.ceil(count / PLACES_IN_A_ROW), min(count, PLACES_IN_A_ROW)


def draw_masks(patterns: Mapping[str, Pattern], figure: "FigureBase") -> None:
    """Draw the patterns of a network into a figure, or a part of one."""
    parts = figure.subfigures(*grid_of(len(patterns)), squeeze=False).ravel()
    for part, (place, pattern) in zip(parts, patterns.items(), strict=False):
        part.suptitle(f"{place}\n{summary(pattern)}", fontsize=8)
        for axes, mask in zip(part.subplots(1, DRAWS), masks_of(pattern), strict=True):
            _draw_mask(axes, mask)


def summary(pattern: Pattern) -> str:
    """Say in a few words what a pattern does."""
    if pattern.is_empty:
        return "no pattern"
    if not isinstance(pattern, ConvPattern):
        shared = [name for name, is_shared in (("tokens", pattern.share_t), ("channels", pattern.share_c)) if is_shared]
        noise = f"\nshared by {' and '.join(shared)}" if shared else ""
        runs = "all tokens" if pattern.size == "all" else f"{pattern.size} of {pattern.size + pattern.stride} tokens"
        return f"{runs} at {pattern.rate:g}{noise}"
    channels = "all channels alike" if pattern.share_c else "each channel its own"
    rate = "" if pattern.rate == 1 else f" at {pattern.rate:g}"
    return f"{channels}{rate}{', shortcut too' if pattern.residual else ''}"


def masks_of(pattern: Pattern) -> list[Tensor]:
    """Draw masks of a pattern: 1 is kept.

    Args:
        pattern: The pattern.

    Returns:
        Three masks (H, W) of one sample's channels, or of three samples where all channels share theirs; for tokens
        three samples' masks (C, T).

    """
    layer = PatternDropout(pattern)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if isinstance(pattern, ConvPattern):
            maps = layer(torch.ones(DRAWS, DRAWS, MAP, MAP)) != 0
            return list(maps[:, 0] if pattern.share_c else maps[0])
        return list((layer(torch.ones(DRAWS, TOKENS, CHANNELS)) != 0).transpose(1, 2))


def _draw_mask(axes: "Axes", mask: Tensor) -> None:
    axes.imshow(mask.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_aspect("equal" if mask.shape[0] == mask.shape[1] else "auto")  # tokens have as much room as maps
    axes.set(xticks=[], yticks=[])
