"""Tune elasticity and annealing of an arm, over the sets that the paper names and by validation loss alone.

    python -m examples.paper.tune --row mnist_fc_1 --jobs 4 --set data.root=data

A trial is a run of run.py with a pair of the two. The study is Optuna's: started again, here or on another machine that
reaches the same --storage, it goes on with the pairs that are left, at most --trials of them; machines that are at it
together share these. A study.md beside the trials has the lowest validation loss of each pair.
"""

import argparse
import itertools
import math
import random
import shlex
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState

from examples.paper.experiment import ROWS, YDROP_ARMS, Run, add_shared_arguments, carry_out, storage_of
from examples.paper.pool import Pool
from examples.paper.tables import markdown
from lightning_ydrop import ConfigurationError
from lightning_ydrop.search.workers import TrialError

# Sec. 5, arXiv 2409.09088.
ELASTICITIES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
ANNEALING_EPOCHS = (1, 3, 5, 7, 9)
PAIRS = tuple(itertools.product(ELASTICITIES, ANNEALING_EPOCHS))


def loss_of(known: argparse.Namespace, trial: optuna.Trial, folder: Path) -> float:
    """Train with the pair that a trial suggests, and average the lowest validation loss over seeds."""
    elasticity = trial.suggest_categorical("elasticity", ELASTICITIES)
    annealing_epochs = trial.suggest_categorical("annealing_epochs", ANNEALING_EPOCHS)
    pair = (f"ydrop.elasticity={elasticity}", f"ydrop.annealing_epochs={annealing_epochs}")
    losses = []
    for seed in known.seeds:
        run = Run(known.row, known.arm, seed, pair, tuple(known.set), folder)
        if failure := carry_out(run, waits="retry_of" in trial.user_attrs):
            raise TrialError(failure)
        assert run.result is not None
        losses.append(run.result["val_loss"])
    return statistics.fmean(losses)


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
    command = ["python", "-m", "examples.paper.tune", "--row", row, "--arm", arm, "--seeds", *map(str, runs["seeds"])]
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


def main(args: Sequence[str] | None = None) -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", required=True, choices=ROWS, help="network and data, a file of rows/")
    parser.add_argument("--arm", default="ydrop", choices=YDROP_ARMS, help="of examples/configs/, with a YDropCallback")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="a trial's loss is the mean over them")
    parser.add_argument("--trials", type=int, default=len(PAIRS), help="how many more to run")
    add_shared_arguments(parser)
    parser.add_argument("--out", type=Path, default=Path("runs/tune"), help="where the folders of trials are")
    known = parser.parse_args(args)
    pool = Pool(storage_of(known), f"{known.row} {known.arm}", known.jobs)
    try:
        study = pool.study()
    except ConfigurationError as error:
        raise SystemExit(str(error)) from None
    folder = folder_of(known)
    identity = Run(known.row, known.arm, 0, (), tuple(known.set), folder).identity
    same = {"settings": identity["settings"], "seeds": known.seeds, "files": identity["files"]}
    if study.user_attrs.setdefault("runs", same) != same:
        raise SystemExit(
            f"The study has trials with {study.user_attrs['runs']}, and not {same}, where `files` stands for the "
            "content of the YAML files: name another --out, or --storage."
        )
    study.set_user_attr("runs", same)
    tune(pool, known)
    folder.mkdir(parents=True, exist_ok=True)  # where all trials were on other machines, there is none yet
    (folder / "study.md").write_text(table(study))
    print(f"\n{table(study)}")


def tune(pool: Pool, known: argparse.Namespace) -> None:
    """Try the pairs that are left, at most so many."""
    done = losses_of(pool.study())
    left = [pair for pair in PAIRS if pair not in done]
    random.Random(0).shuffle(left)  # a part of them is a random search
    if not left or known.trials == 0:
        return
    pairs = {f"{pair[0]:g}, {pair[1]}": {"elasticity": pair[0], "annealing_epochs": pair[1]} for pair in left}
    try:
        latest = pool.run(
            partial(loss_of, known),
            pairs,
            folder=folder_of(known),
            at_most=known.trials,
            max_failures=1,
            unit="trial",
        )
    except ConfigurationError as error:
        raise SystemExit(str(error)) from None
    if any(trial.state == TrialState.FAIL for trial in latest.values()):
        raise SystemExit("Some trials failed, for the reasons above.")


def folder_of(known: argparse.Namespace) -> Path:
    """Find the folder of the trials."""
    folder: Path = known.out / f"{known.row}_{known.arm}"
    return folder


if __name__ == "__main__":
    main()
