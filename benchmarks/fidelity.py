"""Which units phase 1 finds: the share of the exact strong bucket, for settings of different cost.

Exact is the ranking by conductance of the whole batch with 100 steps of the trapezoid rule. Half of the units are
strong, so a random ranking finds 0.5. Where phase 1 does not run on every batch, its ranking is compared with the exact
one of the batch that it serves.
"""

import itertools
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import torch
import torch.nn.functional as F
from jsonargparse import auto_cli
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torchvision.datasets import MNIST

from benchmarks.layers import num_samples_of
from benchmarks.networks import ACTIVATIONS, RECOMMENDED, MakeDropout, Transformer, perceptron, small_cnn
from benchmarks.report import write_report
from examples.paper.pool import Pool, complete
from lightning_ydrop import ConductanceDropout, YDrop, layer_conductance
from lightning_ydrop.functional.attribution import Quadrature
from lightning_ydrop.functional.rates import strong_count

BATCH_SIZE = 64
EXACT_STEPS = 100
EPOCHS = {"digits": 30, "mnist": 4}
MNIST_IMAGES = 20_000
# At each moment of training so many batches are compared with the exact ranking; so many before these can serve them.
COMPARED, BEFORE = 6, 24


@dataclass(frozen=True)
class Setting:
    """How phase 1 ranks.

    Attributes:
        n_steps: Steps on the path.
        num_samples: Samples of a batch.
        period: It runs on every nth batch.
        decay: Of a running mean of scores over its runs: 0 takes the last run alone.
        quadrature: Where on each step the gradient is taken.

    """

    n_steps: int
    num_samples: int
    period: int = 1
    decay: float = 0.0
    quadrature: Quadrature = "right"

    @property
    def rows(self) -> float:
        """Rows that pass through the model for each batch of training."""
        starts = 1 if self.quadrature == "right" else self.num_samples
        return (self.n_steps * self.num_samples + starts) / self.period

    def __str__(self) -> str:
        kind = "" if self.quadrature == "right" else f" {self.quadrature}"
        period = f" /{self.period}" if self.period > 1 else ""
        decay = f" running {self.decay:g}" if self.decay else ""
        return f"{self.n_steps}x{self.num_samples}{kind}{period}{decay}"


def fitting(n_steps: int, period: int = 1, decay: float = 0.0, quadrature: Quadrature = "right") -> Setting:
    """Make a setting with as many samples as the batch has rows for."""
    samples = num_samples_of(BATCH_SIZE, n_steps) if quadrature == "right" else BATCH_SIZE // (n_steps + 1)
    return Setting(n_steps, samples, period, decay, quadrature)


PAPER = fitting(5)
CHEAP = fitting(5, RECOMMENDED["every_n_batches"])
SETTINGS = (
    PAPER,
    # Fewer steps, fewer samples, another quadrature.
    *(Setting(n_steps, 12) for n_steps in (1, 2, 3)),
    *(fitting(n_steps) for n_steps in (1, 2, 3)),
    *(fitting(n_steps, quadrature="trapezoid") for n_steps in (1, 2, 3)),
    Setting(5, BATCH_SIZE),
    # What was found is carried over batches.
    *(fitting(5, period) for period in (2, 4, 8)),
    *(fitting(1, period) for period in (4, 8, 16)),
    *(fitting(2, period, quadrature="trapezoid") for period in (2, 4)),
    *(Setting(5, BATCH_SIZE, period) for period in (16, 24)),
    *(Setting(2, BATCH_SIZE, 16, quadrature="trapezoid"), Setting(3, BATCH_SIZE, 20, quadrature="trapezoid")),
    # And a running mean of it.
    *(fitting(5, 5, decay) for decay in (0.5, 0.7, 0.8)),
    *(fitting(2, period, decay, "trapezoid") for period in (1, 4, 5, 6) for decay in (0.5, 0.7, 0.8)),
    *(fitting(3, 5, decay, "trapezoid") for decay in (0.5, 0.7)),
    *(Setting(2, BATCH_SIZE, 16, decay, "trapezoid") for decay in (0.3, 0.5)),
)
NETWORKS = ("FC_1", "FC_2", "CNN", "Transformer")


