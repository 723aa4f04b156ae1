"""Figures of importance, as the paper draws them. They take matplotlib, which is installed with lightning-ydrop[plots].

No figure is shown or kept by pyplot: each function draws into the axes that it is given, or into those of a new figure.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from lightning_ydrop.analysis.removal import RemovalCurve
from lightning_ydrop.analysis.spread import falling
from lightning_ydrop.pictures import colors_of, finished, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_conductance(means: Mapping[str, Tensor], axes: "Axes | None" = None) -> "Axes":
    """Draw the mean conductance of units, from the highest to the lowest (Fig. 2a, arXiv 2409.09088).

    Args:
        means: By label, such as the arm that a network was trained by, the means of its units, shape (U,).
        axes: Where to draw.

    Returns:
        The axes; `axes.figure` is the figure.

    """
    axes = axes or new_axes("plot_conductance()")
    colors = colors_of(means)
    for label, mean in means.items():
        axes.plot(falling(mean), color=colors[label], label=label)
    axes.set(xlabel="units, sorted", ylabel="mean conductance")
    return finished(axes)


def plot_cumulative_conductance(
    means: Mapping[str, Tensor], axes: "Axes | None" = None, marks: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8)
) -> "Axes":
    """Draw the cumulative sum of conductance over units, from the highest to the lowest (Fig. 2b, arXiv 2409.09088).

    Args:
        means: As for `plot_conductance`.
        axes: Where to draw.
        marks: Shares of the units at which to write what percentage they hold of the sum of positive means.

    Returns:
        The axes.

    """
    axes = axes or new_axes("plot_cumulative_conductance()")
    colors = colors_of(means)
    for number, (label, mean) in enumerate(means.items()):
        sums, positive = falling(mean).cumsum(0), mean.clamp(min=0).sum()
        axes.plot(sums, color=colors[label], label=label)
        for mark in marks:
            place = max(0, round(mark * len(sums)) - 1)
            # In lines at the foot, where no curve is and none hides another.
            axes.text(
                place,
                0.03 + 0.06 * number,
                f"{float(sums[place] / positive):.1%}",
                transform=axes.get_xaxis_transform(),
                ha="center",
                fontsize="small",
                color=colors[label],
            )
            axes.plot(place, float(sums[place]), ".", color=colors[label])
    axes.set(xlabel="units, sorted", ylabel="cumulative mean conductance")
    return finished(axes)


def plot_removal(curves: Mapping[str, RemovalCurve], axes: "Axes | None" = None) -> "Axes":
    """Draw accuracy while units are removed, with its standard deviation over repeats (Fig. 3, arXiv 2409.09088).

    Args:
        curves: By label, such as the arm that a network was trained by.
        axes: Where to draw.

    Returns:
        The axes.

    """
    axes = axes or new_axes("plot_removal()")
    colors = colors_of(curves)
    for label, curve in curves.items():
        fractions = [100 * fraction for fraction in curve.fractions]
        mean, std = 100 * curve.mean, 100 * curve.std
        axes.plot(fractions, mean, ".-", color=colors[label], label=label)
        axes.fill_between(fractions, mean - std, mean + std, color=colors[label], alpha=0.2, linewidth=0)
    axes.set(xlabel="units removed, %", ylabel="accuracy, %")
    return finished(axes)
