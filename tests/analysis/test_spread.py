import sys
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import LightningModule
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from torch import Tensor, nn

from lightning_ydrop import ConductanceDropout, ConfigurationError, KeyAdapter, layer_conductance
from lightning_ydrop.analysis import ConductanceSpread, mean_conductance
from lightning_ydrop.functional.attribution import gini


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=30))
def test_gini_is_half_the_mean_difference_over_the_mean(values: list[float]) -> None:
    scores = torch.tensor(values, dtype=torch.float64)
    positive = [max(value, 0.0) for value in values]
    if sum(positive) < 1e-6:
        return
    differences = sum(abs(one - other) for one in positive for other in positive)
    expected = differences / (2 * len(values) * sum(positive))
    assert gini(scores).item() == pytest.approx(expected, abs=1e-9)


def test_gini_runs_from_all_alike_to_one_that_has_it_all() -> None:
    assert gini(torch.full((10,), 3.0)) == 0
    assert gini(torch.eye(10)[3]) == pytest.approx(0.9)
    assert gini(torch.zeros(10)).isnan()


def test_batches_add_up() -> None:
    conductance = torch.randn(30, 8)
    spread, whole = ConductanceSpread(8), ConductanceSpread(8)
    for batch in conductance.split([10, 15, 5]):
        spread.update(batch)
    whole.update(conductance)
    assert torch.allclose(spread.compute()["mean"], conductance.mean(0), atol=1e-6)
    for name, value in whole.compute().items():
        assert torch.allclose(spread.compute()[name], value, atol=1e-6)
    spread.reset()
    spread.update(conductance[:3])
    assert torch.allclose(spread.compute()["mean"], conductance[:3].mean(0), atol=1e-6)


def test_the_share_at_the_top_is_that_of_the_fraction_asked_for() -> None:
    spread = ConductanceSpread(5, top_fraction=0.4)
    spread.update(torch.tensor([[4.0, -1.0, 3.0, 2.0, 1.0]]))
    assert spread.compute()["top_share"] == pytest.approx(0.7)


def test_the_total_of_a_layer_that_all_paths_cross_is_the_change_of_the_output() -> None:
    model = nn.Sequential(nn.Linear(6, 9), ConductanceDropout(), nn.Tanh(), nn.Linear(9, 3)).double()
    x, y = torch.randn(12, 6, dtype=torch.float64), torch.randint(0, 3, (12,))
    spread = ConductanceSpread(9).set_dtype(torch.float64)
    spread.update(layer_conductance(model, x, y, n_steps=500, quadrature="trapezoid")["1"])
    model.eval()
    change = (model(x) - model(torch.zeros_like(x))).gather(1, y.unsqueeze(1)).mean()
    assert spread.compute()["total"].item() == pytest.approx(change.item(), abs=1e-4)


def test_a_single_unit_is_a_layer_too() -> None:
    model = nn.Sequential(nn.Linear(6, 1), nn.Tanh(), nn.Linear(1, 3))
    x, y = torch.randn(12, 6), torch.randint(0, 3, (12,))
    mean = mean_conductance(model, [(x, y)], layers="1")["1"]
    assert torch.allclose(mean, layer_conductance(model, x, y, layers="1")["1"].mean(0))
    assert mean.shape == (1,)


@pytest.mark.parametrize("values", [torch.randn(8), torch.randn(4, 7), torch.randn(4, 8, 2)])
def test_conductance_of_another_shape_is_refused(values: torch.Tensor) -> None:
    with pytest.raises(ConfigurationError, match=r"takes the conductance \(B, U\)"):
        ConductanceSpread(8).update(values)


@pytest.mark.parametrize("arguments", [{"num_units": 0}, *({"num_units": 3, "top_fraction": top} for top in (0, 1.5))])
def test_what_is_out_of_range_is_refused(arguments: dict[str, float]) -> None:
    with pytest.raises(ConfigurationError, match="ConductanceSpread"):
        ConductanceSpread(**arguments)  # type: ignore[arg-type]


