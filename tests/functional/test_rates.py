import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from lightning_ydrop import Buckets, ConfigurationError, HalfNormalRate
from lightning_ydrop.functional.rates import bucket_probabilities, draw_rates, strong_count

DRAWS = 10_000


def half_normal_cdf(rate: HalfNormalRate, value: float) -> float:
    return math.erf((value - rate.mean) / (rate.std * math.sqrt(2)))


@pytest.mark.parametrize("rate", [Buckets().low, Buckets().high, HalfNormalRate(0.4, 0.2, 0.5)])
def test_rates_are_half_normal_with_a_cap(rate: HalfNormalRate) -> None:
    rates = torch.tensor(draw_rates([rate] * DRAWS, torch.Generator().manual_seed(1)), dtype=torch.float64)
    assert rates.min() >= rate.mean
    assert rates.max() <= rate.max
    # Dvoretzky, Kiefer and Wolfowitz: the empirical distribution is off by more than this once in 1e9 experiments.
    bound = math.sqrt(math.log(2 / 1e-9) / (2 * DRAWS))
    for value in torch.linspace(rate.mean, rate.max, 50).tolist()[:-1]:
        assert abs((rates <= value).double().mean().item() - half_normal_cdf(rate, value)) < bound
    capped = (rates == rate.max).double().mean().item()
    assert abs(capped - (1 - half_normal_cdf(rate, rate.max))) < bound


def test_without_spread_every_rate_is_the_mean() -> None:
    assert draw_rates([HalfNormalRate(0.3, 0.0, 0.3)] * 100, torch.Generator()) == [0.3] * 100


@given(units=st.integers(1, 5000), percent=st.integers(0, 100))
@example(units=100, percent=7)  # 0.07 * 100 > 7 in floating point
def test_strong_bucket_is_the_share_rounded_up(units: int, percent: int) -> None:
    weak = math.floor(Fraction(100 - percent, 100) * units)  # in whole numbers: N - floor(w_W N)
    assert strong_count(units, percent / 100) == units - weak


def test_strong_units_are_the_highest_scores_whatever_their_sign() -> None:
    scores = torch.tensor([-5.0, 0.5, -1.0, 3.0, 0.0])
    drop_prob = bucket_probabilities(scores, 0.1, 0.6, 0.5)
    assert torch.allclose(drop_prob, torch.tensor([0.1, 0.6, 0.1, 0.6, 0.6]))
    assert drop_prob.dtype == torch.float32


def test_ties_fall_to_the_lower_index() -> None:
    assert torch.allclose(bucket_probabilities(torch.zeros(5), 0.1, 0.6, 0.4), torch.tensor([0.6, 0.6, 0.1, 0.1, 0.1]))


@pytest.mark.parametrize(("fraction", "expected"), [(0.0, 0.1), (1.0, 0.6)])
def test_a_bucket_can_be_empty(fraction: float, expected: float) -> None:
    assert torch.allclose(bucket_probabilities(torch.randn(7), 0.1, 0.6, fraction), torch.full((7,), expected))


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40), st.floats(0, 1))
def test_no_weak_unit_scores_above_a_strong_one(values: list[float], fraction: float) -> None:
    scores = torch.tensor(values)
    strong = bucket_probabilities(scores, 0.0, 0.5, fraction) > 0
    assert strong.sum() == strong_count(len(values), fraction)
    if strong.any() and not strong.all():
        assert scores[strong].min() >= scores[~strong].max()


def test_draws_do_not_depend_on_the_default_dtype() -> None:
    rate = HalfNormalRate(0.1, 0.2, 0.9)
    expected = draw_rates([rate] * 100, torch.Generator().manual_seed(1))
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert draw_rates([rate] * 100, torch.Generator().manual_seed(1)) == expected
    finally:
        torch.set_default_dtype(torch.float32)


def test_layers_are_ranked_each_by_itself() -> None:
    scores, low, high = torch.randn(3, 7), torch.rand(3, 1) / 2, 0.5 + torch.rand(3, 1) / 2
    together = bucket_probabilities(scores, low, high, 0.3)
    for layer in range(3):
        alone = bucket_probabilities(scores[layer], low[layer], high[layer], 0.3)
        assert torch.equal(together[layer], alone)
        assert (alone == high[layer]).sum() == 3


def test_numbers_of_numpy_are_numbers() -> None:
    assert strong_count(np.int64(10), np.float64(0.5)) == 5  # type: ignore[arg-type]
    probabilities = bucket_probabilities(torch.arange(4.0), np.float32(0.25), np.float32(0.75), np.float32(0.5))  # type: ignore[arg-type]
    assert probabilities.tolist() == [0.25, 0.25, 0.75, 0.75]


def test_rates_around_one_half_are_those_of_the_paper() -> None:
    assert Buckets.around(0.5) == Buckets()


def test_rates_follow_a_layer() -> None:
    """Proportional to p up to 0.5, keep rates proportional to 1 - p from there on, and monotone throughout."""
    tenth = Buckets.around(0.1)
    assert (tenth.low.mean, tenth.high.mean) == pytest.approx((0.02, 0.12))
    assert (tenth.low.max, tenth.high.max) == pytest.approx((0.1, 0.18))
    eighty = Buckets.around(0.8)
    assert (eighty.low.mean, eighty.high.mean) == pytest.approx((1 - 0.9 * 0.4, 1 - 0.4 * 0.4))
    rates = [Buckets.around(index / 1000) for index in range(1000)]
    for name in ("low", "high"):
        assert [getattr(each, name).mean for each in rates] == sorted(getattr(each, name).mean for each in rates)
        assert [getattr(each, name).max for each in rates] == sorted(getattr(each, name).max for each in rates)
    assert all(each.high.max < 1 for each in rates)
    assert Buckets.around(0.0).high == HalfNormalRate(0.0, 0.0, 0.0)


def test_the_expected_rate_is_the_mean_of_many() -> None:
    rate = HalfNormalRate(0.6, 0.05, 0.9)
    rates = draw_rates([rate] * 100_000, torch.Generator().manual_seed(0))
    assert sum(rates) / len(rates) == pytest.approx(rate.expected, abs=1e-3)  # 10 standard errors


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Buckets.around(1.0), r"Buckets.around\(p=1.0\)"),
        (lambda: strong_count(-1, 0.5), r"strong_count\(num_units=-1\)"),
        (lambda: strong_count(10, 1.5), r"strong_count\(strong_fraction=1.5\)"),
        (lambda: bucket_probabilities(torch.ones(3), 0.1, 0.6, 1.5), "strong_fraction=1.5"),
    ],
)
def test_what_is_out_of_range_is_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        call()
