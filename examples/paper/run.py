"""Run a grid of the paper's rows, arms and seeds, in as many processes at a time as there is room for.

    python examples/paper/run.py --rows mnist_fc_1 --arms plain dropout ydrop random --seeds 0 1 2 3 4 --jobs 4

Each run is the program examples/train.py with examples/configs/base.yaml, a row (a file of rows/), and an arm (another
file of examples/configs/). It leaves a folder under --out, whose result.json says what it reached and by which
arguments. A grid that is started again skips what is done and goes on with what was interrupted, from its last
checkpoint, as if it had not been, bit for bit where --jobs is the same: each run has as many threads as there are cores
for it, and their number changes how sums are rounded. --vary multiplies the grid:

    python examples/paper/run.py --rows mnist_fc_1 --arms dropout ydrop --vary data.train_fraction=0.01,0.05,1

--set and --vary take arguments of train.py by their names there, and those of YDropCallback, for the arms that have
one, as ydrop.elasticity and the like. {seed} in a value is the seed of each run: --set data.split_seed={seed} draws its
training and validation samples by it, where they would otherwise be the same for all seeds.

At the end results.jsonl in --out holds all results, a line each, without what is of this machine alone: a record to
keep, of which report.py makes what it makes of the folder.
"""

import argparse
import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from experiment import ARMS, ROWS, YDROP, YDROP_ARMS, Machine, Run, add_shared_arguments, gather, results_in, setting
from tqdm import tqdm


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
    ahead = [run for run in grid if run.result is None]
    print(f"{len(grid)} runs, {len(grid) - len(ahead)} of them done before")
    failures = run_all(ahead, known.jobs, known.keep_checkpoints)
    gather(results_in([known.out]), known.out / "results.jsonl")
    if failures:
        raise SystemExit(f"{failures} of {len(ahead)} runs are not done, for the reasons above.")


def run_all(runs: Sequence[Run], jobs: int, keep_checkpoints: bool) -> int:
    """Run all, so many at a time, and say what goes wrong.

    Returns:
        How many runs are not done: they failed, or another process is at them.

    """
    failures = 0
    pool = ThreadPoolExecutor(jobs)
    try:
        with (
            Machine(jobs, keep_checkpoints) as machine,
            tqdm(total=len(runs), unit="run", dynamic_ncols=True) as progress,
        ):
            for future in as_completed([pool.submit(machine.run, run) for run in runs]):
                if failure := future.result():
                    failures += 1
                    progress.write(failure)
                progress.update()
    finally:
        pool.shutdown(cancel_futures=True)
    return failures


if __name__ == "__main__":
    main()
