"""Samplers: one objective, and learning by replay."""

import math
import pickle
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState, create_trial

from lightning_ydrop.errors import ConfigurationError
from lightning_ydrop.search.controller import TablePolicy
from lightning_ydrop.search.sampler import (
    SAMPLERS,
    PatternSampler,
    ReseededSampler,
    check_study,
    draw_index,
    make_sampler,
    seed_of,
)
from lightning_ydrop.search.space import ConvValues, PatternSpace
from tests.sameness import assert_same
from tests.search.spaces import FEW, SMALL, WIDE
from tests.search.studies import drawn_of, finished, journal, objective, small_sampler, study_of


@pytest.mark.parametrize("name", SAMPLERS)
def test_all_samplers_serve_one_objective(name: str) -> None:
    study = study_of(make_sampler(name, SMALL, 0))
    study.optimize(objective, n_trials=15)
    assert [trial.user_attrs["draw"]["index"] for trial in study.trials] == list(range(15))
    assert len({str(trial.params) for trial in study.trials}) > 5
    again = study_of(make_sampler(name, SMALL, 0))
    again.optimize(objective, n_trials=15)
    other = study_of(make_sampler(name, SMALL, 1))
    other.optimize(objective, n_trials=15)
    assert finished(again) == finished(study)
    assert finished(other) != finished(study)


def test_an_unknown_sampler_is_refused() -> None:
    with pytest.raises(ConfigurationError) as error:
        make_sampler("rl", SMALL)
    assert str(error.value) == (
        "make_sampler(name='rl') was given. `name` is one of 'random', 'tpe', 'table', 'transformer'. "
        "Pass, for example, name='random'."
    )
    for make in (
        lambda: PatternSampler(TablePolicy(SMALL), -1),
        lambda: ReseededSampler(optuna.samplers.RandomSampler, -1),
    ):
        with pytest.raises(ConfigurationError, match="seed=-1"):
            make()


MADE = [("table", SMALL, 0), ("transformer", SMALL, 0), ("transformer", SMALL, 0), ("transformer", SMALL, 1)]


def test_samplers_by_name_are_what_they_say() -> None:
    samplers: list[Any] = [make_sampler(*arguments) for arguments in MADE]
    assert isinstance(samplers[0].policy, TablePolicy)
    transformers = [sampler.policy for sampler in samplers[1:]]
    assert_same(transformers[0].state(), transformers[1].state())
    assert not (transformers[0].state()["parameters"][1] == transformers[2].state()["parameters"][1]).all()


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
def test_finished_trials_are_learned_from_once_and_in_order(direction: str) -> None:
    study = study_of(PatternSampler(TablePolicy(SMALL)), direction=direction)
    by_hand = TablePolicy(SMALL)
    sign = 1.0 if direction == "maximize" else -1.0

    def add(choices: list[int], value: float | None, state: TrialState, log_prob: float | None) -> None:
        values = [token.values[choice] for token, choice in zip(SMALL.tokens, choices, strict=True)]
        names = [token.name for token in SMALL.tokens]
        distributions = [optuna.distributions.CategoricalDistribution(token.values) for token in SMALL.tokens]
        drawn = choices if log_prob != -7.0 else [0] * 6  # -7: other parameters than those drawn
        study.add_trial(
            create_trial(
                state=state,
                value=value if state != TrialState.FAIL else None,
                params=dict(zip(names, values, strict=True)),
                distributions=dict(zip(names, distributions, strict=True)),
                intermediate_values={} if value is None else {0: value},
                user_attrs={} if log_prob is None else {"draw": {"choices": drawn, "log_prob": log_prob, "index": 0}},
            )
        )

    add([1, 0, 1, 0, 1, 0], 0.5, TrialState.COMPLETE, -4.0)
    add([2, 0, 1, 0, 1, 1], 0.9, TrialState.FAIL, -4.0)
    add([0, 1, 1, 0, 1, 1], 0.1, TrialState.PRUNED, -6.0)
    add([0, 1, 1, 0, 1, 0], None, TrialState.PRUNED, -6.0)
    add([0, 0, 0, 2, 1, 0], math.inf, TrialState.COMPLETE, -6.0)
    study.ask()
    by_hand.learn([1, 0, 1, 0, 1, 0], sign * 0.5, -4.0)
    by_hand.learn([0, 1, 1, 0, 1, 1], sign * 0.1, -6.0)
    assert_same(study.sampler.policy.state(), by_hand.state())
    study.tell(5, state=TrialState.FAIL)
    add([1, 1, 1, 1, 1, 1], 0.7, TrialState.COMPLETE, None)
    add([1, 1, 0, 1, 1, 1], 0.8, TrialState.COMPLETE, -7.0)
    study.ask()
    by_hand.learn([1, 1, 1, 1, 1, 1], sign * 0.7, None)
    by_hand.learn([1, 1, 0, 1, 1, 1], sign * 0.8, None)
    assert_same(study.sampler.policy.state(), by_hand.state())


