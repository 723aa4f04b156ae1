from collections import UserDict, namedtuple
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_ydrop import Adapter, ConfigurationError, IndexAdapter, KeyAdapter
from lightning_ydrop.models.adapters import AutomaticAdapter, check_adapter
from tests.containers import DictConfig, ListConfig

X, Y, Z = torch.randn(4, 3), torch.zeros(4, dtype=torch.long), torch.ones(4)
Pair = namedtuple("Pair", ["first", "second"])
Named = namedtuple("Named", ["weight", "label", "image"])


@dataclass
class Batch:
    target: Tensor
    index: Tensor
    inputs: Tensor


@pytest.mark.parametrize(
    "batch",
    [
        (X, Y),
        [X, Y],
        (X, Y, Z),
        Pair(X, Y),
        Named(Z, Y, X),
        {"x": X, "y": Y},
        {"pixel_values": X, "labels": Y, "path": ["a", "b", "c", "d"]},
        UserDict({"input_values": X, "label": Y}),
        Batch(target=Y, index=Z, inputs=X),
    ],
    ids=lambda batch: type(batch).__name__,
)
def test_usual_batches_are_read(batch: Any) -> None:
    inputs, target = AutomaticAdapter().read(batch)
    assert inputs is X
    assert target is Y


@pytest.mark.parametrize("batch", [X, (X,), [X], {"image": X}, {"image": X, "name": "a"}])
def test_batches_without_a_target_are_read(batch: Any) -> None:
    inputs, target = AutomaticAdapter().read(batch)
    assert inputs is X
    assert target is None


def test_nested_inputs_are_left_to_the_model() -> None:
    inputs, target = AutomaticAdapter().read(({"a": X, "b": Z}, Y))
    assert inputs == {"a": X, "b": Z}
    assert target is Y


@pytest.mark.parametrize(
    ("batch", "shown"),
    [
        ({"views": X, "y": Y}, r"The batch is dict\('views': Tensor\(shape=\(4, 3\)"),
        ({"input_ids": Y, "attention_mask": Y, "labels": Y}, "attention_mask"),
        ({"x": X, "image": X}, "image"),
        ({"x": X, "y": Y, "label": Y}, "label"),
        ({}, r"dict\(\)"),
        ((), r"tuple\(\)"),
        (None, "The batch is None"),
        ("text", "The batch is 'text'"),
        (5, "The batch is 5"),
        (Batch, "The batch is the class Batch"),
    ],
)
def test_batches_that_could_mean_anything_are_shown_with_two_ways_out(batch: Any, shown: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"(?s){shown}.*ydrop_inputs.*KeyAdapter\("):
        AutomaticAdapter().read(batch)


def test_positions_are_taken() -> None:
    batch = [Y, X, Z]
    assert IndexAdapter(inputs=1, target=0).read(batch) == (X, Y)
    assert IndexAdapter(inputs=[1, 2], target=0).read(batch) == ((X, Z), Y)
    assert IndexAdapter(inputs=-1, target=None).read(batch) == (Z, None)
    assert IndexAdapter().read((X, Y)) == (X, Y)


def test_keys_are_taken() -> None:
    batch = UserDict({"a": X, "b": Z, "c": Y})
    assert KeyAdapter("a", "c").read(batch) == (X, Y)
    assert KeyAdapter(["a", "b"], "c").read(batch) == ((X, Z), Y)
    assert KeyAdapter(["a", "b"], "c", keywords=True).read(batch) == ({"a": X, "b": Z}, Y)
    assert KeyAdapter("a", None, keywords=True).read(batch) == ({"a": X}, None)
    assert KeyAdapter().read({"pixel_values": X, "labels": Y}) == (X, Y)
    assert KeyAdapter("image", "label").read(Named(Z, Y, X)) == (X, Y)
    assert KeyAdapter("inputs", "target").read(Batch(Y, Z, X)) == (X, Y)


