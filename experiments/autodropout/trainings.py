"""Train arms with seeds, in workers that share a study, and keep a record of each training."""

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from examples.paper.pool import Pool, complete
from lightning_ydrop.layers.patterns import Pattern
from lightning_ydrop.search.cli import SearchCLI
from lightning_ydrop.search.files import as_patterns, as_plain
from lightning_ydrop.search.training import Training

HERE = Path(__file__).parent
TASKS = sorted(path.stem for path in HERE.glob("*.yaml"))


@dataclass(frozen=True)
class Arm:
    """What is trained.

    Attributes:
        name: What figures call it.
        patterns: By place; none by default.
        args: Arguments of the search's command line that differ from the configuration's.

    """

    name: str
    patterns: dict[str, Pattern] = field(default_factory=dict)
    args: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Write it for the storage."""
        return {"name": self.name, "patterns": as_plain(self.patterns), "args": list(self.args)}


@dataclass(frozen=True)
class Bench:
    """Where arms are trained.

    Attributes:
        task: Name of a configuration in this folder.
        folder: Of the journal of all trainings, and of those of the searches.
        workers: Processes.
        where: Arguments of the search's command line that say where data lies, such as `--data.root=data`.

    """

    task: str
    folder: Path
    workers: int = 1
    where: tuple[str, ...] = ()

    @property
    def storage(self) -> str:
        """The journal of the trainings."""
        return str(self.folder / "arms.journal")

    def training(self, args: Sequence[str] = ()) -> Training:
        """Read the configuration, with arguments of the search's command line."""
        return Training(SearchCLI(["--config", str(HERE / f"{self.task}.yaml"), *self.where, *args]))

    def train(self, stage: str, arms: Sequence[Arm], seeds: Sequence[int]) -> list[dict[str, Any]]:
        """Train each arm with each seed. Started again, it goes on.

        Args:
            stage: What the trainings are for: with the task, the name of their study.
            arms: What is trained. In a stage, one name stands for one arm.
            seeds: Of weights, batches and masks.

        Returns:
            A record of each training: stage, arm, seed, the metrics of the last validation and of the test.

        """
        pool = Pool(self.storage, f"{self.task} {stage}", self.workers, "maximize")
        study = pool.study()
        for arm in arms:
            kept = study.user_attrs.get(f"arm {arm.name}")
            if kept not in (None, json.loads(json.dumps(arm.as_json()))):
                raise SystemExit(f"{pool.study_name} has trained another {arm.name}: {kept}")
            study.set_user_attr(f"arm {arm.name}", arm.as_json())
        trials: dict[str, dict[str, Any]] = {f"{arm.name} | {seed}": {} for seed in seeds for arm in arms}
        folder = f"{self.storage}.folders/{pool.study_name}"
        latest = pool.run(partial(reward_of, self), trials, folder=folder, unit="training")
        done = complete(latest)
        if len(done) < len(trials):
            missing = len(trials) - len(done)
            raise SystemExit(f"{pool.study_name}: {missing} of {len(trials)} trainings failed; start again.")
        return [{"stage": stage, **record} for record in _records_of(done.values())]


def bench_of(parser: argparse.ArgumentParser) -> tuple[Bench, argparse.Namespace]:
    """Read the command line of an experiment."""
    parser.add_argument("--task", required=True, choices=TASKS)
    parser.add_argument("--folder", required=True, type=Path, help="of journals")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--data.root", dest="root", help="folder of the data, for the tasks that need it")
    known = parser.parse_args()
    known.folder.mkdir(parents=True, exist_ok=True)
    where = () if known.root is None else (f"--data.root={known.root}",)
    return Bench(known.task, known.folder, known.workers, where), known


def write_records(task: str, kind: str, records: Sequence[dict[str, Any]]) -> None:
    """Write records beside this file, a line each."""
    (HERE / "records").mkdir(exist_ok=True)
    lines = [json.dumps(record) for record in records]
    (HERE / "records" / f"{task}_{kind}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_records(task: str, kind: str) -> list[dict[str, Any]]:
    """Read what `write_records` wrote; nothing before it wrote anything."""
    path = HERE / "records" / f"{task}_{kind}.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def reward_of(bench: Bench, trial: optuna.Trial, folder: Path) -> float:
    """Train the arm and the seed that a trial names, and give the reward."""
    arm, _, seed = trial.user_attrs["name"].rpartition(" | ")
    content = trial.study.user_attrs[f"arm {arm}"]
    training = bench.training(content["args"])
    # Seeds of searches are made of small numbers too: these are others.
    outcome = training(as_patterns("Bench.train", content["patterns"]), 10_000 + int(seed), folder)
    trial.set_user_attr("reached", {**outcome.metrics, **training.test()})
    return outcome.reward


def _records_of(trials: Iterable[FrozenTrial]) -> list[dict[str, Any]]:
    records = []
    for trial in trials:
        arm, _, seed = trial.user_attrs["name"].rpartition(" | ")
        reached = {name: round(value, 5) for name, value in trial.user_attrs["reached"].items()}
        records.append({"arm": arm, "seed": int(seed), **reached})
    return sorted(records, key=lambda record: (record["arm"], record["seed"]))
