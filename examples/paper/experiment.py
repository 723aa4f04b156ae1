"""One run of the paper's experiments, and how it is carried out."""

import argparse
import fcntl
import hashlib
import importlib
import json
import multiprocessing
import os
import sys
import time
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

import torch
import yaml

HERE = Path(__file__).parent
# The module whose `main` carries a run out, with its arguments. A server imports it once; each run is a fork of that.
PROGRAM = "examples.train"
FORKS = multiprocessing.get_context("forkserver")
CONFIGS = HERE.parent / "configs"
# Networks and data: those of the paper, and others.
FILES = {path.stem: path for folder in (HERE / "rows", HERE.parent / "tasks") for path in sorted(folder.glob("*.yaml"))}
ROWS = sorted(FILES)
ARMS = sorted({path.stem for path in CONFIGS.glob("*.yaml")} - {"base"})
YDROP_ARMS = [arm for arm in ARMS if "YDropCallback" in (CONFIGS / f"{arm}.yaml").read_text()]
# What stands before the name of an argument of YDropCallback.
YDROP = "ydrop."
# Arguments that say where a run takes place, and change nothing that it finds.
PLACES = ("data.root=", "data.download=", "data.num_workers=", "trainer.accelerator=")


@dataclass(frozen=True)
class Run:
    """One run of the grid.

    Attributes:
        row: A file of rows/, by name.
        arm: A file of examples/configs/, by name.
        seed: Of weights, batches, masks and Y-Drop.
        varied: Arguments that the grid varies, as name=value; {seed} in a value is the seed.
        settings: Arguments that all runs share, likewise.
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
    def checkpoints(self) -> Path:
        """Where its checkpoints are: the best, and while it is not done the last."""
        return self.folder / "checkpoints"

    @property
    def files(self) -> list[Path]:
        """The configuration, the later ones laid over the earlier."""
        return [CONFIGS / "base.yaml", FILES[self.row], CONFIGS / f"{self.arm}.yaml"]

    @property
    def arguments(self) -> list[str]:
        """What examples.train is called with, except for a checkpoint to go on from."""
        given = [each.replace("{seed}", str(self.seed)) for each in (*self.settings, *self.varied)]
        ydrop = [f"seed={self.seed}", *(each.removeprefix(YDROP) for each in given if each.startswith(YDROP))]
        return [
            *("fit", *(f"--config={file}" for file in self.files)),
            # Of the last callback, which is the arm's.
            *(f"--trainer.callbacks.init_args.{each}" for each in ydrop if self.arm in YDROP_ARMS),
            *(f"--{each}" for each in given if not each.startswith(YDROP)),
            *(f"--seed_everything={self.seed}", "--trainer.enable_progress_bar=false"),
            *(f"--trainer.logger.init_args.save_dir={self.folder}", "--trainer.logger.init_args.name=logs"),
            f"--checkpoint.dirpath={self.checkpoints}",
        ]

    @property
    def identity(self) -> dict[str, Any]:
        """What makes the run what it is, wherever it takes place."""
        return {
            "row": self.row,
            "arm": self.arm,
            "seed": self.seed,
            "varied": dict(each.split("=", 1) for each in self.varied),
            "settings": what_matters(self.settings, self.arm),
            "files": hashlib.sha256(json.dumps(list(map(_content, self.files))).encode()).hexdigest(),
        }

    @property
    def result(self) -> dict[str, Any] | None:
        """What it reached, once it is done."""
        file = self.folder / "result.json"
        return json.loads(file.read_text()) if file.exists() else None

    @property
    def refusal(self) -> str | None:
        """Why its folder is not to be used, if it holds another run, or what one has learned."""
        file = self.folder / "run.json"
        learned = self.result is not None or any(self.checkpoints.glob("*.ckpt"))
        if learned and file.exists() and json.loads(file.read_text()) != self.identity:
            return f"{file} is of a run with other settings or YAML files: name another folder with --out."
        return None

    def check(self) -> None:
        """Refuse a folder that holds another run, or what one has learned.

        Raises:
            SystemExit: If it does.

        """
        if refusal := self.refusal:
            raise SystemExit(refusal)


def _content(file: Path) -> Any:
    """Read a YAML file, whose comments change nothing.

    Records from before examples/ was a package name its classes without it: they are of the same configuration.
    """
    return yaml.safe_load(file.read_text().replace("class_path: examples.", "class_path: "))


def what_matters(settings: tuple[str, ...], arm: str) -> list[str]:
    """Choose from settings those that change what a run of an arm finds: of each name the last."""
    elsewhere = PLACES if arm in YDROP_ARMS else (*PLACES, YDROP)
    # What appends, such as trainer.callbacks+=, takes no other's place.
    last = {each if "+=" in each else each.partition("=")[0]: each for each in settings}
    return sorted(each for each in last.values() if not each.startswith(elsewhere))


def carry_out(run: Run, keep_checkpoints: bool = False, waits: bool = False) -> str | None:
    """Run to the end, and write result.json.

    Args:
        run: The run.
        keep_checkpoints: Whether its best checkpoint stays in its folder.
        waits: Whether to wait for another process that is at it, and go on with what that has left.

    Returns:
        What went wrong, if anything.

    """
    run.folder.mkdir(parents=True, exist_ok=True)
    with (run.folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX if waits else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return f"{run.folder}: another process is at it."
        if refusal := run.refusal:
            return refusal
        write_at_once(run.folder / "run.json", run.identity)
        # Another process may have ended it in the meantime.
        return None if run.result else _train(run, keep_checkpoints, lock.fileno())


def _train(run: Run, keep_checkpoints: bool, lock: int) -> str | None:
    last = last_of(run.checkpoints)
    began = time.perf_counter()
    if status := _call([*run.arguments, *([f"--ckpt_path={last}"] if last else [])], run.folder, lock):
        return f"{run.folder}: examples.train ended with {status}; see log.txt there."
    reached = newest_logs(run.folder) / "reached.json"
    if not reached.exists():
        return f"{run.folder}: examples.train left no result, as in a trial run; see log.txt there."
    write_at_once(
        run.folder / "result.json",
        {
            **run.identity,
            **json.loads(reached.read_text()),
            "seconds": time.perf_counter() - began,
            "resumed": last is not None,
            "arguments": run.arguments,
        },
    )
    for file in run.checkpoints.glob("last.ckpt" if keep_checkpoints else "*.ckpt"):
        file.unlink()
    return None


def _call(arguments: list[str], folder: Path, lock: int) -> int:
    """Call examples.train with the threads and GPUs of this worker. If the worker is told to end, so is the program."""
    # It holds the lock too: where this program is killed alone, no other begins the run beside it.
    FORKS.set_forkserver_preload([PROGRAM])
    process = FORKS.Process(target=_be_program, args=(PROGRAM, arguments, folder / "log.txt", DupFd(lock)))
    process.start()
    try:
        process.join()
    except BaseException:
        process.terminate()
        process.join()
        raise
    return process.exitcode or 0


def _be_program(program: str, arguments: list[str], log: Path, lock: Any) -> None:
    """Be a program, whose output goes to a file."""
    lock.detach()
    with log.open("ab") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    importlib.import_module(program).main(arguments)


def last_of(checkpoints: Path) -> Path | None:
    """Find the checkpoint to go on from, and remove what an interruption has left beside it and its best one.

    An interruption while checkpoints were written leaves a last one that is half a file, or whose best one is gone:
    the run begins anew.
    """
    last, going_on = checkpoints / "last.ckpt", set()
    if zipfile.is_zipfile(last):
        states = torch.load(last, map_location="cpu", mmap=True, weights_only=True)["callbacks"]
        best = next(
            Path(state["best_model_path"]) for name, state in states.items() if name.startswith("ModelCheckpoint")
        )
        going_on = {last.name, best.name} if best.exists() else set()
    for file in checkpoints.glob("*.ckpt"):
        if file.name not in going_on:
            file.unlink()
    return last if going_on else None


def newest_logs(folder: Path) -> Path:
    """Find the logs of a run, or of its last part where it was interrupted."""
    return max((folder / "logs").glob("version_*"), key=lambda version: int(version.name.rpartition("_")[2]))


def write_at_once(file: Path, content: object) -> None:
    """Write JSON wholly or not at all: half a file would count as done."""
    _write_text_at_once(file, json.dumps(content, indent=1) + "\n")


def _write_text_at_once(file: Path, text: str) -> None:
    part = file.with_name(f"{file.name}.part")
    part.write_text(text)
    part.replace(file)


def results_in(places: Sequence[Path]) -> list[dict[str, Any]]:
    """Read what runs reached: all below a folder, or what `gather` has written."""
    texts: list[str] = []
    for place in places:
        if place.is_file():
            texts += place.read_text().splitlines()
        else:
            texts += [file.read_text() for file in sorted(place.rglob("result.json"))]
    return [json.loads(text) for text in texts]


def portable(result: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out of a result what is of this machine alone."""
    return {name: value for name, value in result.items() if name != "arguments"}


def gather(results: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Write what runs reached into one file, a line each, with nothing of this machine."""
    lines = map(portable, results)
    _write_text_at_once(file, "".join(f"{json.dumps(line)}\n" for line in lines))


def add_shared_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what every program takes that starts runs."""
    named: dict[str, Any] = {"nargs": "+", "action": "extend", "default": [], "type": setting}
    parser.add_argument("--set", **named, metavar="NAME=VALUE", help="arguments of all runs")
    parser.add_argument("--jobs", type=at_least_one, default=1, help="runs at a time; they share cores and GPUs")
    parser.add_argument(
        "--storage",
        help="a file, or a postgresql:// URL that machines share; studies.journal in --out by default",
    )


def storage_of(known: argparse.Namespace) -> str:
    """Say where the study of a program is kept."""
    return known.storage or str(known.out / "studies.journal")


def setting(text: str) -> str:
    """Read name=value from the command line."""
    if not all(text.partition("=")):
        raise argparse.ArgumentTypeError(f"{text!r} is not name=value")
    return text


def at_least_one(text: str) -> int:
    """Read a number of things that are done at a time."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not 1 or more")
    return int(text)
