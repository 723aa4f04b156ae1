"""Workers on one storage: each trial runs once, whatever is killed when."""

import math
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.samplers import RandomSampler
from optuna.trial import FrozenTrial, TrialState

from lightning_ydrop.errors import ConfigurationError
from lightning_ydrop.search.claims import Claims
from lightning_ydrop.search.storage import open_claims, open_study
from lightning_ydrop.search.workers import TrialError, original_of, queue_trials, requeue, work
from tests.search.crew import PLACES, STUDY, Crew, Numbered, params_of
from tests.search.server import Server

Start = Callable[..., tuple[optuna.Study, Claims]]


@pytest.fixture(autouse=True)
def _quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)


@pytest.fixture
def study() -> optuna.Study:
    return open_study("study.journal", STUDY, sampler=RandomSampler(seed=0))


@pytest.fixture
def claims() -> Claims:
    return open_claims("study.journal", STUDY)


def states(study: optuna.Study) -> list[str]:
    return [trial.state.name for trial in study.get_trials()]


@pytest.mark.parametrize("count", [2, 4])
def test_workers_run_no_trial_twice_and_stop_at_the_total(count: int, storage: str) -> None:
    crew = Crew(storage)
    for _ in range(count):
        crew.start(25)
    crew.wait()
    assert not crew.killed
    crew.check(25)
    at_work = {line.split()[-1] for line in crew.record.read_text().splitlines()}
    assert len(at_work) > 1  # a late one may find nothing left


@pytest.mark.parametrize("place", PLACES)
def test_a_worker_that_is_killed_loses_nothing(place: str, storage: str) -> None:
    crew = Crew(storage)
    if place == "requeue":  # there has to be something to queue again
        crew.wait(crew.start(6, "train"))
    crew.wait(crew.start(6, place))
    assert len(crew.killed) == len(crew.processes)
    crew.wait(crew.start(6), crew.start(6))
    assert len(crew.killed) == len(crew.processes) - 2
    crew.check(6)


def kill_at_random(crew: Crew, kills: int, total: int, seed: int) -> None:
    generator = random.Random(seed)
    running = [crew.start(total), crew.start(total)]
    for _ in range(kills):
        time.sleep(0.15 * generator.random())
        process = running.pop(generator.randrange(2))
        crew.kill(process)
        running.append(crew.start(total))
    crew.wait()


def test_workers_are_killed_at_random(storage: str) -> None:
    crew = Crew(storage)
    kill_at_random(crew, kills=5, total=30, seed=0)
    assert len(crew.killed) >= 2  # the others may have been told that nothing is left
    crew.check(30)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_workers_are_killed_at_random_twenty_times(seed: int, storage: str) -> None:
    crew = Crew(storage)
    kill_at_random(crew, kills=20, total=300, seed=seed)
    assert len(crew.killed) == 20
    crew.check(300)


def test_groups_of_workers_share_a_database_and_no_folder(server: Server) -> None:
    crew = Crew(server.database(), folders=("here", "there"))
    kill_at_random(crew, kills=4, total=30, seed=1)
    crew.wait(crew.start(40), crew.start(40))
    crew.check(40)
    assert not list(Path().glob("**/*.claims"))


def test_a_study_that_is_stopped_goes_on_as_if_it_had_not_been(storage: str) -> None:
    crew = Crew(storage)
    for place in ("suggest", "tell", "ask", "told"):
        crew.wait(crew.start(8, place))
    crew.wait(crew.start(8))
    crew.check(8)
    trials = open_study(storage, STUDY).get_trials(states=(TrialState.COMPLETE,))
    assert [trial.params for trial in trials] == [params_of(index) for index in range(8)]


def test_a_trial_goes_on_in_the_folder_that_it_had(study: optuna.Study, claims: Claims) -> None:
    class Killed(BaseException):
        pass

    folders = []

    def objective(trial: optuna.Trial, folder: Path) -> float:
        folders.append(folder)
        trial.suggest_float("x", 0, 1)
        folder.mkdir(parents=True, exist_ok=True)
        step = len(list(folder.iterdir()))
        (folder / f"{step}.ckpt").touch()
        if trial.number == 0 or (trial.number > 0 and step == 1):
            raise Killed
        return float(step)

    for _ in range(2):
        with pytest.raises(Killed):
            work(study, objective, claims, folder="trials", total=1)
    work(study, objective, claims, folder="trials", total=1)
    assert folders == [Path("trials/trial-0")] * 3
    assert states(study) == ["FAIL", "FAIL", "COMPLETE"]
    assert [trial.user_attrs.get("retry_of") for trial in study.trials] == [None, 0, 1]
    assert original_of(study, 2) == 0
    assert study.trials[2].value == 2
    assert len({trial.params["x"] for trial in study.trials}) == 1


