"""A LightningModule that trains a student to say in one pass what its teacher says on average over its masks."""

import copy
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from lightning_ydrop.distillation.masks import dropout_off, dropping
from lightning_ydrop.distillation.monte_carlo import check_drops, mean_probabilities
from lightning_ydrop.errors import ConfigurationError, check_count, check_module, describe, is_real
from lightning_ydrop.phase1.adapters import Adapter, AutomaticAdapter, check_adapter
from lightning_ydrop.phase1.context import signature_of
from lightning_ydrop.phase1.engine import YDrop
from lightning_ydrop.phase1.inputs import Inputs, arguments_of
from lightning_ydrop.phase1.objectives import read_output


class DropoutDistillation(LightningModule):
    """Dropout distillation (Rota Bulo, Porzi, Kontschieder, ICML 2016), to be fitted by a plain Trainer.

    For each batch the teacher, with its dropout on, predicts with masks drawn anew, and the student learns these
    predictions by cross-entropy. Its optimum is the average over all masks, which it then gives in one pass. Labels are
    not needed: any data serve. Of the teacher only what drops is in training mode; its weights and its BatchNorm stay
    as they are. Checkpoints are the student's own: they load into its class, as if it had been trained by itself.

    It logs `train_loss` and `val_loss`, the cross-entropy. The masks of validation are the same every time.

    Args:
        teacher: A trained classifier with dropout, LightningModule or not, whose forward gives logits (B, C, *).
        checkpoint: A checkpoint to take the teacher's weights from, and the probabilities that Y-Drop has left there.
        student: Any classifier with the same outputs. None: a copy of the teacher, its dropout off.
        num_masks: Masks for each sample in a training step, in one pass of the teacher.
        temperature: What the logits of both are divided by, above 0.
        optimizer: Makes the optimiser from the student's parameters.
        adapter: How inputs are found in a batch.

    Raises:
        ConfigurationError: If nothing in the teacher drops, the checkpoint is not its own, or an argument is out of
            range.

    Example:
        >>> teacher = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 3))
        >>> distillation = DropoutDistillation(teacher, num_masks=4)
        >>> distillation(torch.randn(16, 4)).shape
        torch.Size([16, 3])

    """

    def __init__(
        self,
        teacher: nn.Module,
        checkpoint: str | None = None,
        student: nn.Module | None = None,
        num_masks: int = 1,
        temperature: float = 1.0,
        optimizer: OptimizerCallable = torch.optim.Adam,
        adapter: Adapter = AutomaticAdapter(),
    ) -> None:
        super().__init__()
        check_module("DropoutDistillation", teacher)
        check_count("DropoutDistillation", "num_masks", num_masks, minimum=1, example=1)
        if not (is_real(temperature) and temperature > 0):
            raise ConfigurationError(
                f"DropoutDistillation(temperature={describe(temperature)}) was given.",
                "`temperature` is a finite number above 0.",
                "Pass, for example, temperature=1.0.",
            )
        check_adapter("DropoutDistillation", adapter)
        check_drops("DropoutDistillation", teacher)
        if student is not None:
            check_module("DropoutDistillation", student)
        if checkpoint is not None:
            _load(teacher, checkpoint)
        self._dropout_off = student is None
        self.student = copy.deepcopy(teacher) if student is None else student
        if not any(parameter.requires_grad for parameter in self.student.parameters()):
            self.student.requires_grad_(True)  # as that of a teacher that has taught before
        self.teacher = teacher.requires_grad_(False)
        self.num_masks = num_masks
        self.temperature = temperature
        self.optimizer = optimizer
        self.adapter = adapter

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the student."""
        return self.student(*args, **kwargs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Cross-entropy between what the teacher says with fresh masks and what the student says."""
        loss = self._loss(batch)
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """The same on held-out data, with the same masks each time, so that epochs can be compared."""
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(batch_idx)
            self.log("val_loss", self._loss(batch), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Give the student's parameters to the optimiser."""
        return self.optimizer(self.student.parameters())

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Give the student's: the teacher has its own checkpoint."""
        return self.student.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load the student's."""
        return self.student.load_state_dict(state_dict, strict=strict, assign=assign)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Write what a checkpoint of the student's class holds besides its weights."""
        if isinstance(self.student, LightningModule):
            self.student.on_save_checkpoint(checkpoint)
            if self.student.hparams:
                checkpoint[self.CHECKPOINT_HYPER_PARAMS_NAME] = self.student._hparams_name
                checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY] = self._hparams_of_student(self.student.hparams)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Let the student read what it has written."""
        if isinstance(self.student, LightningModule):
            self.student.on_load_checkpoint(checkpoint)

    def _hparams_of_student(self, hparams: Mapping[str, Any]) -> dict[str, Any]:
        given = hparams.get("teacher" if self._dropout_off else "student")
        if "_instantiator" in hparams and isinstance(given, Mapping) and "class_path" in given:
            # LightningCLI tells every module that it makes the arguments of the outermost, which is this one.
            own = dict(given.get("init_args", {}))
            return {**own, "_class_path": given["class_path"], "_instantiator": hparams["_instantiator"]}
        return dict(hparams)

    def _loss(self, batch: Any) -> Tensor:
        inputs: Inputs = self.adapter.read(batch)[0]
        with dropping(self.teacher):
            taught = mean_probabilities(self.teacher, inputs, self.num_masks, temperature=self.temperature)
        positional, keywords = arguments_of(signature_of(self.student, self.student), inputs)
        with dropout_off(self.student) if self._dropout_off else nullcontext():
            logits = read_output(self.student(*positional, **keywords)).float() / self.temperature
        if logits.shape != taught.shape:
            raise ConfigurationError(
                f"The teacher's predictions have the shape {tuple(taught.shape)}, the student's {tuple(logits.shape)}.",
                "A student predicts the same classes as its teacher.",
                "Give it as many outputs.",
            )
        # Gradients fall with the square of the temperature (Hinton, Vinyals, Dean, 2015).
        return nn.functional.cross_entropy(logits, taught) * self.temperature**2


def _load(teacher: nn.Module, checkpoint: str) -> None:
    """Take a teacher's weights, and what Y-Drop has left, from a checkpoint of a Trainer."""
    held = torch.load(Path(checkpoint), map_location="cpu", weights_only=True)
    try:
        teacher.load_state_dict(held["state_dict"])
    except (KeyError, TypeError, RuntimeError) as error:
        raise ConfigurationError(
            f"DropoutDistillation(checkpoint={checkpoint!r}) was given for {type(teacher).__name__}: {error}.",
            "It is a checkpoint that a Trainer has saved of this very class.",
            "Pass the teacher with the arguments that it was trained with, and a checkpoint of that training.",
        ) from error
    for name, state in held.get("callbacks", {}).items():
        if name.startswith("YDropCallback") and state:
            YDrop(teacher).load_state_dict(state)
