"""A pool of workers for named trials, by the engine of `lightning_ydrop.search`: started again, it goes on."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.trial import FrozenTrial, TrialState
from tqdm import tqdm

from lightning_ydrop.search.processes import start_workers
from lightning_ydrop.search.storage import open_claims, open_study
from lightning_ydrop.search.workers import queue_trials, work

# Carries a trial out, whose user attribute `name` says what it is, in a folder of its own, and gives its value.
Objective = Callable[[optuna.Trial, Path], float]


@dataclass(frozen=True)
class Pool:
    """Workers that share a study, on this machine and on all that reach its storage.

    Attributes:
        storage: A file, or a postgresql:// URL that machines share.
        study_name: The same for all that share its trials.
        jobs: Trials at a time on this machine.
        direction: Whether values are to be small or large.

    """

    storage: str
    study_name: str
    jobs: int = 1
    direction: Literal["minimize", "maximize"] = "minimize"

    def study(self) -> optuna.Study:
        """Open the study, or start it.

        Raises:
            ConfigurationError: If the storage can't be used.

        """
        return open_study(self.storage, self.study_name, direction=self.direction, workers=self.jobs)

    def run(
        self,
        objective: Objective,
        trials: Mapping[str, Mapping[str, Any]],
        *,
        folder: str | Path = ".",
        again: bool = False,
        at_most: int | None = None,
        max_failures: int | None = None,
        unit: str = "run",
    ) -> dict[str, FrozenTrial]:
        """Carry out trials, and show how far they are and what goes wrong.

        Args:
            objective: What carries one out. It can be pickled.
            trials: Parameters by name.
            folder: Where each trial has a folder of its own.
            again: Whether those are carried out again that are complete.
            at_most: How many to carry out. None: all.
            max_failures: After how many failures in a row a worker stops. None: never.
            unit: What a trial is called.

        Returns:
            The latest trial of each name, of those that were started.

        Raises:
            ConfigurationError: If the storage can't be used, or all workers stopped.

        """
        study, claims = self.study(), open_claims(self.storage, self.study_name)
        done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        queue_trials(study, claims, trials, again=again, at_most=at_most)
        claims.close()
        left = trials.keys() if again else trials.keys() - {trial.user_attrs["name"] for trial in done}
        count = len(left) if at_most is None else min(at_most, len(left))
        total = None if at_most is None else len(done) + at_most
        with tqdm(total=count, unit=unit, dynamic_ncols=True) as bar:
            progress = _Progress(study, trials, bar)
            if left:
                arguments = (self, objective, folder, total, max_failures)
                start_workers(self.jobs, _be_worker, *arguments, tick=progress, say=bar.write)
            else:
                progress()
        return progress.latest


def complete(trials: Mapping[str, FrozenTrial]) -> dict[str, FrozenTrial]:
    """Choose the trials that are complete."""
    return {name: trial for name, trial in trials.items() if trial.state == TrialState.COMPLETE}


def _be_worker(
    pool: Pool, objective: Objective, folder: str | Path, total: int | None, max_failures: int | None
) -> None:
    """Be one worker: carry out what is queued, until nothing is left."""
    study, claims = pool.study(), open_claims(pool.storage, pool.study_name)
    # Optuna takes NaN for a failure, which is tried again; a training that diverged would diverge again.
    nan_value = math.inf if pool.direction == "minimize" else None
    work(
        study,
        objective,
        claims,
        folder=folder,
        total=total,
        draw=False,
        max_failures=max_failures,
        nan_value=nan_value,
    )
    claims.close()


class _Progress:
    """Tells how far trials are, and what goes wrong.

    Attributes:
        latest: The latest trial of each name, of those that were started.

    """

    latest: dict[str, FrozenTrial]

    def __init__(self, study: optuna.Study, trials: Mapping[str, object], bar: "tqdm[None]") -> None:
        self._study = study
        self._trials = trials
        self._bar = bar
        # What ended before is told no more.
        self._told = {trial.number for trial in study.get_trials(deepcopy=False) if trial.state.is_finished()}
        self.latest = {}

    def __call__(self) -> None:
        for trial in self._study.get_trials(deepcopy=False):
            if trial.user_attrs["name"] in self._trials:
                self.latest[trial.user_attrs["name"]] = trial
        ended = {trial.number: trial for trial in self.latest.values() if trial.state.is_finished()}
        new = ended.keys() - self._told
        self._told |= new
        for number in sorted(new):
            if "error" in ended[number].user_attrs:
                self._bar.write(ended[number].user_attrs["error"])
        self._bar.update(len(new))
