"""Tune an arm by validation loss alone: 12 points of its parameters, or the pairs that the paper names.

    python -m examples.paper.tune --row mnist_fc_1 --arm dropout --jobs 4 --set data.root=data
    python -m examples.paper.tune --row mnist_fc_1 --arm ydrop --pairs --jobs 4 --set data.root=data

Dropout has its rate p; Y-Drop and its controls a p, around which their rates lie, the share of strong units,
elasticity and annealing; Jumpout its rates and its exponent; the arm without dropout the learning rate. The points are
the same each time (spaces.py), so that arms are tuned by the same budget. --pairs are of elasticity and annealing.

A trial is a run of run.py with a point. The study is Optuna's: started again, here or on another machine that reaches
the same --storage, it goes on with the points that are left, at most --trials of them; machines that are at it together
share these. A study.md beside the trials has the lowest validation loss of each point.
"""

import argparse
import math
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
from examples.paper.spaces import SPACES, Point, in_words, pairs, points, settings_of
from examples.paper.tables import markdown
from lightning_ydrop import ConfigurationError
from lightning_ydrop.search.workers import TrialError

COUNT = 12


def points_of(known: argparse.Namespace) -> dict[str, Point]:
    """List the points of an arm, by name."""
    found = pairs() if known.pairs else points(SPACES[known.arm], COUNT)
    return {in_words(point): point for point in found}


def loss_of(known: argparse.Namespace, trial: optuna.Trial, folder: Path) -> float:
    """Train with the point that a trial names, and average the lowest validation loss over seeds."""
    settings = settings_of(points_of(known)[trial.user_attrs["name"]])
    losses = []
    for seed in known.seeds:
        run = Run(known.row, known.arm, seed, (), (*known.set, *settings), folder)
        if failure := carry_out(run, waits="retry_of" in trial.user_attrs):
            raise TrialError(failure)
        assert run.result is not None
        losses.append(run.result["val_loss"])
    return statistics.fmean(losses)


def losses_of(study: optuna.Study) -> dict[str, float]:
    """Find the lowest loss that each point has reached, of those that are done."""
    lowest: dict[str, float] = {}
    for trial in study.get_trials(states=[TrialState.COMPLETE]):
        assert trial.value is not None
        name = trial.user_attrs["name"]
        lowest[name] = min(trial.value, lowest.get(name, math.inf))
    return lowest


def table(study: optuna.Study, known: argparse.Namespace) -> str:
    """Lay out the lowest losses, and the point to choose."""
    lowest, tried = losses_of(study), points_of(known)
    names = sorted(lowest, key=lowest.__getitem__)
    head = [*next(iter(tried.values())), "validation loss"]
    lines = [[*(f"{value:g}" for value in tried[name].values()), f"{lowest[name]:.4f}"] for name in names]
    command = ["python", "-m", "examples.paper.tune", "--row", known.row, "--arm", known.arm]
    command += [*(["--pairs"] if known.pairs else []), "--seeds", *map(str, known.seeds)]
    settings = study.user_attrs["runs"]["settings"]
    command += ["--set", *settings] if settings else []
    return (
        f"# Tuning of {known.row}, {known.arm}\n\n```sh\n{shlex.join(command)}\n```\n\n"
        f"Validation loss of {len(lowest)} points:\n\n{markdown([head, *lines])}\n\n{chosen(lowest, tried)}\n"
    )


def chosen(lowest: Mapping[str, float], tried: Mapping[str, Point]) -> str:
    """Say which point has the lowest loss."""
    if not lowest:
        return "No trial is done."
    name = min(lowest, key=lowest.__getitem__)
    if math.isinf(lowest[name]):
        return "All of them diverged: there is none to choose."
    return f"The lowest is that of `--set {shlex.join(settings_of(tried[name]))}`."


def main(args: Sequence[str] | None = None) -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", required=True, choices=ROWS, help="network and data, a file of rows/")
    parser.add_argument("--arm", default="ydrop", choices=SPACES, help="of examples/configs/")
    parser.add_argument("--pairs", action="store_true", help="tune elasticity and annealing over the paper's sets")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="a trial's loss is the mean over them")
    parser.add_argument("--trials", type=int, help="how many more to run; all by default")
    add_shared_arguments(parser)
    parser.add_argument("--out", type=Path, default=Path("runs/tune"), help="where the folders of trials are")
    known = parser.parse_args(args)
    if known.pairs and known.arm not in YDROP_ARMS:
        parser.error(f"--pairs are of elasticity and annealing, which {known.arm} does not have")
    pool = Pool(storage_of(known), f"{known.row} {known.arm}{' pairs' if known.pairs else ''}", known.jobs)
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
    (folder / "study.md").write_text(table(study, known))
    print(f"\n{table(study, known)}")


def tune(pool: Pool, known: argparse.Namespace) -> None:
    """Try the points that are left, at most so many."""
    done = losses_of(pool.study())
    left: dict[str, dict[str, Any]] = {name: {} for name in points_of(known) if name not in done}
    if not left or known.trials == 0:
        return
    try:
        latest = pool.run(
            partial(loss_of, known),
            left,
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
    folder: Path = known.out / f"{known.row}_{known.arm}{'_pairs' if known.pairs else ''}"
    return folder


if __name__ == "__main__":
    main()
