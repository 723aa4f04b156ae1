"""The example of uncertainty: what it prints, and what it measures."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from examples import uncertainty
from lightning_ydrop.uncertainty import MonteCarlo


def test_it_prints_both_tables(cli: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    uncertainty.main(["--max-epochs", "2", "--num-samples", "5"])
    said = capsys.readouterr().out
    rows = re.findall(r"^ *(one pass|5 masks)  +([\d.]+)  +([\d.]+)  +([\d.]+)$", said, re.MULTILINE)
    assert [row[0] for row in rows] == ["one pass", "5 masks"]
    assert rows[0][2] != rows[1][2]
    assert re.findall(r"^ *(\w+)  +[\d.]+  +[\d.]+  +[\d.]+$", said, re.MULTILINE) == [
        "total",
        "aleatoric",
        "epistemic",
    ]


def test_what_it_measures() -> None:
    # Four predictions at 0.8, of which two are right: off by 0.3. Six at 0.6, all right: off by 0.4.
    probabilities = torch.full((10, 10), 0.2 / 9)
    probabilities[:4, 0] = 0.8
    probabilities[4:] = 0.4 / 9
    probabilities[4:, 0] = 0.6
    labels = torch.tensor([0, 0, 1, 1, *[0] * 6])
    found = uncertainty.measures(probabilities, labels)
    assert found["accuracy"] == pytest.approx(80)
    assert found["ECE"] == pytest.approx(100 * (0.4 * 0.3 + 0.6 * 0.4), abs=1e-3)
    assert found["NLL"] == pytest.approx(-float(probabilities[range(10), labels].log().mean()))


def test_the_report_tells_right_predictions_from_wrong_ones() -> None:
    average = MonteCarlo(
        torch.tensor([[0.9, 0.1, *[0.0] * 8], [0.5, 0.5 - 1e-3, 1e-3, *[0.0] * 7]]),
        7,
        entropy_of_masks=torch.tensor([0.1, 0.2]),
    )
    said = uncertainty.report(average, average.probabilities, torch.tensor([0, 1]))
    assert re.search(r"7 masks +50.00", said)
    assert re.search(r"aleatoric +0\.100 +0\.200 +1\.00", said)
