"""The objective of a search: train with the patterns that a trial suggests, and give the reward."""

import math
import statistics
from collections.abc import Mapping
from pathlib import Path

import optuna
from optuna.trial import TrialState

from lightning_ydrop.layers.patterns import Pattern
from lightning_ydrop.search.apart import train_apart
from lightning_ydrop.search.sampler import PatternSampler, seed_of
from lightning_ydrop.search.space import PatternSpace
from lightning_ydrop.search.training import Outcome, Report, Training
from lightning_ydrop.search.workers import TrialError

# A training that diverged gets the mean reward less so many standard deviations.
DEVIATIONS_BELOW = 3.0


class PatternObjective:
    """Trains with the patterns that a trial suggests.

    The reward is the metric, or minus the metric where it should be small. A training that diverges has a low finite
    reward, so that a controller learns from it: the mean of the finished trials less three standard deviations, and no
    more than the lowest of them; before there are two, the reward of the untrained network less its size. One that is
    stopped early, because its metric was below the median of the others at its epoch, has the reward that lies as many
    standard deviations below the mean of the finished trials as its metric lay below that of the others at that epoch.

    Each trial keeps user attributes: `metrics`, and `diverged` or `stopped_at` where that is so.

    Args:
        training: Trains the network.
        space: What is searched.
        config: File of the configuration, for trainings in several processes.

    """

    def __init__(self, training: Training, space: PatternSpace, config: Path) -> None:
        self._training = training
        self._space = space
        self._config = config if training.num_processes > 1 else None

    def __call__(self, trial: optuna.Trial, folder: Path) -> float:
        """Train, and give the reward."""
        trial.set_user_attr("policy", _state_of(trial.study.sampler))
        values = [trial.suggest_categorical(token.name, token.values) for token in self._space.tokens]
        choices = [token.values.index(value) for token, value in zip(self._space.tokens, values, strict=True)]
        patterns = self._space.patterns(choices)
        seed = seed_of(self._training.cli.seed, trial.user_attrs["draw"]["index"], "training")
        outcome = train_once(self._training, self._config, patterns, seed, folder, self._report_of(trial))
        trial.set_user_attr("metrics", {name: each for name, each in outcome.metrics.items() if math.isfinite(each)})
        if math.isnan(outcome.reward):
            trial.set_user_attr("diverged", True)
            return self._low(trial.study)
        if outcome.stopped_at is not None:
            trial.set_user_attr("stopped_at", outcome.stopped_at)
            return self._as_if_finished(trial, outcome)
        return outcome.reward

    def _report_of(self, trial: optuna.Trial) -> Report | None:
        """Tell when a trial should stop, if trials are stopped at all."""
        after = self._training.settings.prune_after
        if after is None:
            return None

        def report(epoch: int, reward: float) -> bool:
            trial.report(reward, epoch)
            others = _at_epoch(trial.study, epoch)
            return epoch + 1 >= after and len(others) > 1 and reward < statistics.median(others)

        return report

    def _low(self, study: optuna.Study) -> float:
        rewards = _rewards(study)
        if len(rewards) > 1:
            return min(statistics.fmean(rewards) - DEVIATIONS_BELOW * statistics.stdev(rewards), *rewards)
        untrained = self._training.untrained()
        if math.isnan(untrained):
            raise TrialError(
                f"The training diverged, and {self._training.settings.metric!r} is not finite before it either: there "
                "is no low reward to give. Check the learning rate, the data and the metric."
            )
        # A training that did not diverge may end with a larger loss than it began with, and is better all the same.
        return untrained - abs(untrained)

    def _as_if_finished(self, trial: optuna.Trial, outcome: Outcome) -> float:
        assert outcome.stopped_at is not None
        others, rewards = _at_epoch(trial.study, outcome.stopped_at), _rewards(trial.study)
        spread = statistics.stdev(others)
        below = (statistics.fmean(others) - outcome.reward) / spread if spread > 0 else 1.0
        return statistics.fmean(rewards) - max(below, 0.0) * statistics.stdev(rewards)


def train_once(
    training: Training,
    config: Path | None,
    patterns: Mapping[str, Pattern],
    seed: int,
    folder: Path,
    report: Report | None = None,
) -> Outcome:
    """Train here, or in a program of its own, which a strategy with several processes needs.

    Args:
        training: Trains here.
        config: File of the configuration, for a program of its own; None to train here.
        patterns: By place.
        seed: Of weights, batches and masks.
        folder: Where checkpoints lie.
        report: Called after each validation, here.

    Returns:
        What the training reached.

    Raises:
        TrialError: If the program fails.

    """
    if config is None:
        return training(patterns, seed, folder, report)
    return train_apart(config, patterns, seed, folder, report)


def _rewards(study: optuna.Study) -> list[float]:
    """Rewards of the trials that trained to the end."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return [
        trial.value
        for trial in trials
        if trial.value is not None and not {"diverged", "stopped_at"} & set(trial.user_attrs)
    ]


def _at_epoch(study: optuna.Study, epoch: int) -> list[float]:
    """Rewards that finished trials had after an epoch."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return [trial.intermediate_values[epoch] for trial in trials if epoch in trial.intermediate_values]


def _state_of(sampler: object) -> dict[str, float]:
    """Tell how sure a controller is, and how far its late rewards count."""
    if not isinstance(sampler, PatternSampler):
        return {}
    numbers = {
        "entropy": sampler.policy.entropy(),
        "effective_sample_size": sampler.policy.effective_sample_size,
    }
    return {name: number for name, number in numbers.items() if math.isfinite(number)}
