from typing import Any

import pytest
import torch

from lightning_ydrop import ConfigurationError
from lightning_ydrop.phase1.batches import as_inputs, check_baseline, read_batch, start_points, take_rows

X, Y = torch.randn(4, 3), torch.zeros(4, dtype=torch.long)


@pytest.mark.parametrize("batch", [(X, Y), [X, Y], ((X,), Y)])
def test_pairs_are_read(batch: Any) -> None:
    inputs, target = read_batch(batch)
    assert len(inputs) == 1
    assert inputs[0] is X
    assert target is Y


def test_a_tuple_of_inputs_is_read() -> None:
    inputs, _ = read_batch(((X, X), Y))
    assert len(inputs) == 2


@pytest.mark.parametrize(
    ("batch", "shown"),
    [
        (X, "The batch is Tensor"),
        ((X,), r"The batch is tuple\(Tensor"),
        ((X, Y, Y), "The batch is tuple"),
        ({"x": X, "y": Y}, r"The batch is dict\('x': Tensor\(shape=\(4, 3\)"),
        ((X, None), "None"),
        ((X, [0, 1, 2, 3]), r"list\(0, 1, 2, 3\)"),
        (({"a": X}, Y), "dict"),
        (((), Y), r"tuple\(\)"),
        (None, "None"),
    ],
)
def test_other_batches_are_shown_and_refused(batch: Any, shown: str) -> None:
    with pytest.raises(ConfigurationError, match=shown):
        read_batch(batch)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (X.long(), "between integers there is nothing to walk on"),
        ((X, X > 0), "dtype=torch.bool"),
        ((), "non-empty tuple"),
        (("text",), "non-empty tuple"),
        (5, "The inputs are 5"),
        ({"x": X}, "The inputs are dict"),
        ((X, X[:2]), "same number of samples"),
        (X[:0], "at least one"),
        (X.sum(), "first dimension"),
    ],
)
def test_inputs_that_cannot_be_walked_to_are_refused(inputs: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        as_inputs(inputs)


def test_starts_are_shared_until_one_is_not() -> None:
    shared = start_points((X, X.double()), 0.5)
    assert [tuple(start.shape) for start in shared] == [(1, 3), (1, 3)]
    assert [start.dtype for start in shared] == [torch.float32, torch.float64]
    assert all((start == 0.5).all() for start in shared)
    own = start_points((X, X), (torch.zeros(3), X))
    assert [tuple(start.shape) for start in own] == [(4, 3), (4, 3)]
    assert torch.equal(own[1], X)


@pytest.mark.parametrize("baseline", ["black", None, float("nan"), float("inf"), (0.0, "black"), True])
def test_what_is_no_baseline_is_refused(baseline: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"YDrop\(baseline="):
        check_baseline("YDrop", baseline)


def test_rows_are_taken_of_every_tensor() -> None:
    first, second = take_rows((X, Y + torch.arange(4)), torch.tensor([2, 0]))
    assert torch.equal(first, X[[2, 0]])
    assert second.tolist() == [2, 0]
