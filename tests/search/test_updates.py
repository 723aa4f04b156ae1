"""Updates of policies against enumeration of a small space and finite differences."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_ydrop.search.controller import ReinforcePolicy
from lightning_ydrop.search.reinforce import Reinforce
from tests.sameness import assert_same
from tests.search.spaces import SMALL, both, candidates, log_probs, moved, reward_of, weights_of


def gradient_of(policy: ReinforcePolicy, value: Tensor) -> Tensor:
    gradients = torch.autograd.grad(value, weights_of(policy))
    return torch.cat([each.flatten() for each in gradients])


def objective(policy: ReinforcePolicy, beta: float) -> Tensor:
    """E R + beta H, summed over all candidates."""
    each = log_probs(policy, SMALL)
    rewards = torch.tensor([reward_of(choices) for choices in candidates(SMALL)], dtype=torch.float64)
    return (each.exp() * (rewards - beta * each)).sum()


class Spied(torch.optim.SGD):
    """Keeps the gradient of an update and moves nothing."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.gradient = torch.cat([each.grad.flatten() for each in self.param_groups[0]["params"]])


def update_of(policy: ReinforcePolicy, choices: list[int], advantage: float, log_prob: float | None) -> Tensor:
    """The direction in which `learn` would move the policy, given an advantage."""
    spied = Spied(weights_of(policy), lr=1.0)
    policy._optimizer = spied
    policy._rewards.mean, policy._rewards.variance, policy._rewards._sum_of_weights = 0.0, 1.0, 1.0
    policy._usual_entropies = torch.linspace(0.1, 0.7, 6, dtype=torch.float64)  # any baseline
    policy.learn(choices, advantage, log_prob)
    return -spied.gradient


@both
@pytest.mark.parametrize("beta", [0.0, 0.5])
@pytest.mark.parametrize("late", [False, True])
def test_the_update_is_the_gradient_in_expectation(
    make: Callable[..., ReinforcePolicy], beta: float, late: bool
) -> None:
    constants = Reinforce(entropy_weight=beta, weight_cap=math.inf, advantage_cap=math.inf)
    policy = moved(make(SMALL, reinforce=constants))
    drawn_by = moved(make(SMALL), scale=0.3) if late else policy
    with torch.no_grad():
        of_draws = log_probs(drawn_by, SMALL)
    expected = gradient_of(policy, objective(policy, beta))
    mean = torch.zeros_like(expected)
    for choices, log_prob in zip(candidates(SMALL), of_draws.tolist(), strict=True):
        mean += math.exp(log_prob) * update_of(policy, choices, reward_of(choices), log_prob)
    assert mean.tolist() == pytest.approx(expected.tolist(), abs=1e-9)
    assert expected.abs().max() > 0.01


@both
def test_the_gradient_is_that_of_finite_differences(make: Callable[..., ReinforcePolicy]) -> None:
    policy = moved(make(SMALL))
    gradient = gradient_of(policy, objective(policy, 0.5))
    position = 0
    for weight in weights_of(policy):
        flat = weight.detach().view(-1)
        for number in range(0, len(flat), 37):
            kept = flat[number].item()
            values = []
            for step in (1e-5, -1e-5):
                flat[number] = kept + step
                with torch.no_grad():
                    values.append(objective(policy, 0.5).item())
            flat[number] = kept
            slope = (values[0] - values[1]) / 2e-5
            assert gradient[position + number].item() == pytest.approx(slope, abs=1e-7)
        position += len(flat)


@both
def test_a_late_reward_counts_by_its_capped_weight(make: Callable[..., ReinforcePolicy]) -> None:
    policy = moved(make(SMALL, reinforce=Reinforce(entropy_weight=0.0)))
    choices = [1, 0, 1, 2, 1, 0]
    now = policy.log_prob(choices)
    plain = update_of(policy, choices, 1.3, None)
    for log_prob, weight in ((now, 1.0), (now + math.log(4), 0.25), (now - math.log(1.5), 1.5), (now - 3.0, 2.0)):
        assert update_of(policy, choices, 1.3, log_prob).tolist() == pytest.approx((weight * plain).tolist(), rel=1e-9)
    assert policy.effective_sample_size == pytest.approx(5.75**2 / (1 + 1 + 1 / 16 + 2.25 + 4))


@both
def test_the_advantage_is_capped(make: Callable[..., ReinforcePolicy]) -> None:
    policy = moved(make(SMALL, reinforce=Reinforce(entropy_weight=0.0, advantage_cap=2.0)))
    choices = [1, 0, 1, 2, 1, 0]
    at_cap = update_of(policy, choices, 2.0, None)
    assert_same(update_of(policy, choices, 50.0, None), at_cap)
    assert_same(update_of(policy, choices, -50.0, None), -at_cap)
    assert update_of(policy, choices, 1.0, None).tolist() == pytest.approx((at_cap / 2).tolist())


@both
def test_baselines_are_those_of_a_loop(make: Callable[..., ReinforcePolicy]) -> None:
    policy = make(SMALL, lr=0.1, reinforce=Reinforce(baseline_decay=0.8))
    usual = torch.tensor([3.0, 2.0, 2.0] * 2, dtype=torch.float64).log().tolist()
    rewards: list[float] = []
    for seed in range(12):
        choices, log_prob = policy.sample(seed)
        with torch.no_grad():
            entropies = policy._terms(torch.tensor([choices]))[1][0].tolist()
        policy.learn(choices, reward_of(choices), log_prob)
        rewards.append(reward_of(choices))
        usual = [0.8 * before + 0.2 * now for before, now in zip(usual, entropies, strict=True)]
    ages = [0.8 ** (11 - number) for number in range(12)]
    mean = sum(age * reward for age, reward in zip(ages, rewards, strict=True)) / sum(ages)
    assert policy._rewards.mean == pytest.approx(mean)
    assert policy._usual_entropies.tolist() == pytest.approx(usual)
    assert usual[0] < 1.09  # the policy moved
