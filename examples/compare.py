"""Train several arms with several seeds and put them in one table.

Each arm is a file of examples/configs/, each run the program train.py with that file on top of base.yaml. What this
program does not know it hands on to train.py, so that

    python examples/compare.py --arms dropout ydrop --seeds 0 1 2 --jobs 2 --config examples/configs/mnist.yaml

compares the two on MNIST. Arguments of YDropCallback for all arms that have one come behind --ydrop, such as

    --ydrop n_steps=2 quadrature=trapezoid

It writes table.md, and a picture of the runs of the first seed, to the folder --out.
"""

import argparse
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from plots import draw_runs
from train import main as train

CONFIGS = Path(__file__).parent / "configs"


@dataclass(frozen=True)
class Result:
    """What a run reached at its lowest validation loss, the accuracy in percent, and what it took."""

    arm: str
    seed: int
    test_acc: float
    val_loss: float
    epochs: int
    seconds: float
    folder: Path


def run(arm: str, seed: int, out: Path, ydrop: Sequence[str], overrides: Sequence[str], threads: int | None) -> Result:
    """Train and test one arm with one seed."""
    overlay = CONFIGS / f"{arm}.yaml"
    args = ["fit", f"--config={CONFIGS / 'base.yaml'}", *overrides, f"--config={overlay}", f"--seed_everything={seed}"]
    args += [f"--trainer.logger.init_args.save_dir={out}", f"--trainer.logger.init_args.name={arm}-{seed}"]
    if "YDropCallback" in overlay.read_text():
        # Of the last callback, which is this one.
        args += [f"--trainer.callbacks.init_args.{argument}" for argument in (f"seed={seed}", *ydrop)]
    if threads is not None:
        torch.set_num_threads(threads)
        args.append("--trainer.enable_progress_bar=false")  # one line of many runs would be unreadable
    start = time.perf_counter()
    cli = train(args)
    seconds = time.perf_counter() - start
    trainer = cli.trainer
    best = trainer.checkpoint_callback.best_model_score  # type: ignore[union-attr]
    assert trainer.log_dir is not None
    return Result(
        arm,
        seed,
        test_acc=100 * cli.reached["test_acc"],
        val_loss=float(best),
        epochs=trainer.current_epoch,
        seconds=seconds,
        folder=Path(trainer.log_dir),
    )


def table(results: Sequence[Result]) -> str:
    """Summarise runs in Markdown: mean and standard deviation over seeds."""
    lines = ["| arm | test accuracy % | validation loss | epochs | seconds | runs |", "|---|---|---|---|---|---|"]
    for arm in dict.fromkeys(result.arm for result in results):
        runs = [result for result in results if result.arm == arm]
        test = _spread([each.test_acc for each in runs], 2)
        val = _spread([each.val_loss for each in runs], 4)
        epochs, seconds = (statistics.mean(getattr(each, name) for each in runs) for name in ("epochs", "seconds"))
        lines.append(f"| {arm} | {test} | {val} | {epochs:.0f} | {seconds:.0f} | {len(runs)} |")
    return "\n".join(lines)


def _spread(values: Sequence[float], digits: int) -> str:
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", default=["plain", "dropout", "ydrop"], help="files of examples/configs/")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--ydrop", nargs="+", default=[], help="arguments of YDropCallback, as name=value")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; they share the cores")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"), help="where runs and the table are written")
    known, overrides = parser.parse_known_args()
    sys.argv[1:] = []  # LightningCLI warns of arguments that it is not to read
    grid = [(arm, seed) for seed in known.seeds for arm in known.arms]
    if known.jobs == 1:
        results = [run(arm, seed, known.out, known.ydrop, overrides, None) for arm, seed in grid]
    else:
        threads = max(1, (os.cpu_count() or 1) // known.jobs)
        with ProcessPoolExecutor(known.jobs, multiprocessing.get_context("spawn")) as pool:
            waiting = [pool.submit(run, arm, seed, known.out, known.ydrop, overrides, threads) for arm, seed in grid]
            results = [future.result() for future in waiting]
    first = {result.arm: result.folder for result in results if result.seed == known.seeds[0]}
    draw_runs(first, known.out / "picture.png")
    (known.out / "table.md").write_text(table(results) + "\n")
    print(f"\n{table(results)}\n\ntable.md and picture.png are in {known.out}")


if __name__ == "__main__":
    main()
