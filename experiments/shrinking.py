"""How small can a trained network become? Size, time and accuracy without its weakest units, by three kinds of scores.

    python -m experiments.shrinking --seeds 5

scikit-learn's digits, two hidden layers of 1024 units, trained with nn.Dropout(0.5) for 30 epochs. Then `shrink_units`
takes out half, three quarters, nine tenths and 39 of 40 of the units of both layers: those of the lowest conductance on
the training set, those with the smallest weights, or any. What is left is trained for 5 epochs more. A table of the
records goes into docs/results.
"""

import argparse
import json
import logging
import statistics
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from examples.data import Digits
from examples.networks import Classifier
from examples.paper.tables import markdown, spread
from lightning_ydrop.analysis import mean_conductance, shrink_units

RECORDS = Path(__file__).parent / "records" / "shrinking.jsonl"
OUT = Path(__file__).parents[1] / "docs/results/shrinking"
FRACTIONS = (0.5, 0.75, 0.9, 0.975)
EPOCHS, EPOCHS_AFTER = 30, 5
ORDERS = ("conductance", "magnitude", "random")


def scores_of(model: nn.Module, data: Digits, order: str, seed: int) -> dict[str, Tensor]:
    """Score the units of the hidden layers, by name."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    layers.popitem()  # the classes
    if order == "conductance":
        return mean_conductance(model, data.train_dataloader(), layers=list(layers), progress_bar=False)
    if order == "magnitude":
        return {name: layer.weight.detach().norm(dim=1) for name, layer in layers.items()}
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(len(layer.weight), generator=generator) for name, layer in layers.items()}


def fit(model: L.LightningModule, data: Digits, epochs: int) -> None:
    """Train for some epochs, on the CPU."""
    _trainer(epochs).fit(model, datamodule=data)


def accuracy(model: L.LightningModule, data: Digits) -> float:
    """Test, in percent."""
    (reached,) = _trainer(1).test(model, datamodule=data, verbose=False)
    return 100 * reached["test_acc"]


def _trainer(epochs: int) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def milliseconds(model: nn.Module, inputs: Tensor) -> float:
    """Time a forward pass without gradients, the median of 50."""
    times = []
    with torch.inference_mode():
        for _ in range(60):
            start = time.perf_counter()
            model(inputs)
            times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times[10:])


def trained(seed: int) -> list[dict[str, Any]]:
    """Train a network, make it smaller in each way, and train it on."""
    L.seed_everything(seed, verbose=False)
    data = Digits(split_seed=seed)
    model = Classifier((1, 8, 8), hidden=[1024, 1024], dropout="vanilla", p=0.5)
    fit(model, data, EPOCHS)
    inputs = data.test.normalise(data.test.inputs)
    whole = {"accuracy": accuracy(model, data), "parameters": _size(model), "ms": milliseconds(model.eval(), inputs)}
    found = [{"seed": seed, "order": "", "fraction": 0.0, **whole}]
    for order in ORDERS:
        scores = scores_of(model, data, order, seed)
        for fraction in FRACTIONS:
            smaller = shrink_units(model, scores, fraction, inputs[:2])
            assert isinstance(smaller, L.LightningModule)
            row = {"seed": seed, "order": order, "fraction": fraction, "accuracy": accuracy(smaller, data)}
            row |= {"parameters": _size(smaller), "ms": milliseconds(smaller.eval(), inputs)}
            fit(smaller.train(), data, EPOCHS_AFTER)
            found.append(row | {"accuracy after": accuracy(smaller, data)})
    return found


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """Lay out means and standard deviations over seeds."""
    head = ["units removed", "parameters", "time of a forward pass"]
    head += [f"by {order}{when}" for when in ("", ", trained on") for order in ORDERS]
    lines = [head]
    whole = [record for record in records if not record["order"]]
    time_of_whole = statistics.median(record["ms"] for record in whole)
    lines.append(["none", f"{whole[0]['parameters']:,}", "1.00", spread([each["accuracy"] for each in whole], 2)])
    lines[-1] += [""] * (len(head) - len(lines[-1]))
    for fraction in FRACTIONS:
        rows = [record for record in records if record["fraction"] == fraction]
        times = statistics.median(row["ms"] for row in rows) / time_of_whole
        line = [f"{100 * fraction:g}%", f"{rows[0]['parameters']:,}", f"{times:.2f}"]
        for column in ("accuracy", "accuracy after"):
            line += [spread([row[column] for row in rows if row["order"] == order], 2) for order in ORDERS]
        lines.append(line)
    return markdown(lines)


def report() -> None:
    """Write the page that the records make."""
    records = [json.loads(line) for line in RECORDS.read_text().splitlines()]
    num_seeds = len({record["seed"] for record in records})
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "report.md").write_text(
        "# Smaller networks\n\n"
        f"By `python -m experiments.shrinking --seeds {num_seeds}`, whose records lie in `experiments/records`.\n\n"
        "Test accuracy in percent on scikit-learn's digits, mean and standard deviation over "
        f"{num_seeds} seeds, for two hidden layers of 1024 units that were trained with nn.Dropout(0.5) for {EPOCHS} "
        "epochs. `shrink_units` takes out the units of both layers that have the lowest mean conductance on the "
        "training set, the smallest norm of their weights, or any units; then the network is trained for "
        f"{EPOCHS_AFTER} epochs more, with the same dropout. Time is that of a forward pass of 360 images on the CPU, "
        "as a share of the whole network's.\n\n" + table(records)
    )


def main(args: Sequence[str] | None = None) -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    known = parser.parse_args(args)
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    lines = RECORDS.read_text().splitlines() if RECORDS.exists() else []
    there = {json.loads(line)["seed"] for line in lines}
    for seed in sorted(set(range(known.seeds)) - there):
        lines += [json.dumps(record) for record in trained(seed)]
        RECORDS.write_text("".join(f"{line}\n" for line in lines))
        print(f"seed {seed} is trained", flush=True)
    report()


if __name__ == "__main__":
    main()
