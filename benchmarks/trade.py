"""What fidelity costs: every setting of `fidelity` by what it adds to a training step, as a table and a plot.

Run `fidelity` first: its results are read. The cost of a setting is the time of one phase 1, divided by its period and
by the time of a step with nn.Dropout(0.5).
"""

import copy
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from jsonargparse import auto_cli
from matplotlib.ticker import PercentFormatter
from torch import nn

from benchmarks.fidelity import CHEAP, PAPER, SETTINGS, Setting
from benchmarks.measuring import interleaved, ratios, training_step
from benchmarks.report import Row, read_report, write_report
from benchmarks.step import BATCH_SIZE, CASES
from examples.plots import legend_below, picture
from lightning_ydrop import YDrop
from lightning_ydrop.pictures import COLORS as METHOD_COLORS
from lightning_ydrop.pictures import OTHERS

PLOT = Path(__file__).parent.parent / "docs" / "explanation" / "cost.png"
EVERY, SEVERAL, MEAN = "ranked on every batch", "ranked on every nth batch", "running mean of scores"
COLORS = dict(zip((EVERY, SEVERAL, MEAN), (METHOD_COLORS["y-drop"], *OTHERS[:2]), strict=True))
# What a few are called, and where that stands: the names of all would hide each other.
NAMED = {
    CHEAP: ("every_n_batches=4, recommended", (0.17, 0.9)),
    PAPER: ("the paper's setting", (0.7, 0.9)),
    Setting(5, BATCH_SIZE): ('num_samples="all"', (2.0, 0.95)),
}


def main(
    device: str = "cpu",
    threads: int = 1,
    network: str = "FC_2",
    rounds: int = 15,
    plot: Path = PLOT,
    redraw: bool = False,
) -> None:
    """Time every setting on one network.

    Args:
        device: Where.
        threads: Of the CPU.
        network: One of those of `step`.
        rounds: How often each is timed.
        plot: Where the plot goes.
        redraw: Draw the recorded costs again, and time nothing.

    """
    if redraw:
        draw(read_report("trade", device)["rows"], plot)
        return
    settings = {"network": network, "threads": threads, "rounds": rounds}
    torch.set_num_threads(threads)
    where = torch.device(device)
    costs = measure(network, rounds, where)
    moments = [row for row in read_report("fidelity")["rows"] if row["moment"] != "first batches"]
    rows: list[Row] = []
    for setting in sorted(SETTINGS, key=lambda setting: costs[setting]):
        found = [row[str(setting)] for row in moments]
        beyond = [row[str(setting)] - row[str(PAPER)] for row in moments]
        rows.append(
            {
                "setting": str(setting),
                "rows per batch": setting.rows,
                "step": 1 + costs[setting],
                "share found": statistics.fmean(found),
                "lowest": min(found),
                "least above the paper's": min(beyond),
                "no lower in": f"{sum(each >= 0 for each in beyond)} of {len(beyond)}",
            }
        )
    write_report("trade", where, settings, rows)
    draw(rows, plot)


def measure(network: str, rounds: int, device: torch.device) -> dict[Setting, float]:
    """Give what each setting adds to a step with nn.Dropout, as a share of it."""
    case = CASES[network]
    x, y = torch.randn(BATCH_SIZE, *case.shape, device=device), torch.randint(10, (BATCH_SIZE,), device=device)
    plain, driven = case.model("dropout").to(device), case.model("paper").to(device)
    runs: dict[str, Callable[[], object]] = {"dropout": training_step(plain, x, y)}
    for setting in SETTINGS:
        if _rule(setting) not in runs:  # each engine drives a model of its own
            runs[_rule(setting)] = _phase1(copy.deepcopy(driven), setting, x, y)
    ratio_of_rule = ratios(interleaved(runs, rounds=rounds, device=device), "dropout")
    return {setting: ratio_of_rule[_rule(setting)] / setting.period for setting in SETTINGS}


def _rule(setting: Setting) -> str:
    """Name what one phase 1 does, however often."""
    return f"{setting.n_steps} {setting.num_samples} {setting.quadrature}"


def _phase1(model: nn.Module, setting: Setting, x: torch.Tensor, y: torch.Tensor) -> Callable[[], None]:
    engine = YDrop(model, n_steps=setting.n_steps, num_samples=setting.num_samples, quadrature=setting.quadrature)
    return lambda: engine.step(x, y)


def draw(rows: Sequence[Row], plot: Path) -> None:
    """Plot the share of the strong bucket that is found, mean and lowest, against what it adds to a step."""
    settings = {str(setting): setting for setting in SETTINGS}
    plot.parent.mkdir(exist_ok=True)
    with picture(plot, 11, 6.5) as figure:
        axes = figure.add_subplot()
        for row in rows:
            setting, cost, found = settings[row["setting"]], row["step"] - 1, row["share found"]
            color = COLORS[kind_of(setting)]
            axes.plot([cost] * 2, [row["lowest"], found], color=color, alpha=0.3)
            axes.plot(cost, found, "o", color=color, markersize=11 if setting in NAMED else 6)
            if setting in NAMED:
                words, place = NAMED[setting]
                arrow = {"arrowstyle": "-", "color": color}
                axes.annotate(words, (cost, found), place, ha="center", va="bottom", arrowprops=arrow)
        axes.set(xscale="log", xlim=(0.02, 4), ylim=(0.45, 1))
        ticks = [0.03, 0.05, 0.1, 0.2, 0.5, 1, 2]
        axes.set_xticks(ticks, [f"{tick:.0%}" for tick in ticks])
        axes.minorticks_off()
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.set(xlabel="what phase 1 adds to the time of a step with nn.Dropout", ylabel="strong units that are found")
        axes.set_title("each setting's mean over networks and moments, with a line down to its lowest")
        axes.axhline(0.5, color="gray", linestyle=":", label="a random ranking")
        for kind, color in COLORS.items():
            axes.plot([], [], "o", color=color, label=kind)
        legend_below(figure, axes, in_a_row=2)


def kind_of(setting: Setting) -> str:
    """Say when a setting ranks, in the words of the legend."""
    if setting.decay:
        return MEAN
    return SEVERAL if setting.period > 1 else EVERY


if __name__ == "__main__":
    auto_cli(main)
