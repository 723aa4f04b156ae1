"""Is a network as sure as it is right? One pass beside the average over dropout masks, on scikit-learn's digits.

    python -m examples.uncertainty

It trains a perceptron with dropout on a tenth of the images, in half a minute. Then it prints the accuracy, the
negative log-likelihood and the expected calibration error of one pass in evaluation mode and of the average over masks,
and how uncertain the average is where it is right and where it is wrong. The average is less sure than one pass. That
helps a network that is too sure, and harms one that is not: see --max-epochs 10. Pass --seed for other trainings.
"""

import argparse
import logging
import warnings
from collections.abc import Sequence

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.classification import BinaryAUROC, MulticlassAccuracy, MulticlassCalibrationError

from examples.data import Digits
from examples.networks import Classifier
from lightning_ydrop import MonteCarloCallback
from lightning_ydrop.uncertainty import MonteCarlo

NUM_CLASSES = 10


def measures(probabilities: Tensor, labels: Tensor) -> dict[str, float]:
    """Measure how right predictions are, and how far one can trust what they say of that."""
    calibration = MulticlassCalibrationError(NUM_CLASSES, n_bins=15)  # the expected calibration error
    accuracy = MulticlassAccuracy(NUM_CLASSES, average="micro")
    return {
        "accuracy": 100 * float(accuracy(probabilities, labels)),
        "NLL": float(F.nll_loss(probabilities.clamp(min=torch.finfo(torch.float32).tiny).log(), labels)),
        "ECE": 100 * float(calibration(probabilities, labels)),
    }


def report(average: MonteCarlo, one_pass: Tensor, labels: Tensor) -> str:
    """Write both tables."""
    both = {"one pass": one_pass, f"{average.num_samples} masks": average.probabilities}
    lines = [f"{'':>10}  {'accuracy, %':>11}  {'NLL, nats':>9}  {'ECE, %':>6}"]
    for name, probabilities in both.items():
        found = measures(probabilities, labels)
        lines.append(f"{name:>10}  {found['accuracy']:>11.2f}  {found['NLL']:>9.4f}  {found['ECE']:>6.2f}")
    is_right = average.probabilities.argmax(1) == labels
    kinds = {
        "total": average.entropy,
        "aleatoric": average.expected_entropy,
        "epistemic": average.mutual_information,
    }
    lines += ["", f"{'uncertainty, nats':>17}  {'where right':>11}  {'where wrong':>11}  {'AUROC':>5}"]
    for name, uncertainty in kinds.items():
        # How often a wrong prediction is more uncertain than a right one.
        auroc = float(BinaryAUROC()(uncertainty, (~is_right).long()))
        right, wrong = (float(uncertainty[part].mean()) for part in (is_right, ~is_right))
        lines.append(f"{name:>17}  {right:>11.3f}  {wrong:>11.3f}  {auroc:>5.2f}")
    return "\n".join(lines)


def main(args: Sequence[str] | None = None) -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-epochs", type=int, default=60)
    parser.add_argument("--num-samples", type=int, default=100, help="masks")
    parser.add_argument("--train-fraction", type=float, default=0.1, help="share of the images to train on")
    known = parser.parse_args(args)
    warnings.filterwarnings("ignore", ".*does not have many workers")
    warnings.filterwarnings("ignore", category=FutureWarning, module="lightning")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)

    L.seed_everything(known.seed, verbose=False)
    data = Digits(split_seed=known.seed, train_fraction=known.train_fraction)
    model = Classifier((1, 8, 8), hidden=[256, 256], dropout="vanilla", lr=0.05)
    trainer = L.Trainer(
        max_epochs=known.max_epochs,
        accelerator="cpu",
        callbacks=[MonteCarloCallback(known.num_samples, seed=known.seed)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=data)
    # What predict returns for each batch, put together.
    batches = trainer.predict(model, data.test_dataloader()) or []
    average = MonteCarlo(
        torch.cat([batch.probabilities for batch in batches]),  # type: ignore[union-attr]
        known.num_samples,
        entropy_of_masks=torch.cat([batch.expected_entropy for batch in batches]),  # type: ignore[union-attr]
    )
    inputs, labels = (torch.cat(parts) for parts in zip(*data.test_dataloader(), strict=True))
    with torch.no_grad():
        one_pass = model.eval()(inputs).softmax(1)
    print(report(average, one_pass, labels))


if __name__ == "__main__":
    main()
