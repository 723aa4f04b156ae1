import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from lightning_ydrop import ConfigurationError
from lightning_ydrop.functional.attribution import (
    QUADRATURES,
    Quadrature,
    conductance_spread,
    gini,
    path_conductance,
    sum_to_units,
    top_share,
)


def test_one_sample_by_hand() -> None:
    # a = 0, 1, 3 and dF/da = 5, 2, 7 along two steps.
    activations, gradients = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([[5.0], [2.0], [7.0]])
    for quadrature, expected in (("right", 2 * 1 + 7 * 2), ("left", 5 * 1 + 2 * 2), ("trapezoid", 3.5 * 1 + 4.5 * 2)):
        assert path_conductance(activations, gradients, 1, quadrature).item() == expected  # type: ignore[arg-type]


@pytest.mark.parametrize("quadrature", QUADRATURES)
@pytest.mark.parametrize("n_steps", [1, 2, 5])
@pytest.mark.parametrize(("num_starts", "num_samples"), [(1, 4), (4, 4), (1, 1)])
def test_each_sample_has_its_own_path(num_starts: int, num_samples: int, n_steps: int, quadrature: Quadrature) -> None:
    activations = torch.randn(num_starts + n_steps * num_samples, 3, 2, dtype=torch.float64)
    gradients = torch.randn_like(activations)
    expected = torch.zeros(num_samples, 3, 2, dtype=torch.float64)
    for sample in range(num_samples):
        rows = [sample % num_starts, *(num_starts + step * num_samples + sample for step in range(n_steps))]
        for here, there in itertools.pairwise(rows):
            slope = {"right": gradients[there], "left": gradients[here]}.get(
                quadrature, (gradients[here] + gradients[there]) / 2
            )
            expected[sample] += slope * (activations[there] - activations[here])
    assert torch.allclose(path_conductance(activations, gradients, num_samples, quadrature), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    activations = torch.arange(4097, dtype=torch.float32).remainder(2).unsqueeze(1)
    gradients = activations.clone()  # every other step adds 1, which float16 could not count beyond 2048
    total = path_conductance(activations.to(dtype), gradients.to(dtype), 1)
    assert total.dtype == torch.float32
    assert total.item() == 2048
    assert path_conductance(activations.double(), gradients.double(), 1).dtype == torch.float64


def test_units_are_summed_over_positions() -> None:
    values = torch.randn(2, 3, 4, 5)
    assert torch.allclose(sum_to_units(values, 1), values.sum((2, 3)))
    assert torch.allclose(sum_to_units(values, -1), values.sum((1, 2)))
    assert sum_to_units(values[:, :, 0, 0], 1).shape == (2, 3)


def test_top_share_counts_positive_scores_alone() -> None:
    scores = torch.tensor([-10.0, 4.0, 3.0, 2.0, 1.0])
    assert top_share(scores, 0.2).item() == pytest.approx(0.4)
    assert top_share(scores, 0.4).item() == pytest.approx(0.7)
    assert top_share(torch.ones(10), 0.2).item() == pytest.approx(0.2)
    assert top_share(torch.tensor([5.0]), 0.2).item() == 1
    assert math.isnan(top_share(torch.tensor([-1.0, 0.0])).item())


def test_the_spread_is_that_of_the_means() -> None:
    conductance = torch.randn(30, 8)
    spread = conductance_spread(conductance.sum(0), len(conductance), top_fraction=0.5)
    mean = conductance.mean(0)
    assert spread.keys() == {"mean", "top_share", "gini", "total"}
    assert torch.allclose(spread["mean"], mean, atol=1e-6)
    assert torch.allclose(spread["total"], mean.sum(), atol=1e-6)
    assert torch.allclose(spread["top_share"], top_share(mean, 0.5))
    assert torch.allclose(spread["gini"], gini(mean))
    counted = conductance_spread(conductance.sum(0), torch.tensor(30), np.float64(0.5))
    assert all(torch.equal(counted[name], spread[name]) for name in spread)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: path_conductance(torch.ones(3, 1), torch.ones(3, 1), 0), r"path_conductance\(num_samples=0\)"),
        (lambda: path_conductance(torch.ones(3, 1), torch.ones(3, 1), 1, "middle"), "quadrature='middle'"),  # type: ignore[arg-type]
        (lambda: sum_to_units(torch.ones(2, 3, 4), 0), r"sum_to_units\(unit_dim=0\)"),
        (lambda: top_share(torch.ones(3), 1.5), r"top_share\(fraction=1.5\)"),
        (lambda: conductance_spread(torch.ones(3), 1, -0.1), "fraction=-0.1"),
    ],
)
def test_what_is_out_of_range_is_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        call()
