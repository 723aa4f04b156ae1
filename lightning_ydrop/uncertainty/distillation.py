"""A LightningModule that trains a student to predict in one pass what a teacher predicts on average over masks."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lightning_ydrop.checks import check_class_dim, check_count, check_flag, check_module, check_number
from lightning_ydrop.errors import ConfigurationError, describe
from lightning_ydrop.models.adapters import Adapter, AutomaticAdapter, check_adapter
from lightning_ydrop.models.batches import own_method, read_batch
from lightning_ydrop.models.calls import Inputs, Target, arguments_of, signature_of
from lightning_ydrop.models.functional_dropout import switching_dropout_calls
from lightning_ydrop.models.state import logging_muted, random_stream_kept
from lightning_ydrop.torch_internals import uncompiled
from lightning_ydrop.uncertainty.averaging import average_over_masks, subject_of
from lightning_ydrop.uncertainty.draws import MaskSharing
from lightning_ydrop.uncertainty.functional_calls import dropping_in_calls
from lightning_ydrop.uncertainty.head import StudentWithUncertainty, division_loss, widen
from lightning_ydrop.uncertainty.masks import check_drops, dropout_off
from lightning_ydrop.uncertainty.monte_carlo import warn_of_vanilla_rates
from lightning_ydrop.uncertainty.outputs import Dims, logits_of
from lightning_ydrop.uncertainty.tasks import Classification, Probabilities
from lightning_ydrop.uncertainty.teachers import copy_of, load_checkpoint

# These restore a module by its own names before Lightning calls a hook, but a student's checkpoint has other names.
SHARDING = ("FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy", "XLAFSDPStrategy")
# The hooks in which a LightningModule changes a batch before its steps.
BATCH_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
# As in lightning.pytorch.cli, which takes as long to import as all of this package.
OptimizerCallable = Callable[[Iterable[Any]], torch.optim.Optimizer]


class DropoutDistillation(LightningModule):
    """Dropout distillation (Rota Bulo, Porzi, Kontschieder, ICML 2016), to be fitted by a plain Trainer.

    For each batch the teacher predicts with its dropout on and fresh masks, and the student learns these predictions
    by cross-entropy. The optimum is the average over all masks, which the student then gives in one pass. No labels are
    needed: any data serve. The teacher is a copy. Only what drops in it is in training mode, so its weights and its
    BatchNorm stay as they are. If the teacher is a LightningModule, its hooks for batches apply here too. Checkpoints
    are the student's own: they load into its class, as if it had been trained by itself, and a Trainer can resume from
    them.

    It logs `train_loss`, `val_loss` and `test_loss`, the cross-entropy. `train_agreement`, `val_agreement` and
    `test_agreement` are the share of predictions in which the student's likeliest class is the teacher's. Where batches
    have labels, `train_acc`, `val_acc` and `test_acc` are the student's accuracy. Labels are whole numbers (B, *), of
    which those that name no class do not count. Validation and testing use the same masks every time. After a fit the
    student is in evaluation mode. A call of F.dropout in a forward method is left as it is, unless `functional` is
    set: the teacher does not drop there, and a student that has one drops while it is trained.

    With `uncertainty_head` the student also learns how its uncertainty is divided, and `student(x)` gives logits,
    aleatoric and epistemic uncertainty: see `StudentWithUncertainty`. Its loss is added, and logged as
    `train_division_loss`, `val_division_loss` and `test_division_loss`. Checkpoints are those of `student.network`,
    which has one output more than the teacher: they load into its class if it is made with one class more.

    Args:
        teacher: A trained classifier with dropout, LightningModule or not, whose forward gives logits (B, C, *).
        checkpoint: A checkpoint with the teacher's weights and the probabilities that Y-Drop has left there.
            `load_from_checkpoint` would load the weights only.
        student: Any classifier with the same outputs. None: a copy of the teacher, its dropout off.
        num_masks: Masks for each sample in a training step, at least 1.
        temperature: What the logits of both are divided by, above 0. At any value except 1 the student learns the
            average of other, softer predictions. Losses are those of these predictions, multiplied by its square.
        optimizer: Makes the optimiser from the student's parameters.
        adapter: It reads inputs and labels from a batch, unless the teacher or a subclass of this class has a method
            `ydrop_inputs`. Labels are not learned from: `IndexAdapter(inputs=0, target=None)` needs none.
        class_dim: Dimension of the classes in the logits of both, -1 for (B, *, C).
        max_rows: At most this many rows pass through the teacher at once, but never fewer than the batch has. None: all
            masks in one pass, if every layer draws for each sample. The first step of three masks or more finds out
            whether it does. If a GPU has no memory for that many rows, each step finds out again: pass a smaller
            number.
        functional: Whether calls of F.dropout and its kin, and of F.scaled_dot_product_attention, are on in the teacher
            and off in a student that is its copy: see `monte_carlo`.
        uncertainty_head: Whether the student learns its uncertainty too. A copy of the teacher gets one output more in
            its last layer. A `student` that you pass has one output more than the teacher. `temperature` is 1 then.

    Raises:
        ConfigurationError: If nothing in the teacher drops, the checkpoint is not the teacher's, an argument is out
            of range, or the last layer of the copy can't be widened.

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
        functional: bool = False,
        uncertainty_head: bool = False,
    ) -> None:
        super().__init__()
        check_module("DropoutDistillation", teacher)
        self.num_masks = check_count("DropoutDistillation", "num_masks", num_masks, minimum=1, example=1)
        self.temperature = check_number("DropoutDistillation", "temperature", temperature, example=1.0, positive=True)
        self.class_dim = check_class_dim("DropoutDistillation", class_dim)
        self.max_rows = max_rows
        if max_rows is not None:
            self.max_rows = check_count("DropoutDistillation", "max_rows", max_rows, minimum=1, example=4096)
        self.uncertainty_head = check_flag("DropoutDistillation", "uncertainty_head", uncertainty_head)
        if self.uncertainty_head and self.temperature != 1:
            raise ConfigurationError(
                f"DropoutDistillation(temperature={self.temperature}, uncertainty_head=True) was given.",
                "At any other temperature than 1 a student learns softer predictions, whose uncertainty is another.",
                "Leave temperature or uncertainty_head out.",
            )
        if isinstance(optimizer, torch.optim.Optimizer) or not callable(optimizer):
            raise ConfigurationError(
                f"DropoutDistillation(optimizer={describe(optimizer)}) was given.",
                "`optimizer` makes an optimiser from the student's parameters.",
                "Pass, for example, optimizer=functools.partial(torch.optim.SGD, lr=0.01).",
            )
        check_adapter("DropoutDistillation", adapter)
        teacher = copy_of(teacher)
        plain_teacher = _configured(teacher)
        if checkpoint is None:
            warn_of_vanilla_rates("DropoutDistillation", teacher)
        else:
            hparams = _hparams_of(plain_teacher, "teacher") if isinstance(plain_teacher, LightningModule) else {}
            load_checkpoint(plain_teacher, checkpoint, hparams)
        self.functional = check_flag("DropoutDistillation", "functional", functional)
        if not self.functional:
            check_drops("DropoutDistillation", teacher)
        self._dropout_off = student is None
        network = _student_of(teacher) if student is None else student
        check_module("DropoutDistillation", network)
        _configured(network)
        if self.uncertainty_head and student is None:
            widen(network)
        self.student = StudentWithUncertainty(network, self.class_dim) if self.uncertainty_head else network
        if not any(parameter.requires_grad for parameter in self.student.parameters()):
            raise ConfigurationError(
                f"DropoutDistillation(student={describe(student)}) was given, in which nothing is to be trained.",
                "A student has parameters that require gradients.",
                "Call student.requires_grad_(True), or call it for the part that shall learn.",
            )
        self.teacher = teacher.requires_grad_(False)
        for hook in BATCH_HOOKS:
            if isinstance(plain_teacher, LightningModule) and is_overridden(hook, plain_teacher, LightningModule):
                # On the instance: a DataModule's hooks come first, and Lightning warns where a class has them as well.
                setattr(self, hook, getattr(plain_teacher, hook))
        self.optimizer = optimizer
        self.adapter = adapter
        # MulticlassAccuracy would have to know how many classes there are before the first batch.
        self.train_acc, self.val_acc, self.test_acc = MeanMetric(), MeanMetric(), MeanMetric()
        self._accuracies = {"train": self.train_acc, "val": self.val_acc, "test": self.test_acc}
        self._in_training: list[nn.Module] = []  # modules of the student that a fit has put into evaluation mode
        self._mask_sharing = MaskSharing()  # the teacher stays the same, so what one step learns holds for the others

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the student."""
        return self.student(*args, **kwargs)

    def setup(self, stage: str) -> None:
        """Refuse strategies that can't resume from a student's checkpoint.

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

    def on_fit_start(self) -> None:
        """Go on with a student that an earlier fit has put into evaluation mode."""
        for module in self._in_training:
            module.training = True
        self._in_training = []

    def on_fit_end(self) -> None:
        """Leave the student in evaluation mode, as it is to be used."""
        self._in_training = [module for module in self.student.modules() if module.training]
        self.student.eval()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Give the cross-entropy between the teacher's predictions with fresh masks and the student's."""
        return self._logged_loss("train", batch)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log the same loss on held-out data, with the same masks each time, so that epochs can be compared."""
        with self._same_masks(batch_idx):
            self._logged_loss("val", batch, prog_bar=True)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log the same loss on a test set, with the same masks each time."""
        with self._same_masks(batch_idx):
            self._logged_loss("test", batch)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Give the student's output for the inputs in a batch."""
        output = self._network_output(self._read(batch)[0])
        return self.student.divided(output) if isinstance(self.student, StudentWithUncertainty) else output

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Give the student's parameters to the optimiser."""
        return self.optimizer(self.student.parameters())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Turn the checkpoint into one of the student's class: the teacher has a checkpoint of its own."""
        student, prefix = self._plain_student()
        checkpoint["state_dict"] = {
            name.removeprefix(prefix): value
            for name, value in checkpoint["state_dict"].items()
            if name.startswith(prefix)
        }
        if isinstance(student, LightningModule):
            student.on_save_checkpoint(checkpoint)
            if student.hparams:
                # `load_from_checkpoint` reads hyperparameters under either of two keys. If they were under the usual
                # one, LightningCLI would take them for those of the module that resumes, which is this one.
                checkpoint["hparams"] = _hparams_of(student, "teacher" if self._dropout_off else "student")
                checkpoint[self.CHECKPOINT_HYPER_PARAMS_NAME] = student._hparams_name

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Let the student read what it has saved, and name the weights of both as this module names them."""
        student, prefix = self._plain_student()
        if isinstance(student, LightningModule):
            student.on_load_checkpoint(checkpoint)
        weights = {f"{prefix}{name}": value for name, value in checkpoint["state_dict"].items()}
        checkpoint["state_dict"] = weights | {
            f"teacher.{name}": value for name, value in self.teacher.state_dict().items()
        }

    @contextmanager
    def _same_masks(self, batch_idx: int) -> Iterator[None]:
        """Draw the same masks for a batch every time, without a change to the random stream of training."""
        with random_stream_kept(self.device):
            torch.manual_seed(batch_idx)
            yield

    def _plain_student(self) -> tuple[nn.Module, str]:
        """Give the student without its wrapper of torch.compile, and the prefix of the names of its weights."""
        network = self._network
        student = uncompiled(network)
        prefix = "student.network." if self.uncertainty_head else "student."
        return student, prefix if student is network else f"{prefix}_orig_mod."

    @property
    def _network(self) -> nn.Module:
        """The student that gives logits, and with `uncertainty_head` one output more."""
        return self.student.network if isinstance(self.student, StudentWithUncertainty) else self.student

    def _read(self, batch: Any) -> tuple[Inputs, Target]:
        reader = self.teacher if own_method(self, "ydrop_inputs") is None else self
        return read_batch(reader, self.adapter, batch)

    def _network_output(self, inputs: Inputs) -> Any:
        network = self._network
        forward = own_method(network, "ydrop_forward") or network
        positional, keywords = arguments_of(signature_of(network, forward), inputs)
        return forward(*positional, **keywords)

    def _means_over_masks(self, inputs: Inputs) -> Mapping[str, Tensor]:
        """Give the teacher's mean probabilities and, for a head, the mean entropy of what single masks predict."""
        subject = subject_of(self.teacher, inputs, own_method(self.teacher, "ydrop_forward"))
        task = Probabilities(Dims(self.class_dim), self.temperature)
        sharing = self._mask_sharing
        with dropping_in_calls("DropoutDistillation", subject, sharing) if self.functional else nullcontext():
            return average_over_masks(
                subject,
                Classification(Dims(self.class_dim)) if self.uncertainty_head else task,
                self.num_masks,
                max_rows=self.max_rows,
                sharing=sharing,
            ).means

    def _logged_loss(self, stage: str, batch: Any, prog_bar: bool = False) -> Tensor:
        inputs, target = self._read(batch)
        with logging_muted(self):
            means = self._means_over_masks(inputs)
            average = means["probabilities"]
            with ExitStack() as stack:
                if self._dropout_off:
                    stack.enter_context(dropout_off(self.student))
                    if self.functional:
                        stack.enter_context(switching_dropout_calls(False))
                logits = logits_of(self._network_output(inputs), len(average), Dims(self.class_dim))
        num_extra = 1 if self.uncertainty_head else 0
        if logits.shape != (len(average), average.shape[1] + num_extra, *average.shape[2:]):
            raise ConfigurationError(
                f"The teacher's predictions have the shape {tuple(average.shape)}, the student's "
                f"{tuple(logits.shape)}.",
                "A student predicts the same classes as its teacher"
                f"{', and has one output more with uncertainty_head=True' if num_extra else ''}.",
                "Pass student=... with one output more." if num_extra else "Give it as many outputs.",
            )
        logits, extra = logits[:, : average.shape[1]], logits[:, average.shape[1] :]
        # The logit of an impossible class is -inf. It must add nothing, but 0 times infinity is NaN.
        logits = (logits / self.temperature).clamp(min=torch.finfo(logits.dtype).min)
        # Gradients fall with the square of the temperature (Hinton, Vinyals, Dean, 2015).
        loss = nn.functional.cross_entropy(logits, average) * self.temperature**2
        division = division_loss(extra[:, 0], logits, average, means["entropy"]) if num_extra else None
        said, taught = logits.detach().argmax(1), average.argmax(1)
        count = len(average)
        self.log(
            f"{stage}_loss", loss, on_step=False, on_epoch=True, prog_bar=prog_bar, batch_size=count, sync_dist=True
        )
        agreement = (said == taught).float().mean()
        self.log(f"{stage}_agreement", agreement, on_step=False, on_epoch=True, batch_size=count, sync_dist=True)
        if isinstance(target, Tensor) and _are_labels(target, said):
            accuracy = self._accuracies[stage]
            names_class = (target >= 0) & (target < logits.shape[1])
            accuracy.update((said == target).float(), names_class.float())
            self.log(f"{stage}_acc", accuracy, on_step=False, on_epoch=True, batch_size=count)
        if division is None:
            return loss
        self.log(f"{stage}_division_loss", division, on_step=False, on_epoch=True, batch_size=count, sync_dist=True)
        return loss + division


