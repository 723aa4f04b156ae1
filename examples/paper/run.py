"""Run a grid of the paper's rows, arms and seeds, in as many processes at a time as there is room for.

    python examples/paper/run.py --rows mnist_fc_1 --arms plain dropout ydrop random --seeds 0 1 2 3 4 --jobs 4

Each run is the program examples/train.py with examples/configs/base.yaml, a file of rows/ and one of arms/, and leaves
a folder under --out. Its result.json says what it reached and by which arguments. A grid that is started again skips
what is done and goes on with what was interrupted, from its last checkpoint. --vary multiplies the grid:

    python examples/paper/run.py --rows mnist_fc_1 --arms dropout ydrop --vary data.train_fraction=0.01,0.05,1

--set and --vary take arguments of train.py by their names there, and those of YDropCallback, for the arms that have
one, as ydrop.elasticity and the like.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from tqdm import tqdm

HERE = Path(__file__).parent
TRAIN = HERE.parent / "train.py"
BASE = HERE.parent / "configs" / "base.yaml"
# What stands before the name of an argument of YDropCallback.
YDROP = "ydrop."


@dataclass(frozen=True)
class Run:
    """One run of the grid.

    Attributes:
        row: A file of rows/, by name.
        arm: A file of arms/, by name.
        seed: Of weights, batches, masks and Y-Drop.
        varied: Arguments that the grid varies, as name=value.
        settings: Arguments that all runs share, as name=value.
        out: Where the grid leaves its folders.

    """

    row: str
    arm: str
    seed: int
    varied: tuple[str, ...]
    settings: tuple[str, ...]
    out: Path

    @property
    def folder(self) -> Path:
        """Where the run leaves everything."""
        return self.out / self.row / "_".join([self.arm, *self.varied]) / f"seed_{self.seed}"

    @property
    def arguments(self) -> list[str]:
        """What train.py is called with, but for a checkpoint to go on from."""
        arm = HERE / "arms" / f"{self.arm}.yaml"
        given = [*self.settings, *self.varied]
        arguments = [
            *("fit", f"--config={BASE}", f"--config={HERE / 'rows' / f'{self.row}.yaml'}"),
            *(f"--checkpoint.dirpath={self.folder / 'checkpoints'}", "--checkpoint.save_last=true"),
            *(f"--{each}" for each in given if not each.startswith(YDROP)),
            *(f"--config={arm}", f"--seed_everything={self.seed}"),
            *(f"--trainer.logger.init_args.save_dir={self.folder}", "--trainer.logger.init_args.name=logs"),
            "--trainer.enable_progress_bar=false",
        ]
        if "YDropCallback" in arm.read_text():
            ydrop = [f"seed={self.seed}", *(each.removeprefix(YDROP) for each in given if each.startswith(YDROP))]
            arguments += [f"--trainer.callbacks.init_args.{each}" for each in ydrop]
        return arguments

    @property
    def result(self) -> dict[str, Any] | None:
        """What it reached, once it is done.

        Raises:
            SystemExit: If the folder holds the result of another run.

        """
        file = self.folder / "result.json"
        if not file.exists():
            return None
        result: dict[str, Any] = json.loads(file.read_text())
        if result["settings"] != list(self.settings):
            raise SystemExit(f"{file} is of a run with other settings: name another folder with --out.")
        return result


def start(run: Run, slot: int, threads: int, keep_checkpoints: bool) -> str | None:
    """Run to the end, and write result.json.

    Returns:
        What went wrong, if anything.

    """
    run.folder.mkdir(parents=True, exist_ok=True)
    last = run.folder / "checkpoints" / "last.ckpt"
    resumed = last.exists()
    arguments = [*run.arguments, *([f"--ckpt_path={last}"] if resumed else [])]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    if torch.cuda.is_available():
        environment["CUDA_VISIBLE_DEVICES"] = str(slot % torch.cuda.device_count())
    began = time.perf_counter()
    with (run.folder / "log.txt").open("a") as log:
        done = subprocess.run(
            [sys.executable, TRAIN, *arguments], env=environment, stdout=log, stderr=subprocess.STDOUT, check=False
        )
    if done.returncode != 0:
        return f"{run.folder}: train.py ended with {done.returncode}; see log.txt there."
    newest = max((run.folder / "logs").glob("version_*"), key=lambda folder: folder.stat().st_mtime)
    result = {
        "row": run.row,
        "arm": run.arm,
        "seed": run.seed,
        "varied": dict(each.split("=", 1) for each in run.varied),
        "settings": list(run.settings),
        **json.loads((newest / "reached.json").read_text()),
        "seconds": time.perf_counter() - began,
        "resumed": resumed,
        "arguments": run.arguments,
    }
    # Written at once or not at all: half a file would count as done.
    part = run.folder / "result.json.part"
    part.write_text(json.dumps(result, indent=1) + "\n")
    part.rename(run.folder / "result.json")
    last.unlink(missing_ok=True)
    if not keep_checkpoints:
        for file in (run.folder / "checkpoints").glob("*.ckpt"):
            file.unlink()
    return None


def grid_of(known: argparse.Namespace) -> Iterator[Run]:
    """Multiply rows, arms, seeds and what is varied; seeds outermost, so that half a grid is already a comparison."""
    axes = [[f"{name}={value}" for value in values.split(",")] for name, _, values in map(_split, known.vary)]
    for seed, row, *varied, arm in itertools.product(known.seeds, known.rows, *axes, known.arms):
        yield Run(row, arm, seed, tuple(varied), tuple(known.set), known.out)


def num_cores() -> int:
    """Count the cores that this process may use, which may be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _split(setting: str) -> tuple[str, str, str]:
    parts = setting.partition("=")
    if not parts[2]:
        raise SystemExit(f"{setting!r} was given; it takes name=value.")
    return parts


