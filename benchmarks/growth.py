"""How the cost of Y-Drop grows: with a perceptron's layers, its width, the batch, and the rows of phase 1.

Figures are ratios to the same step with nn.Dropout(0.5), beside the floor by counted operations.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli
from matplotlib.axes import Axes
from torch import Tensor, nn

from benchmarks.layers import N_STEPS, NUM_CLASSES, num_samples_of
from benchmarks.measuring import interleaved, quartiles, ratios, training_step
from benchmarks.networks import MakeDropout, perceptron
from benchmarks.report import Row, read_report, write_report
from benchmarks.step import Case, floor
from examples.plots import legend_below, picture
from lightning_ydrop import ConductanceDropout, YDrop
from lightning_ydrop.pictures import COLORS

PLOT = Path(__file__).parent.parent / "docs" / "explanation" / "growth.png"
NUM_FEATURES = 784
# Steps are timed together until they take so many seconds: what interrupts a single short one would count too much.
AT_LEAST = 0.05
MOST_ROUNDS = 60


@dataclass(frozen=True)
class Setting:
    """A perceptron, a batch, and how many of its samples phase 1 draws: as many as it has rows for, or a number."""

    layers: int = 2
    width: int = 1024
    batch: int = 64
    num_samples: int | None = None

    @property
    def rows(self) -> int:
        """Give the rows of phase 1: the start, and each sample at each step."""
        return N_STEPS * (self.num_samples or num_samples_of(self.batch)) + 1

    @property
    def case(self) -> Case:
        """Say how the network is built."""
        return Case(self._build, (NUM_FEATURES,))

    def _build(self, dropout: MakeDropout) -> nn.Module:
        return perceptron(NUM_FEATURES, [self.width] * self.layers, NUM_CLASSES, dropout)


# What else holds along an axis.
ALONG = {
    "layers": Setting(width=512),
    "width": Setting(),
    "batch": Setting(),
    "rows": Setting(),
}


def main(
    device: str = "cpu",
    threads: int = 1,
    layers: Sequence[int] = (1, 2, 4, 8, 16, 32, 64),
    widths: Sequence[int] = (256, 512, 1024, 2048, 4096, 8192),
    batches: Sequence[int] = (16, 32, 64, 128, 256, 512, 1024),
    samples: Sequence[int] = (1, 2, 4, 8, 16, 32),
    seconds_for_each: float = 5.0,
    seed: int = 0,
    plot: Path = PLOT,
    redraw: bool = False,
) -> None:
    """Measure along one axis at a time.

    Args:
        device: Where.
        threads: Of the CPU.
        layers: Hidden layers, each with dropout.
        widths: Units in each hidden layer.
        batches: Samples in the batch.
        samples: Samples that phase 1 draws from a batch of 64, each with a row for every step.
        seconds_for_each: About how long each point is measured.
        seed: Of weights and batch.
        plot: Where the plot goes.
        redraw: Draw the recorded figures again, and time nothing.

    """
    if redraw:
        draw(read_report("growth", device)["rows"], plot)
        return
    settings = {name: value for name, value in locals().items() if name not in ("plot", "redraw")}
    torch.set_num_threads(threads)
    where = torch.device(device)
    axes = {
        "layers": {number: replace(ALONG["layers"], layers=number) for number in layers},
        "width": {width: replace(ALONG["width"], width=width) for width in widths},
        "batch": {size: replace(ALONG["batch"], batch=size) for size in batches},
        "rows": {N_STEPS * number: replace(ALONG["rows"], num_samples=number) for number in samples},
    }
    rows: list[Row] = []
    for axis, points in axes.items():
        for value, setting in points.items():
            torch.manual_seed(seed)
            rows.append({"axis": axis, "value": value, **measure(setting, where, seconds_for_each)})
            print(rows[-1], flush=True)
    write_report("growth", where, settings, rows)
    draw(rows, plot)


def measure(setting: Setting, device: torch.device, seconds_for_each: float) -> dict[str, Any]:
    """Time a step with nn.Dropout and one with Y-Drop in turn, and count the operations that both need."""
    x = torch.randn(setting.batch, NUM_FEATURES, device=device)
    y = torch.randint(NUM_CLASSES, (setting.batch,), device=device)
    runs = steps_of(setting, x, y)
    seconds = interleaved(runs, rounds=1, device=device, warm_up=2)
    times = max(1, round(AT_LEAST / seconds["dropout"][0]))
    rounds = max(4, round(seconds_for_each / times / sum(took for (took,) in seconds.values())))
    runs = {name: partial(_repeat, run, times) for name, run in runs.items()}
    seconds = interleaved(runs, rounds=min(rounds, MOST_ROUNDS), device=device, warm_up=1)
    return {
        "ratio": ratios(seconds, "dropout")["ydrop"],
        "quartiles": quartiles(seconds, "ydrop", "dropout"),
        "floor": floor(setting.case, x, y, setting.rows),
        "dropout ms": 1e3 * statistics.median(seconds["dropout"]) / times,
        "Y-Drop ms": 1e3 * statistics.median(seconds["ydrop"]) / times,
        "rounds": len(seconds["dropout"]),
    }


def steps_of(setting: Setting, x: Tensor, y: Tensor) -> dict[str, Callable[[], None]]:
    """Make both steps. The weights are shared, so that neither finds them in a cache of its own."""
    plain = setting.case.model("dropout").to(x.device)
    assert isinstance(plain, nn.Sequential)
    driven = nn.Sequential(*[ConductanceDropout(0.5) if isinstance(each, nn.Dropout) else each for each in plain])
    ydrop = YDrop(driven, n_steps=N_STEPS, num_samples=setting.num_samples)
    return {
        "dropout": training_step(plain, x, y),
        "ydrop": partial(_both_phases, ydrop, training_step(driven, x, y), x, y),
    }


def _repeat(run: Callable[[], None], times: int) -> None:
    for _ in range(times):
        run()


def _both_phases(ydrop: YDrop, train: Callable[[], None], x: Tensor, y: Tensor) -> None:
    ydrop.step(x, y)
    train()


def draw(rows: Sequence[Row], plot: Path) -> None:
    """Plot the ratio and its floor along each axis."""
    labels = {
        "layers": f"hidden layers of {ALONG['layers'].width} units",
        "width": f"units in each of {ALONG['width'].layers} layers",
        "batch": "samples in the batch",
        "rows": f"rows of phase 1, {N_STEPS} for each sample drawn",
    }
    plot.parent.mkdir(exist_ok=True)
    highest = max(max(row["ratio"], row["floor"]) for row in rows)
    with picture(plot, 11, 8) as figure:
        panels = figure.subplots(2, 2, sharey=True)
        for panel, (axis, label) in zip(panels.flat, labels.items(), strict=True):
            _draw_axis(panel, [row for row in rows if row["axis"] == axis])
            panel.set(xlabel=label, ylim=(0.9, 1.1 * highest))
        figure.supylabel("time of a step, nn.Dropout = 1")
        legend_below(figure, panels[0, 0], in_a_row=2)


def _draw_axis(panel: Axes, rows: Sequence[Row]) -> None:
    values = [row["value"] for row in rows]
    low, high = zip(*[row["quartiles"] for row in rows], strict=True)
    panel.fill_between(
        values, low, high, color=COLORS["y-drop"], alpha=0.2, linewidth=0, label="quartiles of the ratio in a round"
    )
    panel.plot(values, [row["ratio"] for row in rows], "o-", color=COLORS["y-drop"], label="Y-Drop, measured")
    panel.plot(values, [row["floor"] for row in rows], "--", color="black", label="floor, by counted operations")
    panel.axhline(1, color=COLORS["dropout"], label="nn.Dropout")
    panel.set_xscale("log", base=2)
    panel.set_xticks(values, [str(value) for value in values])
    panel.minorticks_off()
    panel.grid(axis="y", alpha=0.3)


if __name__ == "__main__":
    auto_cli(main)
