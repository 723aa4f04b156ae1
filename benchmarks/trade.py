"""What fidelity costs: every setting of `fidelity` by what it adds to a training step, as a table and a plot.

Run `fidelity` first: its results are read. The cost of a setting is the time of one phase 1, divided by its period and
by the time of a step with nn.Dropout(0.5).
"""

import copy
import statistics
from collections.abc import Callable
from pathlib import Path

import matplotlib
import torch
from jsonargparse import auto_cli
from matplotlib import pyplot
from torch import nn

from benchmarks.fidelity import CHEAP, PAPER, SETTINGS, Setting
from benchmarks.measuring import interleaved, ratios, training_step
from benchmarks.report import Row, read_report, write_report
from benchmarks.step import BATCH_SIZE, CASES
from lightning_ydrop import YDrop

PLOT = Path(__file__).parent.parent / "docs" / "explanation" / "cost.png"
COLORS = {"anew": "#3572b0", "carried over": "#d08770", "running mean of scores": "#5a9367"}
NAMED = {PAPER: ", the paper's", CHEAP: ", recommended"}


def main(device: str = "cpu", threads: int = 1, network: str = "FC_2", rounds: int = 15, plot: Path = PLOT) -> None:
    """Time every setting on one network.

    Args:
        device: Where.
        threads: Of the CPU.
        network: One of those of `step`.
        rounds: How often each is timed.
        plot: Where the plot goes.

    """
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
    draw(costs, rows, plot)


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


def draw(costs: dict[Setting, float], rows: list[Row], plot: Path) -> None:
    """Plot the share of the strong bucket that is found, mean and lowest, against what it adds to a step."""
    matplotlib.use("agg")
    by_name = {row["setting"]: row for row in rows}
    figure, axes = pyplot.subplots(figsize=(9, 5.5), layout="constrained")
    highest = 0.0
    for setting, cost in sorted(costs.items(), key=lambda item: item[1]):
        row = by_name[str(setting)]
        found = row["share found"]
        color = COLORS["running mean of scores" if setting.decay else "carried over" if setting.period > 1 else "anew"]
        axes.plot([cost] * 2, [row["lowest"], found], color=color, alpha=0.3)
        axes.plot(cost, found, "o", color=color, markersize=9 if setting in NAMED else 5)
        # Of those that others find more at less cost, only the named ones get a label: too many lie close together.
        if setting in NAMED or found > highest + 0.01:
            label = f"{setting}{NAMED.get(setting, '')}"
            # To the left there is room, but for the named ones: what costs less and finds as much would have the label.
            offset, side = ((9, -5), "left") if setting in NAMED else ((-7, 5), "right")
            axes.annotate(label, (cost, found), offset, textcoords="offset points", ha=side, fontsize=8)
        highest = max(highest, found)
    axes.set_xscale("log")
    axes.set_xlim(left=0.02)
    ticks = [0.03, 0.05, 0.1, 0.2, 0.5, 1, 2]
    axes.set_xticks(ticks, [f"{tick:.0%}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("what phase 1 adds to a step with nn.Dropout")
    axes.set_ylabel("share of the exact strong bucket")
    axes.set_title("steps x samples / period: mean over networks and moments, and down to the lowest", fontsize=10)
    axes.axhline(0.5, color="grey", linestyle=":", linewidth=1, label="chance")
    for label, color in COLORS.items():
        axes.plot([], [], "o", color=color, label=label)
    axes.legend(loc="upper left", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    plot.parent.mkdir(exist_ok=True)
    figure.savefig(plot, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    auto_cli(main)
