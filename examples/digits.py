"""Y-Drop beside nn.Dropout on scikit-learn's digits, in two minutes.

    python -m examples.digits

It trains a perceptron without dropout, with nn.Dropout and with Y-Drop, twice each, from the same weights and on
the same batches, and prints their test accuracy. Two trainings prove nothing; docs/explanation/evidence.md has more.
"""

import argparse
import logging
import statistics
import warnings

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from tqdm import tqdm

from examples.data import Digits
from examples.networks import Classifier, Dropout
from lightning_ydrop import YDropCallback

# What stands in the network, and what the table calls it.
METHODS: dict[str, Dropout] = {"no dropout": "none", "nn.Dropout": "vanilla", "Y-Drop": "vanilla"}


def train(method: str, seed: int, max_epochs: int, folder: str) -> float:
    """Train once, and give the test accuracy in percent of the weights with the lowest validation loss."""
    L.seed_everything(seed, verbose=False)
    best = ModelCheckpoint(f"{folder}/{method}-{seed}", monitor="val_loss")
    # The callback turns the network's nn.Dropout into layers that it drives.
    ydrop = [YDropCallback(convert=True, seed=seed)] if method == "Y-Drop" else []
    trainer = L.Trainer(
        max_epochs=max_epochs,
        accelerator="cpu",
        callbacks=[best, *ydrop],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = Digits(split_seed=seed)
    model = Classifier((1, 8, 8), hidden=[1024, 1024], dropout=METHODS[method], lr=0.01)
    trainer.fit(model, datamodule=data)
    (tested,) = trainer.test(model, data, ckpt_path="best", verbose=False)
    return 100 * tested["test_acc"]


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--max-epochs", type=int, default=25)
    parser.add_argument("--out", default="runs/digits", help="folder for checkpoints")
    known = parser.parse_args()
    warnings.filterwarnings("ignore", ".*does not have many workers")
    warnings.filterwarnings("ignore", category=FutureWarning, module="lightning")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    runs = [(method, seed) for seed in range(known.seeds) for method in METHODS]
    accuracy: dict[str, list[float]] = {method: [] for method in METHODS}
    for method, seed in tqdm(runs, desc="trainings"):
        accuracy[method].append(train(method, seed, known.max_epochs, known.out))
    print(f"test accuracy of {known.seeds} trainings each, in percent")
    for method, values in accuracy.items():
        print(f"{method:>12}: {statistics.fmean(values):.2f}   ({', '.join(f'{value:.2f}' for value in values)})")


if __name__ == "__main__":
    main()
