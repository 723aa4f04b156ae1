"""Put the records of run.py into tables and a picture, without training.

    python -m experiments.tasks.report

A gain is the mean over seeds of a difference in test accuracy, in points, with its 95% interval by the paired t test.
"""

import argparse
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy.stats import binomtest

from examples.paper.differences import Difference, difference_of, holm
from examples.paper.tables import markdown, spread
from examples.paper.words import arm_in_words
from examples.plots import legend_below, picture
from experiments.tasks.run import RECORDS
from experiments.tasks.tasks import ARMS, TASKS, TRIALS, Task
from lightning_ydrop.pictures import colors_of

OUT = Path(__file__).parents[2] / "docs/results/tasks"
HEAD = """# Small tasks, and tuned baselines

By `python -m experiments.tasks.report`, from {num_runs} trainings whose records lie in `experiments/tasks/records`.

Test accuracy in percent at the lowest validation loss, mean and standard deviation over seeds. Without dropout {trials}
learning rates were tried at the middle size, and the best is that of all arms; dropout, Y-Drop and Jumpout were then
tuned at each size, by validation loss alone and with {trials} trainings each. The controls have Y-Drop's settings:
random scores rank units at random, inverted scores drop those more often that matter least. Gains are in points, with
95% intervals of the paired t test; p is Holm's, over all {num_cells} rows of this page."""


@dataclass(frozen=True)
class Cell:
    """A task at a size.

    Attributes:
        task: The task.
        fraction: The share of its training set.
        accuracies: By arm and seed, in percent.
        losses: By arm and seed, the lowest validation loss.
        settings: By arm, what was chosen.

    """

    task: Task
    fraction: float
    accuracies: Mapping[str, Mapping[int, float]]
    losses: Mapping[str, Mapping[int, float]]
    settings: Mapping[str, Mapping[str, str]]

    def gain(self, arm: str, over: str) -> Difference:
        """Compare two arms, seed by seed."""
        return _paired(self.accuracies, arm, over)

    def change(self, arm: str, over: str) -> Difference:
        """Compare the logarithms of two arms' losses, seed by seed, in percent: -5 is a loss lower by about 5%."""
        logarithms = {
            each: {seed: 100 * math.log(loss) for seed, loss in losses.items()} for each, losses in self.losses.items()
        }
        return _paired(logarithms, arm, over)

    @property
    def label(self) -> str:
        """Name it."""
        return f"{self.task.name}, {self.task.samples(self.fraction):,}"


def _paired(values: Mapping[str, Mapping[int, float]], arm: str, over: str) -> Difference:
    ours, theirs = (values.get(each, {}) for each in (arm, over))
    return difference_of((ours[seed], theirs[seed]) for seed in ours if seed in theirs)