def main(
    mnist_root: Path | None = None,
    networks: Sequence[str] = NETWORKS,
    activations: Sequence[str] = tuple(ACTIVATIONS),
    data: Sequence[str] = ("digits", "mnist"),
    moments: Sequence[str] = ("first batches", "start", "middle", "end"),
    jobs: int = 1,
    seed: int = 0,
) -> None:
    """Train every network on every data set, and compare settings on the way.

    Args:
        mnist_root: Folder with torchvision's MNIST; without it digits alone.
        networks: Which of them; FC_2 with ReLU alone.
        activations: Which of them.
        data: Which data sets.
        moments: Of training: "first batches", "start" (one epoch later, where annealing could end at the earliest),
            "middle", "end".
        jobs: Processes, of one thread each.
        seed: Of everything.

    """
    settings = {"networks": networks, "activations": activations, "jobs": jobs, "seed": seed, "batch size": BATCH_SIZE}
    cases = [
        case
        for case in itertools.product(data, networks, activations)
        if not (case[0] == "mnist" and mnist_root is None) and not (case[1] == "FC_2" and case[2] != "relu")
    ]
    by_name = {" ".join(case): case for case in cases}
    run = partial(compare_one, by_name, mnist_root, tuple(moments), seed)
    with tempfile.TemporaryDirectory() as folder:
        found = Pool(f"{folder}/cases.journal", "fidelity", jobs).run(run, {name: {} for name in by_name}, unit="case")
    if len(complete(found)) < len(cases):
        raise SystemExit("Some cases failed, for the reasons above.")
    rows = [row for name in by_name for row in found[name].user_attrs["rows"]]
    print({str(setting): round(setting.rows, 1) for setting in SETTINGS}, "rows for each batch")
    write_report("fidelity", torch.device("cpu"), settings, rows)


def compare_one(
    cases: Mapping[str, tuple[str, str, str]],
    mnist_root: Path | None,
    moments: Sequence[str],
    seed: int,
    trial: optuna.Trial,
    folder: Path,
) -> float:
    """Compare settings on the network, activation and data that a trial names, and keep the rows with the trial."""
    del folder
    trial.set_user_attr("rows", compare(*cases[trial.user_attrs["name"]], mnist_root, moments, seed))
    return 0.0


