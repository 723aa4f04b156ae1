"""Write the tables of the comparisons and draw them, from the records alone.

python -m experiments.autodropout.report
"""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scipy import stats

from examples.paper.tables import markdown
from experiments.autodropout.compare import SAMPLERS
from experiments.autodropout.trainings import HERE, TASKS, read_records
from lightning_ydrop.layers.patterns import Pattern
from lightning_ydrop.pictures import colors_of
from lightning_ydrop.search.files import as_patterns
from lightning_ydrop.search.plots import draw_masks, grid_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Records = Sequence[Mapping[str, Any]]
PICTURES = HERE.parents[1] / "docs" / "results" / "autodropout"
TITLES = {
    "digits": "270 digits, residual network",
    "mnist": "2,700 images of MNIST, residual network",
    "trec": "1,000 questions of TREC, Transformer",
}
NAMES = {
    "none": "no dropout",
    "dropout": "nn.Dropout",
    "ydrop": "Y-Drop",
    "spatial": "SpatialDropout",
    "dropblock": "DropBlock",
    "variational": "variational dropout",
    "word": "word dropout",
    "random": "random search",
    "tpe": "TPE",
    "table": "table controller",
    "transformer": "Transformer controller",
}
# The palette goes by these names: "random" alone is a control of Y-Drop's.
COLORS = {method: colors_of(NAMES.values())[name] for method, name in NAMES.items()}
STAGES = {"final": "", "wide": "twice as wide", "deep": "twice as deep"}
# Trials that a point of a curve covers.
WINDOW = 20
METRICS = {"val_loss": ("validation loss", 4, 1.0), "test_acc": ("test accuracy", 2, 100.0)}


def methods_of(records: Records) -> dict[str, dict[str, list[Mapping[str, Any]]]]:
    """Sort trainings by method, and by search where the method is one."""
    sorted_records: dict[str, dict[str, list[Mapping[str, Any]]]] = {name: {} for name in NAMES}
    for record in records:
        unit = record["arm"].split(" ")[0]  # "table-3 trial 17", "dropout 0.3", "none"
        sorted_records[unit.partition("-")[0]].setdefault(unit, []).append(record)
    return {name: units for name, units in sorted_records.items() if units}


def sample_of(units: Mapping[str, Records], metric: str) -> list[float]:
    """List what counts as one observation: a search, by the mean over its seeds, or a seed of a baseline."""
    factor = METRICS[metric][2]
    by_unit = [[factor * record[metric] for record in records] for records in units.values()]
    return by_unit[0] if len(by_unit) == 1 else [statistics.fmean(values) for values in by_unit]


def interval(sample: Sequence[float]) -> tuple[float, float]:
    """Give the mean, and half of its 95% interval by Student's t."""
    low, high = stats.ttest_1samp(sample, 0).confidence_interval()
    return float(low + high) / 2, float(high - low) / 2


def difference(sample: Sequence[float], baseline: Sequence[float]) -> tuple[float, float]:
    """Give the difference of two means, and half of its 95% interval by Welch's t."""
    bounds = stats.ttest_ind(sample, baseline, equal_var=False).confidence_interval()
    return (bounds.low + bounds.high) / 2, (bounds.high - bounds.low) / 2


def table_of_searches(searches: Records) -> str:
    """Compare samplers by the rewards of their trials."""
    lines: list[Sequence[object]] = [["searched by", "first tenth", "last tenth", "best trial", "distinct patterns"]]
    for sampler in SAMPLERS:
        runs = [search for search in searches if search["sampler"] == sampler]
        tenth = len(runs[0]["rewards"]) // 10
        columns = [
            [statistics.fmean(run["rewards"][:tenth]) for run in runs],
            [statistics.fmean(run["rewards"][-tenth:]) for run in runs],
            [max(run["rewards"]) for run in runs],
        ]
        cells = [f"{mean:.4f} ± {half:.4f}" for mean, half in map(interval, columns)]
        distinct = statistics.fmean(run["distinct"] for run in runs)
        lines.append([NAMES[sampler], *cells, f"{distinct:.0f}"])
    return markdown(lines)


def table_of_methods(records: Records) -> str:
    """Compare what was chosen, with seeds that chose nothing."""
    methods = methods_of(records)
    titles = [title for title, _, _ in METRICS.values()]
    lines = [["", *(column for title in titles for column in (title, "over nn.Dropout")), "chosen"]]
    for method, units in methods.items():
        cells = []
        for metric, (_, digits, _) in METRICS.items():
            sample, baseline = sample_of(units, metric), sample_of(methods["dropout"], metric)
            mean, half = interval(sample)
            cells.append(f"{mean:.{digits}f} ± {half:.{digits}f}")
            gain, half = difference(sample, baseline)
            cells.append("" if method == "dropout" else f"{gain:+.{digits}f} ± {half:.{digits}f}")
        arm = next(iter(units.values()))[0]["arm"]
        chosen = "" if method in SAMPLERS or method == "none" else arm.partition(" ")[2]
        lines.append([NAMES[method], *cells, chosen])
    return markdown(lines)


