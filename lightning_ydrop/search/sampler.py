"""Controllers and Optuna's own searchers as samplers of one and the same objective.

An objective does the same with all of them:

    trial.set_user_attr("draw", trial.study.sampler.drawn(trial.number))
    choices = [trial.suggest_categorical(token.name, token.values) for token in space.tokens]

It writes the draw before it suggests: a trial that dies later is queued again with it.
"""

import math
import threading
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from optuna import Study
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from lightning_ydrop.checks import check_choice, check_count
from lightning_ydrop.errors import ConfigurationError
from lightning_ydrop.search.controller import Policy, TablePolicy, TransformerPolicy
from lightning_ydrop.search.space import PatternSpace

SAMPLERS = ("random", "tpe", "table", "transformer")
LEARNED_FROM = (TrialState.COMPLETE, TrialState.PRUNED)


def draw_index(study: Study, trial: FrozenTrial) -> int:
    """Number the draws of a study, whatever died between them.

    Trials that were queued again, and trials that died before they drew, don't count. So a study that is stopped and
    started again numbers its draws as the uninterrupted one does.

    Args:
        study: The study.
        trial: A trial of it that draws.

    Returns:
        The index of its draw, from 0.

    """
    drawn, count = -1, 0
    for other in study.get_trials(deepcopy=False):
        if other.number >= trial.number:
            continue
        draw = other.user_attrs.get("draw")
        if draw is not None:
            drawn = max(drawn, draw["index"])
        is_hole = other.state == TrialState.FAIL and draw is None
        count += not is_hole and "retry_of" not in other.user_attrs
    return max(1 + drawn, count)


def check_study(study: Study, space: PatternSpace) -> None:
    """Refuse a study whose trials are not of this space.

    Args:
        study: The study.
        space: What a policy or an objective chooses from.

    Raises:
        ConfigurationError: If a trial has another place, field or list of values, or the study has two objectives.

    """
    if len(study.directions) > 1:
        raise ConfigurationError(
            f"A study with {len(study.directions)} objectives was given.",
            "A search maximises or minimises one number.",
            "Create the study with one direction.",
        )
    for trial in study.get_trials(deepcopy=False):
        _check_trial(trial, {token.name: token.values for token in space.tokens})


def _check_trial(trial: FrozenTrial, values: dict[str, tuple[Any, ...]]) -> None:
    """Refuse a trial with parameters of another space. One that died may have a part of them."""
    finished = trial.state in LEARNED_FROM
    for name, distribution in trial.distributions.items():
        if name not in values:
            known = sorted({each.rpartition(".")[0] for each in values})
            wrong = f"has the parameter {name!r}; the places of this space are {', '.join(map(repr, known))}"
        elif getattr(distribution, "choices", None) != values[name]:
            wrong = f"chose {name!r} from {getattr(distribution, 'choices', distribution)}, not from {values[name]}"
        else:
            continue
        raise _another_model(trial, wrong)
    if finished and len(trial.params) < len(values):
        missing = next(name for name in values if name not in trial.params)
        raise _another_model(trial, f"has no parameter {missing!r}")


def _another_model(trial: FrozenTrial, wrong: str) -> ConfigurationError:
    return ConfigurationError(
        f"A study of another model was given: its trial {trial.number} {wrong}.",
        "All trials of a study choose from the same places and values.",
        "Name another study or another storage, or search with the model and the values of this one.",
    )


def seed_of(seed: int, index: int, name: str = "") -> int:
    """Make a seed of its own for a draw, or for one parameter of it. It fits into 32 bits."""
    mixed = np.random.SeedSequence([seed, index, zlib.crc32(name.encode())])
    return int(mixed.generate_state(1, np.uint32)[0])


