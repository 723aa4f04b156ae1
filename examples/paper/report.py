"""Put the results of run.py into tables and plots: a Markdown file with pictures beside it.

    python examples/paper/report.py --runs runs/paper --out runs/paper/report.md

Arms are compared seed by seed: a difference is the mean over the seeds that both have, with its 95% confidence interval
by Student's t. The paper's test accuracy (Tables 2 and 3, arXiv 2409.09088) stands beside ours.
"""

import argparse
import contextlib
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")  # no screen is needed

from matplotlib import pyplot as plt
from scipy.stats import t as student
from tables import markdown, spread

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
ARMS = ("plain", "dropout", "dropout_at_mean_rate", "ydrop", "random", "inverted")
AGAINST = ("dropout", "random")
COLORS = {"plain": "tab:purple", "dropout": "tab:orange", "ydrop": "tab:green", "random": "tab:gray"}

# A row, and what was varied in it.
Setting = tuple[str, tuple[str, ...]]
# By seed, what a run reached.
Runs = Mapping[int, Mapping[str, Any]]


@dataclass(frozen=True)
class Difference:
    """A mean difference over pairs, and how far the 95% confidence interval reaches to either side.

    Attributes:
        mean: In percent.
        half_width: In percent; infinite for fewer than two pairs.
        pairs: How many.

    """

    mean: float
    half_width: float
    pairs: int

    def __str__(self) -> str:
        if self.pairs > 1:
            return f"{self.mean:+.2f} ± {self.half_width:.2f} ({self.pairs})"
        return f"{self.mean:+.2f} (1)" if self.pairs else ""


def read(folder: Path) -> dict[Setting, dict[str, dict[int, dict[str, Any]]]]:
    """Read all results: by row and what was varied, by arm, by seed."""
    found: dict[Setting, dict[str, dict[int, dict[str, Any]]]] = defaultdict(lambda: defaultdict(dict))
    for file in sorted(folder.rglob("result.json")):
        result = json.loads(file.read_text())
        varied = tuple(f"{name}={value}" for name, value in result["varied"].items())
        found[result["row"], varied][result["arm"]][result["seed"]] = result
    return found


def difference(ours: Runs, theirs: Runs) -> Difference:
    """Compare test accuracy seed by seed."""
    each = [100 * (ours[seed]["test_acc"] - theirs[seed]["test_acc"]) for seed in ours.keys() & theirs.keys()]
    if len(each) < 2:
        return Difference(each[0] if each else math.nan, math.inf, len(each))
    half_width = student.ppf(0.975, len(each) - 1) * statistics.stdev(each) / math.sqrt(len(each))
    return Difference(statistics.fmean(each), float(half_width), len(each))


def table(paper: Mapping[str, float], arms: Mapping[str, Runs]) -> str:
    """Lay out the arms of one row, beside the paper's figures where it has them."""
    columns = ["arm", "test accuracy %", "the paper's", *(f"against {other} (pairs)" for other in AGAINST)]
    columns += ["validation loss", "epochs", "seconds", "runs"]
    lines = [columns]
    for arm in sorted(arms, key=place):
        runs = arms[arm]
        against = [str(difference(runs, arms[other])) if other in arms and other != arm else "" for other in AGAINST]
        lines.append(
            [
                arm,
                spread([100 * run["test_acc"] for run in runs.values()], 2),
                f"{paper[arm]:.2f}" if arm in paper else "",
                *against,
                spread([run["val_loss"] for run in runs.values()], 4),
                *(f"{statistics.fmean(run[name] for run in runs.values()):.0f}" for name in ("epochs", "seconds")),
                str(len(runs)),
            ]
        )
    return markdown(lines)


def place(arm: str) -> int:
    """Say where an arm stands among the others."""
    return ARMS.index(arm) if arm in ARMS else len(ARMS)


def draw(name: str, arms_by_value: Mapping[float, Mapping[str, Runs]], picture: Path) -> None:
    """Draw test accuracy of each arm against a value that was varied, with its standard deviation over seeds."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for arm in sorted({arm for arms in arms_by_value.values() for arm in arms}, key=place):
        values = sorted(value for value, arms in arms_by_value.items() if arm in arms)
        accuracies = [[100 * run["test_acc"] for run in arms_by_value[value][arm].values()] for value in values]
        means = [statistics.fmean(each) for each in accuracies]
        spreads = [statistics.stdev(each) if len(each) > 1 else 0.0 for each in accuracies]
        axes.errorbar(values, means, spreads, marker=".", capsize=3, label=arm, color=COLORS.get(arm))
    if min(arms_by_value) > 0 and max(arms_by_value) >= 10 * min(arms_by_value):
        axes.set_xscale("log")
    axes.set(xlabel=name, ylabel="test accuracy, %")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, dpi=120)
    plt.close(figure)


def write(folder: Path, out: Path) -> None:
    """Write the report, and a picture for each row in which one number was varied."""
    found = read(folder)
    if not found:
        raise SystemExit(f"There is no result.json under {folder}: run examples/paper/run.py first.")
    out.parent.mkdir(parents=True, exist_ok=True)
    parts = ["# Results", f"Test accuracy at the lowest validation loss, from the {_count(found)} runs of `{folder}`."]
    curves: dict[tuple[str, str], dict[float, Mapping[str, Runs]]] = defaultdict(dict)
    for (row, varied), arms in sorted(found.items()):
        paper = {} if varied else PAPER.get(row, {})
        parts += [f"## {row}{''.join(f', {each}' for each in varied)}", table(paper, arms)]
        name, _, value = varied[0].partition("=") if len(varied) == 1 else ("", "", "")
        with contextlib.suppress(ValueError):  # no number to draw against
            curves[row, name][float(value)] = arms
    for (row, name), arms_by_value in curves.items():
        if len(arms_by_value) > 1:
            picture = out.with_name(f"{row}_{name}.png")
            draw(name, arms_by_value, picture)
            parts += [f"## {row} against {name}", f"![Test accuracy of each arm]({picture.name})"]
    text = "\n\n".join(parts)
    out.write_text(text + "\n")
    print(f"{text}\n\n{out} is written")


def _count(found: Mapping[Any, Mapping[str, Runs]]) -> int:
    return sum(len(runs) for arms in found.values() for runs in arms.values())


def main(args: Sequence[str] | None = None) -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/paper"), help="what run.py left")
    parser.add_argument("--out", type=Path, help="the report; report.md in that folder by default")
    known = parser.parse_args(args)
    write(known.runs, known.out or known.runs / "report.md")


if __name__ == "__main__":
    main()