def draw(task: str, file: Path) -> None:
    """Draw a comparison: rewards over trials, what each method reaches, and the patterns of one search."""
    from matplotlib.figure import Figure

    finals = [record for record in read_records(task, "trainings") if record["stage"] == "final"]
    patterns = example_of(task)
    heights = 4.2, 0.5 + 1.6 * grid_of(len(patterns))[0]
    figure = Figure(figsize=(10, sum(heights)), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=heights, squeeze=False).ravel()
    left, right = upper.subplots(1, 2)
    _draw_searches(read_records(task, "searches"), left)
    _draw_methods(finals, right)
    lower.suptitle(
        "what the Transformer controller's first search chose: black is dropped, three draws each", fontsize=10
    )
    draw_masks(patterns, lower)
    upper.suptitle(f"AutoDropout: {TITLES[task]}", fontsize=12)
    figure.savefig(file, dpi=110)


def example_of(task: str) -> dict[str, Pattern]:
    """Read the patterns that the Transformer controller's first search chose."""
    (chosen,) = (each for each in read_records(task, "chosen") if each["name"].startswith("transformer-0 "))
    return as_patterns("report", chosen["patterns"])


def _draw_searches(searches: Records, axes: "Axes") -> None:
    for sampler in SAMPLERS:
        curves = []
        for search in searches:
            if search["sampler"] == sampler:
                rewards = search["rewards"]
                ends = range(WINDOW, len(rewards) + 1)
                curves.append([statistics.fmean(rewards[end - WINDOW : end]) for end in ends])
        means = [statistics.fmean(values) for values in zip(*curves, strict=True)]
        trials = range(WINDOW, WINDOW + len(means))
        axes.plot(trials, means, color=COLORS[sampler], label=NAMES[sampler])
        axes.fill_between(
            trials,
            [min(values) for values in zip(*curves, strict=True)],
            [max(values) for values in zip(*curves, strict=True)],
            color=COLORS[sampler],
            alpha=0.12,
            linewidth=0,
        )
    axes.set(
        xlabel="trials", ylabel="reward: minus validation loss", title=f"mean of the last {WINDOW} trials, 5 searches"
    )
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, fontsize=8)


def _draw_methods(finals: Records, axes: "Axes") -> None:
    methods = methods_of(finals)
    for row, (method, units) in enumerate(methods.items()):
        mean, half = interval(sample_of(units, "val_loss"))
        axes.errorbar(mean, row, xerr=half, fmt="o", color=COLORS[method], capsize=3)
    axes.set_yticks(range(len(methods)), [NAMES[method] for method in methods])
    axes.invert_yaxis()
    axes.set(xlabel="validation loss (less is better)", title="fresh seeds of what each chose, 95% intervals")
    axes.grid(axis="x", alpha=0.3)


def compared() -> list[str]:
    """List the tasks whose comparison is recorded."""
    return [task for task in TASKS if read_records(task, "trainings")]


def text() -> str:
    """Write the report."""
    lines = ["# What a search for dropout patterns finds", ""]
    lines += [
        "By `python -m experiments.autodropout.report`, from the records of "
        "[the experiments](../../../experiments/autodropout/README.md). Intervals are 95%: over 5 searches for what "
        "was searched, over seeds for the rest; differences by Welch's t.",
    ]
    for task in compared():
        records = read_records(task, "trainings")
        lines += [
            "",
            f"## {TITLES[task]}",
            "",
            f"![]({task}.png)",
            "",
            "Rewards of the trials, minus the validation loss:",
            "",
        ]
        lines.append(table_of_searches(read_records(task, "searches")))
        stages = {record["stage"] for record in records}
        for stage, title in STAGES.items():
            if stage not in stages:
                continue
            lines += ["", f"{f'In a network {title}' if title else 'Fresh seeds of what was chosen'}:", ""]
            lines.append(table_of_methods([record for record in records if record["stage"] == stage]))
        for other in TASKS:
            if there := read_records(task, f"from_{other}"):
                lines += ["", f"What was chosen for {other}:", "", table_of_methods(there)]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the program."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    for task in compared():
        draw(task, PICTURES / f"{task}.png")
    (PICTURES / "report.md").write_text(text(), encoding="utf-8")
    print(text())


if __name__ == "__main__":
    main()