def compare(
    data: str, network: str, activation: str, mnist_root: Path | None, moments: Sequence[str], seed: int
) -> list[dict[str, Any]]:
    """Train one network with Y-Drop at the paper's settings, and rank units in every way at some moments.

    Returns:
        For each moment, by setting, the share of the exact strong bucket, as the mean over batches and layers.

    """
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    images, labels = load(data, mnist_root)
    model = build(network, ACTIVATIONS[activation], images)
    engine = YDrop(model, elasticity=1e-2, seed=seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    per_epoch = len(images) // BATCH_SIZE
    last = per_epoch * EPOCHS[data]
    begins = {"first batches": 0, "start": per_epoch, "middle": last // 2, "end": last - BEFORE - COMPARED}
    begins = {moment: begin for moment, begin in begins.items() if moment in moments}
    seen: dict[str, list[Ranked]] = {moment: [] for moment in begins}
    for number, (x, y) in enumerate(itertools.islice(batches(images, labels), last)):
        for moment, begin in begins.items():
            if begin <= number < begin + BEFORE + COMPARED:
                seen[moment].append(Ranked(model, x, y, exact=number >= begin + BEFORE))
        engine.step(x, y)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return [
        {"data": data, "network": network, "activation": activation, "moment": moment}
        | {str(setting): share_found(ranked, setting, seed) for setting in SETTINGS}
        for moment, ranked in seen.items()
    ]


class Ranked:
    """The conductance of all samples of one batch, by every rule that a setting may ask for, and exactly."""

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor, *, exact: bool) -> None:
        measure = partial(layer_conductance, model, x, y, max_rows=512)
        rules = {(setting.n_steps, setting.quadrature) for setting in SETTINGS}
        self.samples = {rule: measure(n_steps=rule[0], quadrature=rule[1]) for rule in sorted(rules)}
        self.exact: dict[str, set[int]] = {}
        if exact:
            scores = measure(n_steps=EXACT_STEPS, quadrature="trapezoid")
            self.exact = {name: strong_units(values.mean(0)) for name, values in scores.items()}

    def scores(self, layer: str, setting: Setting, generator: torch.Generator) -> Tensor:
        """Score a layer's units on as many samples as a setting draws."""
        values = self.samples[setting.n_steps, setting.quadrature][layer]
        return values[torch.randperm(len(values), generator=generator)[: setting.num_samples]].mean(0)


def share_found(ranked: Sequence[Ranked], setting: Setting, seed: int) -> float:
    """Average the share over the batches compared, all ages that a ranking may have there, and layers."""
    generator = torch.Generator().manual_seed(seed)
    shares = []
    for now, batch in enumerate(ranked):
        for layer, exact in batch.exact.items():
            for age in range(setting.period):
                # The last run, and where scores are carried on, those before it.
                runs = range(now - age, -1, -setting.period) if setting.decay else (max(0, now - age),)
                weights = [setting.decay**back for back in range(len(runs))]
                scores = sum(
                    weight * ranked[run].scores(layer, setting, generator)
                    for run, weight in zip(runs, weights, strict=True)
                )
                assert isinstance(scores, Tensor)
                shares.append(len(strong_units(scores) & exact) / len(exact))
    return statistics.fmean(shares)


def strong_units(scores: Tensor) -> set[int]:
    """Give the half of the units with the highest scores."""
    return set(scores.argsort(descending=True)[: strong_count(len(scores), 0.5)].tolist())


def load(data: str, mnist_root: Path | None) -> tuple[Tensor, Tensor]:
    """Give images (N, 1, H, W) of mean 0 and standard deviation 1, and their labels."""
    if data == "mnist":
        found = MNIST(str(mnist_root), download=False)
        images, labels = found.data[:MNIST_IMAGES].float(), found.targets[:MNIST_IMAGES]
    else:
        values, targets = load_digits(return_X_y=True)
        images, labels = torch.tensor(values, dtype=torch.float32).view(-1, 8, 8), torch.tensor(targets)
    return ((images - images.mean()) / images.std()).unsqueeze(1), labels


def build(network: str, activation: type[nn.Module], images: Tensor) -> nn.Module:
    """Make a network for images."""
    dropout: MakeDropout = partial(ConductanceDropout, 0.5)
    behind: MakeDropout = partial(ConductanceDropout, 0.5, unit_dim=-1)
    size = images.shape[-1]
    made: dict[str, Callable[[], nn.Module]] = {
        "FC_1": lambda: perceptron(size**2, [1024] * 2, 10, dropout, activation),
        "FC_2": lambda: perceptron(size**2, [2048] * 3, 10, dropout, activation),
        "CNN": lambda: small_cnn(dropout, activation),
        # Each row of an image is a token.
        "Transformer": lambda: nn.Sequential(nn.Flatten(1, 2), Transformer(size, 64, 2, 10, behind, activation)),
    }
    return made[network]()


def batches(images: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Give shuffled batches for ever."""
    for _ in itertools.count():
        order = torch.randperm(len(images))
        for rows in order.split(BATCH_SIZE)[: len(images) // BATCH_SIZE]:
            yield images[rows], labels[rows]


if __name__ == "__main__":
    auto_cli(main)
