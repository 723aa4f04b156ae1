"""What happens when annealing ends? Validation accuracy by epoch, for several ways to pass from dropout to Y-Drop.

    python -m experiments.first_minutes --seeds 10

scikit-learn's digits, two hidden layers of 256 units, SGD at 0.05 without momentum, annealing of 3 epochs. All
trainings of a seed begin with the same weights and batches. What is recorded is not trained again. A table and a
picture of the records go into docs/results.
"""

import argparse
import json
import logging
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch

from examples.data import Digits
from examples.networks import Classifier
from examples.paper.differences import difference_of
from examples.paper.tables import markdown
from examples.plots import legend_below, picture
from lightning_ydrop import YDropCallback
from lightning_ydrop.callbacks.schedule import Schedule

RECORDS = Path(__file__).parent / "records" / "first_minutes.jsonl"
OUT = Path(__file__).parents[1] / "docs/results/first_minutes"
EPOCHS, ANNEALING = 30, 3
# What YDropCallback is given; None trains with nn.Dropout.
ARMS: Mapping[str, Mapping[str, Any] | None] = {
    "nn.Dropout": None,
    "step, elasticity 1e-3": {"elasticity": 1e-3},
    "step, elasticity 1e-2": {"elasticity": 1e-2},
    "step, elasticity 1e-1": {"elasticity": 1e-1},
    "linear, elasticity 1e-2": {"elasticity": 1e-2, "transition": "linear"},
    "linear, elasticity 1e-1": {"elasticity": 1e-1, "transition": "linear"},
    "measured while annealing, 1e-2": {"elasticity": 1e-2, "measuring": True},
    "measured while annealing, 1e-1": {"elasticity": 1e-1, "measuring": True},
    "step from 0.39, elasticity 1e-2": {"elasticity": 1e-2, "initial_drop_prob": 0.39},
}
# Of a picture, and their colors: what the callback has by default, and what it recommends.
DRAWN = {
    "nn.Dropout": "tab:orange",
    "step, elasticity 1e-3": "black",
    "step, elasticity 1e-2": "tab:blue",
    "step, elasticity 1e-1": "tab:red",
    "linear, elasticity 1e-1": "tab:green",
}


class Measuring(Schedule):
    """Annealing in which the running mean moves already, while layers drop at their vanilla rate."""

    def progress(self, trainer: L.Trainer, batch_idx: int) -> float:
        """Stay just above 0 while annealing: at 0 nothing would be measured."""
        return max(super().progress(trainer, batch_idx), 1e-9)


