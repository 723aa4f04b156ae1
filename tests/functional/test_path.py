from typing import Any

import numpy as np
import pytest
import torch

from lightning_ydrop import ConfigurationError
from lightning_ydrop.functional.path import path_points


def test_points_stand_at_equal_steps_from_start_to_inputs() -> None:
    start, inputs = torch.tensor([[1.0, -1.0]]), torch.tensor([[3.0, 1.0], [1.0, 7.0]])
    expected = torch.tensor([[1, -1], [1.5, -0.5], [1, 1], [2, 0], [1, 3], [2.5, 0.5], [1, 5], [3, 1], [1, 7]])
    assert torch.equal(path_points(start, inputs, 4), expected)


def test_path_ends_at_the_inputs_exactly() -> None:
    inputs = torch.randn(5, 3, 4)
    for n_steps in (1, 3, 7):
        assert torch.equal(path_points(torch.randn(5, 3, 4), inputs, n_steps)[-5:], inputs)


def test_shared_start_costs_one_row() -> None:
    inputs = torch.randn(5, 3)
    assert len(path_points(torch.zeros(1, 3), inputs, 4)) == 4 * 5 + 1
    assert len(path_points(torch.zeros(5, 3), inputs, 4)) == 5 * 5


@pytest.mark.parametrize("n_steps", [0, 2.0, None, True])
def test_steps_are_counted(n_steps: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"path_points\(n_steps="):
        path_points(torch.zeros(1, 3), torch.ones(2, 3), n_steps)
    assert len(path_points(torch.zeros(1, 3), torch.ones(2, 3), np.int64(4))) == 9  # type: ignore[arg-type]
