"""Which targets a logit can be taken for, and how others are refused."""

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from lightning_ydrop.errors import ConfigurationError, describe

# By how much shares may miss 1: those of label smoothing in bfloat16, with a thousand classes, stay below it.
LARGEST_EXCESS = 0.02


def class_dim_of(owner: str, class_dim: object) -> int:
    """Give the dimension of the classes as an int, also if it is an integer of NumPy.

    Raises:
        ConfigurationError: If it is 0, or not a whole number.

    """
    if not isinstance(class_dim, Integral) or isinstance(class_dim, bool) or class_dim == 0:
        raise ConfigurationError(
            f"{owner}(class_dim={describe(class_dim)}) was given.",
            "`class_dim` is the dimension of the classes in the output, any but 0, which is the batch.",
            "Pass 1 for (B, C) and (B, C, H, W), or -1 for (B, T, C).",
        )
    return int(class_dim)


def ignore_index_of(owner: str, ignore_index: object) -> int:
    """Give the class index that does not count as an int, also if it is an integer of NumPy.

    Raises:
        ConfigurationError: If it is not a whole number.

    """
    if not isinstance(ignore_index, Integral) or isinstance(ignore_index, bool):
        raise ConfigurationError(
            f"{owner}(ignore_index={describe(ignore_index)}) was given.",
            "`ignore_index` is a whole number.",
            "Pass, for example, ignore_index=-100.",
        )
    return int(ignore_index)


def check_pairs(target: Any, num_samples: int, batch_dim: int = 0, sizes: Sequence[int] = ()) -> None:
    """Refuse what is no target for a number of samples.

    Args:
        target: The target.
        num_samples: How many samples the inputs have.
        batch_dim: The dimension of the samples.
        sizes: The sizes of an input, among which another dimension may be the batch.

    Raises:
        ConfigurationError: If the target is neither None nor a tensor with one entry for each sample.

    """
    if target is None:
        return
    if not isinstance(target, Tensor):
        raise ConfigurationError(
            f"The target is {describe(target)}.",
            "A target is a tensor of class indices (B,), soft labels (B, C) or dense labels (B, H, W), or None for the "
            "sum of the outputs.",
            "Convert it in the dataset or in collate_fn, for example with torch.as_tensor, or choose it with an "
            "adapter.",
        )
    if num_samples not in (*target.shape[:1], *target.shape[batch_dim : batch_dim + 1]):
        remedy = "Pass inputs and targets of the same batch."
        if target.ndim and (other := 1 - min(batch_dim, 1)) < len(sizes) and sizes[other] == len(target):
            remedy = (
                f"Dimension {other} of the inputs has {len(target)} entries: for models of "
                f"{'(T, B, F)' if other else '(B, T, F)'} pass batch_dim={other}, here and to the layers. Otherwise "
                "pass inputs and targets of the same batch."
            )
        raise ConfigurationError(
            f"The target is {describe(target)} for {num_samples} samples.",
            f"Every sample has one target, in the first dimension{f' or dimension {batch_dim}' if batch_dim else ''}.",
            remedy,
        )


def check_target(objective: Any, output: Tensor, target: Any, batch_dim: int = 0) -> None:
    """Let an objective check a target, and show the user's own shapes where the batch was moved to the front.

    Args:
        objective: The objective.
        output: The model's output, with the batch first.
        target: The target, with the batch first.
        batch_dim: Where the batch was in the output.

    Raises:
        ConfigurationError: If they do not fit.

    """
    try:
        objective.check(output, target)
    except ConfigurationError as error:
        if not batch_dim:
            raise
        given, *others = error.args
        own = describe(output.movedim(0, batch_dim))
        raise ConfigurationError(f"{given} Here the batch comes first: your output is {own}.", *others) from None


def check_classes(objective: object, output: Tensor, target: Tensor, class_dim: int) -> None:
    """Refuse an output in which a target names nothing, whatever the target holds.

    Args:
        objective: What the message shows as given.
        output: The model's output, (rows, *).
        target: The target.
        class_dim: Dimension of the classes in the output.

    Raises:
        ConfigurationError: If the output has no dimension `class_dim`, or integers are given for a single logit.

    """
    if not -output.ndim < class_dim < output.ndim:
        raise ConfigurationError(
            f"{objective!r} was given, and the model's forward returned {describe(output)} for the target "
            f"{describe(target)}.",
            "With a target the output has a logit for each class: (B, C), or (B, C, H, W) for dense labels.",
            'Return such logits, set `class_dim`, or name the task: objective="binary" for a single logit, '
            'objective="regression" for a number.',
        )
    if output.shape[class_dim] < 2 and not target.is_floating_point():
        raise ConfigurationError(
            f"{objective!r} was given, and the model's forward returned {describe(output)}, a single logit, for the "
            f"target {describe(target)}.",
            "An integer target names one of two classes or more, so the output has a logit for each class. Label 1 "
            "names nothing in a single logit.",
            'Pass objective="binary" if the target is 0 or 1, or objective="regression" if it is a number to predict.',
        )


