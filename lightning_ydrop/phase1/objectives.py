"""F, the scalar for each row whose gradient says how much a unit matters."""

from typing import Any

import torch
from torch import Tensor

from lightning_ydrop.errors import ConfigurationError, describe

Target = Tensor | None


def target_output(output: Tensor, target: Target) -> Tensor:
    """F of each row: the output that the target names.

    Nothing is checked here, since looking at values makes the host wait for the device: see `check_target`.

    Args:
        output: The model's output, shape (rows, C), or (rows, *) where there is no target.
        target: Class index, integer of shape (rows,): its logit. Soft labels, floating of shape (rows, C): the logits'
            sum weighted by them. None: the sum of the outputs.

    Returns:
        Shape (rows,).

    """
    if target is None:
        return output.flatten(1).sum(1) if output.ndim > 1 else output
    if target.is_floating_point():
        return (output * target).sum(1)
    return output.gather(1, target.long().unsqueeze(1)).squeeze(1)


def check_pairs(target: Any, num_samples: int) -> None:
    """Refuse what is no target for a number of samples.

    Raises:
        ConfigurationError: If the target is neither None nor a tensor with one entry for each sample.

    """
    if target is None:
        return
    if not isinstance(target, Tensor):
        raise ConfigurationError(
            f"The target is {describe(target)}.",
            "A target is a tensor of class indices (B,) or soft labels (B, C), or None for the sum of the outputs.",
            "Convert it in the dataset or in collate_fn, for example with torch.as_tensor.",
        )
    if target.shape[:1] != (num_samples,):
        raise ConfigurationError(
            f"The target is {describe(target)} for {num_samples} samples.",
            "Every sample has one target, in the first dimension.",
            "Pass inputs and targets of the same batch.",
        )


def check_target(output: Any, target: Target) -> None:
    """Refuse an output or a target that `target_output` cannot read. It looks at values, so a device has to catch up.

    Args:
        output: What the model returned for any number of rows.
        target: The target of a whole batch, of any number of rows.

    Raises:
        ConfigurationError: If the output is no floating tensor, the target does not fit to it, or a class lies outside.

    """
    if not (isinstance(output, Tensor) and output.is_floating_point() and output.ndim > 0):
        raise ConfigurationError(
            f"The model's forward returned {describe(output)}.",
            "Phase 1 differentiates one floating tensor with a row for each sample.",
            "Return the logits from forward; whatever else is needed can be computed in training_step.",
        )
    if target is None:
        return
    if output.ndim != 2:
        raise ConfigurationError(
            f"The model's forward returned {describe(output)} for the target {describe(target)}.",
            "With a target the output has the shape (B, C), one logit for each class.",
            "Return such logits, or pass None as the target for the sum of the outputs.",
        )
    num_classes = output.shape[1]
    if target.is_floating_point():
        if target.shape[1:] != output.shape[1:]:
            raise ConfigurationError(
                f"The target is {describe(target)} for an output of {num_classes} classes.",
                f"A floating target holds soft labels, so its shape is (B, {num_classes}), that of the output.",
                "For class indices convert it with target.long(); for no class at all pass None.",
            )
    elif target.ndim != 1 or target.dtype == torch.bool:
        raise ConfigurationError(
            f"The target is {describe(target)} for an output of {num_classes} classes.",
            "An integer target holds one class index for each sample, so its shape is (B,).",
            "Reshape it with target.flatten(), or turn one-hot rows into soft labels with target.float().",
        )
    elif target.numel() > 0:
        low, high = int(target.min()), int(target.max())
        if low < 0 or high >= num_classes:
            raise ConfigurationError(
                f"The target holds classes from {low} to {high} for an output of {num_classes} classes.",
                f"Class indices lie from 0 to {num_classes - 1}.",
                "Number the classes from 0, and give the model's last layer an output for each.",
            )
