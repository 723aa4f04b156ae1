"""Studies of a small space with a synthetic objective."""

import math
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from lightning_ydrop.search.controller import ReinforcePolicy, TablePolicy, TransformerPolicy
from lightning_ydrop.search.sampler import PatternSampler, make_sampler
from lightning_ydrop.search.space import PatternSpace
from tests.search.spaces import SMALL


def small_policy(space: PatternSpace, kind: str) -> ReinforcePolicy:
    return TablePolicy(space) if kind == "table" else TransformerPolicy(space, width=8, feedforward=16)


def small_sampler(name: str, seed: int = 3) -> Any:
    if name in ("table", "transformer"):
        return PatternSampler(small_policy(SMALL, name), seed)
    return make_sampler(name, SMALL, seed)


def wave_of(choices: list[int]) -> float:
    return math.sin(sum((number + 1) * choice for number, choice in enumerate(choices)))


def drawn_of(trial: optuna.Trial) -> dict[str, Any]:
    sampler: Any = trial.study.sampler
    drawn: dict[str, Any] = sampler.drawn(trial.number)
    return drawn


def objective(trial: optuna.Trial) -> float:
    """The one objective of all samplers."""
    trial.set_user_attr("draw", drawn_of(trial))
    values = [trial.suggest_categorical(token.name, token.values) for token in SMALL.tokens]
    return wave_of([token.values.index(value) for token, value in zip(SMALL.tokens, values, strict=True)])


def study_of(sampler: Any, storage: BaseStorage | None = None, direction: Any = "maximize") -> Any:
    return optuna.create_study(
        storage=storage or InMemoryStorage(), sampler=sampler, study_name="s", direction=direction, load_if_exists=True
    )


def journal(path: Path) -> JournalStorage:
    return JournalStorage(JournalFileBackend(str(path)))


def finished(study: Any) -> list[tuple[Any, ...]]:
    """All that a search found, without the numbers that Optuna gave."""
    trials = study.get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED))
    return [(trial.params, trial.value, trial.state, trial.user_attrs["draw"]) for trial in trials]
