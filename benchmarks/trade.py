"""What fidelity costs: every setting of `fidelity` by what it adds to a training step, as a table and a plot.

Run `fidelity` first: its results are read. The cost of a setting is the time of one phase 1, divided by its period and
by the time of a step with nn.Dropout(0.5).
"""

import statistics
from collections.abc import Callable
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from jsonargparse import auto_cli
from matplotlib import pyplot
from torch import nn

from benchmarks.fidelity import CHEAP, PAPER, SETTINGS, Setting
from benchmarks.measuring import interleaved, ratios
from benchmarks.report import Row, read_report, write_report
from benchmarks.step import BATCH_SIZE, CASES
from lightning_ydrop import YDrop

PLOT = Path(__file__).parent.parent / "docs" / "cost.png"
SINGLE_RUN = "#3572b0"
CARRIED = "#d08770"


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
    optimizer = torch.optim.SGD(plain.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        optimizer.step()

    runs: dict[str, Callable[[], object]] = {"dropout": step}
    for setting in SETTINGS:
        runs.setdefault(_rule(setting), _phase1(driven, setting, x, y))
    found = ratios(interleaved(runs, rounds=rounds, device=device), "dropout")
    return {setting: found[_rule(setting)] / setting.period for setting in SETTINGS}


def _rule(setting: Setting) -> str:
    """Name what one phase 1 does, however often."""
    return f"{setting.n_steps} {setting.num_samples} {setting.quadrature}"


def _phase1(model: nn.Module, setting: Setting, x: torch.Tensor, y: torch.Tensor) -> Callable[[], None]:
    engine = YDrop(model, n_steps=setting.n_steps, num_samples=setting.num_samples, quadrature=setting.quadrature)
    return lambda: engine.step(x, y)


def draw(costs: dict[Setting, float], rows: list[Row], plot: Path) -> None:
    """Plot the share of the strong bucket that is found, mean and lowest, against the cost of a step."""
    matplotlib.use("agg")
    by_name = {row["setting"]: row for row in rows}
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for setting, cost in costs.items():
        row = by_name[str(setting)]
        color = CARRIED if setting.period > 1 else SINGLE_RUN
        marked = setting in (PAPER, CHEAP)
        axes.plot([1 + cost] * 2, [row["lowest"], row["share found"]], color=color, alpha=0.4)
        axes.plot(1 + cost, row["share found"], "o", color=color, markersize=9 if marked else 5)
        axes.annotate(
            {PAPER: f"{setting}, the paper's", CHEAP: f"{setting}, recommended"}.get(setting, str(setting)),
            (1 + cost, row["share found"]),
            xytext=(4, 4),
            textcoords="offset points",
            fontsize=9 if marked else 6,
            weight="bold" if marked else "normal",
        )
    axes.set_xscale("log")
    ticks = [1.01, 1.02, 1.05, 1.1, 1.2, 1.5, 2, 3]
    axes.set_xticks(ticks, map(str, ticks))
    axes.minorticks_off()
    axes.set_xlabel("step, as a multiple of nn.Dropout's")
    axes.set_ylabel("share of the exact strong bucket: mean, and down to the lowest row")
    axes.axhline(0.5, color="grey", linestyle=":", linewidth=1)
    axes.annotate("chance", (axes.get_xlim()[0], 0.5), xytext=(4, 3), textcoords="offset points", fontsize=7)
    for label, color in (("on every batch", SINGLE_RUN), ("carried over batches", CARRIED)):
        axes.plot([], [], "o", color=color, label=label)
    axes.legend(loc="lower right", frameon=False)
    plot.parent.mkdir(exist_ok=True)
    figure.savefig(plot, dpi=150)


if __name__ == "__main__":
    auto_cli(main)
