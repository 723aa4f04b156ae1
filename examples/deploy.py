"""Serve a network's uncertainty in one pass: distil it, export the student to ONNX, run that with onnxruntime.

    python -m examples.deploy --out student.onnx

On scikit-learn's digits, in half a minute. The teacher is a perceptron with dropout that is trained on a tenth of the
images. A student learns its average over masks, and how uncertain that is, from all training images without labels.
Then it is exported, and what onnxruntime makes of the file is compared with torch and with 100 masks of the teacher.
It takes lightning-ydrop[examples], onnxscript and onnxruntime.
"""

import argparse
import functools
import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn
from torchmetrics.classification import BinaryAUROC

from examples.data import Digits
from examples.networks import Classifier
from examples.uncertainty import measures
from lightning_ydrop import ConfigurationError, DropoutDistillation, monte_carlo
from lightning_ydrop.errors import describe
from lightning_ydrop.functional import predictive_entropy

# What a student with an uncertainty head returns.
OUTPUTS = ("logits", "aleatoric", "epistemic")


def trainer_for(max_epochs: int) -> L.Trainer:
    """Make a Trainer that says and keeps nothing."""
    return L.Trainer(
        max_epochs=max_epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )


def trained_teacher(data: Digits, max_epochs: int = 60) -> Classifier:
    """Train a perceptron with dropout, and give it in evaluation mode."""
    teacher = Classifier((1, 8, 8), hidden=[256, 256], dropout="vanilla", lr=0.05)
    trainer_for(max_epochs).fit(teacher, datamodule=data)
    return teacher.eval()


def distilled(
    teacher: nn.Module, data: Digits, max_epochs: int = 60, num_masks: int = 4, uncertainty_head: bool = True
) -> nn.Module:
    """Train a student on the training images, and give it in evaluation mode."""
    distillation = DropoutDistillation(
        teacher,
        num_masks=num_masks,
        optimizer=functools.partial(torch.optim.Adam, lr=1e-3),
        uncertainty_head=uncertainty_head,
    )
    trainer_for(max_epochs).fit(distillation, datamodule=data)
    return distillation.student


def export(model: nn.Module, inputs: Tensor, file: str | Path, outputs: Sequence[str] = OUTPUTS) -> None:
    """Write a model to an ONNX file that takes batches of any size.

    Args:
        model: In evaluation mode, with one input.
        inputs: An example of the input, two rows or more.
        file: Where to.
        outputs: Names of what the model returns.

    Raises:
        ConfigurationError: If the model is in training mode, in which it would be exported with its dropout.

    """
    if model.training:
        raise ConfigurationError(
            f"export({describe(model)}) was given a model in training mode.",
            "A model is exported as it is to be used.",
            "Call model.eval() first.",
        )
    torch.onnx.export(
        model,
        (inputs,),
        str(file),
        dynamo=True,
        external_data=False,
        input_names=["inputs"],
        output_names=list(outputs),
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        verbose=False,
    )


class Served:
    """An exported model in onnxruntime, on the CPU.

    Args:
        file: The ONNX file.
        threads: For one pass; 0 for as many as onnxruntime likes.

    """

    def __init__(self, file: str | Path, threads: int = 0) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self._session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        (self._input,) = self._session.get_inputs()
        self._outputs = [output.name for output in self._session.get_outputs()]

    def __call__(self, inputs: np.ndarray[Any, Any]) -> dict[str, np.ndarray[Any, Any]]:
        """Run it on a batch, and give its outputs by name.

        Raises:
            ConfigurationError: If the batch is none of the model's.

        """
        # A dimension of any size has a name instead of a number.
        fixed = [size if isinstance(size, int) else None for size in self._input.shape]
        fits = isinstance(inputs, np.ndarray) and inputs.ndim == len(fixed) and inputs.dtype == np.float32
        if not fits or any(size not in (None, given) for size, given in zip(fixed, inputs.shape, strict=True)):
            given = f"{inputs.dtype} {inputs.shape}" if isinstance(inputs, np.ndarray) else describe(inputs)
            raise ConfigurationError(
                f"A served model was given {given}.",
                f"It takes an array of float32 of the shape {self._input.shape}.",
                "Scale and shape inputs as for training, and call .astype(np.float32).",
            )
        return dict(zip(self._outputs, self._session.run(None, {self._input.name: inputs}), strict=True))


