import sys

import pytest
from matplotlib import pyplot
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec

from lightning_ydrop import ConfigurationError
from lightning_ydrop.pictures import COLORS, SYNONYMS, colors_of, figure_of, finished, new_axes


def test_no_two_labels_have_the_same_color() -> None:
    colors = colors_of(
        ["random scores", "no dropout", "Dropout", "shuffled scores", "Y-Drop", "at random", "strongest"]
    )
    assert len(set(colors.values())) == 7
    assert len(set(COLORS.values())) == len(COLORS)


def test_a_method_has_one_color_by_all_its_names() -> None:
    assert colors_of(["plain", "Y-Drop"]) == {"plain": "tab:purple", "Y-Drop": "tab:green"}
    for synonym, name in SYNONYMS.items():
        assert colors_of([synonym])[synonym] == colors_of([name])[name]


def test_axes_are_those_of_a_figure_that_pyplot_does_not_keep() -> None:
    axes = new_axes("plot()")
    axes.plot([1, 2], label="a line")
    legend = finished(axes).get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["a line"]
    assert not pyplot.get_fignums()


def test_a_part_of_a_figure_is_in_the_whole() -> None:
    figure = Figure()
    assert figure_of(figure.add_subfigure(GridSpec(1, 2)[0]).add_subplot()) is figure
    assert figure_of(figure.add_subplot()) is figure


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigurationError) as caught:
        new_axes("ConductanceSpread.plot()")
    assert str(caught.value) == (
        "ConductanceSpread.plot() was called, and there is no matplotlib. Pictures are drawn with matplotlib. "
        'Run pip install "lightning-ydrop[plots]".'
    )