def test_a_trial_that_was_queued_by_hand_is_learned_as_what_it_is() -> None:
    study = study_of(PatternSampler(TablePolicy(SMALL)))
    study.enqueue_trial({token.name: token.values[1] for token in SMALL.tokens})
    study.optimize(objective, n_trials=3)
    assert list(study.trials[0].params.values()) == [token.values[1] for token in SMALL.tokens]
    by_hand = TablePolicy(SMALL)
    for trial in study.trials[:2]:
        choices = [token.values.index(trial.params[token.name]) for token in SMALL.tokens]
        draw = trial.user_attrs["draw"]
        assert trial.value is not None
        by_hand.learn(choices, trial.value, draw["log_prob"] if draw["choices"] == choices else None)
    assert_same(study.sampler.policy.state(), by_hand.state())


def test_draws_are_numbered_without_retries_and_holes() -> None:
    study = study_of(optuna.samplers.RandomSampler(0))

    def add(state: TrialState, **user_attrs: Any) -> int:
        study.add_trial(
            create_trial(state=state, value=0.0 if state == TrialState.COMPLETE else None, user_attrs=user_attrs)
        )
        trial = study.trials[-1]
        return draw_index(study, trial)

    drawn = {"choices": [], "log_prob": 0.0}
    assert add(TrialState.COMPLETE, draw={**drawn, "index": 0}) == 0
    assert add(TrialState.FAIL) == 1  # died before it drew
    assert add(TrialState.FAIL, draw={**drawn, "index": 1}) == 1  # died after it drew
    assert add(TrialState.COMPLETE, draw={**drawn, "index": 1}, retry_of=2) == 2
    assert add(TrialState.RUNNING) == 2  # has not drawn yet
    assert add(TrialState.RUNNING) == 3
    assert add(TrialState.COMPLETE, draw={**drawn, "index": 9}) == 4
    assert add(TrialState.WAITING) == 10
    assert draw_index(study, study.trials[1]) == 1  # later trials don't count


def test_seeds_of_draws_differ() -> None:
    seeds = {seed_of(seed, index, name) for seed in range(5) for index in range(50) for name in ("", "a", "b")}
    assert len(seeds) == 750
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert seed_of(1, 2) == seed_of(1, 2)


def test_threads_share_a_sampler() -> None:
    study = study_of(PatternSampler(TablePolicy(SMALL)))
    study.optimize(objective, n_trials=40, n_jobs=4)
    assert sorted(trial.user_attrs["draw"]["index"] for trial in study.trials) == list(range(40))
    assert len({str(trial.params) for trial in study.trials}) > 10
    for trial in study.trials:
        chosen = [token.values[c] for token, c in zip(SMALL.tokens, trial.user_attrs["draw"]["choices"], strict=True)]
        assert list(trial.params.values()) == chosen
    assert not study.sampler._draws


