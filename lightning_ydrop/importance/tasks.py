"""What phase 1 differentiates for each kind of task, and the signs that a batch is of another kind."""

from collections.abc import Mapping
from typing import Literal, get_args

from torch import Tensor

from lightning_ydrop.errors import ConfigurationError, describe
from lightning_ydrop.importance.objectives import Objective, TargetLogit, check_objective
from lightning_ydrop.models.calls import Target

Task = Literal["multiclass", "binary", "multilabel", "regression", "reconstruction"]


class SignedLogit(Objective):
    """The logits with the signs of their labels, for binary and multi-label models: `sum((2 y - 1) z)`.

    The output has one logit for each label, so for a binary model one for each sample, or for each pixel. The target
    has a 0 or 1 for each logit, of any dtype, or a number between the two. Dimensions of size 1 may be missing: a
    target (B,) fits an output (B, 1), and a target (B, H, W) an output (B, 1, H, W).
    """

    def __call__(self, output: Tensor, target: Target) -> Tensor:
        """Add up the logits of the labels that hold, less those of the others."""
        if target is None:
            return output.flatten(1).sum(1) if output.ndim > 1 else output
        return (output * (2 * target.to(output.dtype) - 1).reshape_as(output)).reshape(len(output), -1).sum(1)

    def check(self, output: Tensor, target: Target) -> None:
        """Refuse a target that has not a number from 0 to 1 for each logit."""
        if target is None:
            return
        if not _fits(output, target):
            raise ConfigurationError(
                f"{self!r} was given, and the model's forward returned {describe(output)} for the target "
                f"{describe(target)}.",
                "Binary and multi-label models have one logit for each label.",
                'For class indices pass objective="multiclass".',
            )
        if bool((target < 0).any()) or bool((target > 1).any()):
            raise ConfigurationError(
                f"{self!r} was given, and the target {describe(target)} holds numbers outside [0, 1].",
                "A label is 0 or 1, or between the two.",
                "Labels of -1 and 1 become (target + 1) / 2 in a method `ydrop_inputs`. For class indices pass "
                'objective="multiclass", for other numbers objective="regression".',
            )


class NegativeSquaredError(Objective):
    """The squared error with its sign turned, for regressions: the units that reduce the error most matter most.

    Dimensions of size 1 may be missing in the target: one of (B,) fits an output (B, 1).
    """

    def __call__(self, output: Tensor, target: Target) -> Tensor:
        """Add up the squared errors of each row, and turn the sign."""
        assert target is not None
        errors = output - target.to(output.dtype).reshape_as(output)
        return -errors.square().reshape(len(output), -1).sum(1)

    def check(self, output: Tensor, target: Target) -> None:
        """Refuse a target that has not a number for each output."""
        if target is None or not _fits(output, target):
            raise ConfigurationError(
                f"{self!r} was given, and the model's forward returned {describe(output)} for the target "
                f"{'None' if target is None else describe(target)}.",
                "A regression has a number for each output.",
                "Let `ydrop_inputs` or the adapter return a target of the shape of the output. For class indices pass "
                'objective="multiclass", and where the target is the input objective="reconstruction".',
            )


class Reconstruction(NegativeSquaredError):
    """The squared error between output and input with its sign turned, for autoencoders. It takes no target.

    Paths lead from the baseline to an input. The output is compared with that input all along.
    """

    takes_target = False
    target_is_input = True

    def check(self, output: Tensor, target: Target) -> None:
        """Refuse an output that has not a number for each one of the input."""
        assert target is not None
        if not _fits(output, target):
            raise ConfigurationError(
                f"{self!r} was given, and the model's forward returned {describe(output)} for the input "
                f"{describe(target)}.",
                "A reconstruction has the shape of the input.",
                "Write a method `ydrop_forward` that returns it, or choose another objective.",
            )


OBJECTIVES: Mapping[str, type[Objective]] = {
    "multiclass": TargetLogit,
    "binary": SignedLogit,
    "multilabel": SignedLogit,
    "regression": NegativeSquaredError,
    "reconstruction": Reconstruction,
}


def objective_of(owner: str, objective: Objective | Task | None) -> Objective:
    """Give the objective of a task.

    Args:
        owner: What the user called, for messages.
        objective: An objective, the name of a task, or None for multi-class classification.

    Raises:
        ConfigurationError: If it is something else.

    """
    if objective is None:
        return TargetLogit()
    if isinstance(objective, str):
        if objective not in OBJECTIVES:
            raise ConfigurationError(
                f"{owner}(objective={objective!r}) was given.",
                f"The tasks are {', '.join(map(repr, get_args(Task)))}.",
                'Name one of them: a segmentation is "multiclass", an autoencoder "reconstruction". Or pass an '
                "objective such as TargetLogit(class_dim=-1).",
            )
        chosen = OBJECTIVES[objective]()
        chosen.task = objective
        return chosen
    check_objective(owner, objective)
    return objective


def check_task(output: Tensor, inputs: tuple[Tensor, ...], target: Target) -> None:
    """Refuse a batch that looks as if its model was no classifier, where nobody has named a task.

    Args:
        output: The model's output, (rows, *).
        inputs: The floating inputs, (rows, *).
        target: What was read as class indices.

    Raises:
        ConfigurationError: If the output has the shape of the only input, and the labels name a small part of it.

    """
    if target is None or target.is_floating_point() or len(inputs) != 1 or output.shape[1:] != inputs[0].shape[1:]:
        return
    num_outputs = output[0].numel()
    if num_outputs >= 2 * (1 + int(target.max())) and num_outputs > 16:
        raise ConfigurationError(
            f"The model's forward returned {describe(output)}, the shape of its input, for the target "
            f"{describe(target)}, which names no class above {int(target.max())}.",
            "Without `objective`, an output is a logit for each class. This looks like an autoencoder, whose batches "
            "have labels that it does not train on.",
            'Pass objective="reconstruction" for an autoencoder, or objective="multiclass" if the output holds logits.',
        )


def _fits(output: Tensor, target: Tensor) -> bool:
    """Tell whether a target has an entry for each output of a row, apart from dimensions of size 1."""
    shapes = ([size for size in tensor.shape[1:] if size != 1] for tensor in (output, target))
    return not target.is_complex() and len(set(map(tuple, shapes))) == 1
