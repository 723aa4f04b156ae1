"""Several classes that F is taken for, from one forward pass."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_ydrop.checks import is_list, is_whole
from lightning_ydrop.errors import ConfigurationError, describe, listed
from lightning_ydrop.importance.objectives import Objective

ClassChoice = Sequence[int] | Literal["all"] | None


@dataclass(frozen=True)
class Classes:
    """The classes that F is taken for, the same for all samples and positions.

    Attributes:
        owner: What the user called, for error messages.
        chosen: Their indices; None for all that the output has.
        class_dim: The dimension of the classes in the output.

    """

    owner: str
    chosen: tuple[int, ...] | None
    class_dim: int = 1

    def indices(self, output: Tensor) -> tuple[int, ...]:
        """Give the indices of the classes in an output of the model, (rows, *).

        Raises:
            ConfigurationError: If all are wanted, and the output has no dimension of classes.

        """
        if self.chosen is not None:
            return self.chosen
        self._check_dimension(output)
        return tuple(range(output.shape[self.class_dim]))

    def targets(self, output: Tensor) -> list[Tensor]:
        """Give for each class the target that names it everywhere in an output (rows, C, *): (rows, *), int64."""
        shape = list(output.shape)
        if -output.ndim < self.class_dim < output.ndim:
            shape.pop(self.class_dim)
        return [torch.full(shape, each, device=output.device) for each in self.indices(output)]

    def check(self, output: Tensor, objective: Objective) -> None:
        """Refuse classes that an output of the model does not have, in the words of `classes`.

        Args:
            output: The output, (rows, *).
            objective: F. One that does not say where its classes are may read them from anywhere.

        Raises:
            ConfigurationError: If there are any.

        """
        if not hasattr(objective, "class_dim"):
            return
        self._check_dimension(output)
        num_classes = output.shape[self.class_dim]
        if num_classes < 2:
            raise ConfigurationError(
                f"{self} was given, and the model's forward returned {describe(output)}, a single logit.",
                "`classes` are indices of logits, of which the output has one for each class, two or more.",
                f'Pass a target instead, with objective="binary" for a single logit: {self.owner}(model, inputs, '
                'target, objective="binary").',
            )
        if max(self.indices(output)) >= num_classes:
            raise ConfigurationError(
                f"{self} was given, and the model's output has {num_classes} classes.",
                f"`classes` lie from 0 to {num_classes - 1}.",
                'Pass some of these, or classes="all". If the output has its classes in another dimension, say so: '
                "objective=TargetLogit(class_dim=...).",
            )

    def __str__(self) -> str:
        chosen = '"all"' if self.chosen is None else f"[{listed(map(str, self.chosen))}]"
        return f"{self.owner}(classes={chosen})"

    def _check_dimension(self, output: Tensor) -> None:
        if not -output.ndim < self.class_dim < output.ndim:
            raise ConfigurationError(
                f"{self} was given, and the model's forward returned {describe(output)}.",
                f"The classes are those of dimension {self.class_dim} of the output.",
                "Return a logit for each class, (B, C), or say where the classes are: objective=TargetLogit(class_dim="
                "...).",
            )

    def extremes(self, output: Tensor) -> list[Tensor]:
        """Give the targets of the lowest and the highest class, which tell whether all of them fit."""
        indices = self.indices(output)
        return replace(self, chosen=(min(indices), max(indices))).targets(output)


def check_classes(owner: str, classes: Any, target: object, objective: Objective) -> Classes | None:
    """Refuse classes that F can't be taken for, as far as can be told without the model's output.

    Args:
        owner: What the user called, for the message.
        classes: What was given for `classes`.
        target: What was given beside it.
        objective: F.

    Returns:
        The classes; None if none were given.

    Raises:
        ConfigurationError: If they are refused.

    """
    if classes is None:
        return None
    is_all = isinstance(classes, str) and classes == "all"
    chosen = list(classes) if is_list(classes) else []
    if not is_all and not (chosen and all(is_whole(each) and each >= 0 for each in chosen)):
        raise ConfigurationError(
            f"{owner}(classes={describe(classes)}) was given.",
            '`classes` is a list of at least one class index of at least 0, or "all".',
            'Pass, for example, classes=[0, 3] or classes="all". For one class of each sample pass target=....',
        )
    if target is not None:
        raise ConfigurationError(
            f"{owner}(target={describe(target)}, classes={describe(classes)}) was given.",
            "`classes` takes the place of the target: each of them is the target of all samples in turn.",
            "Pass one of the two.",
        )
    if not objective.takes_target:
        raise ConfigurationError(
            f"{owner}(classes={describe(classes)}, objective={objective!r}) was given.",
            "Classes are targets, and this objective does not look at a target.",
            "Leave out `classes`, or choose an objective of a class, such as TargetLogit().",
        )
    class_dim = getattr(objective, "class_dim", 1)
    return Classes(owner, None if is_all else tuple(map(int, chosen)), class_dim)
