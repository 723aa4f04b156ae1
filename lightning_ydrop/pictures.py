"""What all pictures share: one color for each method, and axes that pyplot does not keep.

Pictures take matplotlib, which is installed with lightning-ydrop[plots].
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from lightning_ydrop.errors import ConfigurationError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# By what a legend calls a method, in small letters. No two methods share a color, whatever else is in a picture.
COLORS = {
    "no dropout": "tab:purple",
    "dropout": "tab:orange",
    "y-drop": "tab:green",
    "dropout at y-drop's mean rate": "tab:gray",
    "jumpout": "tab:blue",
    "random scores": "tab:red",
    "shuffled scores": "tab:brown",
    "inverted scores": "tab:pink",
    "spatialdropout": "tab:olive",
    "dropblock": "tab:cyan",
    "variational dropout": "#8c6d31",
    "word dropout": "#3d7a75",
    "random search": "#636363",
    "tpe": "#c7a100",
    "table controller": "#17517e",
    "transformer controller": "#c2185b",
}
# Other names of these methods.
SYNONYMS = {
    "plain": "no dropout",
    "none": "no dropout",
    "nn.dropout": "dropout",
    "ydrop": "y-drop",
    "dropout_at_mean_rate": "dropout at y-drop's mean rate",
    "random": "random scores",
    "shuffled": "shuffled scores",
    "inverted": "inverted scores",
}
OTHERS = ("black", "#8fa3ad", "#5e4fa2", *COLORS.values())


def colors_of(labels: Iterable[str]) -> dict[str, str]:
    """Choose a color for each label: that of a method by its name, and for others what none of these has."""
    labels = list(labels)
    names = {label: SYNONYMS.get(label.lower(), label.lower()) for label in labels}
    known = {label: COLORS[name] for label, name in names.items() if name in COLORS}
    others = itertools.cycle(color for color in OTHERS if color not in known.values())
    return {label: known.get(label) or next(others) for label in labels}


def new_axes(owner: str) -> "Axes":
    """Make the axes of a new figure, which pyplot neither shows nor keeps.

    Args:
        owner: What draws, as a message names it.

    Raises:
        ConfigurationError: If matplotlib is not installed.

    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"{owner} was called, and there is no matplotlib.",
            "Pictures are drawn with matplotlib.",
            'Run pip install "lightning-ydrop[plots]".',
        ) from error
    axes: Axes = Figure(figsize=(5, 3.8), dpi=120, layout="constrained").add_subplot()
    return axes


def finished(axes: "Axes") -> "Axes":
    """Give axes a legend, and leave out the lines that frame nothing."""
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def results_of(metric: Any, val: Any) -> list[Any]:
    """List what a metric's `plot` draws: one result, or several; what `compute` returns now where there is none."""
    if val is None:
        return [metric.compute()]
    return list(val) if isinstance(val, Sequence) else [val]


def figure_of(axes: "Axes") -> "Figure":
    """Give the figure that axes are in, also where they are in a part of it."""
    return axes.figure.figure
