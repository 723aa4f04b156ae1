from typing import Any

import numpy as np
import pytest
import torch

from lightning_ydrop import ConfigurationError
from lightning_ydrop.functional import removal_threshold
from tests.containers import ListConfig

FRACTIONS = (0.0, 0.25, 0.5, 0.75, 1.0)


@pytest.mark.parametrize(
    ("accuracy", "loss", "expected"),
    [
        ([0.9, 0.9, 0.895, 0.7, 0.9], 0.01, 0.5),
        ([0.9, 0.9, 0.895, 0.7, 0.9], 0.001, 0.25),
        ([0.9, 0.9, 0.895, 0.7, 0.9], 0.5, 1.0),
        ([0.9, 0.1, 0.9, 0.9, 0.9], 0.01, 0.0),
        ([0.5, 0.6, 0.7, 0.8, 0.9], 0.0, 1.0),
    ],
)
def test_it_is_the_last_fraction_before_accuracy_first_falls(
    accuracy: list[float], loss: float, expected: float
) -> None:
    for fractions in (FRACTIONS, ListConfig(list(FRACTIONS)), np.array(FRACTIONS)):
        threshold = removal_threshold(torch.tensor(accuracy), fractions, np.float64(loss))  # type: ignore[arg-type]
        assert threshold == expected
        assert type(threshold) is float


@pytest.mark.parametrize(
    ("accuracy", "fractions", "loss", "message"),
    [
        (torch.ones(5), FRACTIONS, 1.5, r"removal_threshold\(loss=1.5\)"),
        (torch.ones(4), FRACTIONS, 0.1, "one accuracy for each fraction"),
        (torch.ones(2, 5), FRACTIONS, 0.1, r"accuracy.mean\(0\)"),
        (torch.ones(0), (), 0.1, "at least one fraction"),
    ],
)
def test_what_does_not_fit_is_refused(accuracy: Any, fractions: Any, loss: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        removal_threshold(accuracy, fractions, loss)
