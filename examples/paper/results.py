"""What the runs of run.py reached, sorted into experiments, and compared seed by seed."""

import json
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from examples.paper.differences import Difference, difference_of
from examples.paper.experiment import YDROP, YDROP_ARMS, results_in

ARMS = ("plain", "dropout", "dropout_at_mean_rate", "jumpout", "ydrop", "random", "shuffled", "inverted")
# What a run reached, as run.py leaves it.
Result = Mapping[str, Any]
# By seed.
Runs = Mapping[int, Result]


@dataclass(frozen=True)
class Experiment:
    """The runs of one row with the same settings, but for those of Y-Drop, which may be each arm's own.

    Attributes:
        row: Its name.
        names: The arguments that were varied, if any.
        settings: The arguments that all runs share.
        arms: By the values of these, and by arm, the runs.
        parts: The experiments that it was joined from, if any.

    Raises:
        SystemExit: If an arm has runs by several versions of its YAML files.

    """

    row: str
    names: tuple[str, ...]
    settings: tuple[str, ...]
    arms: Mapping[tuple[str, ...], Mapping[str, Runs]]
    parts: tuple["Experiment", ...] = ()

    def __post_init__(self) -> None:
        files: dict[str, str] = {}
        for run in self.runs():
            if files.setdefault(run["arm"], run["files"]) != run["files"]:
                raise SystemExit(
                    f"{run['arm']} of {self.row} has runs by several versions of its YAML files, which are not to be "
                    "put together: report them one by one, or run the older ones again."
                )

    @property
    def values(self) -> list[tuple[str, ...]]:
        """What the arguments were, in order."""
        return sorted(self.arms, key=lambda values: [order(value) for value in values])

    def runs(self) -> Iterator[Result]:
        """Go through all runs."""
        for arms in self.arms.values():
            for runs in arms.values():
                yield from runs.values()


def read(places: Sequence[Path]) -> list[Experiment]:
    """Read all results, from folders of run.py or from their results.jsonl.

    Raises:
        SystemExit: If there are none, a run is there twice, or by several versions of its YAML files.

    """
    results = results_in(places)
    if not results:
        raise SystemExit(
            f"There is no result in {', '.join(map(str, places))}: run `python -m examples.paper.run` first."
        )
    by_experiment: dict[tuple[str, tuple[str, ...], tuple[str, ...]], list[Result]] = {}
    for result in results:
        settings = tuple(each for each in result["settings"] if not each.startswith(YDROP))
        by_experiment.setdefault((result["row"], tuple(result["varied"]), settings), []).append(result)
    found = [Experiment(*key, _by_values(by_experiment[key])) for key in sorted(by_experiment)]
    return [_with_others(each, found) for each in found]


def joined(experiments: Sequence[Experiment], name: str, value: str, point: Experiment) -> list[Experiment]:
    """Make an experiment that varied nothing one more point of that of its row which varied an argument.

    Raises:
        SystemExit: If there is no such experiment, or more than one, or it has that point.

    """
    found = [each for each in experiments if (each.row, each.names) == (point.row, (name,))]
    if len(found) != 1 or point.names or not value or order(value) in [order(each) for (each,) in found[0].arms]:
        raise SystemExit(
            f"--join {name}={value} was given for {point.row}, of which {len(found)} experiments varied {name} alone. "
            "It joins runs that varied nothing to the one experiment that varied NAME, and had no such VALUE."
        )
    arms = {**found[0].arms, (value,): point.arms[()]}
    whole = replace(found[0], arms=arms, parts=(*(found[0].parts or found), point))
    return [whole if each is found[0] else each for each in experiments]


def _with_others(experiment: Experiment, experiments: Sequence[Experiment]) -> Experiment:
    """Put the arms without Y-Drop beside what varied its settings alone."""
    unvaried = (experiment.row, (), experiment.settings)
    same = [each for each in experiments if (each.row, each.names, each.settings) == unvaried]
    others = {arm: runs for each in same for arm, runs in each.arms[()].items() if arm not in YDROP_ARMS}
    if not (others and experiment.names and all(name.startswith(YDROP) for name in experiment.names)):
        return experiment
    arms = {values: {**others, **runs} for values, runs in experiment.arms.items()}
    return replace(experiment, arms=arms, parts=(experiment, Experiment(*unvaried, {(): others})))


