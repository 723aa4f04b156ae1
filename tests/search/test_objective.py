"""What a training that did not end well is worth."""

import math
import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.trial import TrialState, create_trial

from lightning_ydrop.search.objective import PatternObjective
from lightning_ydrop.search.settings import SearchSettings
from lightning_ydrop.search.space import PatternSpace
from lightning_ydrop.search.training import Outcome, Report
from lightning_ydrop.search.workers import TrialError

SPACE = PatternSpace({"stage1.1": "conv"})
FINISHED = {0: 1.0, 1: 3.0, 2: 2.0}


class Trained:
    """Stands for a training: it reaches what it is told to, epoch by epoch."""

    num_processes = 1
    cli = SimpleNamespace(seed=0)

    def __init__(self, *rewards: float, untrained: float = -5.0, prune_after: int | None = None) -> None:
        self.rewards = rewards
        self.settings = SearchSettings("val_acc", prune_after=prune_after)
        self._untrained = untrained
        self.seeds: list[int] = []

    def untrained(self) -> float:
        return self._untrained

    def __call__(self, patterns: object, seed: int, folder: Path, report: Report | None) -> Outcome:
        self.seeds.append(seed)
        for epoch, reward in enumerate(self.rewards):
            if report is not None and report(epoch, reward):
                return Outcome(reward, {"val_acc": reward}, epoch)
        return Outcome(self.rewards[-1], {"val_acc": self.rewards[-1]}, None)


def study_of(finished: dict[int, float], **attributes: Any) -> optuna.Study:
    """A study with finished trials, which reached half of their reward after the first epoch."""
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(0))
    for value in finished.values():
        params = {token.name: token.values[0] for token in SPACE.tokens}
        distributions: dict[str, BaseDistribution] = {
            token.name: CategoricalDistribution(token.values) for token in SPACE.tokens
        }
        study.add_trial(
            create_trial(
                state=TrialState.COMPLETE,
                value=value,
                params=params,
                distributions=distributions,
                intermediate_values={0: value / 2, 1: value},
                user_attrs=attributes,
            )
        )
    return study


def value_of(training: Any, study: optuna.Study, index: int = 7) -> tuple[float, optuna.Trial]:
    trial = study.ask()
    trial.set_user_attr("draw", {"index": index})
    return PatternObjective(training, SPACE, Path("config"))(trial, Path("folder")), trial


def test_the_reward_is_what_the_training_reached() -> None:
    value, trial = value_of(Trained(0.2, 0.7), study_of({}))
    assert value == 0.7
    assert trial.user_attrs["metrics"] == {"val_acc": 0.7}
    assert not {"diverged", "stopped_at"} & set(trial.user_attrs)


def test_a_training_that_diverges_lies_three_deviations_below_the_others() -> None:
    value, trial = value_of(Trained(math.nan), study_of(FINISHED))
    assert value == pytest.approx(2.0 - 3 * statistics.stdev(FINISHED.values()))
    assert trial.user_attrs["diverged"]
    assert trial.user_attrs["metrics"] == {}


def test_rewards_of_others_that_diverged_don_t_count() -> None:
    study = study_of(FINISHED)
    study.add_trials(study_of({0: -100.0}, diverged=True).trials)
    study.add_trials(study_of({0: -100.0}, stopped_at=3).trials)
    assert value_of(Trained(math.nan), study)[0] == pytest.approx(2.0 - 3 * 1.0)


def test_before_two_have_finished_it_has_less_than_the_reward_of_the_untrained_network() -> None:
    """A training that does not diverge may end with a larger loss than it began with."""
    assert value_of(Trained(math.nan), study_of({0: 1.0}))[0] == -5.0 - 5.0
    assert value_of(Trained(math.nan, untrained=0.1), study_of({}))[0] == 0.0  # an accuracy
    with pytest.raises(TrialError, match="not finite before it either"):
        value_of(Trained(math.nan, untrained=math.nan), study_of({}))


def test_it_is_no_better_than_the_worst_that_finished() -> None:
    skewed = dict.fromkeys(range(30), 1.0) | {30: -50.0}
    assert value_of(Trained(math.nan), study_of(skewed))[0] == -50.0


def test_what_is_below_the_median_stops_and_lies_as_far_below_the_mean() -> None:
    # At epoch 0 the others have 0.5, 1.5 and 1.0: 0.75 is half a deviation below their mean.
    value, trial = value_of(Trained(0.75, 9.0, prune_after=1), study_of(FINISHED))
    assert trial.user_attrs["stopped_at"] == 0
    assert value == pytest.approx(2.0 - 0.5 * statistics.stdev(FINISHED.values()))


@pytest.mark.parametrize(("rewards", "after"), [((0.75, 9.0), 3), ((1.2, 9.0), 1), ((0.75, 9.0), None)])
def test_others_go_on(rewards: tuple[float, ...], after: int | None) -> None:
    value, trial = value_of(Trained(*rewards, prune_after=after), study_of(FINISHED))
    assert value == 9.0
    assert "stopped_at" not in trial.user_attrs


def test_the_seed_of_a_training_is_that_of_its_draw() -> None:
    training = Trained(1.0)
    study = study_of({})
    for index in (3, 3, 4):
        value_of(training, study, index)
    first, again, other = training.seeds
    assert first == again != other