def test_workers_draw_differently(tmp_path: Path) -> None:
    studies = [study_of(small_sampler("table"), journal(tmp_path / "journal")) for _ in range(2)]
    drawn = []
    for _ in range(3):
        for study in studies:
            trial = study.ask()
            drawn.append(study.sampler.drawn(trial.number))
    assert [draw["index"] for draw in drawn] == list(range(6))
    assert len({str(draw["choices"]) for draw in drawn}) > 3


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_survive_pickling(name: str) -> None:
    study = study_of(small_sampler(name))
    study.optimize(objective, n_trials=12)
    twin = study_of(pickle.loads(pickle.dumps(study.sampler)))
    for trial in study.trials:
        twin.add_trial(trial)
    for each in (study, twin):
        each.optimize(objective, n_trials=3)
    assert finished(twin) == finished(study)


def test_a_study_of_another_model_is_refused() -> None:
    study = study_of(PatternSampler(TablePolicy(SMALL)))
    check_study(study, WIDE)  # there is nothing yet
    study.optimize(objective, n_trials=2)
    study.sampler.check_study(study)
    with pytest.raises(ConfigurationError) as error:
        check_study(study, WIDE)
    assert str(error.value) == (
        "A study of another model was given: its trial 0 chose 'stage1.1.size' from (0.0, 0.25, 0.5), not from "
        "(0.0, 0.125, 0.25, 0.375, 0.5). All trials of a study choose from the same places and values. "
        "Name another study or another storage, or search with the model and the values of this one."
    )
    fewer = PatternSpace({"stage1.1": "conv"}, FEW)
    more = PatternSpace({"stage1.1": "conv", "stage2.1": "conv", "stage3.1": "conv"}, FEW)
    with pytest.raises(
        ConfigurationError, match=r"has the parameter 'stage2.1.size'; the places of this space are 'stage1.1'"
    ):
        check_study(study, fewer)
    with pytest.raises(ConfigurationError, match=r"has no parameter 'stage3.1.size'"):
        check_study(study, more)
    for space in (fewer, more):
        # A program that did not check: its policy does not learn from what it does not understand.
        other = optuna.create_study(sampler=PatternSampler(TablePolicy(space)))
        other.add_trial(study.trials[0])
        for _ in range(2):
            with pytest.raises(ConfigurationError, match="A study of another model"):
                other.ask()


def test_a_trial_that_died_halfway_is_of_this_model() -> None:
    study = study_of(PatternSampler(TablePolicy(SMALL)))
    trial = study.ask()
    trial.suggest_categorical(SMALL.tokens[0].name, SMALL.tokens[0].values)
    check_study(study, SMALL)
    with pytest.raises(ConfigurationError, match=r"chose 'stage1.1.size'"):
        check_study(study, WIDE)


def test_two_objectives_are_refused() -> None:
    study = optuna.create_study(directions=["minimize", "maximize"])
    with pytest.raises(ConfigurationError, match="A study with 2 objectives"):
        check_study(study, SMALL)


def test_a_parameter_beside_the_space_is_refused() -> None:
    study = study_of(PatternSampler(TablePolicy(SMALL)))
    trial = study.ask()
    with pytest.raises(ConfigurationError, match="suggests 'lr', which is no token"):
        trial.suggest_float("lr", 0, 1)


def test_tpe_uses_what_it_saw() -> None:
    """After its first random trials TPE finds better candidates than chance does."""
    values = ConvValues(
        size=(0, 0.1, 0.2, 0.3, 0.4, 0.5), stride=(0.5,), repeat=(1,), rotate=(0,), shear_x=(0,), shear_y=(0,)
    )
    space = PatternSpace({f"stage1.{number}": "conv" for number in range(4)}, values)

    def sizes(trial: optuna.Trial) -> float:
        trial.set_user_attr("draw", drawn_of(trial))
        chosen = [trial.suggest_categorical(token.name, token.values) for token in space.tokens]
        return sum(
            float(value or 0) for value, token in zip(chosen, space.tokens, strict=True) if token.field == "size"
        )

    means = {}
    for name in ("random", "tpe"):
        study = study_of(make_sampler(name, space, 0))
        study.optimize(sizes, n_trials=60)
        means[name] = sum(trial.value or 0.0 for trial in study.trials[30:]) / 30
    assert means["tpe"] > means["random"] + 0.2
