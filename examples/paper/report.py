"""Put the results of run.py into tables and plots: a Markdown file with pictures beside it.

    python -m examples.paper.report --runs runs/paper --out runs/paper/report.md

Runs come from folders of run.py, or from files like the results.jsonl that it leaves there.
Arms are compared seed by seed: a difference is the mean over the seeds that both have, with its 95% confidence interval
by Student's t. The paper's test accuracy (Tables 2 and 3, arXiv 2409.09088) stands beside ours where network and data
are the paper's. A run whose validation loss is no number has diverged: its accuracy counts, its loss does not.

Where settings of Y-Drop alone were varied, the arms that these change nothing for stand beside each of their values,
from runs of the same row with the same other settings.

With `--join data.train_fraction=1 runs/all`, runs that varied nothing, and may have settings of their own, are one more
point of those of the same row that varied that argument.
"""

import argparse
import shlex
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from examples.paper.experiment import results_in
from examples.paper.results import (
    Experiment,
    Runs,
    commands,
    difference,
    id_of,
    is_the_papers,
    joined,
    numbers,
    place,
    read,
)
from examples.paper.tables import markdown, spread
from examples.paper.words import argument_in_words, arm_in_words, row_in_words, value_in_words
from examples.plots import legend_below, picture
from lightning_ydrop.pictures import colors_of

# Test accuracy in percent.
PAPER: dict[str, dict[str, float]] = {
    row: dict(zip(("plain", "dropout", "ydrop"), values, strict=True))
    for row, values in {
        "mnist_fc_1": (98.18, 98.30, 98.47),
        "mnist_fc_2": (98.19, 98.21, 98.53),
        "mnist_fc_3": (97.99, 98.18, 98.54),
        "mnist_fc_4": (97.99, 98.20, 98.58),
        "cifar10_s_1": (81.15, 83.39, 83.77),
        "cifar10_s_2": (81.69, 83.55, 84.10),
        "cifar10_s_3": (81.63, 83.38, 84.20),
        "cifar10_s_4": (81.59, 83.47, 84.32),
        "stl10_m_1": (72.51, 74.14, 74.68),
        "stl10_m_2": (71.65, 73.55, 74.26),
        "cifar100_m_1": (57.43, 61.97, 62.90),
        "cifar100_m_2": (56.80, 61.97, 63.18),
        "svhn_m_1": (94.31, 94.45, 94.61),
        "svhn_m_2": (94.42, 94.38, 94.82),
    }.items()
}
HEAD = """By `{command}`.

Test accuracy at the lowest validation loss, from {num_runs} runs: mean and standard deviation over seeds.
Gains are means over the seeds that both have, with their 95% confidence interval by Student's t and their number."""
LINES: dict[str, Any] = {"marker": ".", "markersize": 9, "capsize": 3, "elinewidth": 1}


def count(runs: Runs) -> str:
    """Count runs, and those of them that diverged or that were interrupted and went on."""
    diverged = len(runs) - len(numbers(runs, "val_loss"))
    resumed = sum(run["resumed"] for run in runs.values())
    notes = [f"{number} {what}" for number, what in ((diverged, "diverged"), (resumed, "resumed")) if number]
    return f"{len(runs)} ({', '.join(notes)})" if notes else str(len(runs))


def table(paper: Mapping[str, float], arms: Mapping[str, Runs]) -> str:
    """Lay out the arms of one row, beside the paper's figures where it has them."""
    columns = [
        "arm",
        "test accuracy %",
        "the paper's",
        "its gain over dropout (pairs)",
        "Y-Drop's gain over it (pairs)",
    ]
    columns += ["validation loss", "epochs", "runs"]
    lines = [columns]
    for arm in sorted(arms, key=place):
        runs = arms[arm]
        gains = [
            str(difference(runs, arms["dropout"])) if "dropout" in arms and arm != "dropout" else "",
            str(difference(arms["ydrop"], runs)) if "ydrop" in arms and arm != "ydrop" else "",
        ]
        lines.append(
            [
                arm,
                spread([100 * each for each in numbers(runs, "test_acc").values()], 2),
                f"{paper[arm]:.2f}" if arm in paper else "",
                *gains,
                spread(list(numbers(runs, "val_loss").values()), 4),
                f"{statistics.fmean(run['epochs'] for run in runs.values()):.0f}",
                count(runs),
            ]
        )
    return markdown(lines)


def overview(experiment: Experiment) -> str:
    """Lay out test accuracy of each arm against what was varied, and Y-Drop's gains over the others below."""
    values = experiment.values
    arms = sorted({arm for value in values for arm in experiment.arms[value]}, key=place)
    lines = [[f"test accuracy % against {', '.join(experiment.names)}", *map(", ".join, values)]]
    for arm in arms:
        runs = [experiment.arms[value].get(arm, {}) for value in values]
        lines.append([arm, *(spread([100 * each for each in numbers(run, "test_acc").values()], 2) for run in runs)])
    for arm in arms if "ydrop" in arms else ():
        if arm != "ydrop":
            pairs = [(experiment.arms[value].get("ydrop", {}), experiment.arms[value].get(arm, {})) for value in values]
            lines.append([f"Y-Drop's gain over {arm} (pairs)", *(str(difference(*pair)) for pair in pairs)])
    return markdown(lines)


