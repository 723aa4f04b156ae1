"""F, the scalar for each row whose gradient says how much a unit matters: strategies that a YAML file can name."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_ydrop.checks import check_kind
from lightning_ydrop.errors import ConfigurationError, describe
from lightning_ydrop.models.calls import Target


class Objective(ABC):
    """What phase 1 differentiates. Subclass it, and name the subclass in Python or YAML.

    Attributes:
        takes_target: Whether it looks at the batch's target; if not, there may be none, or anything.

    Example:
        >>> class Margin(Objective):
        ...     def __call__(self, output, target):
        ...         return output[:, 0] - output[:, 1]

    """

    takes_target: ClassVar[bool] = True

    @abstractmethod
    def __call__(self, output: Tensor, target: Target) -> Tensor:
        """Give F of each row, without looking at values, which would make the host wait for the device.

        Args:
            output: The model's output, floating, shape (rows, *).
            target: The target of each row, or None.

        Returns:
            Shape (rows,).

        """

    def check(self, output: Tensor, target: Target) -> None:  # noqa: B027, since most have nothing to refuse
        """Refuse what F cannot be taken of. It may look at values: a fit calls it once.

        Args:
            output: The model's output for any number of rows.
            target: The target of a whole batch, of any number of rows.

        Raises:
            ConfigurationError: If they do not fit.

        """

    def settle(self, predict: Callable[[], Tensor], target: Target) -> Target:
        """Settle the target before the path is walked.

        Args:
            predict: Runs the model on the samples and returns its output.
            target: That of the batch.

        Returns:
            The target that F is taken with, at every point of the path.

        """
        return target

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({arguments})"


class TargetLogit(Objective):
    """The output that the target names, as in the paper; without a target, the sum of the outputs.

    The target of an output (B, C, *) is a class index for each sample (B,), or for each position (B, *), whose logits
    add up; or soft labels of the output's shape: the outputs' sum weighted by them.

    Args:
        class_dim: Dimension of the classes in the output: 1 for (B, C) and (B, C, H, W), -1 for (B, T, C).
        ignore_index: Class index of samples and positions that do not count.

    Raises:
        ConfigurationError: If `class_dim` is 0, or one of them no whole number.

    """

    def __init__(self, class_dim: int = 1, ignore_index: int = -100) -> None:
        _check_class_dim("TargetLogit", class_dim)
        if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
            raise ConfigurationError(
                f"TargetLogit(ignore_index={describe(ignore_index)}) was given.",
                "`ignore_index` is a whole number.",
                "Pass, for example, ignore_index=-100.",
            )
        self.class_dim = class_dim
        self.ignore_index = ignore_index

    def __call__(self, output: Tensor, target: Target) -> Tensor:
        """Take the logit of the labelled class."""
        if target is None:
            return _sum_of_rows(output)
        if target.is_floating_point():
            return _sum_of_rows(output * target)
        # This loss is the logit with its sign turned, and 0 where a position does not count.
        logits = output.movedim(self.class_dim, 1)
        return -_sum_of_rows(F.nll_loss(logits, target.long(), ignore_index=self.ignore_index, reduction="none"))

    def check(self, output: Tensor, target: Target) -> None:
        """Refuse a target that names nothing in the output."""
        if target is None:
            return
        if not -output.ndim < self.class_dim < output.ndim:
            raise ConfigurationError(
                f"{self!r} was given, and the model's forward returned {describe(output)} for the target "
                f"{describe(target)}.",
                "With a target the output has a logit for each class: (B, C), or (B, C, H, W) for dense labels.",
                "Return such logits, set `class_dim`, or choose objective=OutputSum() or NegativeLoss(...).",
            )
        num_classes = output.shape[self.class_dim]
        labelled = output.select(self.class_dim, 0).shape[1:]
        if target.is_floating_point():
            self._check_soft(output, target)
        elif target.shape[1:] != labelled or target.dtype == torch.bool or target.is_complex():
            raise ConfigurationError(
                f"The target is {describe(target)} for the output {describe(output)} with {num_classes} classes.",
                "An integer target holds one class index for each sample, or for each position of dense labels, so "
                f"its shape is {('B', *labelled)}.".replace("'", ""),
                "Reshape it with target.flatten(), turn one-hot rows into soft labels with target.float(), or set "
                "objective=TargetLogit(class_dim=...).",
            )
        elif len(counted := target[target != self.ignore_index]) > 0:
            low, high = int(counted.min()), int(counted.max())
            if low < 0 or high >= num_classes:
                raise ConfigurationError(
                    f"The target holds classes from {low} to {high} for an output of {num_classes} classes.",
                    f"Class indices lie from 0 to {num_classes - 1}; {self.ignore_index} does not count.",
                    "Number the classes from 0, give the model's last layer an output for each, or set "
                    "objective=TargetLogit(ignore_index=...).",
                )

    def _check_soft(self, output: Tensor, target: Tensor) -> None:
        if target.shape[1:] != output.shape[1:] or output.shape[self.class_dim] == 1 or bool((target < 0).any()):
            raise ConfigurationError(
                f"The floating target {describe(target)} was given for the output {describe(output)}.",
                "A floating target holds soft labels, shares of two classes or more that are not negative, in the "
                "shape of the output.",
                "For class indices convert it with target.long(); for a regression choose objective=OutputSum(), or "
                'NegativeLoss(nn.MSELoss(reduction="none")).',
            )


class PredictedLogit(Objective):
    """The logit of the class that the model predicts for the sample itself; the batch's target is not looked at.

    It takes one more forward pass of the samples, to see what the model predicts.

    Args:
        class_dim: Dimension of the classes in the output.

    Raises:
        ConfigurationError: If `class_dim` is 0 or no whole number.

    """

    takes_target = False

    def __init__(self, class_dim: int = 1) -> None:
        _check_class_dim("PredictedLogit", class_dim)
        self.class_dim = class_dim

    def __call__(self, output: Tensor, target: Target) -> Tensor:
        """Take the logit of the predicted class."""
        return TargetLogit(self.class_dim)(output, target)

    def check(self, output: Tensor, target: Target) -> None:
        """Refuse an output without classes."""
        if not -output.ndim < self.class_dim < output.ndim or output.shape[self.class_dim] < 2:
            raise ConfigurationError(
                f"{self!r} was given, and the model's forward returned {describe(output)}.",
                "A prediction is the largest of two logits or more, in the dimension `class_dim` of the output.",
                "Return such logits, set `class_dim`, or choose objective=OutputSum().",
            )

    def settle(self, predict: Callable[[], Tensor], target: Target) -> Target:
        """Predict."""
        return predict().argmax(self.class_dim)


class OutputSum(Objective):
    """The sum of the outputs, for regressions and for outputs that are no classes; the target is not looked at."""

    takes_target = False

    def __call__(self, output: Tensor, target: Target) -> Tensor:
        """Add up the output of each row."""
        return _sum_of_rows(output)


class NegativeLoss(Objective):
    """The loss with its sign turned, so that units matter that bring the loss down.

    Args:
        loss: A loss that is not averaged: from (output, target) to one number for each sample, or for each position
            or output of each sample, which add up: such as `nn.CrossEntropyLoss(reduction="none")`.

    Raises:
        ConfigurationError: If `loss` cannot be called, or is a class.

    """

    def __init__(self, loss: nn.Module | Callable[..., Tensor]) -> None:
        if not callable(loss) or isinstance(loss, type):
            raise ConfigurationError(
                f"NegativeLoss(loss={describe(loss)}) was given.",
                "A loss is called with the output and the target.",
                'Pass, for example, loss=nn.CrossEntropyLoss(reduction="none").',
            )
        self.loss = loss

    def __call__(self, output: Tensor, target: Target) -> Tensor:
        """Turn the sign of the loss of each row."""
        return -_sum_of_rows(self.loss(output, target))

    def check(self, output: Tensor, target: Target) -> None:
        """Refuse a loss that mixes rows."""
        if target is None:
            raise ConfigurationError(
                f"{self!r} was given, and the batch has no target.",
                "A loss needs a target.",
                "Let the adapter or `ydrop_inputs` return one, or choose objective=OutputSum().",
            )
        rows = min(len(output), len(target))
        try:
            losses, first = (self.loss(output[:count], target[:count]) for count in (rows, 1))
        except Exception as error:
            raise ConfigurationError(
                f"{self!r} was given, and of the output {describe(output)} and the target {describe(target)} the loss "
                f"raised {type(error).__name__}: {error}",
                "The loss is called with what the model's forward returns and with the target as it is in the batch.",
                "Let `ydrop_inputs` return the target that it takes, for example y.float()[:, None], or pass a loss "
                "that converts it.",
            ) from error
        # A loss that broadcasts has one for each pair of rows: (B, B) of an output (B, 1) and a target (B,).
        if not isinstance(losses, Tensor) or losses.shape[:1] != (rows,) or losses[:1].shape != first.shape:
            raise ConfigurationError(
                f"{self!r} was given, and the loss of {rows} samples is {describe(losses)}, for the output "
                f"{describe(output)} and the target {describe(target)}.",
                "The loss has an entry for each sample, or some for each sample alone, so that rows of the path do not "
                "mix.",
                'Make it with reduction="none", and let `ydrop_inputs` return a target of the shape of the output.',
            )


def check_objective(owner: str, objective: object) -> None:
    """Refuse what is no objective.

    Raises:
        ConfigurationError: If it is not.

    """
    check_kind(owner, "objective", objective, Objective, example="TargetLogit()")


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
            "A target is a tensor of class indices (B,), soft labels (B, C) or dense labels (B, H, W), or None for the "
            "sum of the outputs.",
            "Convert it in the dataset or in collate_fn, for example with torch.as_tensor, or choose it with an "
            "adapter.",
        )
    if target.shape[:1] != (num_samples,):
        raise ConfigurationError(
            f"The target is {describe(target)} for {num_samples} samples.",
            "Every sample has one target, in the first dimension.",
            "Pass inputs and targets of the same batch.",
        )


def _sum_of_rows(values: Tensor) -> Tensor:
    return values.flatten(1).sum(1) if values.ndim > 1 else values


def _check_class_dim(owner: str, class_dim: Any) -> None:
    if isinstance(class_dim, bool) or not isinstance(class_dim, int) or class_dim == 0:
        raise ConfigurationError(
            f"{owner}(class_dim={describe(class_dim)}) was given.",
            "`class_dim` is the dimension of the classes in the output, any but 0, which is the batch.",
            "Pass 1 for (B, C) and (B, C, H, W), or -1 for (B, T, C).",
        )
