import math
from typing import Any, get_args

import numpy as np
import pytest

from lightning_ydrop import ConfigurationError
from lightning_ydrop.callbacks.rate_curve import Kind, RateCurve

# What the docstring of DropoutSchedule says, for n = 4 and t = 0 to 8.
EXPECTED: dict[str, list[float]] = {
    "linear": [0, 0.25, 0.5, 0.75, 1, 1, 1, 1, 1],
    "cosine": [0, 0.5 - math.sqrt(0.5) / 2, 0.5, 0.5 + math.sqrt(0.5) / 2, 1, 1, 1, 1, 1],
    "cyclic": [0, 0.5, 1, 0.5, 0, 0.5, 1, 0.5, 0],
    "early": [1, 1, 1, 1, 0, 0, 0, 0, 0],
    "late": [0, 0, 0, 0, 1, 1, 1, 1, 1],
    "curriculum": [1 - math.exp(-2.5 * t) for t in range(9)],
}


@pytest.mark.parametrize("kind", get_args(Kind))
def test_each_kind_goes_as_its_equation_says(kind: Any) -> None:
    curve = RateCurve(kind, p=0.8, initial=0.2, length=4)
    shares = [curve.share(t, 4) for t in range(9)]
    assert shares == pytest.approx(EXPECTED[kind])
    assert [curve.rate(0.5, share) for share in shares] == pytest.approx([0.2 + 0.6 * each for each in EXPECTED[kind]])


def test_a_layer_keeps_its_own_rate_at_the_end() -> None:
    curve = RateCurve()
    assert [curve.rate(0.3, share) for share in (0.0, 0.5, 1.0)] == [0.0, 0.15, 0.3]
    assert RateCurve(initial=0.1, p=0.7).rate(0.3, 1.0) == 0.7  # 0.1 + 0.6 is not


def test_gamma_says_how_fast_a_curriculum_rises() -> None:
    assert RateCurve("curriculum", gamma=3).share(2, 4) == pytest.approx(1 - math.exp(-1.5))


@pytest.mark.parametrize("kind", get_args(Kind))
@pytest.mark.parametrize("levels", [2, 3, 5])
@pytest.mark.parametrize("length", [2, 7, 20])
def test_the_number_of_rates_is_bounded(kind: Any, levels: int, length: int) -> None:
    free, bound = RateCurve(kind, length=length), RateCurve(kind, length=length, levels=levels)
    for curve in (free, bound):
        rates = {curve.share(t, length) for t in range(50)}
        assert len(rates) <= curve.count_rates(50, length)
    steps = [bound.share(t, length) for t in range(50)]
    assert len(set(steps)) <= levels
    assert all(step == pytest.approx(round(step * (levels - 1)) / (levels - 1)) for step in steps)
    assert max(abs(step - free.share(t, length)) for t, step in enumerate(steps)) <= 0.5 / (levels - 1) + 1e-9


def test_the_numbers_of_numpy_become_plain() -> None:
    whole: dict[str, Any] = {"length": np.int64(3), "levels": np.int64(4)}
    curve = RateCurve("curriculum", np.float64(0.5), np.float32(0), gamma=np.float64(2), **whole)  # type: ignore[arg-type]
    kept = (curve.p, curve.initial, curve.length, curve.levels, curve.gamma)
    assert [type(each) for each in kept] == [float, float, int, int, float]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "square"}, "`kind` is one of 'linear'"),
        ({"by": "batches"}, "`by` is one of 'epochs', 'steps'"),
        ({"p": 1.0}, "A drop rate is a number in"),
        ({"initial": -0.1}, "A drop rate is a number in"),
        ({"length": 0}, "`length` is a whole number of at least 1"),
        ({"kind": "cyclic", "length": 1}, "`length` is a whole number of at least 2"),
        ({"kind": "cyclic"}, "`length` is the length of a cycle, counted in epochs"),
        ({"kind": "late", "by": "steps"}, "`length` is when dropout is switched, counted in steps"),
        ({"gamma": 5.0}, "`gamma` is how fast the rate"),
        ({"kind": "curriculum", "gamma": 0}, "`gamma` is a finite number above 0"),
        ({"levels": 1}, "`levels` is a whole number of at least 2"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        RateCurve(**arguments)
