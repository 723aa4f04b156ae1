"""What a search finds, against patterns made by hand and dropout of units, each tuned as long as the search took.

    python -m experiments.autodropout.compare --task digits --folder runs/digits --workers 2

It takes the searches of the folder. Each method, a search or a baseline, goes through the same three steps: as many
trainings as a search has trials, for baselines 5 seeds of each setting; 5 fresh seeds of the five best, of which
validation chooses one; 10 fresh seeds of that one, the only ones whose test counts. What was chosen for digits and TREC
is then trained with 5 seeds in networks twice as wide and twice as deep, and what was chosen for digits on MNIST too
(`--transfer-from digits`).
"""

import argparse
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.autodropout.trainings import Arm, bench_of, read_records, write_records
from lightning_ydrop.layers.patterns import ConvPattern, Pattern, TokenPattern
from lightning_ydrop.search.export import candidates_of
from lightning_ydrop.search.files import as_patterns
from lightning_ydrop.search.space import PatternSpace
from lightning_ydrop.search.studies import choices_of, existing_study, finished, space_of

SAMPLERS = ("random", "tpe", "table", "transformer")
TOP = 5
TUNING_SEEDS, CHOOSING_SEEDS, FINAL_SEEDS, TRANSFER_SEEDS = range(5), range(100, 105), range(200, 210), range(300, 305)
HIGHEST_RATE = 0.6
SIZES = (1 / 8, 1 / 4, 3 / 8, 1 / 2)
YDROP = ("--trainer.callbacks+=lightning_ydrop.YDropCallback", "--trainer.callbacks.convert=true")
# Words are numbers: the path that conductance integrates along starts at their embeddings.
OF_WORDS = ("--trainer.callbacks.interpolate_at=words",)
TRANSFERS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "digits": {"wide": ("--model.width=1.0",), "deep": ("--model.depth=16",)},
    "mnist": {},
    "trec": {"wide": ("--model.width=64", "--model.heads=4"), "deep": ("--model.depth=4",)},
}


def rates(count: int) -> list[float]:
    """Spread rates evenly above 0."""
    return [round(HIGHEST_RATE * (index + 1) / count, 4) for index in range(count)]


def baselines(space: PatternSpace, count: int) -> dict[str, list[Arm]]:
    """List the settings of each baseline, `count` for each."""

    def everywhere(name: str, pattern: Callable[[float], Pattern]) -> list[Arm]:
        return [Arm(f"{name} {rate:g}", dict.fromkeys(space.kinds, pattern(rate))) for rate in rates(count)]

    of_words = "token" in space.kinds.values()
    ydrop = (*YDROP, *OF_WORDS) if of_words else YDROP
    units = {
        "dropout": [Arm(f"dropout {rate:g}", args=(f"--model.p={rate}",)) for rate in rates(count)],
        "ydrop": [Arm(f"ydrop {rate:g}", args=(f"--model.p={rate}", *ydrop)) for rate in rates(count)],
    }
    if of_words:
        return units | {
            "variational": everywhere("variational", TokenPattern.variational_dropout),
            "word": everywhere("word", TokenPattern.word_dropout),
        }
    blocks = [
        Arm(f"dropblock {size:g} {rate:g}", dict.fromkeys(space.kinds, ConvPattern.dropblock(size, rate)))
        for size in SIZES
        for rate in rates(count // len(SIZES))
    ]
    return units | {"spatial": everywhere("spatial", ConvPattern.spatial_dropout), "dropblock": blocks}


def searches_of(task: str, folder: Path) -> list[dict[str, Any]]:
    """Read the searches of a folder: the rewards and choices of their trials, and what is worth retraining.

    Those whose journals are elsewhere are taken from the records of the task.
    """
    searches = {(each["sampler"], each["seed"]): each for each in read_records(task, "searches")}
    for journal in sorted(folder.glob("*-*.journal")):
        study = existing_study(str(journal), journal.stem)
        space, trials = space_of(study), finished(study)
        sampler, _, seed = journal.stem.rpartition("-")
        if sampler not in SAMPLERS:
            continue
        choices = [choices_of(space, trial.params) for trial in trials]
        searches[sampler, int(seed)] = {
            "sampler": sampler,
            "seed": int(seed),
            "distinct": len({space.distinct(each) for each in choices}),
            "rewards": [round(float(trial.value or 0.0), 4) for trial in trials],
            "choices": ["".join(map(str, each)) for each in choices],
            "candidates": candidates_of(study, space, TOP),
        }
    return [searches[key] for key in sorted(searches)]


def mean_of(records: Sequence[dict[str, Any]], arm: str, metric: str) -> float:
    """Average a metric over the trainings of an arm."""
    return statistics.fmean(record[metric] for record in records if record["arm"] == arm)


def best_of(records: Sequence[dict[str, Any]], arms: Sequence[Arm], metric: str, lower: bool) -> list[Arm]:
    """Sort arms by a metric, the best first. One that diverged is the last."""

    def rank(arm: Arm) -> float:
        mean = mean_of(records, arm.name, metric)
        return math.inf if math.isnan(mean) else mean if lower else -mean

    return sorted(arms, key=rank)


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transfer-from", help="train what was chosen for another task here, and nothing else")
    bench, known = bench_of(parser)
    if known.transfer_from is not None:
        chosen = chosen_of(known.transfer_from)
        write_records(bench.task, f"from_{known.transfer_from}", bench.train("transfer", chosen, TRANSFER_SEEDS))
        return
    searches = searches_of(bench.task, bench.folder)
    budget = {len(search["rewards"]) for search in searches}
    if len(budget) != 1:
        raise SystemExit(f"{bench.folder} has searches of {sorted(budget)} trials: finish them first.")
    write_records(bench.task, "searches", searches)
    training = bench.training()
    space, metric, lower = training.space(), training.settings.metric, training.settings.mode == "min"

    methods = baselines(space, budget.pop() // len(TUNING_SEEDS))
    tuned = bench.train("tuning", [arm for arms in methods.values() for arm in arms], TUNING_SEEDS)
    candidates = {name: best_of(tuned, arms, metric, lower)[:TOP] for name, arms in methods.items()}
    for search in searches:
        study = f"{search['sampler']}-{search['seed']}"
        candidates[study] = [
            Arm(f"{study} {name}", space.patterns(choices)) for name, choices in search["candidates"].items()
        ]
    fresh = bench.train("choosing", [arm for arms in candidates.values() for arm in arms], CHOOSING_SEEDS)
    chosen = [Arm("none"), *(best_of(fresh, arms, metric, lower)[0] for arms in candidates.values())]
    write_records(bench.task, "chosen", [arm.as_json() for arm in chosen])
    records = [*tuned, *fresh, *bench.train("final", chosen, FINAL_SEEDS)]
    for stage, args in TRANSFERS[bench.task].items():
        there = [Arm(arm.name, arm.patterns, (*arm.args, *args)) for arm in chosen]
        records += bench.train(stage, there, TRANSFER_SEEDS)
    write_records(bench.task, "trainings", records)


def chosen_of(task: str) -> list[Arm]:
    """Read what was chosen for a task."""
    return [
        Arm(each["name"], as_patterns("compare", each["patterns"]), tuple(each["args"]))
        for each in read_records(task, "chosen")
    ]


if __name__ == "__main__":
    main()
