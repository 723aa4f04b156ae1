"""Train arms with seeds, in workers that share a study, and keep a record of each training."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState

from lightning_ydrop.layers.patterns import Pattern
from lightning_ydrop.search.files import as_patterns, as_plain
from lightning_ydrop.search.processes import start_workers
from lightning_ydrop.search.storage import open_claims, open_study
from lightning_ydrop.search.training import SearchCLI, Training
from lightning_ydrop.search.workers import queue_trials, work


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


def train_arms(
    config: Path, arms: Sequence[Arm], seeds: Sequence[int], storage: str, name: str, workers: int
) -> list[dict[str, Any]]:
    """Train each arm with each seed. Started again, it goes on.

    Args:
        config: Of network and data, as a search takes it.
        arms: What is trained. The same name has the same arm, whenever it is trained.
        seeds: Of weights, batches and masks.
        storage: A journal file or a database.
        name: Name of the study that the trainings are trials of.
        workers: Processes.

    Returns:
        A record of each training: arm, seed, the metrics of the last validation and of the test.

    """
    study = open_study(storage, name, direction="maximize", workers=workers)
    for arm in arms:
        kept = study.user_attrs.get(f"arm {arm.name}")
        if kept not in (None, json.loads(json.dumps(arm.as_json()))):
            raise SystemExit(f"{name} has trained another {arm.name}: {kept}")
        study.set_user_attr(f"arm {arm.name}", arm.as_json())
    claims = open_claims(storage, name)
    queue_trials(study, claims, {f"{arm.name} | {seed}": {} for seed in seeds for arm in arms})
    claims.close()
    start_workers(workers, be_worker, str(config), storage, name)
    wanted = {f"{arm.name} | {seed}" for seed in seeds for arm in arms}
    return [record for record in records_of(study) if f"{record['arm']} | {record['seed']}" in wanted]


def records_of(study: optuna.Study) -> list[dict[str, Any]]:
    """List what the trainings of a study reached."""
    records = []
    for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        arm, _, seed = trial.user_attrs["name"].rpartition(" | ")
        records.append({"arm": arm, "seed": int(seed), **trial.user_attrs["reached"]})
    return sorted(records, key=lambda record: (record["arm"], record["seed"]))


def be_worker(config: str, storage: str, name: str) -> None:
    """Be one worker."""
    study, claims = open_study(storage, name, direction="maximize"), open_claims(storage, name)

    def objective(trial: optuna.Trial, folder: Path) -> float:
        arm, _, seed = trial.user_attrs["name"].rpartition(" | ")
        content = trial.study.user_attrs[f"arm {arm}"]
        training = Training(SearchCLI(["--config", config, *content["args"]]))
        # Seeds of searches are made of small numbers too: these are others.
        outcome = training(as_patterns("train_arms", content["patterns"]), 10_000 + int(seed), folder)
        trial.set_user_attr("reached", {**outcome.metrics, **training.test()})
        return outcome.reward

    work(study, objective, claims, folder=f"{storage}.folders/{name}", total=None, draw=False, max_failures=None)
    claims.close()