def test_a_trial_that_kills_each_worker_fails_in_the_end(study: optuna.Study, claims: Claims) -> None:
    study.enqueue_trial({"x": 0.5})

    def objective(trial: optuna.Trial, folder: Path) -> float:
        if trial.suggest_float("x", 0, 1) == 0.5:
            raise KeyboardInterrupt
        return 1.0

    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            work(study, objective, claims, folder="trials", total=1, max_retries=2)
    work(study, objective, claims, folder="trials", total=1, max_retries=2)
    assert states(study) == ["FAIL", "FAIL", "FAIL", "COMPLETE"]
    assert study.trials[3].params["x"] != 0.5


def test_a_trial_that_raises_keeps_its_error(study: optuna.Study, claims: Claims) -> None:
    def objective(trial: optuna.Trial, folder: Path) -> float:
        if trial.number == 0:
            raise RuntimeError("out of memory")
        if trial.number == 1:
            raise TrialError("the pattern is larger than the map")
        if trial.number == 2:
            raise optuna.TrialPruned
        return math.nan if trial.number == 3 else 1.0

    ended: list[FrozenTrial] = []
    work(
        study,
        objective,
        claims,
        folder="trials",
        total=2,
        after_trial=lambda _, trial: ended.append(trial),
    )
    assert states(study) == ["FAIL", "FAIL", "PRUNED", "FAIL", "COMPLETE"]
    assert [trial.number for trial in ended] == [0, 1, 2, 3, 4]
    errors = [trial.user_attrs.get("error", "") for trial in study.trials]
    assert errors[0].startswith(f"RuntimeError: out of memory ({__file__}, line")
    assert errors[1] == "the pattern is larger than the map"
    assert "nan_value" in errors[3]
    assert errors[2] == errors[4] == ""


def test_trials_that_diverge_are_given_a_value(study: optuna.Study, claims: Claims) -> None:
    work(study, lambda *_: math.nan, claims, folder="trials", total=2, nan_value=0.1)
    assert [trial.value for trial in study.trials] == [0.1, 0.1]


def test_a_worker_stops_after_failures_in_a_row(study: optuna.Study, claims: Claims) -> None:
    def objective(trial: optuna.Trial, folder: Path) -> float:
        if trial.number != 1:
            raise ValueError(f"no {trial.number}")
        return 1.0

    with pytest.raises(ConfigurationError) as raised:
        work(study, objective, claims, folder="trials", total=10, max_failures=2)
    assert str(raised.value).startswith(
        "2 trial(s) failed in a row, the last of them, trial 3, with: ValueError: no 3 (" + __file__
    )
    assert str(raised.value).endswith("A worker then stops. What is finished is kept. Mend the cause and start again.")
    assert states(study) == ["FAIL", "COMPLETE", "FAIL", "FAIL"]


def test_failures_stop_no_worker_that_is_told_to_go_on(study: optuna.Study, claims: Claims) -> None:
    def objective(trial: optuna.Trial, folder: Path) -> float:
        if trial.number < 8:
            raise ValueError
        return 1.0

    work(study, objective, claims, folder="trials", total=1, max_failures=None)
    assert len(study.trials) == 9


def test_failed_trials_are_not_run_again(study: optuna.Study, claims: Claims) -> None:
    study.enqueue_trial({"x": 0.5}, {"name": "one"})

    def objective(trial: optuna.Trial, folder: Path) -> float:
        trial.suggest_float("x", 0, 1)
        raise ValueError

    for _ in range(2):
        work(study, objective, claims, folder="trials", total=None, draw=False)
    assert states(study) == ["FAIL"]


