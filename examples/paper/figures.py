"""Draw Fig. 2 and 3 of the paper from trained networks, and how well they do once units are pruned for good.

    python -m examples.paper.run --rows mnist_fig_2 --keep-checkpoints --out runs/figures --set data.root=data
    python -m examples.paper.figures --runs runs/figures

Each network is measured at its lowest validation loss: conductance on the validation set, accuracy on the test set. The
figures show the first seed of each arm, the tables in figures.md all of them.
"""

import argparse
import copy
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from examples.networks import Classifier
from examples.paper.kept import network, read, record_of
from examples.paper.results import commands_in, is_the_papers, place
from examples.paper.tables import markdown, spread
from examples.paper.words import arm_in_words
from examples.plots import legend_below, picture
from examples.train import TrainCLI
from lightning_ydrop.analysis import ConductanceSpread, RemovalCurve, mean_conductance, prune_units, removal_curve
from lightning_ydrop.analysis.plots import plot_conductance, plot_cumulative_conductance, plot_removal

FRACTIONS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.99)
# Of the row mnist_fig_2: share of the top 20% of units in percent, and at which fraction of removed units accuracy
# starts to fall (Sec. 6.2).
PAPER = {"plain": ("50.0", "20"), "dropout": ("41.7", "60"), "ydrop": ("nearly linear", "80")}
PRUNED_BY: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "conductance": lambda layer, conductance: conductance,
    "magnitude": lambda layer, conductance: layer.get_parameter("weight").detach().norm(dim=1),
    "random": lambda layer, conductance: torch.rand(len(conductance)),
}

PRUNED_IN_WORDS = {
    "conductance": "lowest conductance first",
    "magnitude": "smallest weights first",
    "random": "at random",
}


@dataclass(frozen=True)
class Shown:
    """What one network shows, of its hidden layers together.

    Attributes:
        conductance: The mean of each unit over the validation set, by layer.
        at_random: Accuracy while units are removed at random.
        by_conductance: Accuracy while units are removed, the strongest first.
        pruned: Accuracy while units are pruned, the weakest by conductance, by magnitude or at random first.

    """

    conductance: Mapping[str, Tensor]
    at_random: RemovalCurve
    by_conductance: RemovalCurve
    pruned: Mapping[str, RemovalCurve]


def shown(cli: TrainCLI, repeats: int) -> Shown:
    """Measure one network."""
    model = cli.model.eval()
    cli.datamodule.setup("test")
    validation, test = cli.datamodule.val_dataloader(), cli.datamodule.test_dataloader()
    layers = model.hidden_layers()
    conductance = mean_conductance(model, validation, layers=layers, n_steps=10, quadrature="trapezoid", max_rows=1024)
    strongest = removal_curve(model, test, conductance, layers=layers, fractions=FRACTIONS)
    at_random = removal_curve(model, test, "random", layers=layers, fractions=FRACTIONS, repeats=repeats)
    return Shown(conductance, at_random, strongest, {by: pruned(model, test, conductance, by) for by in PRUNED_BY})


def pruned(
    model: Classifier, test: DataLoader[tuple[Tensor, Tensor]], conductance: Mapping[str, Tensor], by: str
) -> RemovalCurve:
    """Prune copies of a network, and test them."""
    torch.manual_seed(0)
    scores = {name: PRUNED_BY[by](model.get_submodule(name), values) for name, values in conductance.items()}
    accuracies = []
    for fraction in FRACTIONS:
        smaller = copy.deepcopy(model)
        prune_units(smaller, scores, fraction)
        smaller.test_acc.reset()
        with torch.no_grad():
            for x, y in test:
                smaller.test_acc.update(smaller(x), y)
        accuracies.append(smaller.test_acc.compute())
    return RemovalCurve(FRACTIONS, torch.stack(accuracies).unsqueeze(0))


def papers_of(records: Sequence[Mapping[str, Any]]) -> Mapping[str, tuple[str, str]]:
    """Choose the paper's figures for runs of its network and data, or none."""
    return PAPER if all(each["row"] == "mnist_fig_2" and is_the_papers(each) for each in records) else {}


def summary(paper: Mapping[str, tuple[str, str]], arms: Mapping[str, Sequence[Shown]]) -> str:
    """Lay out how conductance is spread, beside the paper's figures where it has them."""
    columns = ["arm", "held by the top 20%, %", "the paper's", "Gini coefficient", "total", "removed at random, %"]
    lines = [[*columns, "removed strongest first, %", "the paper's", "networks"]]
    for arm, networks in arms.items():
        spreads = [spread_of(network.conductance) for network in networks]
        top, removed = paper.get(arm, ("", ""))
        lines.append(
            [
                arm,
                spread([100 * each["top_share"].item() for each in spreads], 1),
                top,
                spread([each["gini"].item() for each in spreads], 2),
                spread([each["total"].item() for each in spreads], 1),
                spread([100 * network.at_random.threshold() for network in networks], 0),
                spread([100 * network.by_conductance.threshold() for network in networks], 0),
                removed,
                str(len(networks)),
            ]
        )
    return markdown(lines)


