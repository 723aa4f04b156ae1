import math
from typing import Any

import pytest
import torch
from torch.distributions import Categorical

from lightning_ydrop import ConfigurationError
from lightning_ydrop.functional import bernoulli_entropy, monte_carlo_divergence, predictive_entropy


@pytest.mark.parametrize("shape", [(6, 4), (2, 4, 3, 5)])
def test_entropy_is_that_of_the_distribution(shape: tuple[int, ...]) -> None:
    probabilities = torch.randn(shape).softmax(1)
    expected = Categorical(probs=probabilities.movedim(1, -1)).entropy()
    assert torch.allclose(predictive_entropy(probabilities), expected, atol=1e-6)


def test_entropy_runs_from_one_certain_class_to_all_alike() -> None:
    entropy = predictive_entropy(torch.tensor([[1.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3]], dtype=torch.float64))
    assert entropy[0] == 0
    assert entropy[1].item() == pytest.approx(math.log(3))


@pytest.mark.parametrize("shape", [(6, 4), (2, 4, 3, 5)])
def test_divergence_is_torchs_own(shape: tuple[int, ...]) -> None:
    logits, average = torch.randn(shape), torch.randn(shape).softmax(1)
    expected = torch.nn.functional.kl_div(logits.log_softmax(1), average, reduction="none").sum(1)
    each = monte_carlo_divergence(logits, average, reduction="none")
    assert torch.allclose(each, expected, atol=1e-6)
    assert torch.allclose(monte_carlo_divergence(logits, average), expected.mean(), atol=1e-6)
    assert torch.allclose(monte_carlo_divergence(logits, average, "sum"), expected.sum(), atol=1e-5)


def test_divergence_of_the_average_itself_is_0() -> None:
    average = torch.tensor([[0.2, 0.8, 0.0], [1.0, 0.0, 0.0]])
    assert torch.equal(monte_carlo_divergence(average.log(), average, "none").abs() < 1e-6, torch.ones(2).bool())


def test_divergence_is_precise_whatever_the_precision() -> None:
    logits, average = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64).softmax(1)
    assert monte_carlo_divergence(logits, average).dtype == torch.float64
    half = monte_carlo_divergence(logits.bfloat16(), average.float())
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(monte_carlo_divergence(logits.bfloat16().double(), average).item(), rel=1e-4)


@pytest.mark.parametrize("reduction", ["batchmean", None, 1])
def test_other_reductions_are_refused(reduction: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"monte_carlo_divergence\(reduction=.*'mean', 'sum', 'none'"):
        monte_carlo_divergence(torch.zeros(1, 2), torch.ones(1, 2) / 2, reduction)


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"\(5, 3\) were given for averages of \(1, 3\)"):
        monte_carlo_divergence(torch.randn(5, 3), torch.ones(1, 3) / 3)


def test_entropy_of_a_label_is_that_of_two_classes() -> None:
    probabilities = torch.rand(3, 4, dtype=torch.float64)
    both = torch.stack([probabilities, 1 - probabilities], 1)
    assert torch.allclose(bernoulli_entropy(probabilities), predictive_entropy(both))
    assert torch.equal(bernoulli_entropy(torch.tensor([0.0, 1.0])), torch.zeros(2))