def test_the_queue_runs_alone(study: optuna.Study, claims: Claims) -> None:
    queue_trials(study, claims, {name: {"x": float(place)} for place, name in enumerate("abc")})
    queue_trials(study, claims, {"b": {"x": 1.0}, "d": {"x": 3.0}}, at_most=3)  # there are three
    ran: list[tuple[str, float]] = []

    def objective(trial: optuna.Trial, folder: Path) -> float:
        ran.append((trial.user_attrs["name"], trial.suggest_float("x", 0, 3)))
        return 1.0

    work(study, objective, claims, folder="trials", total=2, draw=False)
    assert ran == [("a", 0.0), ("b", 1.0)]
    work(study, objective, claims, folder="trials", total=None, draw=False)
    queue_trials(study, claims, {"b": {"x": 1.0}, "d": {"x": 3.0}})  # of which the first is done
    queue_trials(study, claims, {"c": {"x": 1.5}}, again=True)
    work(study, objective, claims, folder="trials", total=None, draw=False)
    assert ran[2:] == [("c", 2.0), ("d", 3.0), ("c", 1.5)]


def test_what_others_run_is_not_touched_and_waited_for(study: optuna.Study, claims: Claims) -> None:
    other = open_claims("study.journal", STUDY)
    with other.deciding():
        running = study.ask()
        other.take(running.number)
    polls = []

    def ran(trial: optuna.Trial, folder: Path) -> float:
        return 1.0

    def slept(seconds: float) -> None:
        polls.append(seconds)
        if len(polls) == 3:
            study.tell(running, 2.0)
            other.release(running.number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "sleep", slept)
        work(study, ran, claims, folder="trials", total=2, poll_seconds=0.5)
    assert [trial.value for trial in study.trials] == [2.0, 1.0]
    assert polls[:3] == [0.5] * 3


def test_a_trial_that_was_taken_for_dead_is_told_no_more(study: optuna.Study, claims: Claims) -> None:
    def objective(trial: optuna.Trial, folder: Path) -> float:
        trial.suggest_float("x", 0, 1)
        if trial.number == 0:
            study.tell(0, state=TrialState.FAIL)  # as another worker does once a connection has broken
        return 1.0

    work(study, objective, claims, folder="trials", total=1)
    assert states(study) == ["FAIL", "COMPLETE"]
    assert study.trials[1].user_attrs["retry_of"] == 0


def test_a_worker_goes_on_whose_connection_broke(server: Server) -> None:
    url = server.database()
    study, claims = open_study(url, STUDY), open_claims(url, STUDY)

    def objective(trial: optuna.Trial, folder: Path) -> float:
        trial.suggest_float("x", 0, 1)
        if trial.number < 2:
            server.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname LIKE 'study%'")
        if trial.number == 0:
            other = open_claims(url, STUDY)
            with other.deciding():
                requeue(study, other)
            other.close()
        return 1.0

    work(study, objective, claims, folder="trials", total=3)
    claims.close()
    assert states(study) == ["FAIL", "COMPLETE", "COMPLETE", "COMPLETE"]
    assert study.trials[1].user_attrs["retry_of"] == 0


def test_the_draw_is_kept_with_the_trial(study: optuna.Study, claims: Claims) -> None:
    study.sampler = Numbered()

    def objective(trial: optuna.Trial, folder: Path) -> float:
        assert trial.user_attrs["draw"]["index"] == trial.number
        assert "process" in trial.user_attrs["claimed"]
        return trial.suggest_float("x", 0, 1)

    work(study, objective, claims, folder="trials", total=3)
    assert [trial.params["x"] for trial in study.trials] == [params_of(index)["x"] for index in range(3)]


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ({"total": -1}, "work(total=-1) was given."),
        ({"max_failures": 0}, "work(max_failures=0) was given."),
        ({"max_retries": 1.5}, "work(max_retries=1.5) was given."),
        ({"poll_seconds": 0}, "work(poll_seconds=0) was given."),
    ],
)
def test_bad_arguments_are_refused(argument: dict[str, Any], says: str, study: optuna.Study, claims: Claims) -> None:
    with pytest.raises(ConfigurationError) as raised:
        work(study, lambda *_: 1.0, claims, **{"folder": "trials", "total": 1, **argument})
    assert str(raised.value).startswith(says)
