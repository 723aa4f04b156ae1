"""How pictures look, and the picture of what a run has written."""

import csv
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Letters that can be read where a page shows a picture at half its size.
STYLE: dict[Any, Any] = {
    "font.size": 13,
    "axes.titlesize": 14,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "savefig.dpi": 144,
}


@contextmanager
def picture(file: Path, width: float, height: float) -> Iterator[Figure]:
    """Give a figure to draw into, and write it.

    Args:
        file: The file to write.
        width: In inches, of which a page shows about 10.
        height: In inches.

    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        figure.savefig(file)


def legend_below(figure: Figure, axes: Axes, in_a_row: int = 4) -> None:
    """Explain the lines of all panels by those of one, below them, where a legend covers no curve."""
    handles, labels = axes.get_legend_handles_labels()
    num_rows = math.ceil(len(labels) / in_a_row)
    figure.legend(handles, labels, loc="outside lower center", ncols=math.ceil(len(labels) / num_rows))


def draw_run(folder: Path, file: Path) -> None:
    """Draw the losses and the sorted conductance per unit of a run.

    Args:
        folder: What the run has written: metrics.csv and conductance.csv.
        file: The file to write.

    """
    metrics, units = _read(folder / "metrics.csv"), _read(folder / "conductance.csv")
    layers = list(units[0])
    with picture(file, 4.5 * (1 + len(layers)), 4) as figure:
        loss, *others = figure.subplots(1, 1 + len(layers), squeeze=False)[0]
        for name, label in (("train_loss", "training"), ("val_loss", "validation")):
            points = [(int(row["epoch"]), float(row[name])) for row in metrics if row.get(name)]
            loss.plot(*zip(*points, strict=True), label=label)
        loss.set(title="loss", xlabel="epoch", ylabel="cross-entropy", yscale="log")
        if loss.lines:  # a run that went on behind its last epoch has none
            loss.legend()
        for axes, layer in zip(others, layers, strict=True):
            axes.plot(sorted((float(row[layer]) for row in units if row[layer]), reverse=True))
            axes.set(title=f"units of {layer}", xlabel="from the highest to the lowest", ylabel="mean conductance")


def _read(file: Path) -> list[dict[str, str]]:
    with file.open() as opened:
        return list(csv.DictReader(opened))
