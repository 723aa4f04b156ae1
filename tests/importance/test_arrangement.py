import inspect
from collections import UserDict
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_ydrop import ConfigurationError
from lightning_ydrop.importance.arrangement import Call, arrange, take_rows
from lightning_ydrop.importance.baseline import Tensors, check_baseline, start_points

X, Y = torch.randn(4, 3), torch.arange(4)


def returning(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
    return args, kwargs


def arranged(
    inputs: Any, model: Any = returning, baseline: Any = 0.0, walk: bool = True
) -> tuple[Call, Tensors, Tensors]:
    batch = arrange(model, inspect.signature(model), inputs, baseline=baseline, interpolate=walk)
    return batch.call, batch.inputs, batch.carried


def test_a_tensor_is_the_argument() -> None:
    call, walked, carried = arranged(X)
    assert walked == (X,)
    assert carried == ()
    assert call((X + 1,), ())[0][0].equal(X + 1)


def test_floating_tensors_are_walked_and_others_carried_along() -> None:
    mask, table, scale = torch.ones(4, 2, dtype=torch.bool), torch.arange(7), torch.tensor(2.0)
    call, walked, carried = arranged((X, Y, None, mask, table, scale, "mode", X.double()))
    assert [item is other for item, other in zip(walked, (X, X), strict=True)] == [True, False]
    assert all(item is other for item, other in zip(carried, (Y, mask), strict=True))
    (x, y, none, m, t, s, mode, double), _ = call((X[:1], X[1:2].double()), (Y[:1], mask[:1]))
    assert x.equal(X[:1])
    assert double.equal(X[1:2].double())
    assert y.equal(Y[:1])
    assert m.equal(mask[:1])
    assert none is None
    assert t is table
    assert s is scale
    assert mode == "mode"


def test_arguments_may_be_nested() -> None:
    call, walked, _ = arranged(([{"a": X, "b": (Y, X)}],))
    assert len(walked) == 2
    ((((nested,)),), _) = call((X + 1, X + 2), (Y + 1,))
    assert nested["a"].equal(X + 1)
    assert nested["b"][0].equal(Y + 1)
    assert nested["b"][1].equal(X + 2)


@pytest.mark.parametrize("mapping", [dict, UserDict])
def test_a_mapping_is_keywords_where_the_model_takes_them(mapping: Any) -> None:
    def named(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x, y

    def whole(batch: Any) -> Any:
        return batch

    for model in (named, returning):
        call, walked, _ = arranged(mapping({"y": Y, "x": X}), model)
        assert walked == (X,)
        assert call.keywords.keys() == {"x", "y"}
    call, walked, _ = arranged(mapping({"y": Y, "x": X}), whole)
    assert walked == (X,)
    assert call((X + 1,), (Y,))["x"].equal(X + 1)


def test_a_floating_input_without_a_baseline_is_carried() -> None:
    _, walked, carried = arranged((X, X + 1), baseline=[None, 0.0])
    assert walked[0].equal(X + 1)
    assert carried == (X,)
    assert len(start_points(walked, [None, 0.0])) == 1


def test_nothing_is_walked_to_where_the_path_starts_behind_a_module() -> None:
    _, walked, carried = arranged((Y, X, torch.randn(5)), walk=False)
    assert walked == ()
    assert all(item is other for item, other in zip(carried, (Y, X), strict=True))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (Y, "between whole numbers there is no path"),
        ((Y, X > 0), "interpolate_at="),
        ((), "The inputs are tuple"),
        (("text",), "The inputs are tuple"),
        (5, "The inputs are 5"),
        ((X, X[:2]), "same number of samples"),
        (X[:0], "at least one"),
        (X.sum(), "a row for each sample"),
    ],
)
def test_inputs_that_cannot_be_walked_to_are_refused(inputs: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        arranged(inputs)


def test_inputs_that_forward_does_not_take_are_refused() -> None:
    def forward(x: Tensor) -> Tensor:
        return x

    with pytest.raises(ConfigurationError, match=r"The inputs are tuple.*forward takes \(x: torch.Tensor\)"):
        arranged((X, X), forward)
    with pytest.raises(ConfigurationError, match="forward takes"):
        arranged({"x": X}, lambda x, y: x)


def test_starts_are_shared_until_one_is_not() -> None:
    shared = start_points((X, X.double()), 0.5)
    assert [tuple(start.shape) for start in shared] == [(1, 3), (1, 3)]
    assert [start.dtype for start in shared] == [torch.float32, torch.float64]
    assert all((start == 0.5).all() for start in shared)
    own = start_points((X, X), (torch.zeros(3), X))
    assert [tuple(start.shape) for start in own] == [(4, 3), (4, 3)]
    assert torch.equal(own[1], X)


@pytest.mark.parametrize(
    ("baseline", "message"),
    [
        ([0.0, 0.0], r"baseline=list\(0.0, 0.0\) was given for paths to 1 tensor"),
        ([], r"baseline=list\(\)"),
        (torch.zeros(2), r"shape=\(2,\)"),
        (torch.zeros(5, 3), "shape of one sample or of the whole input"),
    ],
)
def test_baselines_that_do_not_fit_are_refused(baseline: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        start_points((X,), baseline)


def test_walking_nowhere_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="not all of them None"):
        arranged((X,), baseline=[None])


@pytest.mark.parametrize(
    "baseline",
    ["black", None, float("nan"), float("inf"), (0.0, "black"), True, torch.tensor([0.0, float("nan")])],
)
def test_what_is_no_baseline_is_refused(baseline: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"YDrop\(baseline="):
        check_baseline("YDrop", baseline)


def test_rows_are_taken_of_every_tensor() -> None:
    first, second = take_rows((X, Y), torch.tensor([2, 0]))
    assert torch.equal(first, X[[2, 0]])
    assert second.tolist() == [2, 0]
