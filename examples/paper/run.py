"""Run a grid of the paper's rows, arms and seeds, in as many processes at a time as there is room for.

    python -m examples.paper.run --rows mnist_fc_1 --arms plain dropout ydrop random --seeds 0 1 2 3 4 --jobs 4

Each run is `python -m examples.train` with examples/configs/base.yaml, a row (a file of rows/), and an arm (a file of
examples/configs/). It leaves a folder under --out, whose result.json says what it reached and by which arguments. A
grid that is started again skips what is done and goes on with what was interrupted, from its last checkpoint, as if it
had not been, bit for bit where --jobs is the same: each run has as many threads as there are cores for it, and their
number changes how sums are rounded. --vary multiplies the grid:

    python -m examples.paper.run --rows mnist_fc_1 --arms dropout ydrop --vary data.train_fraction=0.01,0.05,1

--set and --vary take arguments of examples.train by their names there, and those of YDropCallback, for the arms that
have one, as ydrop.elasticity and the like. {seed} in a value is the seed of each run: --set data.split_seed={seed}
draws its training and validation samples by it, where they would otherwise be the same for all seeds.

Several machines share a grid if each is given the same one and the same --storage, a postgresql:// URL: each run takes
place on one of them, and at the end all have its result. The run of a machine that was lost is run again.

At the end results.jsonl in --out holds all results, a line each, without what is of this machine alone: a record to
keep, of which report.py makes what it makes of the folder.
"""

import argparse
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import optuna
from optuna.trial import TrialState

from examples.paper.experiment import (
    ARMS,
    ROWS,
    YDROP,
    YDROP_ARMS,
    Run,
    add_shared_arguments,
    carry_out,
    gather,
    portable,
    results_in,
    setting,
    storage_of,
    write_at_once,
)
from examples.paper.pool import Pool, complete
from lightning_ydrop import ConfigurationError
from lightning_ydrop.search.workers import TrialError


def grid_of(known: argparse.Namespace) -> Iterator[Run]:
    """Multiply rows, arms, seeds and what is varied; seeds outermost, so that half a grid is already a comparison."""
    axes = [varied(each) for each in known.vary]
    for seed, row, *values, arm in itertools.product(known.seeds, known.rows, *axes, known.arms):
        yield Run(row, arm, seed, tuple(values), tuple(known.set), known.out)


def varied(axis: str) -> list[str]:
    """Take an argument and its values apart: "model.hidden=[64],[64,64]" has two."""
    name, values = axis.split("=", 1)
    found, depth = [""], 0
    for character in values:
        depth += (character in "[{") - (character in "]}")
        if character == "," and depth == 0:
            found.append("")
        else:
            found[-1] += character
    return [f"{name}={value}" for value in found]


def main(args: Sequence[str] | None = None) -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", required=True, choices=ROWS, help="networks and data, files of rows/")
    parser.add_argument("--arms", nargs="+", default=ARMS, choices=ARMS, help="of examples/configs/, all by default")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument(
        "--vary",
        nargs="+",
        action="extend",
        default=[],
        type=setting,
        metavar="NAME=VALUE,VALUE",
        help="arguments that multiply the grid",
    )
    add_shared_arguments(parser)
    parser.add_argument("--out", type=Path, default=Path("runs/paper"), help="where the folders of runs are")
    parser.add_argument("--keep-checkpoints", action="store_true", help="keep the best checkpoint of each run")
    known = parser.parse_args(args)
    grid = list(grid_of(known))
    if len({run.folder for run in grid}) < len(grid):
        parser.error("a row, an arm, a seed or a value of --vary is there twice")
    others = [arm for arm in known.arms if arm not in YDROP_ARMS]
    if others and any(each.startswith(YDROP) for each in known.vary):
        parser.error(
            f"--vary of {YDROP} changes nothing for {', '.join(others)}: name other --arms, and run these without it"
        )
    for run in grid:
        run.check()
    try:
        failures = run_all(grid, known)
    except ConfigurationError as error:
        raise SystemExit(str(error)) from None
    gather(results_in([known.out]), known.out / "results.jsonl")
    if failures:
        raise SystemExit(failures)


def run_all(grid: Sequence[Run], known: argparse.Namespace) -> str | None:
    """Run what is not done, so many at a time, and say what goes wrong.

    Returns:
        How many runs are not done, if any: they failed, or another process is at them.

    """
    pool = Pool(storage_of(known), name_of(grid), known.jobs)
    runs = {str(run.folder.relative_to(known.out)): run for run in grid}
    if known.storage:
        fetch_results(pool.study(), runs)
    ahead = [name for name, run in runs.items() if run.result is None]
    print(f"{len(grid)} runs, {len(grid) - len(ahead)} of them done before")
    # A run whose folder was removed is run again, except where others may have done it.
    objective = partial(carried_out, runs, known.keep_checkpoints)
    latest = pool.run(objective, {name: {} for name in ahead}, again=not known.storage)
    if known.storage:
        fetch_results(pool.study(), runs)
    num_failures = len(ahead) - len(complete(latest))
    return f"{num_failures} of {len(ahead)} runs are not done, for the reasons above." if num_failures else None


def name_of(grid: Sequence[Run]) -> str:
    """Name the study of a grid: the same grid has the same, in whatever order and on whatever machine."""
    identities = sorted(json.dumps(run.identity, sort_keys=True) for run in grid)
    return f"grid {hashlib.sha256(json.dumps(identities).encode()).hexdigest()[:12]}"


def carried_out(runs: Mapping[str, Run], keep_checkpoints: bool, trial: optuna.Trial, folder: Path) -> float:
    """Carry out the run that a trial names, and give its validation loss."""
    del folder  # a run has its own
    run = runs[trial.user_attrs["name"]]
    # What a worker that was killed has left may go on for a while.
    if failure := carry_out(run, keep_checkpoints, waits="retry_of" in trial.user_attrs):
        raise TrialError(failure)
    result = run.result
    assert result is not None
    trial.set_user_attr("result", portable(result))
    return float(result["val_loss"])


def fetch_results(study: optuna.Study, runs: Mapping[str, Run]) -> None:
    """Write what other machines have done into the folders of this one."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        run = runs[trial.user_attrs["name"]]
        if run.result is None:
            run.folder.mkdir(parents=True, exist_ok=True)
            write_at_once(run.folder / "run.json", run.identity)
            write_at_once(run.folder / "result.json", trial.user_attrs["result"])


if __name__ == "__main__":
    main()