def read(file: Path) -> list[dict[str, Any]]:
    """Read records."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def cells_of(finals: Sequence[Mapping[str, Any]]) -> list[Cell]:
    """Sort trainings into cells, of which each has dropout and Y-Drop."""
    found: dict[tuple[str, float], dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    losses: dict[tuple[str, float], dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    settings: dict[tuple[str, float], dict[str, dict[str, str]]] = defaultdict(dict)
    for record in finals:
        key = record["row"], float(record["varied"]["data.train_fraction"])
        found[key][record["arm"]][record["seed"]] = 100 * record["test_acc"]
        losses[key][record["arm"]][record["seed"]] = record["val_loss"]
        settings[key][record["arm"]] = dict(each.split("=", 1) for each in record["settings"])
    order = list(TASKS)
    return [
        Cell(TASKS[row], fraction, arms, losses[row, fraction], settings[row, fraction])
        for (row, fraction), arms in sorted(found.items(), key=lambda each: (order.index(each[0][0]), each[0][1]))
        if {"dropout", "ydrop"} <= arms.keys()
    ]


def chosen(cell: Cell, arm: str) -> str:
    """Write what was chosen for an arm."""
    given = cell.settings.get(arm, {})
    parts = [f"p={given['model.p']}"] if "model.p" in given else []
    if "ydrop.buckets" in given:
        share = json.loads(given["ydrop.buckets"])["strong_fraction"]
        parts += [f"{100 * share:g}% strong", f"elasticity {float(given['ydrop.elasticity']):g}"]
        parts += [f"annealing {given['ydrop.annealing_epochs']}"]
    return ", ".join(parts)


def table(cells: Sequence[Cell], p_values: Mapping[str, float]) -> str:
    """Lay out accuracies and gains."""
    arms = [arm for arm in ARMS if any(arm in cell.accuracies for cell in cells)]
    gains = [("ydrop", "dropout"), ("random", "dropout"), ("ydrop", "random"), ("ydrop", "plain")]
    head = ["task, training samples", *map(arm_in_words, arms)]
    head += [f"{arm_in_words(arm)} over {arm_in_words(over)}" for arm, over in gains]
    lines = [[*head, "p of the first", "loss of Y-Drop over dropout, %"]]
    for cell in cells:
        accuracies = [spread(list(cell.accuracies.get(arm, {}).values()), 2) for arm in arms]
        differences = [in_points(cell.gain(*each)) for each in gains]
        loss = in_points(cell.change("ydrop", "dropout"), digits=0)
        lines.append([cell.label, *accuracies, *differences, f"{p_values[cell.label]:.2g}", loss])
    return markdown(lines)


def table_of_settings(cells: Sequence[Cell]) -> str:
    """Lay out what was chosen."""
    lines = [["task, training samples", "learning rate", "dropout", "Y-Drop"]]
    for cell in cells:
        rate = cell.settings["dropout"].get("model.lr", "not tuned")
        lines.append([cell.label, rate, chosen(cell, "dropout"), chosen(cell, "ydrop")])
    return markdown(lines)


def in_points(difference: Difference, digits: int = 2) -> str:
    """Write a gain."""
    mean = round(difference.mean, digits) + 0.0  # not -0.00
    return f"{mean:+.{digits}f} ± {difference.half_width:.{digits}f}" if difference.pairs > 1 else ""


def table_of_averages(cells: Sequence[Cell]) -> str:
    """Lay out what is true on average."""
    over_dropout = [(arm, "dropout") for arm in ("ydrop", "random", "inverted", "jumpout")]
    pairs = [*over_dropout, ("ydrop", "random"), ("dropout", "plain"), ("ydrop", "plain")]
    head = ["", "tasks", "points", "p", "tasks in which it is above 0", "p of the sign test", "validation loss, %"]
    return markdown([head, *(on_average(cells, *pair) for pair in pairs if _by_task(cells, "gain", *pair))])


def on_average(cells: Sequence[Cell], arm: str, over: str) -> list[str]:
    """Say whether an arm helps on average: tasks are the units, each the mean over its sizes."""
    accuracy, loss = _by_task(cells, "gain", arm, over), _by_task(cells, "change", arm, over)
    wins, ties = sum(value > 0 for value in accuracy), sum(value == 0 for value in accuracy)
    mean, change = (difference_of((value, 0.0) for value in values) for values in (accuracy, loss))
    sign = binomtest(wins, len(accuracy) - ties).pvalue if len(accuracy) > ties else 1.0
    return [
        f"{arm_in_words(arm)} over {arm_in_words(over)}",
        str(len(accuracy)),
        in_points(mean),
        f"{mean.p_value:.2g}",
        str(wins),
        f"{sign:.2g}",
        in_points(change, digits=1),
    ]


def table_by_task(cells: Sequence[Cell]) -> str:
    """Lay out the gain of each task: for each seed the mean over sizes, then the mean over seeds with its interval."""
    pairs = [("ydrop", "dropout"), ("random", "dropout"), ("ydrop", "random"), ("dropout", "plain")]
    lines = [["task", "sizes", *(f"{arm_in_words(arm)} over {arm_in_words(over)}" for arm, over in pairs)]]
    for row in dict.fromkeys(cell.task.row for cell in cells):
        ours = [cell for cell in cells if cell.task.row == row]
        gains = [in_points(_over_sizes(ours, *pair)) for pair in pairs]
        lines.append([ours[0].task.name, str(len(ours)), *gains])
    return markdown(lines)


def _over_sizes(cells: Sequence[Cell], arm: str, over: str) -> Difference:
    means: list[Mapping[int, float]] = []
    for each in (arm, over):
        of_sizes = [cell.accuracies.get(each, {}) for cell in cells]
        seeds = set.intersection(*(set(values) for values in of_sizes))
        means.append({seed: statistics.fmean(values[seed] for values in of_sizes) for seed in seeds})
    ours, theirs = means
    return difference_of((ours[seed], theirs[seed]) for seed in sorted(ours.keys() & theirs.keys()))


def _by_task(cells: Sequence[Cell], what: str, arm: str, over: str) -> list[float]:
    by_task: dict[str, list[float]] = defaultdict(list)
    for cell in cells:
        mean = getattr(cell, what)(arm, over).mean
        if not math.isnan(mean):
            by_task[cell.task.of or cell.task.row].append(mean)
    return [statistics.fmean(values) for values in by_task.values()]


def draw(cells: Sequence[Cell], file: Path) -> None:
    """Draw the gain of Y-Drop, and of its rates at random, over tuned dropout, for every task and size."""
    arms = ("ydrop", "random")
    colors = colors_of(map(arm_in_words, arms))
    with picture(file, 9, 1.6 + 0.34 * len(cells)) as figure:
        axes = figure.subplots()
        for number, arm in enumerate(arms):
            gains = [cell.gain(arm, "dropout") for cell in cells]
            places = [-place - 0.3 * number for place in range(len(cells))]
            words = arm_in_words(arm)
            axes.errorbar(
                [gain.mean for gain in gains],
                places,
                xerr=[gain.half_width if math.isfinite(gain.half_width) else 0 for gain in gains],
                label="Y-Drop" if arm == "ydrop" else "the same rates, units ranked at random",
                color=colors[words],
                fmt="o" if arm == "ydrop" else "x",
                markersize=5,
                linewidth=1.2,
            )
        axes.axvline(0, color=colors_of(["dropout"])["dropout"], linewidth=1.5)
        axes.set_yticks([-place - 0.15 for place in range(len(cells))], [cell.label for cell in cells])
        axes.set_xscale("symlog", linthresh=2)
        axes.set_xticks([-10, -5, -2, -1, 0, 1, 2, 5, 10], ["-10", "-5", "-2", "-1", "0", "1", "2", "5", "10"])
        axes.set(xlabel="points over tuned dropout (beyond 2 on a log scale)")
        axes.margins(y=0.02)
        legend_below(figure, axes)


def sections(cells: Sequence[Cell], p_values: Mapping[str, float]) -> Iterator[str]:
    """Write each kind of task."""
    for kind in dict.fromkeys(cell.task.kind for cell in cells):
        yield f"## {kind[0].upper()}{kind[1:]}"
        ours = [cell for cell in cells if cell.task.kind == kind]
        yield table(ours, p_values)
        if len({cell.task.of or cell.task.row for cell in ours}) > 1:
            yield "On average over these tasks:"
            yield table_of_averages(ours)


def text(cells: Sequence[Cell]) -> str:
    """Write the report."""
    adjusted = holm([cell.gain("ydrop", "dropout").p_value for cell in cells])
    p_values = {cell.label: value for cell, value in zip(cells, adjusted, strict=True)}
    num_runs = sum(len(read(RECORDS / f"{stage}.jsonl")) for stage in ("rates", "trials", "finals"))
    parts = [
        HEAD.format(num_runs=f"{num_runs:,}", trials=TRIALS, num_cells=len(cells)),
        "![Gain over tuned dropout for every task and size](gains.png)",
        "## On average",
        "Of each task the mean over its sizes and networks; over tasks the mean, with its 95% interval.",
        table_of_averages(cells),
        "## By task",
        "For each seed the mean over sizes; then the mean over seeds, with its 95% interval.",
        table_by_task(cells),
        *sections(cells, p_values),
        "## What was chosen",
        table_of_settings(cells),
    ]
    return "\n\n".join(parts) + "\n"


def main(args: Sequence[str] | None = None) -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT, help="folder of report.md and its picture")
    out = parser.parse_args(args).out
    cells = cells_of(read(RECORDS / "finals.jsonl"))
    if not cells:
        raise SystemExit(f"There are no records in {RECORDS}: run `python -m experiments.tasks.run` first.")
    out.mkdir(parents=True, exist_ok=True)
    draw(cells, out / "gains.png")
    (out / "report.md").write_text(text(cells))
    print(text(cells))


if __name__ == "__main__":
    main()
