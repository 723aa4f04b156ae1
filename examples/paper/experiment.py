"""One run of the paper's experiments, and the machine that runs share."""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

HERE = Path(__file__).parent
TRAIN = HERE.parent / "train.py"
CONFIGS = HERE.parent / "configs"
ROWS = sorted(path.stem for path in (HERE / "rows").glob("*.yaml"))
ARMS = sorted({path.stem for path in CONFIGS.glob("*.yaml")} - {"base"})
YDROP_ARMS = [arm for arm in ARMS if "YDropCallback" in (CONFIGS / f"{arm}.yaml").read_text()]
# What stands before the name of an argument of YDropCallback.
YDROP = "ydrop."


@dataclass(frozen=True)
class Run:
    """One run of the grid.

    Attributes:
        row: A file of rows/, by name.
        arm: A file of examples/configs/, by name.
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
        given = [*self.settings, *self.varied]
        arguments = [
            *("fit", f"--config={CONFIGS / 'base.yaml'}", f"--config={HERE / 'rows' / f'{self.row}.yaml'}"),
            *(f"--checkpoint.dirpath={self.folder / 'checkpoints'}", "--checkpoint.save_last=true"),
            *(f"--{each}" for each in given if not each.startswith(YDROP)),
            *(f"--config={CONFIGS / f'{self.arm}.yaml'}", f"--seed_everything={self.seed}"),
            *(f"--trainer.logger.init_args.save_dir={self.folder}", "--trainer.logger.init_args.name=logs"),
            "--trainer.enable_progress_bar=false",
        ]
        if self.arm in YDROP_ARMS:
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


class Machine:
    """What runs share: cores, and GPUs where there are any.

    Args:
        jobs: Runs at a time.
        keep_checkpoints: Whether the best checkpoint of each run stays in its folder.

    """

    def __init__(self, jobs: int, keep_checkpoints: bool = False) -> None:
        self.keep_checkpoints = keep_checkpoints
        self.threads = max(1, num_cores() // jobs)
        self.slots: SimpleQueue[int] = SimpleQueue()
        for slot in range(jobs):
            self.slots.put(slot)

    def run(self, run: Run) -> str | None:
        """Run to the end, and write result.json, as soon as there is room.

        Returns:
            What went wrong, if anything.

        """
        slot = self.slots.get()
        try:
            return self._run(run, slot)
        finally:
            self.slots.put(slot)

    def _run(self, run: Run, slot: int) -> str | None:
        run.folder.mkdir(parents=True, exist_ok=True)
        last = run.folder / "checkpoints" / "last.ckpt"
        resumed = last.exists()
        arguments = [*run.arguments, *([f"--ckpt_path={last}"] if resumed else [])]
        environment = os.environ | {"OMP_NUM_THREADS": str(self.threads)}
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
        if not self.keep_checkpoints:
            for file in (run.folder / "checkpoints").glob("*.ckpt"):
                file.unlink()
        return None


def num_cores() -> int:
    """Count the cores that this process may use, which may be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def add_shared_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what every program takes that starts runs."""
    parser.add_argument(
        "--set", nargs="+", default=[], type=setting, metavar="NAME=VALUE", help="arguments of all runs"
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; they share cores and GPUs")


def setting(text: str) -> str:
    """Read name=value from the command line."""
    if not all(text.partition("=")):
        raise argparse.ArgumentTypeError(f"{text!r} is not name=value")
    return text
