"""Train all arms on small sets, each tuned by the same budget.

    python -m experiments.tasks.sets --out data
    python -m experiments.tasks.run --data data --jobs 2 --tasks tabular_cancer tabular_vote

Of each task, at the middle one of its sizes, the arm without dropout is trained with 12 learning rates; the one of the
lowest validation loss is that of all arms. Then, at each size, dropout, Y-Drop and Jumpout are trained with 12 points
of their own parameters, and those of the lowest validation loss are kept. Last, all arms are trained with what was
chosen, with other seeds. The two controls, Y-Drop's rates given to units at random and to the least important ones,
have the settings of Y-Drop.

Started again, it goes on with what is left, on another machine too: at the end of each stage records are written
beside this program, and what they hold is not trained again.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from examples.paper.experiment import Run, at_least_one, portable, write_at_once
from examples.paper.run import run_all
from experiments.tasks.tasks import TASKS, Plan

RECORDS = Path(__file__).parent / "records"


def carry_out(stage: str, runs: Sequence[Run], known: argparse.Namespace) -> None:
    """Carry out the runs of a stage that are left, and keep a record of each."""
    if not runs:
        return
    take_up(stage, runs)
    print(f"{stage}: ", end="", flush=True)
    failures = run_all(runs, known)
    record(stage, runs)
    if failures:
        raise SystemExit(failures)


def take_up(stage: str, runs: Sequence[Run]) -> None:
    """Give the runs of a stage that another machine has carried out the results of their records."""
    file = RECORDS / f"{stage}.jsonl"
    known = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    for run in runs:
        if run.result is None:
            identity = run.identity
            found = [each for each in known if identity.items() <= each.items()]
            if found:
                run.folder.mkdir(parents=True, exist_ok=True)
                write_at_once(run.folder / "result.json", found[0])


def record(stage: str, runs: Sequence[Run]) -> None:
    """Add what runs reached to the records of their stage."""
    file = RECORDS / f"{stage}.jsonl"
    lines = set(file.read_text().splitlines()) if file.exists() else set()
    lines |= {json.dumps(portable(run.result)) for run in runs if run.result}
    RECORDS.mkdir(exist_ok=True)
    file.write_text("".join(f"{line}\n" for line in sorted(lines)))


def main(args: Sequence[str] | None = None) -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, default=Path("data"), help="what sets.py wrote, text/, pictures/ and MNIST/"
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--fractions", nargs="+", type=float, help="some of the sizes of each task; all by default")
    parser.add_argument("--jobs", type=at_least_one, default=1, help="trainings at a time")
    parser.add_argument("--out", type=Path, default=Path("runs/tasks"), help="where the folders of trainings are")
    parser.add_argument("--storage", help="as for run.py; studies.journal in --out by default")
    known = parser.parse_args(args)
    known.keep_checkpoints = False
    sizes = {each for name in known.tasks for each in TASKS[name].fractions}
    if unknown := set(known.fractions or ()) - sizes:
        parser.error(f"these tasks have the --fractions {sorted(sizes)}, and not {sorted(unknown)}")
    plans = []
    for name in known.tasks:
        task = TASKS[name]
        fractions = tuple(each for each in task.fractions if not known.fractions or each in known.fractions)
        if not fractions:
            continue
        root = () if task.root is None else (f"data.root={known.data / task.root}",)
        plans.append(Plan(task, root, known.out, fractions))
    carry_out("rates", [run for plan in plans for run in plan.rates()], known)
    carry_out("trials", [run for plan in plans for run in plan.trials()], known)
    seeds = range(max(plan.task.seeds for plan in plans))  # outermost: what there is first is a comparison
    carry_out("finals", [run for seed in seeds for plan in plans for run in plan.finals(seed)], known)


if __name__ == "__main__":
    main()
