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
        kind: Of data.
        name: What reports call it.
        root: Where its data are in the folder of all data; nowhere for those that a package ships.
        full: Samples of the training set that are not held out.
        fractions: Shares of these that are trained on.
        settings: Arguments of all its trainings.
        seeds: Trainings of each arm.
        tunes_rate: Whether the learning rate is tuned.
        arms: What is compared.
        of: The task that it is with another network: averages over tasks take the two for one. Itself by default.

    """

    row: str
    kind: str
    name: str
    root: str | None
    full: int
    fractions: tuple[float, ...]
    settings: tuple[str, ...] = ()
    seeds: int = 5
    tunes_rate: bool = True
    arms: tuple[str, ...] = ARMS
    of: str = ""

    def samples(self, fraction: float) -> int:
        """Count what is trained on."""
        return math.ceil(fraction * self.full)


def _tasks() -> Iterator[Task]:
    # The other arms have records in docs/results.
    of_the_paper = ("dropout", "ydrop", "random")
    digits, mnist = "digits", "MNIST, two layers of 1024"
    yield Task("digits", "perceptrons", digits, None, 1078, (1.0,), seeds=20, tunes_rate=False, arms=of_the_paper)
    settings = ("data.val_fraction=0.1", "early_stopping.patience=25")
    sizes = (0.01, 0.02, 0.05)
    yield Task("mnist_fc_1", "perceptrons", mnist, "", 54000, sizes, settings, 10, tunes_rate=False, arms=of_the_paper)
    for row, words in (
        ("256", "two layers of 256"),
        ("512", "two layers of 512"),
        ("one_layer", "one layer of 1024"),
        ("three_layers", "three layers of 1024"),
    ):
        name, of = f"MNIST, {words}", "mnist_fc_1"
        shared = ("perceptrons", name, "", 54000, (0.05,), settings)
        yield Task(f"mnist_{row}", *shared, tunes_rate=False, arms=of_the_paper, of=of)
    for name, full in (("cancer", 342), ("vote", 567), ("phishing", 750), ("segment", 1386), ("affairs", 3819)):
        yield Task(f"tabular_{name}", "tables", name, f"tabular/{name}.csv", full, (0.1, 0.3, 1.0))
    for name, full in (("power", 657), ("vowels", 384), ("arrows", 126)):
        yield Task(f"series_{name}", "time series", name, f"series/{name}.npz", full, (0.2, 0.5, 1.0))
    texts = (
        ("trec", "TREC", "text/trec", 4362),
        ("sst2", "SST-2", "text/sst2", 5536),
        ("mr", "MR", "text/mr/all.tsv", 6824),
    )
    networks = {"cnn": "convolutions", "lstm": "LSTM", "transformer": "Transformer"}
    for data, name, root, full in texts:
        for network, words in networks.items():
            embedding = ("ydrop.interpolate_at=words",)
            yield Task(f"{data}_{network}", "text", f"{name}, {words}", root, full, (0.05, 0.1, 0.3), embedding)
    for network, words in (("s_1", "S_1"), ("resnet", "ResNet-18 of a quarter of the width")):
        less = ("data.val_fraction=0.1",)
        yield Task(f"pictures_{network}", "pictures", f"CIFAR-10, {words}", "pictures", 10800, (0.05, 0.1, 0.2), less)


TASKS = {task.row: task for task in _tasks()}


@dataclass(frozen=True)
class Plan:
    """The trainings of a task, in three stages: each takes what the ones before it have found.

    Attributes:
        task: The task.
        settings: Arguments of all trainings, which say where they take place.
        out: Where the folders of trainings are.
        fractions: Those of its sizes that are compared.

    """

    task: Task
    settings: tuple[str, ...]
    out: Path
    fractions: tuple[float, ...]

    def rates(self) -> list[Run]:
        """Train without dropout, at the middle size, with several learning rates."""
        fraction = self.task.fractions[len(self.task.fractions) // 2]
        return self._trials("plain", fraction) if self.task.tunes_rate else []

    def trials(self) -> list[Run]:
        """Train the arms that have parameters with several points of them, at each size."""
        return [
            run
            for fraction in self.fractions
            for arm in dict.fromkeys(TUNED[arm] for arm in self.task.arms if arm in TUNED)
            for run in self._trials(arm, fraction)
        ]

    def finals(self, seed: int) -> list[Run]:
        """Train all arms with what was chosen, at each size, if the task takes as many seeds."""
        if seed >= self.task.seeds:
            return []
        return [
            self._run(self.out / "finals", arm, fraction, seed, self.chosen(arm, fraction))
            for fraction in self.fractions
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
