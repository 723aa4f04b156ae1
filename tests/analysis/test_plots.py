import pytest
import torch
from matplotlib import pyplot

from lightning_ydrop.analysis import RemovalCurve
from lightning_ydrop.analysis.plots import plot_conductance, plot_cumulative_conductance, plot_removal

MEANS = {"Plain": torch.tensor([1.0, 5.0, 0.0, 4.0, 0.0]), "Y-Drop": torch.tensor([3.0, 2.0, 3.0, 2.0, 2.0])}


def test_units_are_drawn_from_the_highest_to_the_lowest() -> None:
    axes = plot_conductance(MEANS)
    lines = {str(line.get_label()): list(line.get_ydata()) for line in axes.get_lines()}  # type: ignore[arg-type]
    assert lines == {"Plain": [5, 4, 1, 0, 0], "Y-Drop": [3, 3, 2, 2, 2]}
    assert not pyplot.get_fignums()  # nothing is left for pyplot to show or to keep


def test_cumulative_shares_are_written_where_they_are_reached() -> None:
    axes = plot_cumulative_conductance(MEANS)
    assert [text.get_text() for text in axes.texts] == [
        *("50.0%", "90.0%", "100.0%", "100.0%"),
        *("25.0%", "50.0%", "66.7%", "83.3%"),
    ]
    assert list(axes.get_lines()[0].get_ydata()) == [5, 9, 10, 10, 10]  # type: ignore[arg-type]


def test_shares_are_those_of_what_is_positive() -> None:
    axes = plot_cumulative_conductance({"Plain": torch.tensor([3.0, 1.0, 0.0, -2.0, -3.0])}, marks=(0.2, 0.8))
    assert [text.get_text() for text in axes.texts] == ["75.0%", "50.0%"]


def test_removal_is_drawn_in_percent_into_axes_that_are_given() -> None:
    figure, axes = pyplot.subplots()
    curve = RemovalCurve((0.0, 0.5), torch.tensor([[1.0, 0.5], [1.0, 0.7]]))
    assert plot_removal({"Dropout": curve}, axes) is axes
    (line,) = axes.get_lines()
    assert list(line.get_xdata()) == [0, 50]  # type: ignore[arg-type]
    assert list(line.get_ydata()) == pytest.approx([100, 60])  # type: ignore[arg-type]
    assert line.get_color() == "tab:orange"
    pyplot.close(figure)
