"""Bit for bit."""

from typing import Any

import torch
from torch import Tensor


def assert_same(one: Any, other: Any) -> None:
    """Compare what may nest tensors in dictionaries, lists and tuples: nothing may differ, and nothing be missing."""
    if isinstance(one, Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for item, twin in zip(one, other, strict=True):
            assert_same(item, twin)
    else:
        assert one == other