def _are_labels(target: Tensor, said: Tensor) -> bool:
    """Tell whether a target can name a class for each prediction."""
    return not (target.is_floating_point() or target.is_complex()) and target.shape == said.shape


def _configured(model: nn.Module) -> nn.Module:
    """Give a model without its wrapper of torch.compile, after a LightningModule has made its late layers."""
    plain_model = uncompiled(model)
    if isinstance(plain_model, LightningModule):
        plain_model.configure_model()
    return plain_model


def _student_of(teacher: nn.Module) -> nn.Module:
    """Copy a teacher for training, even if it was frozen or in evaluation mode."""
    student = copy_of(teacher).train()
    if not any(parameter.requires_grad for parameter in student.parameters()):
        student.requires_grad_(True)
    return student


def _hparams_of(module: LightningModule, role: str) -> dict[str, Any]:
    """Give the hyperparameters that a teacher or student has saved.

    LightningCLI gives every module that it makes the arguments of the outermost one, the DropoutDistillation.
    """
    hparams: Mapping[str, Any] = module.hparams
    arguments = hparams.get(role)
    if "_instantiator" in hparams and isinstance(arguments, Mapping) and "class_path" in arguments:
        init_args = dict(arguments.get("init_args", {}))
        return {**init_args, "_class_path": arguments["class_path"], "_instantiator": hparams["_instantiator"]}
    return dict(hparams)