class Curve(L.Callback):
    """Keeps the validation accuracy of each epoch."""

    def __init__(self) -> None:
        self.val_acc: list[float] = []

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep it."""
        self.val_acc.append(round(float(trainer.callback_metrics["val_acc"]), 4))


def train(settings: Mapping[str, Any] | None, seed: int) -> list[float]:
    """Train once, and give the validation accuracy after each epoch."""
    L.seed_everything(seed, verbose=False)
    curve, callbacks = Curve(), []
    if settings is not None:
        arguments = {name: value for name, value in settings.items() if name != "measuring"}
        callback = YDropCallback(annealing_epochs=ANNEALING, seed=seed, **arguments)
        if "measuring" in settings:
            callback._schedule = Measuring(ANNEALING)
        callbacks.append(callback)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=EPOCHS,
        callbacks=[*callbacks, curve],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    model = Classifier(
        (1, 8, 8), hidden=[256, 256], dropout="vanilla" if settings is None else "conductance", lr=0.05, momentum=0.0
    )
    trainer.fit(model, datamodule=Digits(split_seed=seed))
    return curve.val_acc


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """Lay out, for each arm, the deepest fall below nn.Dropout after annealing, and the end.

    Beside each mean is its gain over nn.Dropout, with the 95% interval of the paired t test.
    """
    vanilla = {record["seed"]: record["val_acc"] for record in records if record["arm"] == "nn.Dropout"}
    epochs = (ANNEALING, ANNEALING + 1, ANNEALING + 2, 2 * ANNEALING + 4, EPOCHS)
    lines = [["", *(f"after epoch {epoch}" for epoch in epochs), "best"]]
    for arm in ARMS:
        curves = {record["seed"]: record["val_acc"] for record in records if record["arm"] == arm}
        cells = []
        for epoch in (*epochs, None):
            values = [100 * (max(curve) if epoch is None else curve[epoch - 1]) for curve in curves.values()]
            others = [100 * (max(vanilla[seed]) if epoch is None else vanilla[seed][epoch - 1]) for seed in curves]
            gain = difference_of(zip(values, others, strict=True))
            mean = f"{statistics.fmean(values):.1f}"
            cells.append(mean if arm == "nn.Dropout" else f"{mean} ({gain.mean:+.1f} ± {gain.half_width:.1f})")
        lines.append([arm, *cells])
    return markdown(lines)


def draw(records: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Draw the mean validation accuracy after each epoch, and beside it the mean gain over nn.Dropout."""
    by_arm = {arm: {each["seed"]: each["val_acc"] for each in records if each["arm"] == arm} for arm in DRAWN}
    epochs = range(1, EPOCHS + 1)
    with picture(file, 12, 5) as figure:
        level, gain = figure.subplots(1, 2)
        for arm, curves in by_arm.items():
            means = [100 * statistics.fmean(values) for values in zip(*curves.values(), strict=True)]
            color = DRAWN[arm]
            level.plot(epochs, means, color=color, label=arm)
            pairs = [list(zip(curves[seed], by_arm["nn.Dropout"][seed], strict=True)) for seed in curves]
            differences = [difference_of((100 * a, 100 * b) for a, b in epoch) for epoch in zip(*pairs, strict=True)]
            centres = [each.mean for each in differences]
            gain.plot(epochs, centres, color=color)
            if arm != "nn.Dropout":
                low, high = ([each.mean + sign * each.half_width for each in differences] for sign in (-1, 1))
                gain.fill_between(epochs, low, high, color=color, alpha=0.15, linewidth=0)
        level.set(ylim=(80, None), xlabel="epoch", ylabel="validation accuracy, %", title="mean over seeds")
        gain.set(xlabel="epoch", ylabel="percentage points", title="gain over nn.Dropout, 95% interval")
        for axes in (level, gain):
            axes.axvline(ANNEALING + 0.5, color="gray", linestyle=":", linewidth=1)
        legend_below(figure, level)


def text(records: Sequence[Mapping[str, Any]]) -> str:
    """Write the report."""
    seeds = len({record["seed"] for record in records})
    return f"""# The first minutes

By `python -m experiments.first_minutes --seeds {seeds}`, from records in `experiments/records`.

Validation accuracy in percent on scikit-learn's digits, {seeds} seeds, with two hidden layers of 256 units; in brackets
the gain over nn.Dropout in points, with its 95% interval. Annealing ends after epoch {ANNEALING}, at the dotted line.

![Validation accuracy by epoch, and the gain over nn.Dropout](curves.png)

{table(records)}
"""


def main(args: Sequence[str] | None = None) -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--out", type=Path, default=OUT, help="folder of report.md and its picture")
    known = parser.parse_args(args)
    seeds, out = known.seeds, known.out
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    RECORDS.parent.mkdir(exist_ok=True)
    lines = RECORDS.read_text().splitlines() if RECORDS.exists() else []
    records = [json.loads(line) for line in lines]
    done = {(record["arm"], record["seed"]) for record in records}
    for seed in range(seeds):
        for arm, settings in ARMS.items():
            if (arm, seed) not in done:
                records.append({"arm": arm, "seed": seed, "val_acc": train(settings, seed)})
                with RECORDS.open("a") as file:
                    file.write(json.dumps(records[-1]) + "\n")
    out.mkdir(parents=True, exist_ok=True)
    draw(records, out / "curves.png")
    (out / "report.md").write_text(text(records))
    print(text(records))


if __name__ == "__main__":
    main()
