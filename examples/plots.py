"""Pictures of what training did, drawn from what runs have written."""

import csv
from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")  # no screen is needed

from matplotlib import pyplot as plt
from matplotlib.axes import Axes


def draw_runs(runs: Mapping[str, Path], picture: Path) -> None:
    """Draw the losses and the sorted conductance per unit of some runs.

    Args:
        runs: By label the folder of each run, which holds metrics.csv and conductance.csv.
        picture: The file to write.

    """
    layers = list(dict.fromkeys(layer for run in runs.values() for layer in _read_conductance(run)))
    figure, panels = plt.subplots(1, 1 + len(layers), figsize=(4.5 * (1 + len(layers)), 3.8), layout="constrained")
    for number, (label, run) in enumerate(runs.items()):
        color = f"C{number}"
        _draw_losses(panels[0], run, label, color)
        conductance = _read_conductance(run)
        for panel, layer in zip(panels[1:], layers, strict=True):
            panel.plot(sorted(conductance[layer], reverse=True), label=label, color=color)
            panel.set(title=f"{layer}: importance of each unit", xlabel="units, sorted", ylabel="mean conductance")
    panels[0].set(title="loss: training dotted, validation solid", xlabel="epoch", ylabel="cross-entropy", yscale="log")
    for panel in panels:
        panel.legend(frameon=False)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, dpi=120)
    plt.close(figure)


def _draw_losses(panel: Axes, run: Path, label: str, color: str) -> None:
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    for column, style in (("train_loss", ":"), ("val_loss", "-")):
        points = [(int(row["epoch"]), float(row[column])) for row in rows if row.get(column)]
        panel.plot(*zip(*points, strict=True), style, color=color, label=label if style == "-" else None)


def _read_conductance(run: Path) -> dict[str, list[float]]:
    with (run / "conductance.csv").open() as file:
        rows = list(csv.DictReader(file))
    return {layer: [float(row[layer]) for row in rows if row[layer]] for layer in rows[0]}
