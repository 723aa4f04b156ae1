"""Tune elasticity and annealing of an arm, over the sets that the paper names and by validation loss alone.

    python examples/paper/tune.py --row mnist_fc_1 --jobs 4 --set data.root=data

A trial is a run of run.py with a pair of the two. The study is Optuna's: started again, here or on another machine that
reaches the same --storage, it goes on with the pairs that are left, at most --trials of them. A study.md beside the
trials has the lowest validation loss of each pair.
"""

import argparse
import itertools
import math
import shlex
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from experiment import ROWS, YDROP_ARMS, Machine, Run, add_shared_arguments
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from tables import markdown

# Sec. 5, arXiv 2409.09088.
ELASTICITIES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
ANNEALING_EPOCHS = (1, 3, 5, 7, 9)
PAIRS = tuple(itertools.product(ELASTICITIES, ANNEALING_EPOCHS))


class Objective:
    """The lowest validation loss of a run, averaged over seeds."""

    def __init__(self, known: argparse.Namespace, folder: Path, machine: Machine) -> None:
        self.known = known
        self.folder = folder
        self.machine = machine

    def __call__(self, trial: optuna.Trial) -> float:
        """Train with the pair that the trial suggests."""
        elasticity = trial.suggest_categorical("elasticity", ELASTICITIES)
        annealing_epochs = trial.suggest_categorical("annealing_epochs", ANNEALING_EPOCHS)
        known = self.known
        pair = (f"ydrop.elasticity={elasticity}", f"ydrop.annealing_epochs={annealing_epochs}")
        losses = []
        for seed in known.seeds:
            # A folder for each trial: one that was interrupted on this machine may be going on elsewhere.
            run = Run(known.row, known.arm, seed, pair, tuple(known.set), self.folder / f"trial_{trial.number:03}")
            if failure := self.machine.run(run):
                raise RuntimeError(failure)
            assert run.result is not None
            losses.append(run.result["val_loss"])
        mean = statistics.fmean(losses)
        # Optuna takes none for a failure, which is tried again; a run that diverged would diverge again.
        return math.inf if math.isnan(mean) else mean


def pair_of(trial: optuna.trial.FrozenTrial) -> tuple[Any, Any]:
    """Take the pair of a trial, which has none where it failed before it was given one."""
    return trial.params.get("elasticity"), trial.params.get("annealing_epochs")


def losses_of(study: optuna.Study) -> dict[tuple[float, int], float]:
    """Find the lowest loss that each pair has reached, of those that are done."""
    lowest: dict[tuple[float, int], float] = {}
    for trial in study.get_trials(states=[TrialState.COMPLETE]):
        assert trial.value is not None
        lowest[pair_of(trial)] = min(trial.value, lowest.get(pair_of(trial), math.inf))
    return lowest


def table(study: optuna.Study) -> str:
    """Lay out the lowest losses, and the pair to choose."""
    lowest = losses_of(study)
    lines: list[list[object]] = [["elasticity \\ annealing epochs", *ANNEALING_EPOCHS]]
    for elasticity in ELASTICITIES:
        losses = [lowest.get((elasticity, epochs)) for epochs in ANNEALING_EPOCHS]
        lines.append([f"{elasticity:g}", *("" if loss is None else f"{loss:.4f}" for loss in losses)])
    row, arm = study.study_name.split()
    runs = study.user_attrs["runs"]
    command = ["python", "examples/paper/tune.py", "--row", row, "--arm", arm, "--seeds", *map(str, runs["seeds"])]
    command += ["--set", *runs["settings"]] if runs["settings"] else []
    return (
        f"# Tuning of {study.study_name}\n\n```sh\n{shlex.join(command)}\n```\n\n"
        f"Validation loss of {len(lowest)} pairs:\n\n{markdown(lines)}\n\n{chosen(lowest)}\n"
    )


def chosen(lowest: Mapping[tuple[float, int], float]) -> str:
    """Say which pair has the lowest loss."""
    if not lowest:
        return "No trial is done."
    elasticity, epochs = min(lowest, key=lowest.__getitem__)
    if math.isinf(lowest[elasticity, epochs]):
        return "All of them diverged: there is none to choose."
    return f"The lowest is that of `--set ydrop.elasticity={elasticity:g} ydrop.annealing_epochs={epochs}`."


def storage(text: str) -> BaseStorage | str:
    """Take the URL of a database, or the path of a file that processes and machines append to."""
    if "://" in text:
        return text
    Path(text).parent.mkdir(parents=True, exist_ok=True)
    return JournalStorage(JournalFileBackend(text))


def main(args: Sequence[str] | None = None) -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", required=True, choices=ROWS, help="network and data, a file of rows/")
    parser.add_argument("--arm", default="ydrop", choices=YDROP_ARMS, help="of examples/configs/, with a YDropCallback")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="a trial's loss is the mean over them")
    parser.add_argument("--trials", type=int, default=len(PAIRS), help="how many more to run")
    add_shared_arguments(parser)
    parser.add_argument("--out", type=Path, default=Path("runs/tune"), help="where the folders of trials are")
    parser.add_argument("--storage", help="a file or a database's URL; studies.journal in --out by default")
    known = parser.parse_args(args)
    folder = known.out / f"{known.row}_{known.arm}"
    study = optuna.create_study(
        study_name=f"{known.row} {known.arm}",
        storage=storage(known.storage or str(known.out / "studies.journal")),
        # The pairs in random order: a part of them is a random search.
        sampler=optuna.samplers.GridSampler({"elasticity": ELASTICITIES, "annealing_epochs": ANNEALING_EPOCHS}),
        load_if_exists=True,
    )
    identity = Run(known.row, known.arm, 0, (), tuple(known.set), folder).identity
    same = {"settings": identity["settings"], "seeds": known.seeds, "files": identity["files"]}
    if study.user_attrs.setdefault("runs", same) != same:
        raise SystemExit(
            f"The study has trials with {study.user_attrs['runs']}, and not {same}, where `files` stands for the "
            "content of the YAML files: name another --out, or --storage."
        )
    study.set_user_attr("runs", same)
    tune(study, known, folder)
    folder.mkdir(parents=True, exist_ok=True)  # where all trials were on other machines, there is none yet
    (folder / "study.md").write_text(table(study))
    print(f"\n{table(study)}")


def tune(study: optuna.Study, known: argparse.Namespace, folder: Path) -> None:
    """Try the pairs that are left, at most so many."""
    done = losses_of(study)
    left = [pair for pair in PAIRS if pair not in done]
    failed = {pair_of(trial) for trial in study.get_trials(states=[TrialState.FAIL])}
    for elasticity, annealing_epochs in failed.intersection(left):
        # The sampler takes what has failed for done.
        study.enqueue_trial({"elasticity": elasticity, "annealing_epochs": annealing_epochs})
    num_trials = min(known.trials, len(left))
    if num_trials == 0:
        return
    try:
        with Machine(known.jobs) as machine:
            objective = Objective(known, folder, machine)
            study.optimize(objective, n_trials=num_trials, n_jobs=known.jobs, show_progress_bar=True)
    except RuntimeError as failure:
        raise SystemExit(str(failure)) from None


if __name__ == "__main__":
    main()
