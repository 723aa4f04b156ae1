from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_ydrop import ConfigurationError
from lightning_ydrop.models.calls import read_output, read_rows

OUTPUT = torch.tensor([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]])
DENSE = torch.arange(24.0).view(2, 3, 2, 2)  # (B, C, H, W)


@dataclass
class Two:
    loss: Tensor
    scores: Tensor


@pytest.mark.parametrize(
    "output",
    [
        OUTPUT,
        SimpleNamespace(logits=OUTPUT, loss=OUTPUT.sum()),
        {"hidden": DENSE, "logits": OUTPUT},
        {"loss": OUTPUT.sum(), "out": OUTPUT},
        (OUTPUT, DENSE),
        [OUTPUT.sum(), OUTPUT.long(), OUTPUT],
        Two(OUTPUT.sum(), OUTPUT),
    ],
    ids=lambda output: type(output).__name__,
)
def test_the_output_is_found(output: Any) -> None:
    assert read_output(output) is OUTPUT


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (None, "forward returned None"),
        (OUTPUT.long(), "dtype=torch.int64"),
        (OUTPUT.sum(), r"shape=\(\)"),
        ((), r"tuple\(\)"),
        ({"logits": None}, r"dict\('logits': None\)"),
        ("text", "'text'"),
    ],
)
def test_outputs_without_a_tensor_are_refused(output: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        read_output(output)


def test_a_row_that_was_squeezed_away_is_told() -> None:
    told = r"has to stay when there is one row: write \.squeeze\(-1\) instead of \.squeeze\(\)\.$"
    for output in (torch.randn(1, 1).squeeze(), {"mean": torch.randn(1, 1).squeeze()}):
        with pytest.raises(ConfigurationError, match=told):
            read_output(output)
    with pytest.raises(ConfigurationError, match=told):
        read_rows(torch.randn(1, 5).squeeze(), 1)
    with pytest.raises(ConfigurationError) as caught:
        read_output(None)
    assert "squeeze" not in str(caught.value)
