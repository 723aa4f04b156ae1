"""Each check takes numbers, flags and lists of any library, refuses all else, and returns a plain Python value."""

import math
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from lightning_ydrop import ConfigurationError
from lightning_ydrop.checks import (
    check_choice,
    check_class_dim,
    check_count,
    check_flag,
    check_fraction,
    check_number,
    check_rate,
    check_unit_dim,
    is_list,
)
from tests.containers import DictConfig, ListConfig

Check = Callable[[Any], Any]
RATE: Check = partial(check_rate, "F", "x")
FRACTION: Check = partial(check_fraction, "F", "x", example=0.5)
NUMBER: Check = partial(check_number, "F", "x", example=0.5)
POSITIVE: Check = partial(check_number, "F", "x", example=0.5, positive=True)
COUNT: Check = partial(check_count, "F", "x", minimum=1, example=2)
UNIT_DIM: Check = partial(check_unit_dim, "F")
CLASS_DIM: Check = partial(check_class_dim, "F")
FLAG: Check = partial(check_flag, "F", "x")
CHOICE: Check = partial(check_choice, "F", "x", choices=("left", "right"))


@pytest.mark.parametrize(
    ("check", "value", "plain"),
    [
        *((check, np.float32(0.25), 0.25) for check in (RATE, FRACTION, NUMBER, POSITIVE)),
        *((check, np.float64(0.25), 0.25) for check in (RATE, FRACTION, NUMBER, POSITIVE)),
        *((check, Fraction(1, 4), 0.25) for check in (RATE, FRACTION, NUMBER, POSITIVE)),
        *((check, np.int64(0), 0) for check in (RATE, FRACTION, NUMBER)),
        *((check, 0, 0) for check in (RATE, FRACTION, NUMBER)),
        (FRACTION, np.float16(1.0), 1.0),
        *((check, kind(3), 3) for check in (COUNT, UNIT_DIM, CLASS_DIM) for kind in (int, np.int64, np.uint8)),
        *((check, np.int32(-1), -1) for check in (UNIT_DIM, CLASS_DIM)),
        *((FLAG, kind(value), value) for kind in (bool, np.bool_) for value in (True, False)),
        (CHOICE, np.str_("left"), "left"),
    ],
)
def test_what_is_taken_is_returned_as_a_plain_value(check: Check, value: Any, plain: Any) -> None:
    checked = check(value)
    assert checked == plain
    assert type(checked) is type(plain)


@pytest.mark.parametrize(
    ("check", "values"),
    [
        (RATE, (1.0, -0.1, np.float32(1.0), np.int64(1))),
        (FRACTION, (1.1, -0.1, np.float32(1.5))),
        (NUMBER, (-1, np.float32(-1.0))),
        (POSITIVE, (0, 0.0, np.float32(0.0), -1)),
        (COUNT, (0, 1.0, np.int64(0), np.float64(2.0))),
        (UNIT_DIM, (0, 1.0, np.int64(0))),
        (CLASS_DIM, (0, 1.0, np.int64(0))),
    ],
)
def test_numbers_out_of_range_and_what_is_not_a_number_are_refused(check: Check, values: tuple[Any, ...]) -> None:
    never: tuple[Any, ...] = (
        *(math.nan, math.inf, -math.inf, np.float32("nan"), np.float64("inf"), True, False, np.True_, np.False_),
        *("1", None, [1], np.array([0.5, 0.5]), torch.tensor(1), 1j, Decimal(1), ListConfig([1])),
    )
    for value in values + never:
        with pytest.raises(ConfigurationError, match=r"F\((x|unit_dim|class_dim)="):
            check(value)


@pytest.mark.parametrize("value", [0, 1, 1.0, "yes", None, np.int64(1), torch.tensor(True), np.array([True, False])])
def test_what_is_not_a_flag_is_refused(value: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"F\(x=.*`x` is True or False"):
        FLAG(value)


@pytest.mark.parametrize("value", ["up", None, 1, ["left"], np.array(["left", "right"])])
def test_what_is_not_a_choice_is_refused(value: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"F\(x=.*`x` is one of 'left', 'right'"):
        CHOICE(value)


def test_lists_are_sequences_but_no_texts() -> None:
    lists: list[Any] = [[1], (), ListConfig([1]), range(3), np.arange(3)]
    others: list[Any] = ["abc", b"abc", {1: 2}, DictConfig({}), {1}, 3, None, torch.arange(3), np.ones((2, 2))]
    assert all(map(is_list, lists))
    assert not any(map(is_list, others))