def uncertainties(outputs: Mapping[str, np.ndarray[Any, Any]]) -> tuple[Tensor, dict[str, Tensor]]:
    """Turn the outputs of a student into probabilities and its total, aleatoric and epistemic uncertainty in nats."""
    probabilities = torch.from_numpy(outputs["logits"]).softmax(1)
    parts = {name: torch.from_numpy(outputs[name]) for name in OUTPUTS[1:] if name in outputs}
    return probabilities, {"total": predictive_entropy(probabilities), **parts}


def averaged(teacher: nn.Module, inputs: Tensor, num_masks: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Give the same of the average over masks of a teacher."""
    average = monte_carlo(teacher, inputs, num_masks, progress_bar=False)
    return average.probabilities, {
        "total": average.entropy,
        "aleatoric": average.expected_entropy,
        "epistemic": average.mutual_information,
    }


def auroc_of_errors(uncertainty: Tensor, is_wrong: Tensor) -> float:
    """Tell how often a wrong prediction is more uncertain than a right one: 0.5 by chance."""
    return float(BinaryAUROC()(uncertainty, is_wrong.long()))


def table(predictions: Mapping[str, tuple[Tensor, Mapping[str, Tensor]]], labels: Tensor) -> str:
    """Write how right predictions are, and how well each kind of uncertainty tells the wrong ones."""
    kinds = ("total", "aleatoric", "epistemic")
    lines = [f"{'':>20}  {'accuracy, %':>11}  {'NLL, nats':>9}  {'ECE, %':>6}   AUROC of errors: {', '.join(kinds)}"]
    for name, (probabilities, parts) in predictions.items():
        found, is_wrong = measures(probabilities, labels), probabilities.argmax(1) != labels
        aurocs = "  ".join(f"{auroc_of_errors(parts[kind], is_wrong):.3f}" if kind in parts else "" for kind in kinds)
        lines.append(
            f"{name:>20}  {found['accuracy']:>11.2f}  {found['NLL']:>9.4f}  {found['ECE']:>6.2f}   {aurocs}".rstrip()
        )
    return "\n".join(lines)


def quieten() -> None:
    """Silence what Lightning and the exporter say about themselves."""
    warnings.filterwarnings("ignore", ".*does not have many workers")
    warnings.filterwarnings("ignore", ".*defined a `validation_step`")
    warnings.filterwarnings("ignore", ".*in eval mode at the start of training")  # the teacher
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    for name in ("lightning.pytorch", "lightning.fabric", "torch.onnx", "onnx_ir", "onnxscript"):
        logging.getLogger(name).setLevel(logging.ERROR)


def main(args: Sequence[str] | None = None) -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("student.onnx"), help="the file to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-epochs", type=int, default=60, help="of the teacher and of the student")
    known = parser.parse_args(args)
    if not known.out.absolute().parent.is_dir():
        parser.error(f"--out {known.out}: there is no folder {known.out.parent}. Make it first.")
    quieten()

    L.seed_everything(known.seed, verbose=False)
    teacher = trained_teacher(Digits(split_seed=known.seed, train_fraction=0.1), known.max_epochs)
    data = Digits(split_seed=known.seed)
    student = distilled(teacher, data, known.max_epochs)
    inputs, labels = data.test.inputs, data.test.labels
    export(student, inputs[:2], known.out)

    served = Served(known.out)(inputs.numpy())
    with torch.no_grad():
        in_torch = dict(zip(OUTPUTS, student(inputs), strict=True))
        one_pass = teacher(inputs).softmax(1)
    difference = max(float((torch.from_numpy(served[name]) - in_torch[name]).abs().max()) for name in OUTPUTS)
    print(f"{known.out}: onnxruntime differs from torch by {difference:.1e} at most\n")
    predictions: dict[str, tuple[Tensor, Mapping[str, Tensor]]] = {
        "teacher, one pass": (one_pass, {"total": predictive_entropy(one_pass)}),
        "teacher, 10 masks": averaged(teacher, inputs, 10),
        "teacher, 100 masks": averaged(teacher, inputs, 100),
        "student, onnxruntime": uncertainties(served),
    }
    print(table(predictions, labels))


if __name__ == "__main__":
    main()