def check_label_shape(output: Tensor, target: Tensor, class_dim: int) -> None:
    """Refuse integers in another shape than (B,) for (B, C), or (B, *) for (B, C, *). Rows are not compared.

    Raises:
        ConfigurationError: If a position of the output has no label, or a label no position.

    """
    named = list(output.shape)
    named.pop(class_dim)
    if target.shape[1:] != tuple(named[1:]):
        raise _not_labels(target, output, class_dim)


def check_labels(output: Tensor, target: Tensor, class_dim: int, ignore_index: int) -> None:
    """Refuse an integer target that does not name a class of the output everywhere. It looks at values.

    Raises:
        ConfigurationError: If its shape or dtype does not fit, or a class is out of range.

    """
    check_label_shape(output, target, class_dim)
    if target.dtype == torch.bool or target.is_complex():
        raise _not_labels(target, output, class_dim)
    num_classes = output.shape[class_dim]
    # As int64: in uint8, 156 equals -100.
    labels = target.long()
    counted = labels[labels != ignore_index]
    if len(counted) == 0:
        return
    low, high = int(counted.min()), int(counted.max())
    if low < 0 or high >= num_classes:
        raise ConfigurationError(
            f"The target holds classes from {low} to {high} for an output of {num_classes} classes.",
            f"Class indices lie from 0 to {num_classes - 1}; {ignore_index} does not count.",
            "Number the classes from 0, give the model's last layer an output for each, or name the one that does not "
            f"count: objective=TargetLogit(ignore_index={high if high >= num_classes else low}).",
        )


def check_soft_labels(output: Tensor, target: Tensor, class_dim: int) -> None:
    """Refuse a floating target that is no share of each class. It looks at values.

    Raises:
        ConfigurationError: If its shape is not that of the output, there is one class, a share is negative, or the
            shares of a sample don't sum to 1.

    """
    if (
        target.shape[1:] != output.shape[1:]
        or output.shape[class_dim] == 1
        or bool((target < 0).any())
        or bool(((target.double().sum(class_dim) - 1).abs() > LARGEST_EXCESS).any())
    ):
        raise ConfigurationError(
            f"The floating target {describe(target)} was given for the output {describe(output)}.",
            "A floating target holds soft labels: shares of two classes or more, in the shape of the output, that are "
            "not negative and sum to 1 for each sample.",
            'Name the task: objective="binary" or "multilabel" for labels of 0 and 1, "regression" for numbers to '
            'predict, "reconstruction" for an autoencoder. For class indices convert the target with target.long().',
        )


def _not_labels(target: Tensor, output: Tensor, class_dim: int) -> ConfigurationError:
    named = list(output.shape)
    num_classes = named.pop(class_dim)
    if output.ndim > 2 and target.shape[1:] == output.shape[1:-1] != torch.Size(named[1:]):
        return ConfigurationError(
            f"The target is {describe(target)} for the output {describe(output)}, whose {num_classes} classes are "
            f"dimension {class_dim} by TargetLogit(class_dim={class_dim}).",
            "An integer target holds one class index for each position, so its shape is that of the output without "
            "the dimension of the classes.",
            "The classes seem to be the last dimension: pass objective=TargetLogit(class_dim=-1).",
        )
    shape = ", ".join(map(str, ["B", *named[1:]])) + ("," if len(named) == 1 else "")
    return ConfigurationError(
        f"The target is {describe(target)} for the output {describe(output)} with {num_classes} classes.",
        "An integer target holds one class index for each sample, or for each position of dense labels, so its shape "
        f"is ({shape}).",
        f"Give it that shape, with target.{_reshaping(target, named)} for example, in a method `ydrop_inputs`; or say "
        "where the classes are: objective=TargetLogit(class_dim=...)."
        if target.shape[1:] != output.shape[1:]
        else 'Name the task: objective="multilabel" for labels of 0 and 1, "regression" for numbers to predict. Turn '
        "one-hot rows into soft labels with target.float().",
    )


def _reshaping(target: Tensor, wanted: list[int]) -> str:
    """Say what would give labels the shape that is wanted: leave out a dimension of size 1, or flatten."""
    ones = [dim for dim, size in enumerate(target.shape) if dim > 0 and size == 1]
    fitting = [dim for dim in ones if [*target.shape[1:dim], *target.shape[dim + 1 :]] == wanted[1:]]
    return f"squeeze({fitting[0]})" if fitting else "flatten()" if len(wanted) == 1 else "reshape(...)"
