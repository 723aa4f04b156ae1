"""Workers with an objective that takes no time, which can be killed, and what must hold of their study."""

import multiprocessing
import os
import random
import signal
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

import optuna
import psycopg  # noqa: F401
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from lightning_ydrop.search.storage import open_claims, open_study
from lightning_ydrop.search.workers import original_of, work

# What a database takes is imported when the first one is opened: here, and not by each worker.
optuna.storages.RDBStorage("sqlite://").engine.dispose()
STUDY = "crew"
SPACE: dict[str, BaseDistribution] = {"x": FloatDistribution(0, 1), "y": FloatDistribution(0, 1)}
# Where a worker can be told to kill itself, the first time that it gets there.
PLACES = ("ask", "claim", "draw", "suggest", "train", "tell", "told", "requeue")


class Numbered(BaseSampler):
    """A sampler whose draws are numbered, and each seeded by its number."""

    def __init__(self, kill_at: str | None = None) -> None:
        self._draws: dict[int, dict[str, Any]] = {}
        self._kill_at = kill_at

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        if self._kill_at == "ask":
            die()
        before = [each.user_attrs for each in study.get_trials(deepcopy=False) if each.number < trial.number]
        index = sum("draw" in each and "retry_of" not in each for each in before)
        self._draws[trial.number] = trial.user_attrs.get("draw") or {"index": index, "params": params_of(index)}

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return SPACE

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return dict(self._draws[trial.number]["params"])

    def sample_independent(self, *args: Any) -> Any:
        raise AssertionError("all is drawn at once")

    def drawn(self, number: int) -> dict[str, Any]:
        if self._kill_at == "draw":
            die()
        return self._draws[number]


def params_of(index: int) -> dict[str, float]:
    generator = random.Random(index)
    return {name: generator.random() for name in SPACE}


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def record(*words: object) -> None:
    """Append a line to the record of all runs, whole, whatever other processes write."""
    descriptor = os.open(os.environ["RECORD"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, (" ".join(map(str, words)) + "\n").encode())
    os.close(descriptor)


def be_worker(storage: str, total: int, kill_at: str | None = None, seconds: float = 0.02) -> None:
    """Work until the study is complete, or until the place where this one kills itself."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = open_study(storage, STUDY, sampler=Numbered(kill_at), workers=2)
    claims = open_claims(storage, STUDY)

    def objective(trial: optuna.Trial, folder: Path) -> float:
        original = original_of(study, trial.number)
        record("start", original, trial.number, os.getpid())
        x = trial.suggest_float("x", 0, 1)
        if kill_at == "suggest":
            die()
        y = trial.suggest_float("y", 0, 1)
        time.sleep(seconds * random.random())
        if kill_at == "train":
            die()
        record("end", original, trial.number, os.getpid())
        return x + y

    tell, enqueue, take = study.tell, study.enqueue_trial, claims.take

    def told(*args: Any, **kwargs: Any) -> FrozenTrial:
        if kill_at == "tell":
            die()
        done = tell(*args, **kwargs)
        if kill_at == "told":
            die()
        return done

    study.tell = told  # type: ignore[method-assign]
    study.enqueue_trial = (lambda *_, **__: die()) if kill_at == "requeue" else enqueue  # type: ignore[method-assign]
    claims.take = (lambda number: die()) if kill_at == "claim" else take  # type: ignore[method-assign]
    work(study, objective, claims, folder="trials", total=total, poll_seconds=0.02)
    claims.close()


def in_folder(folder: str, path: str, *args: Any) -> None:
    os.environ["RECORD"] = path
    os.makedirs(folder, exist_ok=True)
    os.chdir(folder)
    be_worker(*args)


class Crew:
    """Starts workers, kills them, and knows which it has killed.

    Args:
        storage: Where their study is; a path is one in the present folder.
        folders: Working folders, which workers are given in turn.

    """

    def __init__(self, storage: str, folders: Sequence[str] = (".",)) -> None:
        self.storage = storage if "://" in storage else str(Path(storage).absolute())
        self.folders = [str(Path(folder).absolute()) for folder in folders]
        self.record = Path("record").absolute()
        self.processes: list[BaseProcess] = []
        self.killed: set[int] = set()
        # It has imported everything: a worker starts in no time.
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["tests.search.crew"])
        with mock.patch.dict(os.environ, PYTHONPATH=str(Path(__file__).parents[2])):
            forkserver.ensure_running()

    def start(self, total: int, kill_at: str | None = None) -> BaseProcess:
        folder = self.folders[len(self.processes) % len(self.folders)]
        arguments = (folder, str(self.record), self.storage, total, kill_at)
        process = self._context.Process(target=in_folder, args=arguments)
        process.start()
        self.processes.append(process)
        return process

    def kill(self, process: BaseProcess) -> None:
        process.kill()
        self.wait(process)

    def wait(self, *processes: BaseProcess) -> None:
        for process in processes or self.processes:
            process.join(120)
            assert process.exitcode in (0, -signal.SIGKILL)
            if process.exitcode:
                assert process.pid is not None
                self.killed.add(process.pid)

    def check(self, total: int) -> None:
        """Nothing is lost, and nothing ran twice."""
        trials = open_study(self.storage, STUDY).get_trials()
        states = Counter(trial.state for trial in trials)
        assert states[TrialState.COMPLETE] == total
        assert not states[TrialState.RUNNING]
        assert not states[TrialState.WAITING]
        complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
        # Each draw was told once, with the parameters that were drawn.
        assert sorted(trial.user_attrs["draw"]["index"] for trial in complete) == list(range(total))
        for trial in complete:
            assert trial.params == params_of(trial.user_attrs["draw"]["index"])
            assert trial.value == sum(trial.params.values())
        # A trial was run again only where its worker was killed.
        runs = defaultdict(list)
        for line in self.record.read_text().splitlines():
            event, original, _, pid = line.split()
            if event == "start":
                runs[int(original)].append(int(pid))
        assert len(runs) == total
        for pids in runs.values():
            assert set(pids[:-1]) <= self.killed
            assert len(set(pids)) == len(pids)