@pytest.mark.parametrize("listed", [list, tuple, ListConfig])
def test_places_come_in_lists_of_any_kind_and_are_kept_as_plain_ones(listed: Any) -> None:
    positions = IndexAdapter(inputs=listed([np.int64(1), 2]), target=np.int32(0))  # type: ignore[arg-type]
    assert positions.read([Y, X, Z]) == ((X, Z), Y)
    assert repr(positions) == "IndexAdapter(inputs=[1, 2], target=0)"
    keys = KeyAdapter(listed([np.str_("a"), "b"]), np.str_("c"), keywords=np.True_)  # type: ignore[arg-type]
    assert keys.read({"a": X, "b": Z, "c": Y}) == ({"a": X, "b": Z}, Y)
    assert repr(keys) == "KeyAdapter(inputs=['a', 'b'], target='c', keywords=True)"
    # repr shows a subclass of str and bool as its base in some versions of NumPy.
    assert {type(each) for each in (*positions.inputs, positions.target)} == {int}  # type: ignore[misc]
    assert {type(each) for each in (*keys.inputs, keys.target)} == {str}
    assert type(keys.keywords) is bool


def test_a_single_number_of_numpy_is_a_position() -> None:
    adapter = IndexAdapter(np.int64(1), None)  # type: ignore[arg-type]
    assert adapter.read((X, Y)) == (Y, None)
    assert repr(adapter) == "IndexAdapter(inputs=1, target=None)"
    assert IndexAdapter(np.array([1, 0])).read((X, Y)) == ((Y, X), Y)  # type: ignore[arg-type]


def test_a_batch_may_be_any_mapping() -> None:
    batch = DictConfig({"x": X, "y": Y})
    assert AutomaticAdapter().read(batch) == (X, Y)
    assert KeyAdapter("x", "y").read(batch) == (X, Y)


@pytest.mark.parametrize(
    ("adapter", "batch", "message"),
    [
        (IndexAdapter(target=2), (X, Y), r"IndexAdapter\(inputs=0, target=2\) was given, and the batch is tuple\("),
        (IndexAdapter(), {"x": X}, "It reads a batch with something at 0"),
        (IndexAdapter(), "text", r"at 0|at 1"),
        (KeyAdapter("image"), {"img": X}, r"KeyAdapter\(inputs='image', target='labels', keywords=False\)"),
        (KeyAdapter("image"), (X, Y), "something at 'image'"),
        (KeyAdapter("image"), X, "something at 'image'"),
    ],
)
def test_places_that_are_not_there_are_named(adapter: Adapter, batch: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        adapter.read(batch)


@pytest.mark.parametrize(
    "make",
    [
        lambda: IndexAdapter(inputs="image"),  # type: ignore[arg-type]
        lambda: IndexAdapter(inputs=[]),
        lambda: IndexAdapter(inputs=True),
        lambda: IndexAdapter(inputs=np.True_),  # type: ignore[arg-type]
        lambda: IndexAdapter(inputs=np.float64(1.0)),  # type: ignore[arg-type]
        lambda: IndexAdapter(inputs=ListConfig([])),
        lambda: IndexAdapter(inputs=ListConfig([0, "a"])),
        lambda: KeyAdapter(inputs=ListConfig(["a", None])),
        lambda: KeyAdapter(inputs=DictConfig({"a": 1})),  # type: ignore[arg-type]
        lambda: IndexAdapter(target="label"),  # type: ignore[arg-type]
        lambda: KeyAdapter(inputs=0),  # type: ignore[arg-type]
        lambda: KeyAdapter(inputs=["a", 1]),  # type: ignore[list-item]
        lambda: KeyAdapter(target=1),  # type: ignore[arg-type]
    ],
)
def test_places_of_another_kind_are_refused(make: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"Adapter\(inputs=.*, target=.*\) was given"):
        make()


def test_what_is_no_adapter_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"YDropCallback\(adapter=the class KeyAdapter\) was given"):
        check_adapter("YDropCallback", KeyAdapter)
    check_adapter("YDropCallback", KeyAdapter())
