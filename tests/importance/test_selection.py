from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lightning_ydrop import ConductanceDropout, ConfigurationError, layer_conductance
from lightning_ydrop.importance.selection import (
    Layout,
    check_called,
    check_widths,
    count_units,
    driven_layers,
    layout_of,
    select_layers,
    unit_dims_of,
)
from lightning_ydrop.layers.conversion import ConversionReport
from tests.containers import ListConfig
from tests.networks import perceptron
from tests.test_bad_input import check_sentences


@pytest.mark.parametrize("listed", [list, tuple, ListConfig])
def test_layers_come_in_any_sequence(listed: Callable[[list[Any]], Any]) -> None:
    model = perceptron()
    assert list(select_layers("f", model, listed(["3", nn.ReLU, "0"]))) == ["0", "2", "3", "5"]
    found = layer_conductance(model, torch.randn(4, 12), 0, layers=listed(["1", "0"]))
    assert list(found) == ["0", "1"]


@pytest.mark.parametrize("layers", [[], "9", nn.LSTM, 3, [nn.Linear(2, 2)], ListConfig([]), ["0", "9"]])
def test_what_is_not_there_is_refused(layers: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"^f\(layers=.* of Sequential: 0, 1, 2, 3, 4, 5, 6\."):
        select_layers("f", perceptron(), layers)


def test_a_module_at_two_places_is_found_once() -> None:
    shared = nn.Linear(2, 2)
    assert list(select_layers("f", nn.Sequential(shared, nn.ReLU(), shared), nn.Linear)) == ["0"]


def test_layers_say_where_their_units_are_or_their_kind_does() -> None:
    layers = {
        "own": ConductanceDropout(unit_dim=2),
        "linear": nn.Linear(2, 2),
        "conv": nn.Conv2d(2, 2, 1),
        "norm": nn.LayerNorm(2),
        "relu": nn.ReLU(),
    }
    assert unit_dims_of(layers, None) == {"own": 2, "linear": -1, "conv": 1, "norm": -1, "relu": 1}
    assert unit_dims_of(layers, -2) == {"own": 2, "linear": -2, "conv": -2, "norm": -2, "relu": -2}


@pytest.mark.parametrize(
    ("shape", "unit_dim", "batch_dim", "expected"),
    [
        ((6, 3), 1, 0, Layout(0, 1)),
        ((6, 3), -1, 0, Layout(0, -1)),
        ((6, 5, 3), -1, 0, Layout(0, -1)),
        ((5, 6, 3), -1, 1, Layout(1, 2)),
        ((5, 6, 3), 0, 1, Layout(1, 0)),
        ((5, 6, 3), -3, 1, Layout(1, 0)),
        ((6, 3), 1, 1, Layout(0, 1)),  # a last state
        ((5, 4, 6, 3), 3, 2, Layout(2, 3)),
        ((6,), 1, 0, None),
        ((6, 3), 2, 0, None),
        ((6, 3), -2, 0, None),
        ((6, 3), 0, 0, None),
        ((5, 3), 1, 0, None),
        ((5, 6, 3), 1, 1, None),
        ((5, 4, 3), 2, 1, None),
    ],
)
def test_rows_and_units_are_found(
    shape: tuple[int, ...], unit_dim: int, batch_dim: int, expected: Layout | None
) -> None:
    output = torch.randn(shape)
    layout = layout_of(output, unit_dim, rows=6, batch_dim=batch_dim)
    assert layout == expected
    if layout is not None:
        first = layout.rows_first(output)
        assert len(first) == 6
        assert first.shape[layout.units_behind_rows] == output.shape[unit_dim]


def test_units_are_counted_over_all_calls() -> None:
    drop = ConductanceDropout(unit_dim=-1)
    outputs = [torch.randn(6, 3), torch.randn(6, 5, 3)]
    assert count_units("drop", drop, outputs, -1, rows=6) == 3
    with pytest.raises(ConfigurationError, match="put out 3 and 4 units"):
        count_units("drop", drop, [*outputs, torch.randn(6, 4)], -1, rows=6)
    with pytest.raises(
        ConfigurationError, match=r"put out Tensor\(shape=\(5, 6, 3\).*say which dimension it is with batch"
    ):
        count_units("drop", drop, [torch.randn(5, 6, 3)], -1, rows=6)


