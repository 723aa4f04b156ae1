"""A LightningModule that trains a student to say in one pass what its teacher says on average over its masks."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn

from lightning_ydrop.checks import check_count, check_module, is_real
from lightning_ydrop.errors import ConfigurationError, describe
from lightning_ydrop.models.adapters import Adapter, AutomaticAdapter, check_adapter
from lightning_ydrop.models.batches import own_method, read_batch
from lightning_ydrop.models.calls import Inputs, arguments_of, signature_of
from lightning_ydrop.models.state import logging_muted, random_stream_kept
from lightning_ydrop.torch_internals import uncompiled
from lightning_ydrop.uncertainty.masks import dropout_off
from lightning_ydrop.uncertainty.monte_carlo import (
    check_drops,
    logits_of,
    mean_probabilities,
    warn_of_vanilla_rates,
)
from lightning_ydrop.uncertainty.teachers import copied, load_checkpoint

# They restore a module by the names in it, before a hook of Lightning's is called; a student's checkpoint has others.
SHARDING = ("FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy", "XLAFSDPStrategy")
# What a LightningModule does to each batch before its steps.
BATCH_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


class DropoutDistillation(LightningModule):
    """Dropout distillation (Rota Bulo, Porzi, Kontschieder, ICML 2016), to be fitted by a plain Trainer.

    For each batch the teacher, with its dropout on, predicts with masks drawn anew, and the student learns these
    predictions by cross-entropy. Its optimum is the average over all masks, which it then gives in one pass. Labels are
    not needed: any data serve. The teacher is a copy, of which only what drops is in training mode: its weights and its
    BatchNorm stay as they are. What a LightningModule does to batches before its steps, this does too. Checkpoints are
    the student's own: they load into its class, as if it had been trained by itself, and a Trainer goes on from them.

    It logs `train_loss`, `val_loss` and `test_loss`, the cross-entropy. The masks of validation and of testing are the
    same every time. F.dropout in a forward is not seen: a student that calls it drops while it is trained.

    Args:
        teacher: A trained classifier with dropout, LightningModule or not, whose forward gives logits (B, C, *).
        checkpoint: A checkpoint to take the teacher's weights from, and the probabilities that Y-Drop has left there:
            `load_from_checkpoint` would find the weights alone.
        student: Any classifier with the same outputs. None: a copy of the teacher, its dropout off.
        num_masks: Masks for each sample in a training step.
        temperature: What the logits of both are divided by, above 0. With any but 1 the student learns the average of
            other, softer predictions, and losses are of these, multiplied by the square of it.
        optimizer: Makes the optimiser from the student's parameters.
        adapter: How inputs are found in a batch, where the teacher, or a subclass of this, has no method
            `ydrop_inputs`; labels are not looked at, `IndexAdapter(inputs=0, target=None)` needs none.
        class_dim: Dimension of the classes in the logits of both, -1 for (B, *, C).
        max_rows: At most so many rows pass through the teacher at once, but never fewer than the batch has. None: all
            masks in one pass, where every layer draws for each sample. Where a GPU has no memory for so many, each
            step finds that out anew: pass fewer.

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
        class_dim: int = 1,
        max_rows: int | None = None,
    ) -> None:
        super().__init__()
        check_module("DropoutDistillation", teacher)
        check_count("DropoutDistillation", "num_masks", num_masks, minimum=1, example=1)
        if max_rows is not None:
            check_count("DropoutDistillation", "max_rows", max_rows, minimum=1, example=4096)
        if not (is_real(temperature) and temperature > 0):
            raise ConfigurationError(
                f"DropoutDistillation(temperature={describe(temperature)}) was given.",
                "`temperature` is a finite number above 0.",
                "Pass, for example, temperature=1.0.",
            )
        if isinstance(optimizer, torch.optim.Optimizer) or not callable(optimizer):
            raise ConfigurationError(
                f"DropoutDistillation(optimizer={describe(optimizer)}) was given.",
                "`optimizer` makes an optimiser from the student's parameters.",
                "Pass, for example, optimizer=functools.partial(torch.optim.SGD, lr=0.01).",
            )
        check_adapter("DropoutDistillation", adapter)
        teacher = copied(teacher)
        own = _made(teacher)
        if checkpoint is None:
            warn_of_vanilla_rates("DropoutDistillation", teacher)
        else:
            load_checkpoint(own, checkpoint, _own_hparams(own, "teacher") if isinstance(own, LightningModule) else {})
        check_drops("DropoutDistillation", teacher)
        self._dropout_off = student is None
        self.student = _student_of(teacher) if student is None else student
        check_module("DropoutDistillation", self.student)
        _made(self.student)
        if not any(parameter.requires_grad for parameter in self.student.parameters()):
            raise ConfigurationError(
                f"DropoutDistillation(student={describe(student)}) was given, in which nothing is to be trained.",
                "A student has parameters that require gradients.",
                "Call student.requires_grad_(True), or that of the part that is to learn.",
            )
        self.teacher = teacher.requires_grad_(False)
        for hook in BATCH_HOOKS:
            if isinstance(own, LightningModule) and is_overridden(hook, own, LightningModule):
                # On the instance: a DataModule's hooks come first, and Lightning warns of those of both.
                setattr(self, hook, getattr(own, hook))
        self.num_masks = num_masks
        self.temperature = temperature
        self.optimizer = optimizer
        self.adapter = adapter
        self.class_dim = class_dim
        self.max_rows = max_rows

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the student."""
        return self.student(*args, **kwargs)

    def setup(self, stage: str) -> None:
        """Refuse strategies that could not go on from a student's checkpoint.

        Raises:
            ConfigurationError: If the Trainer has one of them.

        """
        strategy = self.trainer.strategy
        if any(base.__name__ in SHARDING for base in type(strategy).__mro__):
            raise ConfigurationError(
                f"DropoutDistillation was given to a Trainer with {type(strategy).__name__}.",
                "Strategies that shard restore a module by the names in it, and a student's checkpoint has its own.",
                'Distil with strategy="ddp".',
            )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Cross-entropy between what the teacher says with fresh masks and what the student says."""
        return self._logged_loss("train_loss", batch)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """The same on held-out data, with the same masks each time, so that epochs can be compared."""
        with self._same_masks(batch_idx):
            self._logged_loss("val_loss", batch, prog_bar=True)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """The same on a test set, with the same masks each time."""
        with self._same_masks(batch_idx):
            self._logged_loss("test_loss", batch)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Give what the student returns for the inputs in a batch."""
        return self._student_says(self._inputs_of(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Give the student's parameters to the optimiser."""
        return self.optimizer(self.student.parameters())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what a checkpoint of the student's own class holds: the teacher has a checkpoint of its own."""
        student, prefix = self._own_student()
        checkpoint["state_dict"] = {
            name.removeprefix(prefix): value
            for name, value in checkpoint["state_dict"].items()
            if name.startswith(prefix)
        }
        if isinstance(student, LightningModule):
            student.on_save_checkpoint(checkpoint)
            if student.hparams:
                # `load_from_checkpoint` reads hyperparameters under either of two keys. Under the usual one
                # LightningCLI would take the student's for those of the module that goes on, which is this one.
                checkpoint["hparams"] = _own_hparams(student, "teacher" if self._dropout_off else "student")
                checkpoint[self.CHECKPOINT_HYPER_PARAMS_NAME] = student._hparams_name

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Let the student read what it has written, and tell its weights from the teacher's."""
        student, prefix = self._own_student()
        if isinstance(student, LightningModule):
            student.on_load_checkpoint(checkpoint)
        weights = {f"{prefix}{name}": value for name, value in checkpoint["state_dict"].items()}
        checkpoint["state_dict"] = weights | {
            f"teacher.{name}": value for name, value in self.teacher.state_dict().items()
        }

    @contextmanager
    def _same_masks(self, batch_idx: int) -> Iterator[None]:
        """Let a batch draw the same masks every time, which take nothing from the random stream of training."""
        with random_stream_kept(self.device):
            torch.manual_seed(batch_idx)
            yield

    def _own_student(self) -> tuple[nn.Module, str]:
        """Give the student without what compilation puts around it, and the beginning of the names of its weights."""
        student = uncompiled(self.student)
        return student, "student." if student is self.student else "student._orig_mod."

    def _inputs_of(self, batch: Any) -> Inputs:
        reader = self.teacher if own_method(self, "ydrop_inputs") is None else self
        inputs, _ = read_batch(reader, self.adapter, batch)
        return inputs

    def _student_says(self, inputs: Inputs) -> Any:
        forward = own_method(self.student, "ydrop_forward") or self.student
        positional, keywords = arguments_of(signature_of(self.student, forward), inputs)
        return forward(*positional, **keywords)

    def _logged_loss(self, name: str, batch: Any, prog_bar: bool = False) -> Tensor:
        inputs = self._inputs_of(batch)
        with logging_muted(self):
            taught = mean_probabilities(
                self.teacher,
                inputs,
                self.num_masks,
                temperature=self.temperature,
                class_dim=self.class_dim,
                max_rows=self.max_rows,
                forward=own_method(self.teacher, "ydrop_forward"),
            )
            with dropout_off(self.student) if self._dropout_off else nullcontext():
                logits = logits_of(self._student_says(inputs), len(taught), self.class_dim)
        if logits.shape != taught.shape:
            raise ConfigurationError(
                f"The teacher's predictions have the shape {tuple(taught.shape)}, the student's {tuple(logits.shape)}.",
                "A student predicts the same classes as its teacher.",
                "Give it as many outputs.",
            )
        # A class that is impossible, of logit -inf, adds nothing: 0 times infinity would be no number.
        logits = (logits / self.temperature).clamp(min=torch.finfo(logits.dtype).min)
        # Gradients fall with the square of the temperature (Hinton, Vinyals, Dean, 2015).
        loss = nn.functional.cross_entropy(logits, taught) * self.temperature**2
        self.log(name, loss, on_step=False, on_epoch=True, prog_bar=prog_bar, batch_size=len(taught), sync_dist=True)
        return loss


def _made(model: nn.Module) -> nn.Module:
    """Give a model without what compilation puts around it, and with what a LightningModule makes late."""
    own = uncompiled(model)
    if isinstance(own, LightningModule):
        own.configure_model()
    return own


def _student_of(teacher: nn.Module) -> nn.Module:
    """Copy a teacher for training, also one that was frozen or in evaluation mode when it was passed."""
    student = copied(teacher).train()
    if not any(parameter.requires_grad for parameter in student.parameters()):
        student.requires_grad_(True)
    return student


def _own_hparams(module: LightningModule, role: str) -> dict[str, Any]:
    """Give the hyperparameters that a teacher or student has saved.

    LightningCLI tells every module that it makes the arguments of the outermost, which is the DropoutDistillation.
    """
    hparams: Mapping[str, Any] = module.hparams
    given = hparams.get(role)
    if "_instantiator" in hparams and isinstance(given, Mapping) and "class_path" in given:
        own = dict(given.get("init_args", {}))
        return {**own, "_class_path": given["class_path"], "_instantiator": hparams["_instantiator"]}
    return dict(hparams)
