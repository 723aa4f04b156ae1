"""Draw the idea of Y-Drop for the README: python docs/pictures/draw_idea.py."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_ydrop.pictures import colors_of

# How much each of eight units contributes to the output, made up for the picture.
CONTRIBUTIONS = (0.15, 0.9, 0.3, 0.7, 0.1, 1.0, 0.25, 0.6)
COLORS = colors_of(["nn.Dropout", "Y-Drop"])


def draw_layer(axes: Axes) -> None:
    """Draw a hidden layer, each unit's line to the output as thick as what passes through it."""
    for row, contribution in enumerate(CONTRIBUTIONS):
        axes.plot([0, 1], [row, 3.5], color="0.3", linewidth=7 * contribution, alpha=0.55, zorder=1)
        axes.plot(0, row, "o", markersize=15, color="white", markeredgecolor="0.2", zorder=2)
    axes.plot(1, 3.5, "o", markersize=19, color="white", markeredgecolor="0.2", zorder=2)
    axes.text(1.16, 3.5, "output", va="center")
    axes.text(-0.13, -1.0, "units of a layer", va="center", ha="left")
    axes.set(xlim=(-0.25, 1.6), ylim=(7.6, -1.5), title="1. measure what each unit contributes")
    axes.axis("off")


def draw_rates(axes: Axes) -> None:
    """Draw the rate at which each unit is dropped, by either method."""
    strong = sorted(CONTRIBUTIONS)[len(CONTRIBUTIONS) // 2]
    rates = [0.64 if contribution >= strong else 0.14 for contribution in CONTRIBUTIONS]
    rows = range(len(rates))
    axes.barh([row - 0.19 for row in rows], rates, 0.36, color=COLORS["Y-Drop"], label="Y-Drop")
    axes.barh(
        [row + 0.19 for row in rows], [0.5] * len(rates), 0.36, color=COLORS["nn.Dropout"], label="nn.Dropout(0.5)"
    )
    axes.set(xlim=(0, 1), ylim=(7.6, -1.5), xlabel="probability that the unit is dropped in a step", yticks=[])
    axes.set_title("2. drop the important half more often")
    axes.legend(loc="upper right", frameon=False, ncols=2)
    axes.spines[["top", "right", "left"]].set_visible(False)


def main() -> None:
    """Run the program."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_layer(left)
    draw_rates(right)
    figure.savefig(Path(__file__).with_name("idea.png"), dpi=130)


if __name__ == "__main__":
    main()
