"""The tasks, and the trainings that each takes."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from examples.paper.experiment import Run
from examples.paper.spaces import SPACES, Point, points, settings_of

TRIALS = 12
TUNING_SEED = 100
# By arm: the arm whose settings it has. The controls have Y-Drop's.
TUNED = {"dropout": "dropout", "jumpout": "jumpout", "ydrop": "ydrop", "random": "ydrop", "inverted": "ydrop"}
ARMS = ("plain", *TUNED)


@dataclass(frozen=True)
class Task:
    """A network and its data.

    Attributes:
        row: A file of examples/tasks or examples/paper/rows, by name.
        root: Where its data are in the folder of all data; nowhere for those that a package ships.
        fractions: Shares of the training set that are trained on.
        settings: Arguments of all its trainings.
        seeds: Trainings of each arm.
        tunes_rate: Whether the learning rate is tuned.
        arms: What is compared.

    """

    row: str
    root: str | None
    fractions: tuple[float, ...]
    settings: tuple[str, ...] = ()
    seeds: int = 5
    tunes_rate: bool = True
    arms: tuple[str, ...] = ARMS


def _tasks() -> Iterator[Task]:
    # The other arms have records in docs/results.
    of_the_paper = ("dropout", "ydrop", "random")
    yield Task("digits", None, (1.0,), seeds=20, tunes_rate=False, arms=of_the_paper)
    mnist = ("data.val_fraction=0.1", "early_stopping.patience=25", "ydrop.annealing_epochs=5")
    yield Task("mnist_fc_1", "", (0.01, 0.05), mnist, tunes_rate=False, arms=of_the_paper)
    for name in ("cancer", "vote", "phishing", "segment", "affairs"):
        yield Task(f"tabular_{name}", f"tabular/{name}.csv", (0.1, 0.3, 1.0))
    for name in ("power", "vowels", "arrows"):
        yield Task(f"series_{name}", f"series/{name}.npz", (0.2, 0.5, 1.0))
    for name, root in (("trec", "text/trec"), ("sst2", "text/sst2"), ("mr", "text/mr/all.tsv")):
        for network in ("cnn", "lstm", "transformer"):
            yield Task(f"{name}_{network}", root, (0.05, 0.1, 0.3), ("ydrop.interpolate_at=words",))
    for network in ("s_1", "resnet"):
        yield Task(f"pictures_{network}", "pictures", (0.05, 0.1, 0.2), ("data.val_fraction=0.1",))


TASKS = {task.row: task for task in _tasks()}


@dataclass(frozen=True)
class Plan:
    """The trainings of a task, in three stages: each takes what the ones before it have found.

    Attributes:
        task: The task.
        settings: Arguments of all trainings, which say where they take place.
        out: Where the folders of trainings are.

    """

    task: Task
    settings: tuple[str, ...]
    out: Path

    def rates(self) -> list[Run]:
        """Train without dropout, at the middle size, with several learning rates."""
        fraction = self.task.fractions[len(self.task.fractions) // 2]
        return self._trials("plain", fraction) if self.task.tunes_rate else []

    def trials(self) -> list[Run]:
        """Train the arms that have parameters with several points of them, at each size."""
        return [
            run
            for fraction in self.task.fractions
            for arm in dict.fromkeys(TUNED.values())
            for run in self._trials(arm, fraction)
        ]

    def finals(self, seed: int) -> list[Run]:
        """Train all arms with what was chosen, at each size."""
        return [
            self._run(self.out / "finals", arm, fraction, seed, self.chosen(arm, fraction))
            for fraction in self.task.fractions
            for arm in self.task.arms
        ]

    def chosen(self, arm: str, fraction: float) -> tuple[str, ...]:
        """Choose the settings of an arm, by the lowest validation loss."""
        rate = settings_of(_best(self.rates(), "plain")) if self.task.tunes_rate else ()
        own = settings_of(_best(self._trials(TUNED[arm], fraction), TUNED[arm])) if arm in TUNED else ()
        return (*rate, *own)

    def _trials(self, arm: str, fraction: float) -> list[Run]:
        rate = () if arm == "plain" else self.chosen("plain", fraction)
        return [
            self._run(self.out / "trials" / str(number), arm, fraction, TUNING_SEED, (*rate, *settings_of(point)))
            for number, point in enumerate(points(SPACES[arm], TRIALS))
        ]

    def _run(self, out: Path, arm: str, fraction: float, seed: int, settings: Sequence[str]) -> Run:
        size = (f"data.train_fraction={fraction:g}",)
        shared = (*self.settings, "data.split_seed={seed}", *self.task.settings)
        return Run(self.task.row, arm, seed, size, (*shared, *settings), out)


def _best(runs: Sequence[Run], arm: str) -> Point:
    """Find the point of the lowest validation loss."""
    losses = [math.inf if run.result is None else run.result["val_loss"] for run in runs]
    finite = [math.inf if math.isnan(loss) else loss for loss in losses]
    return points(SPACES[arm], TRIALS)[finite.index(min(finite))]