def test_settings_of_numpy_are_kept_as_plain_ones() -> None:
    spread = ConductanceSpread(np.int64(5), np.float32(0.5))  # type: ignore[arg-type]
    assert (repr(spread.num_units), repr(spread.top_fraction)) == ("5", "0.5")
    spread.update(torch.rand(2, 5))
    assert spread.compute()["mean"].shape == (5,)


def test_a_data_set_is_averaged_over_samples_not_batches() -> None:
    model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3))
    x, y = torch.randn(12, 6), torch.randint(0, 3, (12,))
    batches = [{"image": x[:10], "label": y[:10]}, {"image": x[10:], "label": y[10:]}]
    adapter = KeyAdapter("image", "label")
    means = mean_conductance(model, batches, layers=nn.ReLU, adapter=adapter, n_steps=7)
    assert torch.allclose(means["1"], layer_conductance(model, x, y, layers=nn.ReLU, n_steps=7)["1"].mean(0), atol=1e-6)


class Own(LightningModule):
    """What is measured is twice what its forward says, on other inputs than the batch's, and it logs in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3))

    def forward(self, x: Tensor) -> Any:
        self.log("seen", x.mean())
        return self.body(x)

    def ydrop_inputs(self, batch: Any) -> Any:
        return batch["features"] + 1, batch["class"]

    def ydrop_forward(self, x: Tensor) -> Any:
        return 2 * self(x)


def test_own_methods_are_called() -> None:
    model, x, y = Own(), torch.randn(12, 6), torch.randint(0, 3, (12,))
    batches = [{"features": x, "class": y}]
    expected = 2 * layer_conductance(model.body, x + 1, y, layers="1", n_steps=7)["1"].mean(0)
    assert torch.allclose(mean_conductance(model, batches, layers=nn.ReLU, n_steps=7)["body.1"], expected, atol=1e-6)
    other = mean_conductance(model, batches, layers=nn.ReLU, n_steps=7, forward=model.body)["body.1"]
    assert torch.allclose(other, expected / 2, atol=1e-6)


def test_it_takes_no_more_rows_at_once_than_a_batch_has() -> None:
    rows = []
    model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3))
    model.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    mean_conductance(model, [(torch.randn(12, 6), torch.randint(0, 3, (12,)))], layers=nn.ReLU)
    assert max(rows) <= 12


def test_no_data_have_no_mean() -> None:
    with pytest.raises(ConfigurationError, match="gave no batch"):
        mean_conductance(nn.Linear(2, 2), [], layers=nn.Linear)


def labels_of(axes: Axes) -> list[str]:
    return [text.get_text() for text in cast(Legend, axes.get_legend()).get_texts()]


def test_the_metric_is_drawn_in_words() -> None:
    spread = ConductanceSpread(5)
    spread.update(torch.tensor([[1.0, 4.0, 1.0, 1.0, 1.0]]))
    figure, axes = spread.plot()
    assert isinstance(figure, Figure)
    assert axes.figure is figure
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("units, from the highest to the lowest", "mean conductance")
    assert labels_of(axes) == ["top 20% hold 50%, Gini 0.30"]
    (line,) = axes.get_lines()
    assert list(line.get_ydata()) == [4, 1, 1, 1, 1]  # type: ignore[arg-type]
    assert not pyplot.get_fignums()


def test_results_of_several_epochs_are_drawn_into_axes_that_are_given() -> None:
    whole = Figure()
    axes = whole.add_subplot()
    results = []
    for top in (4.0, 1.0):
        spread = ConductanceSpread(5, top_fraction=0.4)
        results.append(spread(torch.tensor([[top, 1.0, 1.0, 1.0, 1.0]])))
    assert spread.plot(results, axes) == (whole, axes)
    assert labels_of(axes) == ["1: top 40% hold 62%, Gini 0.30", "2: top 40% hold 40%, Gini 0.00"]
    one = ConductanceSpread(1)
    one.update(torch.ones(3, 1))  # whose mean torchmetrics gives as a scalar
    assert len(one.plot()[1].get_lines()[0].get_xdata()) == 1  # type: ignore[arg-type]


def test_a_picture_without_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigurationError, match=r"ConductanceSpread\.plot\(\) .* \"lightning-ydrop\[plots\]\""):
        ConductanceSpread(5).plot()
