"""How far a search is: in the terminal, in the study for dashboards, and in a logger."""

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import optuna
from lightning.pytorch.loggers import Logger
from optuna.trial import TrialState

from lightning_ydrop.search.sampler import LEARNED_FROM
from lightning_ydrop.search.space import PatternSpace
from lightning_ydrop.search.studies import best_of


class Progress:
    """Looks at a study now and then, and tells what has changed.

    Args:
        study: The study.
        space: What is searched.
        total: Trials that the study is to have.
        logger: A logger of Lightning, or None.
        say: Called with each line.

    """

    def __init__(
        self,
        study: optuna.Study,
        space: PatternSpace,
        total: int,
        logger: Logger | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        self._study = study
        self._space = space
        self._total = total
        self._logger = logger
        self._say = say
        self._done = -1
        self._failed: set[int] = set()
        self._distinct: dict[int, tuple[Any, ...]] = {}
        self._began = time.perf_counter()

    def __call__(self) -> None:
        """Look, and tell."""
        trials = self._study.get_trials(deepcopy=False)
        for trial in trials:
            if trial.state == TrialState.FAIL and "error" in trial.user_attrs and trial.number not in self._failed:
                self._failed.add(trial.number)
                self._say(f"trial {trial.number} failed: {trial.user_attrs['error']}")
        done = [trial for trial in trials if trial.state in LEARNED_FROM and trial.value is not None]
        if len(done) == self._done:
            return
        self._done = len(done)
        numbers = self._numbers(done, sum(trial.state == TrialState.RUNNING for trial in trials))
        self._say(self._line(numbers))
        self._study.set_user_attr("progress", numbers)
        if self._logger is not None:
            self._logger.log_metrics({f"search/{name}": value for name, value in numbers.items()}, step=len(done))

    def _numbers(self, done: list[optuna.trial.FrozenTrial], running: int) -> dict[str, float]:
        numbers: dict[str, float] = {"done": len(done), "running": running}
        diverged = sum("diverged" in trial.user_attrs for trial in done)
        if diverged:
            numbers["diverged"] = diverged
        if done:
            rewards = [float(trial.value or 0.0) for trial in done]
            if diverged < len(done):
                numbers["best"] = float(best_of(done).value or 0.0)
            numbers["mean_of_last_tenth"] = statistics.fmean(rewards[-max(1, math.ceil(len(rewards) / 10)) :])
            for trial in done:
                if trial.number not in self._distinct:
                    choices = [token.values.index(trial.params[token.name]) for token in self._space.tokens]
                    self._distinct[trial.number] = self._space.distinct(choices)
            numbers["distinct_patterns"] = len(set(self._distinct.values()))
            policy = [trial.user_attrs["policy"] for trial in done if "policy" in trial.user_attrs]
            numbers |= policy[-1] if policy else {}
        return numbers

    def _line(self, numbers: dict[str, float]) -> str:
        seconds = time.perf_counter() - self._began
        parts = [f"{numbers['done']:.0f}/{self._total} trials", f"{numbers['running']:.0f} running"]
        words = {
            "diverged": "{:.0f} diverged",
            "best": "best {:.4f}",
            "mean_of_last_tenth": "last tenth {:.4f}",
            "entropy": "entropy {:.3f}",
            "effective_sample_size": "effective samples {:.1f}",
            "distinct_patterns": "{:.0f} distinct",
        }
        parts += [text.format(numbers[name]) for name, text in words.items() if name in numbers]
        return f"[{seconds:5.0f} s] {', '.join(parts)}"