def _by_values(results: Sequence[Result]) -> dict[tuple[str, ...], dict[str, dict[int, Result]]]:
    arms: dict[tuple[str, ...], dict[str, dict[int, Result]]] = {}
    for result in results:
        runs = arms.setdefault(tuple(result["varied"].values()), {}).setdefault(label(result, results), {})
        if result["seed"] in runs:
            raise SystemExit(f"{result['arm']} of {result['row']} is there twice with seed {result['seed']}.")
        runs[result["seed"]] = result
    return arms


def id_of(result: Result) -> str:
    """Say which run it is of."""
    return json.dumps([result[name] for name in ("row", "arm", "seed", "varied", "settings")])


def label(result: Result, others: Sequence[Result]) -> str:
    """Name an arm, and where it is there with several settings of Y-Drop, those that not all of it share."""
    shared = set.intersection(*(set(other["settings"]) for other in others if other["arm"] == result["arm"]))
    return " ".join([result["arm"], *(each.removeprefix(YDROP) for each in result["settings"] if each not in shared)])


def numbers(runs: Runs, name: str) -> dict[int, float]:
    """Choose what is a number, by seed: the loss of a run that diverged is none."""
    return {seed: run[name] for seed, run in runs.items() if math.isfinite(run[name])}


def difference(ours: Runs, theirs: Runs) -> Difference:
    """Compare test accuracy seed by seed, in percent."""
    our, their = numbers(ours, "test_acc"), numbers(theirs, "test_acc")
    return difference_of((100 * our[seed], 100 * their[seed]) for seed in sorted(our.keys() & their.keys()))


def is_the_papers(run: Result) -> bool:
    """Say whether network and data are those of the row itself, of which the paper has figures."""
    return not any(each.startswith(("model.", "data.")) for each in (*run["varied"], *run["settings"]))


def place(arm: str) -> tuple[int, str]:
    """Say where an arm stands among the others, those with other settings after itself."""
    name = arm.split()[0]
    return ARMS.index(name) if name in ARMS else len(ARMS), arm


def order(value: str) -> tuple[float | str, ...]:
    """Sort numbers, and lists of them, by what they are; anything else comes last, as it is written."""
    try:
        number = json.loads(value)
        return tuple(map(float, number)) if isinstance(number, list) else (float(number),)
    except (TypeError, ValueError):
        return (math.inf, value)


def commands(experiment: Experiment) -> list[str]:
    """Say how to run it again: in one grid, or in several where some have settings or seeds of their own."""
    if experiment.parts:
        return [line for part in experiment.parts for line in commands(part)]
    by_settings: dict[tuple[str, ...], list[Result]] = {}
    others = []
    for run in experiment.runs():
        if run["arm"] in YDROP_ARMS:
            by_settings.setdefault(tuple(run["settings"]), []).append(run)
        else:
            others.append(run)
    # What is set of Y-Drop is nothing to the other arms: a single grid serves all.
    settings = next(iter(by_settings)) if len(by_settings) == 1 else experiment.settings
    by_settings[settings] = others + by_settings.get(settings, [])
    return [
        _command(experiment, settings, part)
        for settings, runs in sorted(by_settings.items())
        for part in _by_seeds(runs).values()
    ]


def _by_seeds(runs: Sequence[Result]) -> dict[tuple[int, ...], list[Result]]:
    """Part runs by the seeds that there are for what was varied: a grid has the same for all."""
    by_varied: dict[tuple[str, ...], list[Result]] = {}
    for run in runs:
        by_varied.setdefault(tuple(run["varied"].values()), []).append(run)
    parts: dict[tuple[int, ...], list[Result]] = {}
    for some in by_varied.values():
        parts.setdefault(tuple(sorted({run["seed"] for run in some})), []).extend(some)
    return parts


def _command(experiment: Experiment, settings: Sequence[str], runs: Sequence[Result]) -> str:
    parts = ["python", "-m", "examples.paper.run", "--rows", experiment.row]
    parts += ["--arms", *sorted({run["arm"] for run in runs}, key=place)]
    parts += ["--seeds", *map(str, sorted({run["seed"] for run in runs}))]
    values = sorted({tuple(run["varied"].values()) for run in runs}, key=lambda values: list(map(order, values)))
    if experiment.names:
        axes = zip(experiment.names, zip(*values, strict=True), strict=True)
        parts += ["--vary", *(f"{name}={','.join(dict.fromkeys(axis))}" for name, axis in axes)]
    parts += ["--set", *settings] if settings else []
    return shlex.join(parts)


def commands_in(source: Path) -> str:
    """Write the commands that have led to the results in a folder of run.py, or in a record of them."""
    return "\n".join(["```sh", *(line for experiment in read([source]) for line in commands(experiment)), "```"])
