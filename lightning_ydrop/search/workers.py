"""A worker: it runs one trial after another, and runs again what a worker that died has left."""

import contextlib
import math
import os
import socket
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from lightning_ydrop.checks import check_count, check_number
from lightning_ydrop.errors import ConfigurationError
from lightning_ydrop.search.claims import Claims

# Trains with what a trial suggests, in a folder that a trial keeps where it is run again, and gives its value.
Objective = Callable[[optuna.Trial, Path], float]
# The longest error that a trial keeps, in characters.
LONGEST_ERROR = 2000


class TrialError(RuntimeError):
    """Fails a trial with a message of the objective's own."""


def work(
    study: optuna.Study,
    objective: Objective,
    claims: Claims,
    *,
    folder: str | Path,
    total: int | None,
    draw: bool = True,
    max_failures: int | None = 3,
    max_retries: int = 20,
    nan_value: float | None = None,
    poll_seconds: float = 1.0,
    after_trial: Callable[[optuna.Study, FrozenTrial], None] | None = None,
) -> None:
    """Run trials, until the study has as many finished ones as it is to have.

    Any number of workers may do so on one study. Each starts a trial only if it and those that are running are not more
    than `total`, and stays until none is missing: a trial whose worker dies meanwhile is run by another, with the same
    draw and in the same folder.

    A trial has user attributes: `claimed`, its worker; `draw`, what the sampler tells of its draw, if it has a method
    `drawn(number)`; `error`, of one that failed; `retry_of`, the number of the trial that it runs again.

    Args:
        study: The study.
        objective: Gives the value of a trial. It may raise `optuna.TrialPruned`; any other exception fails the trial.
        claims: Of this worker and this study, by `open_claims`.
        folder: Where each trial has a folder of its own, named after its number, or after the number of the trial that
            it runs again. The objective creates it, where it needs one.
        total: How many trials the study is to have that are complete or pruned; None for no end.
        draw: Whether the sampler draws trials once none is queued. False runs the queue alone.
        max_failures: After how many failures in a row this worker stops; None for never.
        max_retries: How often a trial is run again whose worker dies each time, before it counts as failed.
        nan_value: The value of a trial whose objective gives NaN; None fails the trial.
        poll_seconds: How long a worker waits that has nothing to run while others still run theirs.
        after_trial: Called with the study and each trial that this worker has finished.

    Raises:
        ConfigurationError: If so many trials failed in a row, or an argument is none.

    """
    _check(total, max_failures, max_retries, poll_seconds)
    failures = 0
    while True:
        trial = _next_trial(study, claims, total, draw, max_retries)
        if trial == "none":
            return
        if trial == "wait":
            time.sleep(poll_seconds)
            continue
        try:
            place = Path(folder) / f"trial-{original_of(study, trial.number)}"
            ended = _run(study, trial, objective, place, nan_value)
        finally:
            claims.release(trial.number)
        if after_trial is not None:
            after_trial(study, ended)
        error = ended.user_attrs.get("error")
        failures = 0 if error is None else failures + 1
        if failures == max_failures:
            raise ConfigurationError(
                f"{failures} trial(s) failed in a row, the last of them, trial {ended.number}, with: {error}",
                "A worker then stops. What is finished is kept.",
                "Mend the cause and start again.",
            )


def queue_trials(
    study: optuna.Study,
    claims: Claims,
    trials: Mapping[str, Mapping[str, Any]],
    *,
    again: bool = False,
    at_most: int | None = None,
) -> None:
    """Queue trials with given parameters, each under a name, as far as no worker has queued or started them.

    The name is the user attribute `name` of the trial.

    Args:
        study: The study.
        claims: Of this study.
        trials: Parameters by name.
        again: Whether those are queued again that are complete.
        at_most: How many may be in the queue; None for no limit.

    """
    there = (TrialState.WAITING, TrialState.RUNNING, *(() if again else (TrialState.COMPLETE, TrialState.PRUNED)))
    with claims.deciding():
        known = study.get_trials(deepcopy=False, states=there)
        names = {trial.user_attrs.get("name") for trial in known}
        queued = sum(trial.state == TrialState.WAITING for trial in known)
        for name, params in trials.items():
            if name in names or (at_most is not None and queued >= at_most):
                continue
            study.enqueue_trial(dict(params), {"name": name})
            queued += 1


