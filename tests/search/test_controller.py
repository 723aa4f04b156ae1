"""Policies, and their updates against enumeration of small spaces."""

import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lightning_ydrop.errors import ConfigurationError
from lightning_ydrop.search.controller import Policy, ReinforcePolicy, TablePolicy, TransformerPolicy
from lightning_ydrop.search.reinforce import Reinforce
from lightning_ydrop.search.space import PatternSpace
from tests.sameness import assert_same
from tests.search.spaces import MIXED, SMALL, WIDE, both, candidates, log_probs, moved, policies, reward_of, weights_of


@both
def test_the_first_policy_is_uniform(make: Callable[..., Policy]) -> None:
    policy = make(SMALL)
    for choices in candidates(SMALL)[::17]:
        assert policy.log_prob(choices) == pytest.approx(-math.log(144))
    assert policy.entropy() == pytest.approx(math.log(144) / 6)


@both
@pytest.mark.parametrize("space", [SMALL, MIXED], ids=["conv", "mixed"])
def test_probabilities_sum_to_one(make: Callable[..., ReinforcePolicy], space: PatternSpace) -> None:
    policy = moved(make(space))
    with torch.no_grad():
        every = log_probs(policy, space)
    assert every.exp().sum().item() == pytest.approx(1, rel=1e-12)
    assert every.std() > 0.1
    for number in range(0, len(every), 97):
        assert policy.log_prob(candidates(space)[number]) == pytest.approx(every[number].item(), rel=1e-12)


@both
def test_draws_follow_the_probabilities(make: Callable[..., ReinforcePolicy]) -> None:
    policy = moved(make(SMALL))
    number = {tuple(choices): number for number, choices in enumerate(candidates(SMALL))}
    counts = torch.zeros(144)
    draws = 600
    for seed in range(draws):
        choices, log_prob = policy.sample(seed)
        assert log_prob == policy.log_prob(choices)
        counts[number[tuple(choices)]] += 1
    with torch.no_grad():
        expected = draws * log_probs(policy, SMALL).exp()
    # Candidates that are expected less than 5 times are counted together.
    rare = expected < 5
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    chi2 = ((counts - expected) ** 2 / expected).sum()
    free = len(expected) - 1
    assert chi2 < free + 4 * math.sqrt(2 * free)


@both
def test_the_most_likely_choices_are_greedy(make: Callable[..., ReinforcePolicy]) -> None:
    policy = moved(make(WIDE), scale=1.0)
    chosen = policy.most_likely()
    for position, token in enumerate(WIDE.tokens):
        with torch.no_grad():
            terms, _ = policy._terms(
                torch.tensor(
                    [[*chosen[:position], choice, *chosen[position + 1 :]] for choice in range(len(token.values))]
                )
            )
        assert terms[:, position].argmax() == chosen[position]


def test_one_token_at_a_time_computes_what_all_at_once_do() -> None:
    policy = moved(TransformerPolicy(WIDE))
    choices, _ = policy.sample(3)
    probabilities: list[list[float]] = []

    def record(position: int, each: list[float]) -> int:
        probabilities.append(each)
        return choices[position]

    assert policy._generate(record) == choices
    with torch.no_grad():
        whole = policy._logits(torch.tensor([choices]))[0].softmax(1)
    for row, each, token in zip(whole, probabilities, WIDE.tokens, strict=True):
        assert len(each) == len(token.values)
        assert row.tolist() == pytest.approx(each + [0.0] * (len(row) - len(each)), abs=1e-12)


def test_no_token_sees_a_later_one() -> None:
    policy = moved(TransformerPolicy(SMALL))
    rows = torch.tensor(candidates(SMALL))
    with torch.no_grad():
        terms, _ = policy._terms(rows)
    for position in range(6):
        groups: dict[tuple[int, ...], list[float]] = {}
        for row, term in zip(rows.tolist(), terms[:, position].tolist(), strict=True):
            groups.setdefault(tuple(row[: position + 1]), []).append(term)
        for group in groups.values():
            assert max(group) - min(group) < 1e-12
        # And each sees those before it.
        assert position == 0 or len({round(group[0], 9) for group in groups.values()}) > 3


def test_table_tokens_are_independent() -> None:
    policy = moved(TablePolicy(SMALL))
    with torch.no_grad():
        terms, _ = policy._terms(torch.tensor(candidates(SMALL)))
    for position, token in enumerate(SMALL.tokens):
        assert len(set(terms[:, position].tolist())) == len(token.values)


@both
def test_a_policy_learns_what_is_good(make: Callable[..., ReinforcePolicy]) -> None:
    policy = make(SMALL, **({"lr": 1e-2} if make is not TablePolicy else {}))
    for seed in range(300):
        choices, log_prob = policy.sample(seed)
        policy.learn(choices, reward_of(choices), log_prob)
    with torch.no_grad():
        probabilities = log_probs(policy, SMALL).exp()
    mean = sum(p * reward_of(choices) for p, choices in zip(probabilities.tolist(), candidates(SMALL), strict=True))
    best = max(map(reward_of, candidates(SMALL)))
    uniform = sum(map(reward_of, candidates(SMALL))) / 144
    assert mean > uniform + 0.7 * (best - uniform)
    assert reward_of(policy.most_likely()) == pytest.approx(best)
    assert 0 < policy.entropy() < math.log(144) / 6