def main(args: Sequence[str] | None = None) -> None:
    """Run the program."""
    rows, arms = (sorted(path.stem for path in (HERE / kind).glob("*.yaml")) for kind in ("rows", "arms"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", required=True, choices=rows, help="networks and data, files of rows/")
    parser.add_argument("--arms", nargs="+", default=arms, choices=arms, help="files of arms/, all by default")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--vary", nargs="+", default=[], help="arguments that multiply the grid, as name=value,value")
    parser.add_argument("--set", nargs="+", default=[], help="arguments of all runs, as name=value")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; they share cores and GPUs")
    parser.add_argument("--out", type=Path, default=Path("runs/paper"), help="where the folders of runs are")
    parser.add_argument("--keep-checkpoints", action="store_true", help="keep the best checkpoint of each run")
    known = parser.parse_args(args)
    for setting in known.set:
        _split(setting)
    grid = list(grid_of(known))
    ahead = [run for run in grid if run.result is None]
    threads = max(1, num_cores() // known.jobs)
    slots: SimpleQueue[int] = SimpleQueue()
    for slot in range(known.jobs):
        slots.put(slot)

    def take_a_slot(run: Run) -> str | None:
        slot = slots.get()
        try:
            return start(run, slot, threads, known.keep_checkpoints)
        finally:
            slots.put(slot)

    print(f"{len(grid)} runs, {len(grid) - len(ahead)} of them done before")
    failures = []
    with (
        ThreadPoolExecutor(known.jobs) as pool,
        tqdm(total=len(ahead), unit="run", dynamic_ncols=True) as progress,
    ):
        for future in as_completed([pool.submit(take_a_slot, run) for run in ahead]):
            if failure := future.result():
                failures.append(failure)
                progress.write(failure)
            progress.update()
    if failures:
        raise SystemExit(f"{len(failures)} of {len(ahead)} runs failed.")


if __name__ == "__main__":
    main()