@pytest.mark.parametrize(
    ("layer", "shape", "unit_dim", "batch_dim", "message"),
    [
        (
            *(nn.Dropout(), (5, 6, 3), 1, 1),
            "Its dimension 1, as batch_dim=1 says, holds the rows of the batch, and `unit_dim` is another of its "
            "dimensions. Choose the `unit_dim` of the features or channels: unit_dim=-1 if they are its last "
            "dimension; or leave this layer out.",
        ),
        (
            *(ConductanceDropout(unit_dim=-3), (6, 5, 3), -3, 0),
            "Its first dimension holds the rows of the batch, and `unit_dim` is another of its dimensions. Choose the "
            "`unit_dim` of the features or channels: unit_dim=-1 if they are its last dimension, unit_dim=1 if they "
            "are its dimension 1; or leave this layer out: as nn.Dropout it stays what it is.",
        ),
        (
            *(nn.ReLU(), (30, 3), 1, 1),
            "Its dimension 1, as batch_dim=1 says, or its first one holds the rows of the batch, and `unit_dim` is "
            "another of its dimensions. Keep the batch there; or leave this layer out.",
        ),
        (
            *(nn.ReLU(), (5, 6, 3), -1, 0),
            "Its first dimension holds the rows of the batch, and `unit_dim` is another of its dimensions. Keep the "
            "batch there, or say which dimension it is with batch_dim=1; or leave this layer out.",
        ),
        (
            *(nn.ReLU(), (6,), -1, 0),
            "Its first dimension holds the rows of the batch, and `unit_dim` is another of its dimensions. Let it put "
            "out features beside the rows, or leave this layer out.",
        ),
    ],
)
def test_what_has_no_units_is_told_where_they_may_be(
    layer: nn.Module, shape: tuple[int, ...], unit_dim: int, batch_dim: int, message: str
) -> None:
    with pytest.raises(ConfigurationError) as caught:
        count_units("d", layer, [torch.randn(shape)], unit_dim, rows=6, batch_dim=batch_dim)
    assert " ".join(caught.value.args[1:]) == message


def test_a_batch_dim_is_advised_only_where_there_is_one() -> None:
    with pytest.raises(ConfigurationError, match=r"Keep the batch there; or leave this layer out\.$"):
        count_units("d", nn.ReLU(), [torch.randn(5, 6, 3)], -1, rows=6, is_movable=False)


def test_widths_are_those_of_the_first_batch() -> None:
    check_widths({"a": torch.zeros(2, 3), "new": torch.zeros(2, 9)}, {"a": 3})
    with pytest.raises(ConfigurationError, match="'a' had 4 units in an earlier batch, and has 3 in this one"):
        check_widths({"a": torch.zeros(2, 3)}, {"a": 4})


def test_layers_that_do_not_run_are_named() -> None:
    check_called("f", ["a", "b"], {"a", "b", "c"})
    with pytest.raises(ConfigurationError, match=r"^f\(layers=...\) chose 'b', 'c'\."):
        check_called("f", ["a", "b", "c"], {"a"})


def test_driven_layers_are_found_with_plain_names() -> None:
    compiled: Any = torch.compile(perceptron(), backend="eager")
    assert list(driven_layers(nn.Sequential(compiled))) == ["0.1", "0.4"]
    with pytest.raises(
        ConfigurationError, match=r"Linear holds no ConductanceDropout; dropout-like modules in it: none\."
    ):
        driven_layers(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("build", "report", "texts"),
    [
        (lambda: nn.Linear(2, 2), None, ["Put ConductanceDropout(p) where F.dropout stood"]),
        (
            lambda: perceptron(dropout=nn.Dropout),
            None,
            ["To convert 1, 4, pass convert=True to YDropCallback or call convert_dropout(model)."],
        ),
        (
            lambda: nn.Linear(2, 2),
            ConversionReport({}, {}),
            ["With convert=True nothing was converted.", "It can't see F.dropout in a forward", "model.head = nn.Seq"],
        ),
        (
            lambda: perceptron(dropout=nn.Dropout),
            ConversionReport({}, {"1": "excluded", "4": "excluded"}),
            ["1 (Dropout), 4 (Dropout). With convert=True nothing was converted. 1 was left: excluded. 4 was left: "],
        ),
    ],
)
def test_the_error_without_layers_says_how_to_come_by_some(build: Any, report: Any, texts: list[str]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        driven_layers(build(), report)
    for text in texts:
        assert text in str(caught.value)
    check_sentences(caught.value)


def test_an_instance_is_told_from_a_type() -> None:
    model = perceptron()
    with pytest.raises(ConfigurationError, match=r"f\(layers=an instance of ReLU\).*Pass its name: layers='2'\.$"):
        select_layers("f", model, ["0", model[2]])  # type: ignore[list-item]
    with pytest.raises(ConfigurationError, match=r"f\(layers=an instance of ReLU\).*Pass one of these names"):
        select_layers("f", model, nn.ReLU())  # type: ignore[arg-type]


def test_a_converted_layer_of_two_widths_is_left_by_its_name() -> None:
    drop = ConductanceDropout(unit_dim=-1)
    outputs = [torch.randn(6, 3), torch.randn(6, 4)]
    with pytest.raises(ConfigurationError, match=r"or leave this one nn\.Dropout\.$"):
        count_units("net.d", drop, outputs, -1, rows=6)
    drop.replaced = (nn.Dropout(),)
    with pytest.raises(ConfigurationError, match=r"or leave this one nn\.Dropout: convert with exclude='net\.d'\.$"):
        count_units("net.d", drop, outputs, -1, rows=6)