class _Locked(BaseSampler):
    """A sampler with a lock, which stays in its process: `optimize(n_jobs=...)` calls it from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._lock = threading.Lock()

    def reseed_rng(self) -> None:
        """Do nothing: each draw has a seed of its own, made of its index, whatever thread or process draws."""


class PatternSampler(_Locked):
    """A policy as Optuna's sampler: before each draw it learns from the trials that finished since the last.

    Learning is replay. The policy is a function of its arguments and of the finished trials, in order, so that nothing
    has to be saved: start again and go on. Parallel workers have a policy each, which need not agree. The importance
    weights of REINFORCE account for the difference.

    It learns from complete and pruned trials with a finite value, and not from failed ones.

    Args:
        policy: A new policy.
        seed: Seed of the draws, at least 0.

    Raises:
        ConfigurationError: If the seed is negative; before a trial, if the study is of another model.

    """

    def __init__(self, policy: Policy, seed: int = 0) -> None:
        super().__init__()
        self.policy = policy
        self._seed = check_count("PatternSampler", "seed", seed, minimum=0, example=0)
        self._values = {token.name: token.values for token in policy.space.tokens}
        self._draws: dict[int, dict[str, Any]] = {}
        self._learned: set[int] = set()

    def check_study(self, study: Study) -> None:
        """Refuse a study of another model. See the function `check_study`."""
        check_study(study, self.policy.space)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Learn from what finished, then draw."""
        with self._lock:
            self._draw(study, trial)

    def _draw(self, study: Study, trial: FrozenTrial) -> dict[str, Any]:
        if trial.number in self._draws:
            return self._draws[trial.number]
        self.replay(study)
        draw = trial.user_attrs.get("draw")
        if draw is None:
            index = draw_index(study, trial)
            choices, log_prob = self.policy.sample(seed_of(self._seed, index))
            draw = {"choices": choices, "log_prob": log_prob, "index": index}
        self._draws[trial.number] = draw
        return draw

    def replay(self, study: Study) -> None:
        """Learn from each trial once, in order of their numbers."""
        sign = -1.0 if study.direction == StudyDirection.MINIMIZE else 1.0
        for trial in study.get_trials(deepcopy=False, states=LEARNED_FROM):
            if trial.number in self._learned:
                continue
            _check_trial(trial, self._values)
            self._learned.add(trial.number)
            if trial.value is None or not math.isfinite(trial.value):
                continue
            choices = [values.index(trial.params[name]) for name, values in self._values.items()]
            draw = trial.user_attrs.get("draw", {})
            # A trial that a user queued has other parameters than those drawn for it.
            log_prob = draw["log_prob"] if draw.get("choices") == choices else None
            self.policy.learn(choices, sign * trial.value, log_prob)

    def drawn(self, number: int) -> dict[str, Any]:
        """Give what was drawn for a running trial, for the user attribute "draw".

        Args:
            number: The number of a trial that this sampler began.

        Returns:
            `choices`, their `log_prob` when they were drawn, and the `index` of the draw.

        """
        with self._lock:
            return dict(self._draws[number])

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """All tokens, a categorical parameter each."""
        return {name: CategoricalDistribution(values) for name, values in self._values.items()}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Give the values drawn."""
        with self._lock:
            choices = self._draw(study, trial)["choices"]
        return {name: values[choice] for (name, values), choice in zip(self._values.items(), choices, strict=True)}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Refuse a parameter that the policy does not choose."""
        raise _another_model(trial, f"suggests {param_name!r}, which is no token of the policy's space")

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        """Forget the draw, which is in the storage."""
        with self._lock:
            self._draws.pop(trial.number, None)


class ReseededSampler(_Locked):
    """A sampler of Optuna that is made anew for each trial, so that resuming equals the uninterrupted run.

    Optuna's samplers go on from a random state that dies with the process. Here the state is a function of the seed and
    of the trial's index.

    Args:
        make: Makes a sampler from a seed.
        seed: Seed of all draws, at least 0.

    Raises:
        ConfigurationError: If the seed is negative.

    """

    def __init__(self, make: Callable[[int], BaseSampler], seed: int = 0) -> None:
        super().__init__()
        self._make = make
        self._seed = check_count("ReseededSampler", "seed", seed, minimum=0, example=0)
        self._begun: dict[int, tuple[int, BaseSampler]] = {}

    def _begin(self, study: Study, trial: FrozenTrial) -> tuple[int, BaseSampler]:
        with self._lock:
            if trial.number not in self._begun:
                draw = trial.user_attrs.get("draw")
                index = draw_index(study, trial) if draw is None else draw["index"]
                self._begun[trial.number] = index, self._make(seed_of(self._seed, index))
            return self._begun[trial.number]

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Make the sampler of this trial."""
        self._begin(study, trial)[1].before_trial(study, trial)

    def drawn(self, number: int) -> dict[str, Any]:
        """Give the index of a running trial's draw, for the user attribute "draw". Its choices are made later.

        Args:
            number: The number of a trial that this sampler began.

        Returns:
            The `index` of the draw; `choices` and `log_prob` are None.

        """
        with self._lock:
            return {"choices": None, "log_prob": None, "index": self._begun[number][0]}

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Ask the sampler of this trial."""
        return self._begin(study, trial)[1].infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Ask the sampler of this trial."""
        return self._begin(study, trial)[1].sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Ask a sampler made for this parameter: of a trial that died halfway, the rest are drawn as they were."""
        index, _ = self._begin(study, trial)
        sampler = self._make(seed_of(self._seed, index, param_name))
        return sampler.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        """Let the sampler of this trial go, if it was begun here."""
        with self._lock:
            _, sampler = self._begun.pop(trial.number, (0, None))
        if sampler is not None:
            sampler.after_trial(study, trial, state, values)


def _tpe(seed: int) -> BaseSampler:
    return TPESampler(seed=seed)


def make_sampler(name: str, space: PatternSpace, seed: int = 0) -> PatternSampler | ReseededSampler:
    """Make a sampler by its name.

    Args:
        name: "random" or "tpe", which are Optuna's, or "table" or "transformer", which learn by REINFORCE.
        space: What is searched.
        seed: Seed of the draws, and of the Transformer's initial weights.

    Returns:
        A sampler. All of them serve one objective.

    Raises:
        ConfigurationError: If there is no such sampler.

    """
    check_choice("make_sampler", "name", name, SAMPLERS)
    if name == "random":
        return ReseededSampler(RandomSampler, seed)
    if name == "tpe":
        return ReseededSampler(_tpe, seed)
    return PatternSampler(TablePolicy(space) if name == "table" else TransformerPolicy(space, seed=seed), seed)
