import math
from typing import Any

import pytest
import torch

from lightning_ydrop.errors import ConfigurationError
from lightning_ydrop.search.reinforce import Reinforce, Rewards, capped_weight, effective_sample_size, surrogate

REWARDS = [0.91, 0.93, 0.90, 0.90, 0.97, 0.1, 0.95]


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.95])
def test_mean_and_deviation_of_rewards_are_those_of_a_loop(decay: float) -> None:
    rewards = Rewards(decay)
    for count, reward in enumerate(REWARDS):
        ages = [decay ** (count - 1 - number) for number in range(count)]
        if count > 1:
            mean = sum(age * each for age, each in zip(ages, REWARDS, strict=False)) / sum(ages)
            variance = sum(age * (each - mean) ** 2 for age, each in zip(ages, REWARDS, strict=False)) / sum(ages)
            assert rewards.mean == pytest.approx(mean, rel=1e-12)
            assert rewards.variance == pytest.approx(variance, rel=1e-9, abs=1e-18)
            if variance > 0:
                advantage = (reward - mean) / math.sqrt(variance)
                assert rewards.advantage(reward, math.inf) == pytest.approx(advantage, rel=1e-9)
                assert rewards.advantage(reward, 0.5) == pytest.approx(max(-0.5, min(0.5, advantage)), rel=1e-9)
        rewards.add(reward)


def test_a_reward_counts_after_its_use() -> None:
    rewards = Rewards(0.9)
    assert rewards.advantage(0.7, 3.0) == 0.0  # nothing to compare with
    rewards.add(0.7)
    assert rewards.advantage(0.7, 3.0) == 0.0
    # The spread of one reward is 0: the sign is all that is known.
    assert rewards.advantage(0.8, 3.0) == 1.0
    assert rewards.advantage(0.6, 3.0) == -1.0
    assert rewards.advantage(0.6, 0.5) == -0.5
    rewards.add(0.9)
    mean = (0.9 * 0.7 + 0.9) / 1.9
    assert rewards.mean == pytest.approx(mean)
    assert rewards.advantage(mean + 0.01, 3.0) > 0.0


def test_advantages_do_not_depend_on_the_unit_of_the_reward() -> None:
    percent, share = Rewards(0.95), Rewards(0.95)
    for reward in REWARDS:
        assert percent.advantage(100 * reward - 7, 3.0) == pytest.approx(share.advantage(reward, 3.0))
        percent.add(100 * reward - 7)
        share.add(reward)


@pytest.mark.parametrize(
    ("log_prob", "when_drawn", "cap", "weight"),
    [
        (math.log(0.2), math.log(0.2), 2.0, 1.0),
        (math.log(0.3), math.log(0.2), 2.0, 1.5),
        (math.log(0.1), math.log(0.2), 2.0, 0.5),
        (math.log(0.9), math.log(0.2), 2.0, 2.0),
        (math.log(0.9), math.log(0.2), math.inf, 4.5),
        (math.log(0.9), math.log(0.2), 1.0, 1.0),
        (math.log(0.9), None, 2.0, 1.0),
        (-10.0, -2000.0, 2.0, 2.0),
        (-10.0, -2000.0, math.inf, 1e100),
        (-2000.0, -10.0, 2.0, 0.0),
    ],
)
def test_weights_are_ratios_with_a_cap(log_prob: float, when_drawn: float | None, cap: float, weight: float) -> None:
    assert capped_weight(log_prob, when_drawn, cap) == pytest.approx(weight)


def test_the_effective_sample_size_counts_equal_weights() -> None:
    assert effective_sample_size([]) == 0.0
    assert effective_sample_size([0.0]) == 0.0
    assert effective_sample_size([0.5] * 7) == pytest.approx(7)
    assert effective_sample_size([2, 1]) == pytest.approx(9 / 5)


def test_the_surrogate_by_hand() -> None:
    log_probs = torch.tensor([-1.0, -2.0], dtype=torch.float64, requires_grad=True)
    entropies = torch.tensor([0.5, 0.6], dtype=torch.float64, requires_grad=True)
    usual = torch.tensor([0.7, 0.2], dtype=torch.float64)
    arguments: dict[str, Any] = {"advantage": 3.0, "weight": 0.5, "entropy_weight": 0.1}
    independent = surrogate(log_probs, entropies, usual_entropies=None, **arguments)
    assert independent.item() == pytest.approx(0.5 * (3 * -3 + 0.1 * 1.1))
    for usual_entropies, gradient in ((None, [1.5, 1.5]), (usual, [1.5 + 0.5 * 0.1 * (0.6 - 0.2), 1.5])):
        value = surrogate(log_probs, entropies, usual_entropies=usual_entropies, **arguments)
        of_log_probs, of_entropies = torch.autograd.grad(value, [log_probs, entropies])
        assert of_log_probs.tolist() == pytest.approx(gradient)
        assert of_entropies.tolist() == pytest.approx([0.05, 0.05])


def test_constants_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigurationError) as error:
        Reinforce(baseline_decay=1.0)
    assert str(error.value) == (
        "Reinforce(baseline_decay=1.0) was given. `baseline_decay` is a number in [0, 1). "
        "Pass, for example, baseline_decay=0.95."
    )
    wrong: list[dict[str, Any]] = [
        {"baseline_decay": -0.1},
        {"baseline_decay": True},
        {"weight_cap": 0.9},
        {"weight_cap": math.nan},
        {"advantage_cap": 0.0},
        {"advantage_cap": "3"},
        {"entropy_weight": -1},
        {"entropy_weight": math.inf},
    ]
    for arguments in wrong:
        with pytest.raises(ConfigurationError, match="Reinforce"):
            Reinforce(**arguments)
    assert Reinforce(weight_cap=math.inf, advantage_cap=math.inf).weight_cap == math.inf