def requeue(study: optuna.Study, claims: Claims, max_retries: int = 20) -> None:
    """Fail trials whose worker died, and queue them again. Call it only while deciding.

    A worker that is killed between the two leaves a failed trial without an error: the next one queues it again.

    Args:
        study: The study.
        claims: Of this study.
        max_retries: How often a trial is run again.

    """
    for number in _dead_trials(study, claims):
        with contextlib.suppress(ValueError, UpdateFinishedTrialError):  # it was finished in the meantime
            study.tell(number, state=TrialState.FAIL)
    trials = study.get_trials(deepcopy=False)
    queued_again = {trial.user_attrs.get("retry_of") for trial in trials}
    for trial in trials:
        if trial.state != TrialState.FAIL or "error" in trial.user_attrs or trial.number in queued_again:
            continue
        params = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
        kept = {name: value for name, value in trial.user_attrs.items() if name != "claimed"}
        has_drawn = bool(params or kept)  # or it has nothing that a new trial would not have
        if has_drawn and len(_retried(trials, trial.number)) < max_retries:
            study.enqueue_trial(params, {**kept, "retry_of": trial.number})


def original_of(study: optuna.Study, number: int) -> int:
    """Find the number of the trial that a trial runs again, or its own."""
    return [number, *_retried(study.get_trials(deepcopy=False), number)][-1]


def _retried(trials: list[FrozenTrial], number: int) -> list[int]:
    """Follow `retry_of`: the numbers of the trials that a trial runs again, the latest first."""
    numbers: list[int] = []
    while (number := trials[number].user_attrs.get("retry_of", -1)) >= 0:
        numbers.append(number)
    return numbers


def _next_trial(
    study: optuna.Study, claims: Claims, total: int | None, draw: bool, max_retries: int
) -> optuna.Trial | Literal["wait", "none"]:
    """Start the next trial, if there is one to start."""
    with claims.deciding():
        requeue(study, claims, max_retries)
        states = Counter(trial.state for trial in study.get_trials(deepcopy=False))
        finished, running = states[TrialState.COMPLETE] + states[TrialState.PRUNED], states[TrialState.RUNNING]
        if total is not None and finished >= total:
            return "none"
        if (total is not None and finished + running >= total) or not (draw or states[TrialState.WAITING]):
            return "wait" if running else "none"
        trial = study.ask()
        claims.take(trial.number)
        trial.set_user_attr("claimed", f"{socket.gethostname()}, process {os.getpid()}")
        drawn = getattr(study.sampler, "drawn", None)
        if drawn is not None and "draw" not in trial.user_attrs:
            trial.set_user_attr("draw", drawn(trial.number))
        return trial


def _dead_trials(study: optuna.Study, claims: Claims) -> list[int]:
    """Find running trials whose worker died, by number."""
    running = (TrialState.RUNNING,)
    numbers = [trial.number for trial in study.get_trials(deepcopy=False, states=running)]
    unclaimed = {number for number in numbers if not claims.is_held(number)}
    if not unclaimed:
        return []
    # A worker tells before it gives its claim back: a trial that was finished in the meantime is running no more.
    return [trial.number for trial in study.get_trials(deepcopy=False, states=running) if trial.number in unclaimed]


def _run(
    study: optuna.Study, trial: optuna.Trial, objective: Objective, folder: Path, nan_value: float | None
) -> FrozenTrial:
    """Run one trial, and tell how it ended."""
    value, state, error = None, TrialState.COMPLETE, None
    try:
        value = float(objective(trial, folder))
        if math.isnan(value) and nan_value is not None:
            value = nan_value
        if math.isnan(value):
            raise TrialError("The objective gave NaN; pass nan_value, a low value, for trials that diverge.")
    except optuna.TrialPruned:
        state = TrialState.PRUNED
    except Exception as raised:
        value, state, error = None, TrialState.FAIL, _text_of(raised)
    try:
        if error is not None:
            trial.set_user_attr("error", error)
        study.tell(trial, value, state)
    except (ValueError, UpdateFinishedTrialError):
        # Another worker took this one for dead, whose connection had broken: its result is not wanted any more.
        if study.get_trials(deepcopy=False)[trial.number].state != TrialState.FAIL:
            raise
    return study.get_trials(deepcopy=False)[trial.number]


def _text_of(error: Exception) -> str:
    if isinstance(error, TrialError):
        return str(error)
    frame = traceback.extract_tb(error.__traceback__)[-1]
    text = f"{type(error).__name__}: {error} ({frame.filename}, line {frame.lineno})"
    return text if len(text) <= LONGEST_ERROR else f"{text[:LONGEST_ERROR]} ..."


def _check(total: int | None, max_failures: int | None, max_retries: int, poll_seconds: float) -> None:
    if total is not None:
        check_count("work", "total", total, minimum=0, example=100)
    if max_failures is not None:
        check_count("work", "max_failures", max_failures, minimum=1, example=3)
    check_count("work", "max_retries", max_retries, minimum=0, example=20)
    check_number("work", "poll_seconds", poll_seconds, example=1.0, positive=True)