def draw(experiment: Experiment, file: Path) -> None:
    """Draw test accuracy against a value that was varied, and beside it the gain over one of the arms."""
    values, names = experiment.values, experiment.names
    arms = sorted({arm for each in experiment.arms.values() for arm in each}, key=place)
    panels = [_draw_accuracy, _draw_gain][: len(arms)]
    with picture(file, 1.5 + 5 * len(panels), 5) as figure:
        figure.suptitle(row_in_words(experiment.row))
        row = figure.subplots(1, len(panels), squeeze=False)[0]
        for panel, axes in zip(panels, row, strict=True):
            panel(experiment, arms, axes)
            ticks = ["\n".join(map(value_in_words, names, value)) for value in values]
            axes.set_xticks(range(len(values)), ticks)
            axes.set(xlabel=", ".join(map(argument_in_words, names)))
        legend_below(figure, row[0])


def _draw_accuracy(experiment: Experiment, arms: Sequence[str], axes: Axes) -> None:
    """Draw test accuracy, with its standard deviation over seeds."""
    colors = colors_of(map(arm_in_words, arms))
    for arm in arms:
        found = {at: numbers(runs, "test_acc").values() for at, runs in _along(experiment, arm)}
        accuracies = {at: [100 * accuracy for accuracy in each] for at, each in found.items() if each}
        means = [statistics.fmean(each) for each in accuracies.values()]
        spreads = [statistics.stdev(each) if len(each) > 1 else 0 for each in accuracies.values()]
        words = arm_in_words(arm)
        axes.errorbar(list(accuracies), means, spreads, label=words, color=colors[words], **LINES)
    axes.set(ylabel="test accuracy, %", title="mean and standard deviation")


def _draw_gain(experiment: Experiment, arms: Sequence[str], axes: Axes) -> None:
    """Draw the mean difference to dropout, or else to random, with its 95% confidence interval."""
    colors = colors_of(map(arm_in_words, arms))
    against = next((arm for arm in ("dropout", "random") if arm in arms), arms[0])
    theirs = dict(_along(experiment, against))
    for number, arm in enumerate(arms):
        if arm == against:
            continue
        pairs = {at: difference(runs, theirs[at]) for at, runs in _along(experiment, arm) if at in theirs}
        half_widths = [each.half_width if each.pairs > 1 else 0 for each in pairs.values()]
        # Beside each other, since the bars would hide each other.
        places = [at + 0.08 * (number - (len(arms) - 1) / 2) for at in pairs]
        color = colors[arm_in_words(arm)]
        axes.errorbar(places, [each.mean for each in pairs.values()], half_widths, color=color, **LINES)
    axes.axhline(0, color=colors[arm_in_words(against)], linewidth=1.5)
    axes.set(ylabel="percentage points", title=f"gain over {arm_in_words(against)}, 95% interval")


def _along(experiment: Experiment, arm: str) -> Iterator[tuple[int, Runs]]:
    """Go through the runs of an arm, from value to value."""
    for at, value in enumerate(experiment.values):
        if arm in experiment.arms[value]:
            yield at, experiment.arms[value][arm]


def title(experiment: Experiment, experiments: Sequence[Experiment]) -> str:
    """Name an experiment, and where there are others of its name the settings that not all of them share."""
    same = [each.settings for each in experiments if (each.row, each.names) == (experiment.row, experiment.names)]
    own = [each for each in experiment.settings if not all(each in settings for settings in same)]
    against = f" against {', '.join(experiment.names)}" if experiment.names else ""
    return f"{experiment.row}{against}{', ' if own else ''}{', '.join(own)}"


def section(heading: str, experiment: Experiment, file: Path) -> Iterator[str]:
    """Write one experiment's part of the report, and a picture where something was varied."""
    yield f"## {heading}"
    yield "\n".join(["```sh", *commands(experiment), "```"])
    if len({part.settings for part in experiment.parts}) > 1:
        yield "The commands have settings of their own: compare arms, not values, where these differ."
    if len(experiment.arms) > 1:
        draw(experiment, file)
        yield f"![Test accuracy of each arm]({file.name})"
        yield overview(experiment)
    paper = PAPER.get(experiment.row, {}) if all(map(is_the_papers, experiment.runs())) else {}
    for values in experiment.values:
        if values:
            yield f"### {', '.join(f'{name}={value}' for name, value in zip(experiment.names, values, strict=True))}"
        yield table(paper, experiment.arms[values])


def main(args: Sequence[str] | None = None) -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--runs",
        nargs="+",
        type=Path,
        default=[Path("runs/paper")],
        help="folders that run.py left, or their results.jsonl",
    )
    parser.add_argument("--out", type=Path, help="the report; report.md in or beside the first of these by default")
    parser.add_argument(
        "--join",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME=VALUE", "RUNS"),
        help="what run.py left there is one more point of the runs that varied this argument",
    )
    known = parser.parse_args(args)
    first = known.runs[0]
    out = known.out or (first.parent if first.is_file() else first) / "report.md"
    experiments = read(known.runs)
    out.parent.mkdir(parents=True, exist_ok=True)
    for argument, source in known.join:
        name, _, value = argument.partition("=")
        for point in read([Path(source)]):
            experiments = joined(experiments, name, value, point)
    # Some of what is joined may be among the runs.
    num_runs = len({id_of(result) for result in results_in([*known.runs, *(Path(source) for _, source in known.join)])})
    joins = [word for join in known.join for word in ("--join", *join)]
    command = shlex.join(["python", "-m", "examples.paper.report", "--runs", *map(str, known.runs), *joins])
    parts = ["# Results", HEAD.format(command=command, num_runs=num_runs)]
    pictures: Counter[str] = Counter()
    for experiment in experiments:
        name = "_".join((experiment.row, *experiment.names))
        pictures[name] += 1
        again = f"_{pictures[name]}" if pictures[name] > 1 else ""  # with other settings
        parts += section(title(experiment, experiments), experiment, out.with_name(f"{name}{again}.png"))
    text = "\n\n".join(parts)
    out.write_text(text + "\n")
    print(f"{text}\n\n{out} is written")


if __name__ == "__main__":
    main()