def spread_of(conductance: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Say how conductance is spread over the units of the first hidden layer."""
    mean = next(iter(conductance.values()))
    spread = ConductanceSpread(len(mean))
    spread.update(mean.unsqueeze(0))
    return spread.compute()


def accuracies(arms: Mapping[str, Sequence[Shown]], curve: Callable[[Shown], RemovalCurve]) -> list[list[str]]:
    """Lay out one line for each arm: accuracy in percent for each fraction removed."""
    lines = []
    for arm, networks in arms.items():
        means = torch.stack([100 * curve(network).mean for network in networks])
        lines.append([arm, *(spread(column.tolist(), 2) for column in means.T)])
    return lines


def draw(arms: Mapping[str, Sequence[Shown]], folder: Path) -> None:
    """Draw the first network of each arm."""
    first = {arm_in_words(arm): networks[0] for arm, networks in arms.items()}
    means = {arm: next(iter(network.conductance.values())) for arm, network in first.items()}
    with picture(folder / "fig_2.png", 11, 5) as figure:
        left, right = figure.subplots(1, 2)
        plot_conductance(means, left).set_title("mean conductance of each unit")
        plot_cumulative_conductance(means, right).set_title("cumulative sum, and its shares")
        for axes in (left, right):
            axes.set_xlabel("units, from the highest to the lowest")
        _share_legend(figure, [left, right])
    with picture(folder / "fig_3.png", 11, 5) as figure:
        left, right = figure.subplots(1, 2, sharey=True)
        plot_removal({arm: network.at_random for arm, network in first.items()}, left)
        plot_removal({arm: network.by_conductance for arm, network in first.items()}, right)
        left.set(title="removed at random", ylabel="test accuracy, %")
        right.set(title="removed strongest first", ylabel="")
        _share_legend(figure, [left, right])
    rows = math.ceil(len(first) / 2)
    with picture(folder / "pruning.png", 11, 1 + 3.5 * rows) as figure:
        grid = figure.subplots(rows, min(2, len(first)), sharex=True, sharey=True, squeeze=False)
        panels = list(grid.ravel())[: len(first)]
        for (arm, network), axes in zip(first.items(), panels, strict=True):
            plot_removal({PRUNED_IN_WORDS[by]: curve for by, curve in network.pruned.items()}, axes)
            axes.set(title=arm, xlabel="units pruned, %", ylabel="test accuracy, %")
            axes.label_outer()
        _share_legend(figure, panels)


def _share_legend(figure: Figure, panels: Sequence[Axes]) -> None:
    """Give all panels one legend, which covers no curve."""
    for axes in panels:
        if legend := axes.get_legend():
            legend.remove()
    legend_below(figure, panels[0])


def write(
    paper: Mapping[str, tuple[str, str]], commands: str, arms: Mapping[str, Sequence[Shown]], folder: Path
) -> None:
    """Write figures.md of a row, and its pictures beside it."""
    draw(arms, folder)
    head = [f"{100 * fraction:.0f}%" for fraction in FRACTIONS]
    parts = [
        "# What trained networks show",
        "By `python -m examples.paper.figures`, of networks that were trained with `--keep-checkpoints`:",
        commands,
        "Conductance on the validation set, test accuracy in percent; mean and standard deviation over networks. "
        "How many units can be removed is the largest of the shares below that costs no more than one point of "
        "accuracy. The pictures show the networks of the first seed.",
        summary(paper, arms),
        "![Mean conductance of units, and its cumulative sum](fig_2.png)",
        "![Accuracy while units are removed](fig_3.png)",
        "## Removed at random",
        markdown([["arm", *head], *accuracies(arms, lambda network: network.at_random)]),
        "## Removed, the strongest first",
        markdown([["arm", *head], *accuracies(arms, lambda network: network.by_conductance)]),
    ]
    for by in PRUNED_BY:
        parts += [
            "## Pruned for good, " + ("at random" if by == "random" else f"the weakest by {by} first"),
            markdown([["arm", *head], *accuracies(arms, lambda network, by=by: network.pruned[by])]),  # type: ignore[misc]
        ]
    parts.append("![Accuracy of what is left](pruning.png)")
    (folder / "figures.md").write_text("\n\n".join(parts) + "\n")


def main(args: Sequence[str] | None = None) -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/figures"), help="what run.py left, of one row")
    parser.add_argument("--out", type=Path, help="a folder for figures.md and pictures; that of --runs by default")
    parser.add_argument("--repeats", type=int, default=25, help="how often units are drawn at random")
    known = parser.parse_args(args)
    sys.argv[1:] = []  # LightningCLI warns of arguments that it is not to read
    found: dict[str, list[Shown]] = defaultdict(list)
    results = read(known.runs)
    records = [record_of(result) for result in results]
    for result, record in zip(tqdm(results, unit="network", dynamic_ncols=True), records, strict=True):
        found[record["arm"]].append(shown(network(result), known.repeats))
    folder = known.out or known.runs
    folder.mkdir(parents=True, exist_ok=True)
    arms = {arm: found[arm] for arm in sorted(found, key=place)}
    write(papers_of(records), commands_in(known.runs), arms, folder)
    print(f"{folder / 'figures.md'} is written")


if __name__ == "__main__":
    main()
