"""F, the scalar for each row whose gradient says how much a unit matters: strategies that a YAML file can name."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_ydrop.checks import check_kind
from lightning_ydrop.errors import ConfigurationError, describe
from lightning_ydrop.importance.targets import (
    check_classes,
    check_label_shape,
    check_labels,
    check_soft_labels,
    class_dim_of,
    ignore_index_of,
)
from lightning_ydrop.models.calls import Target
from lightning_ydrop.models.holdings import modules_held, moved


class Objective(ABC):
    """What phase 1 differentiates: a number F for each row of the model's output.

    Subclass it, and name the subclass in Python or YAML. Only `__call__` is needed. Keep modules and tensors in
    attributes, where `modules` and `on` find them.

    Attributes:
        takes_target: Whether it looks at the batch's target. If not, there may be none, or anything.
        target_is_input: Whether the target is the model's input instead: the floating one, of which there is one.
        task: The task by whose name it was chosen, if it was.

    Example:
        >>> class Margin(Objective):
        ...     def __call__(self, output, target):
        ...         return output[:, 0] - output[:, 1]

    """

    takes_target: ClassVar[bool] = True
    target_is_input: ClassVar[bool] = False
    task: str = ""

    @abstractmethod
    def __call__(self, output: Tensor, target: Target) -> Tensor:
        """Give F of each row, without reading values on the host, which would wait for the device.

        Args:
            output: The model's output, floating, shape (rows, *).
            target: The target of each row, or None.

        Returns:
            Shape (rows,).

        """

    def check(self, output: Tensor, target: Target) -> None:  # noqa: B027, since most have nothing to refuse
        """Refuse what F cannot be taken of. Only the dry run calls it, so it may look at values.

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
            target: The target of the batch.

        Returns:
            The target that F is taken with, at every point of the path.

        """
        return target

    def count_unusable(self, output: Tensor, target: Target) -> Tensor | None:
        """Count the entries of the target that name nothing in the output, without reading values on the host.

        Args:
            output: The model's output, of which only the shape is used.
            target: The target of any number of rows.

        Returns:
            An int64 scalar on the target's device, or None if no target of this kind can name nothing.

        """
        return None

    def on(self, device: torch.device) -> "Objective":
        """Give the objective with all that it holds on a device.

        Tensors in a function's closure, and in attributes of a class, stay where they are.

        Args:
            device: The device of the model's output.

        Returns:
            The objective itself if nothing has to move. Otherwise a copy: the one that was given is never moved.

        Raises:
            ConfigurationError: If something that has to move cannot be copied.

        """
        return moved(self, device)

    def modules(self) -> list[nn.Module]:
        """List the modules that a call may run, each once, so that phase 1 can leave them as they were."""
        return modules_held(self)

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={_shown(value)}" for name, value in vars(self).items() if name != "task")
        return f"{type(self).__name__}({arguments}){f', the objective of {self.task!r},' if self.task else ''}"


class TargetLogit(Objective):
    """The output that the target names, as in the paper. Without a target, the sum of the outputs.

    The target of an output (B, C, *) has one of three forms: a class index for each sample, (B,); a class index for
    each position, (B, *), whose logits add up; or soft labels of the output's shape, shares that sum to 1, by which the
    outputs are weighted.

    A class index out of range is an error in the first batch. In later batches it counts for nothing, like
    `ignore_index`.

    Args:
        class_dim: Dimension of the classes in the output: 1 for (B, C) and (B, C, H, W), -1 for (B, T, C).
        ignore_index: Class index of samples and positions that do not count.

    Raises:
        ConfigurationError: If `class_dim` is 0, or one of the two is not a whole number.

    """

    def __init__(self, class_dim: int = 1, ignore_index: int = -100) -> None:
        self.class_dim = class_dim_of("TargetLogit", class_dim)
        self.ignore_index = ignore_index_of("TargetLogit", ignore_index)

    def __call__(self, output: Tensor, target: Target) -> Tensor:
        """Take the logit of the labelled class.

        Raises:
            ConfigurationError: If class indices are in another shape than the output asks for.

        """
        if target is None:
            return _sum_of_rows(output)
        if target.is_floating_point():
            return _sum_of_rows(output * target)
        num_classes = output.shape[self.class_dim]
        if output.ndim == 2 and target.ndim == 1:
            # Labels out of range, -1 and less as well as C and more, become C, which does not count.
            labels = target.long().clamp(-1, num_classes).remainder(num_classes + 1)
            if 0 <= self.ignore_index < num_classes:
                labels = labels.masked_fill(labels == self.ignore_index, num_classes)
            # This loss is the logit times minus the weight of its class, and 0 for what does not count.
            weight = output.new_full((num_classes,), -1.0)
            return F.nll_loss(output, labels, weight, ignore_index=num_classes, reduction="none")
        # For positions CUDA has no such loss under deterministic algorithms. `gather` by itself would accept labels
        # for a part of them.
        check_label_shape(output, target, self.class_dim)
        labels = target.long().unsqueeze(self.class_dim)
        # An index out of range stops a GPU for good. So every label reads the logit of the nearest class that counts,
        # and is left out afterwards if it names another one.
        first, last = 0, num_classes - 1
        if self.ignore_index == first < last:
            first = 1
        elif self.ignore_index == last > first:
            last -= 1
        nearest = labels.clamp(first, last)
        left_out = labels != nearest
        if first <= self.ignore_index <= last:
            left_out = left_out | (labels == self.ignore_index)
        return _sum_of_rows(output.gather(self.class_dim, nearest).masked_fill(left_out, 0))

    def check(self, output: Tensor, target: Target) -> None:
        """Refuse a target that does not name something in the output everywhere."""
        if target is None:
            return
        check_classes(self, output, target, self.class_dim)
        if target.is_floating_point():
            check_soft_labels(output, target, self.class_dim)
        else:
            check_labels(output, target, self.class_dim, self.ignore_index)

    def count_unusable(self, output: Tensor, target: Target) -> Tensor | None:
        """Count the class indices that are no class of the output, without those equal to `ignore_index`."""
        if target is None or target.is_floating_point():
            return None
        labels, num_classes = target.long(), output.shape[self.class_dim]
        unusable = labels != labels.clamp(0, num_classes - 1)
        if not 0 <= self.ignore_index < num_classes:
            unusable = unusable & (labels != self.ignore_index)
        return unusable.sum()


class PredictedLogit(Objective):
    """The logit of the class that the model predicts for the sample itself. The batch's target is not looked at.

    It costs one more forward pass of the samples, to see what the model predicts.

    Args:
        class_dim: Dimension of the classes in the output.

    Raises:
        ConfigurationError: If `class_dim` is 0 or not a whole number.

    """

    takes_target = False

    def __init__(self, class_dim: int = 1) -> None:
        self.class_dim = class_dim_of("PredictedLogit", class_dim)

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
    """The sum of the outputs, for regressions and for outputs without classes. The target is not looked at."""

    takes_target = False

    def __call__(self, output: Tensor, target: Target) -> Tensor:
        """Add up the output of each row."""
        return _sum_of_rows(output)


class NegativeLoss(Objective):
    """The loss with its sign turned: the units that reduce the loss most matter most.

    Args:
        loss: A loss that is not averaged, such as `nn.CrossEntropyLoss(reduction="none")`. From (output, target) it
            gives one number for each sample, or for each position or output of each sample, and these add up. It may
            be a module or hold tensors (class weights): `on` copies them to the device of the model.

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
    example = "TargetLogit()"
    if callable(objective) and not isinstance(objective, type):
        example = 'NegativeLoss(nn.CrossEntropyLoss(reduction="none")) for a loss, or objective="regression" for a task'
    check_kind(owner, "objective", objective, Objective, example=example)


def _sum_of_rows(values: Tensor) -> Tensor:
    return values.flatten(1).sum(1) if values.ndim > 1 else values


def _shown(value: object) -> str:
    """Show an attribute without the numbers in its tensors."""
    if isinstance(value, Tensor):
        return describe(value)
    if isinstance(value, partial):
        name = getattr(value.func, "__qualname__", type(value.func).__name__)
        named = [f"{key}={_shown(item)}" for key, item in value.keywords.items()]
        return f"partial({', '.join([name, *map(_shown, value.args), *named])})"
    return repr(value)
