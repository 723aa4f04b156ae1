from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_ydrop import ConfigurationError
from lightning_ydrop.errors import describe
from lightning_ydrop.importance.baseline import baseline_on, check_baseline, start_points
from tests.containers import ListConfig

X = torch.randn(4, 3)


@pytest.mark.parametrize("value", [0, 0.5, np.float32(0.5), np.int64(2)])
def test_a_number_becomes_one_of_pythons(value: Any) -> None:
    checked = check_baseline("YDrop", value)
    assert type(checked) is float
    assert checked == float(value)


@pytest.mark.parametrize("listed", [list, tuple, ListConfig])
def test_a_sequence_of_numbers_tensors_and_none_is_a_list_or_tuple(listed: Callable[[list[Any]], Any]) -> None:
    checked: Any = check_baseline("YDrop", listed([0, X, None]))
    assert type(checked) is (tuple if listed is tuple else list)
    assert (checked[0], checked[2]) == (0.0, None)
    assert checked[1] is X


@pytest.mark.parametrize(
    "value",
    [None, "0", True, [], (), [True], ["0"], float("nan"), [0.0, float("inf")], X / 0, [X.log()], {"x": 0.0}],
    ids=describe,
)
def test_what_is_no_baseline_is_refused(value: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"^YDrop\(baseline=.*Pass, for example, baseline=0\.0\.$"):
        check_baseline("YDrop", value)


def test_tensors_go_to_the_device_and_the_rest_stays() -> None:
    meta = torch.device("meta")  # which stands for an accelerator
    moved: Any = baseline_on(meta, [0.5, X.requires_grad_(False), None])
    assert (moved[0], moved[2]) == (0.5, None)
    assert moved[1].device == meta
    one = baseline_on(meta, X)
    assert isinstance(one, Tensor)
    assert one.device == meta
    assert baseline_on(meta, 0.5) == 0.5


def test_tensors_need_no_gradient() -> None:
    own = torch.zeros(3, requires_grad=True)
    (start,) = start_points((X,), own)
    assert not start.requires_grad
    one = baseline_on(torch.device("cpu"), own)
    assert isinstance(one, Tensor)
    assert not one.requires_grad


@pytest.mark.parametrize(
    ("shape", "rows"), [((5, 3), 1), ((1, 5, 3), 4), ((5, 1, 3), 1), ((5, 4, 3), 4)], ids=lambda shape: str(shape)
)
def test_a_baseline_of_several_samples_has_them_where_the_inputs_have(shape: tuple[int, ...], rows: int) -> None:
    inputs = torch.randn(4, 5, 3)  # (T, B, F) was (5, 4, 3)
    baseline = torch.randn(shape)
    if shape == (1, 5, 3):  # its first dimension is no batch of (T, B, F)
        with pytest.raises(ConfigurationError, match="of one sample or of the whole input"):
            start_points((inputs,), baseline, batch_dim=1)
        return
    (start,) = start_points((inputs,), baseline, batch_dim=1)
    assert start.shape == (rows, 5, 3)
    expected = baseline.unsqueeze(0) if baseline.ndim == 2 else baseline.movedim(1, 0)
    assert torch.equal(start, expected)


def test_dtype_and_rows_are_those_of_the_inputs() -> None:
    starts = start_points((X.double(), X.half()), [torch.ones(4, 3), 0.5])
    assert [start.dtype for start in starts] == [torch.float64, torch.float16]
    assert [len(start) for start in starts] == [4, 4]