@both
def test_entropy_keeps_a_policy_uniform(make: Callable[..., ReinforcePolicy]) -> None:
    entropies = []
    for beta in (0.0, 1.0):
        policy = make(SMALL, reinforce=Reinforce(entropy_weight=beta))
        for seed in range(100):
            choices, log_prob = policy.sample(seed)
            policy.learn(choices, reward_of(choices), log_prob)
        entropies.append(policy.entropy())
    assert entropies[0] < entropies[1] - 0.05


def test_the_entropy_of_a_table_is_exact() -> None:
    policy = moved(TablePolicy(SMALL))
    with torch.no_grad():
        every = log_probs(policy, SMALL)
    assert policy.entropy() == pytest.approx(-(every.exp() * every).sum().item() / 6)


def test_the_entropy_of_a_transformer_is_that_of_its_last_candidates() -> None:
    policy = TransformerPolicy(SMALL, width=8, feedforward=16)
    rows = candidates(SMALL)[:120:10]
    for number, choices in enumerate(rows):
        policy.learn(choices, float(number))
    with torch.no_grad():
        _, entropies = policy._terms(torch.tensor(rows[-8:]))
    assert policy.entropy() == pytest.approx(entropies.mean().item())


@both
def test_weights_are_a_function_of_what_was_learned(make: Callable[..., ReinforcePolicy]) -> None:
    one, other = make(WIDE), make(WIDE)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    for seed in range(20):
        choices, log_prob = one.sample(seed)
        one.learn(choices, math.sin(seed), log_prob)
        assert_same(other.sample(seed), (choices, log_prob))
        if seed % 3 == 0:
            # What only reads changes nothing.
            other.sample(99)
            other.entropy()
            other.most_likely()
        with torch.inference_mode():  # nor does the mode around it
            other.learn(choices, math.sin(seed), log_prob)
    assert_same(one.state(), other.state())
    assert_same(torch.get_rng_state(), state)
    copy = pickle.loads(pickle.dumps(one))
    assert_same(copy.state(), one.state())
    for each in (copy, one):
        each.learn(choices, 3.0)
    assert_same(copy.state(), one.state())


@both
def test_the_defaults_of_torch_change_nothing(make: Callable[..., ReinforcePolicy]) -> None:
    one = make(SMALL)
    one.learn(*one.sample(0)[:1], reward=1.0)
    one.learn(*one.sample(1)[:1], reward=2.0)
    torch.set_default_dtype(torch.bfloat16)
    torch.set_default_device("meta")
    try:
        other = make(SMALL)
        other.learn(*other.sample(0)[:1], reward=1.0)
        other.learn(*other.sample(1)[:1], reward=2.0)
        drawn = other.sample(2)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert drawn == one.sample(2)
    assert_same(one.state(), other.state())


def test_initial_weights_are_seeded() -> None:
    one, twin, other = (TransformerPolicy(SMALL, seed=seed).state() for seed in (0, 0, 1))
    assert_same(one, twin)
    assert not torch.equal(one["parameters"][1], other["parameters"][1])


def test_a_transformer_of_the_default_size_has_27_000_parameters() -> None:
    space = PatternSpace({f"stage1.{number}": "conv" for number in range(12)})
    policy = TransformerPolicy(space)
    assert sum(weight.numel() for weight in weights_of(policy)) == pytest.approx(27_000, rel=0.05)


@both
def test_what_can_not_be_learned_is_refused(make: Callable[..., ReinforcePolicy]) -> None:
    policy = make(SMALL)
    state = policy.state()
    with pytest.raises(ConfigurationError) as error:
        policy.learn([0] * 6, math.nan)
    assert str(error.value) == (
        f"{type(policy).__name__}.learn(reward=nan) was given. `reward` is a finite number. "
        "Give a candidate that diverges a low finite reward: the policy learns to avoid it."
    )
    for choices, reward, log_prob in (
        ([0] * 5, 1.0, None),
        ([0] * 7, 1.0, None),
        ([3, 0, 0, 0, 0, 0], 1.0, None),
        ([-1, 0, 0, 0, 0, 0], 1.0, None),
        ([0.5, 0, 0, 0, 0, 0], 1.0, None),
        ([0] * 6, -math.inf, None),
        ([0] * 6, 1.0, math.nan),
    ):
        with pytest.raises(ConfigurationError):
            policy.learn(choices, reward, log_prob)  # type: ignore[arg-type]
    assert_same(policy.state(), state)


def test_arguments_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigurationError) as error:
        TransformerPolicy(SMALL, width=30, num_heads=4)
    assert str(error.value) == (
        "TransformerPolicy(width=30, num_heads=4) was given. `width` is a multiple of `num_heads`: each head takes an "
        "equal share. Pass, for example, width=32, num_heads=2."
    )
    wrong: list[dict[str, Any]] = [
        {"lr": 0},
        {"lr": math.nan},
        {"space": {}},
        {"reinforce": None},
        {"width": 0},
        {"num_blocks": 0},
        {"num_heads": 1.0},
        {"feedforward": 0},
        {"seed": -1},
    ]
    for arguments in wrong:
        with pytest.raises(ConfigurationError, match=f"TransformerPolicy.{next(iter(arguments))}="):
            TransformerPolicy(**{"space": SMALL, **arguments})
    with pytest.raises(ConfigurationError, match=r"TablePolicy.lr="):
        TablePolicy(SMALL, lr=-1)


def test_both_policies_are_policies() -> None:
    made: list[Policy] = list(policies(SMALL))
    assert [policy.space for policy in made] == [SMALL, SMALL]
