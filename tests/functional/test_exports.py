"""The public functions: each is documented with its shapes, a source and an example, and a class computes by it."""

import re

import pytest
import torch

from lightning_ydrop import functional
from lightning_ydrop.analysis import ConductanceSpread, RemovalCurve
from lightning_ydrop.uncertainty import MonteCarlo, MonteCarloDivergence

WRITTEN_ELSEWHERE = ("jumpout", "unit_dropout", "vanilla_dropout")


def test_the_names_are_sorted_and_there() -> None:
    assert functional.__all__ == sorted(functional.__all__)
    assert all(callable(getattr(functional, name)) for name in functional.__all__)


@pytest.mark.parametrize("name", sorted({*functional.__all__} - {*WRITTEN_ELSEWHERE}))
def test_each_function_has_shapes_a_source_and_an_example(name: str) -> None:
    text = getattr(functional, name).__doc__
    for part in ("Args:", "Returns:", "Example:", ">>> "):
        assert part in text
    assert re.search(r"[Ss]hape|number|rates|fraction", text)
    assert re.search(r"arXiv|\d{4}\)", text)


def test_classes_compute_by_their_functions() -> None:
    logits, average = torch.randn(6, 4), torch.randn(6, 4).softmax(1)
    divergence = MonteCarloDivergence()
    divergence.update(logits, MonteCarlo(average, 9))
    assert torch.allclose(divergence.compute(), functional.monte_carlo_divergence(logits, average))
    assert torch.equal(MonteCarlo(average, 9).entropy, functional.predictive_entropy(average))
    spread, sums = ConductanceSpread(4, top_fraction=0.5), logits.sum(0)
    spread.update(logits)
    for name, value in functional.conductance_spread(sums, 6, 0.5).items():
        assert torch.equal(spread.compute()[name], value)
    curve = RemovalCurve((0.0, 0.5, 0.9), torch.tensor([[0.9, 0.89, 0.1], [0.9, 0.9, 0.1]]))
    assert curve.threshold() == functional.removal_threshold(curve.mean, curve.fractions) == 0.5
