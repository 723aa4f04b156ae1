"""A picture of what training did, drawn from what a run has written."""

import csv
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")  # no screen is needed

from matplotlib import pyplot as plt


def draw_run(folder: Path, picture: Path) -> None:
    """Draw the losses and the sorted conductance per unit of a run.

    Args:
        folder: What the run has written: metrics.csv and conductance.csv.
        picture: The file to write.

    """
    metrics, units = _read(folder / "metrics.csv"), _read(folder / "conductance.csv")
    layers = list(units[0])
    figure, panels = plt.subplots(1, 1 + len(layers), figsize=(4.5 * (1 + len(layers)), 3.8), layout="constrained")
    for name, label in (("train_loss", "training"), ("val_loss", "validation")):
        points = [(int(row["epoch"]), float(row[name])) for row in metrics if row.get(name)]
        panels[0].plot(*zip(*points, strict=True), label=label)
    panels[0].set(title="loss", xlabel="epoch", ylabel="cross-entropy", yscale="log")
    if panels[0].lines:  # a run that went on behind its last epoch has none
        panels[0].legend(frameon=False)
    for panel, layer in zip(panels[1:], layers, strict=True):
        panel.plot(sorted((float(row[layer]) for row in units if row[layer]), reverse=True))
        panel.set(title=f"{layer}: importance of each unit", xlabel="units, sorted", ylabel="mean conductance")
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, dpi=120)
    plt.close(figure)


def _read(file: Path) -> list[dict[str, str]]:
    with file.open() as opened:
        return list(csv.DictReader(opened))
