"""From any batch to what the model takes and what its output should be."""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_ydrop.checks import check_flag, check_kind
from lightning_ydrop.errors import ConfigurationError, describe
from lightning_ydrop.models.calls import Target

INPUT_NAMES = (
    *("x", "input", "inputs", "image", "images", "img", "pixel_values", "input_values", "input_features"),
    *("features", "data", "audio", "video", "input_ids", "inputs_embeds", "tokens"),
    # Never alone, but a model that takes them besides is not to be called without them.
    *("attention_mask", "token_type_ids", "position_ids"),
)
TARGET_NAMES = ("y", "target", "targets", "label", "labels", "label_ids")


class Adapter(ABC):
    """How to read a batch. Subclass it, and name the subclass in Python or YAML.

    Example:
        >>> class Second(Adapter):
        ...     def read(self, batch):
        ...         return batch["views"][1], None

    """

    @abstractmethod
    def read(self, batch: Any) -> tuple[Any, Target]:
        """Take the inputs and the target out of a batch, which is already on the training device.

        Returns:
            The inputs: what the model's `forward` takes, a tensor, a tuple of arguments, or a mapping of arguments by
            name; arguments may nest tensors in lists, tuples and mappings. And the target: class index (B,), soft
            labels (B, C), dense labels (B, H, W), or None.

        """

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({arguments})"


class IndexAdapter(Adapter):
    """Read batches that are tuples or lists.

    Args:
        inputs: Position of the model's input, or positions of all of its inputs in the order of `forward`.
        target: Position of the target; None for the objectives that need none.

    Raises:
        ConfigurationError: If a position is no whole number.

    """

    def __init__(self, inputs: int | list[int] = 0, target: int | None = 1) -> None:
        _check_places("IndexAdapter", inputs, target, int, example="IndexAdapter(inputs=[0, 1], target=2)")
        self.inputs = inputs
        self.target = target

    def read(self, batch: Any) -> tuple[Any, Target]:
        """Take the items at the positions."""
        inputs = _take_each(self, batch, self.inputs)
        return inputs, None if self.target is None else _take(self, batch, self.target)


class KeyAdapter(Adapter):
    """Read batches that are mappings, dataclasses or named tuples.

    Args:
        inputs: Key of the model's input, or keys of all of its inputs in the order of `forward`.
        target: Key of the target; None for the objectives that need none.
        keywords: Whether `forward` takes the inputs by these keys: `model(input_ids=..., attention_mask=...)`.

    Raises:
        ConfigurationError: If a key is no string.

    """

    def __init__(
        self, inputs: str | list[str] = "pixel_values", target: str | None = "labels", keywords: bool = False
    ) -> None:
        _check_places("KeyAdapter", inputs, target, str, example='KeyAdapter(inputs="image", target="label")')
        check_flag("KeyAdapter", "keywords", keywords)
        self.inputs = inputs
        self.target = target
        self.keywords = keywords

    def read(self, batch: Any) -> tuple[Any, Target]:
        """Take the items at the keys."""
        inputs = _take_each(self, batch, self.inputs)
        if self.keywords:
            names = [self.inputs] if isinstance(self.inputs, str) else self.inputs
            inputs = dict(zip(names, inputs if isinstance(inputs, tuple) else (inputs,), strict=True))
        return inputs, None if self.target is None else _take(self, batch, self.target)


class AutomaticAdapter(Adapter):
    """Read the usual batches.

    A tensor is the input. Of a tuple or list the first item is the input, the second the target, whatever follows. Of
    a mapping, dataclass or named tuple the one field with a usual name of an input is the input, and the one with a
    usual name of a target, if there is one, is the target.
    """

    def read(self, batch: Any) -> tuple[Any, Target]:
        """Find the input and the target.

        Raises:
            ConfigurationError: If there is no telling which is which.

        """
        if isinstance(batch, Tensor):
            return batch, None
        named = _fields(batch)
        if named is not None:
            inputs, targets = ([name for name in names if name in named] for names in (INPUT_NAMES, TARGET_NAMES))
            if len(inputs) == 1 and len(targets) <= 1:
                return named[inputs[0]], named[targets[0]] if targets else None
        if isinstance(batch, (tuple, list)) and batch and (named is None or not {*INPUT_NAMES} & named.keys()):
            return batch[0], batch[1] if len(batch) > 1 else None
        raise ConfigurationError(
            f"The batch is {describe(batch)}.",
            "Y-Drop reads a tensor, (x, y, ...), and mappings, dataclasses and named tuples with one known input, such "
            f"as {', '.join(INPUT_NAMES[:7])}, and at most one known target: {', '.join(TARGET_NAMES)}.",
            "Give the LightningModule a method `ydrop_inputs(batch)` that returns (inputs, target), or name the places "
            'in the batch: adapter=KeyAdapter(inputs="image", target="label"), or IndexAdapter.',
        )


def check_adapter(owner: str, adapter: object) -> None:
    """Refuse what is no adapter.

    Raises:
        ConfigurationError: If it is not.

    """
    check_kind(owner, "adapter", adapter, Adapter, example='KeyAdapter(inputs="image", target="label")')


def _fields(batch: Any) -> Mapping[str, Any] | None:
    """View a mapping, dataclass or named tuple as a mapping; nothing else has named fields."""
    if isinstance(batch, Mapping):
        return batch
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    if isinstance(batch, tuple) and hasattr(batch, "_asdict"):
        fields: dict[str, Any] = batch._asdict()
        return fields
    return None


def _take_each(adapter: Adapter, batch: Any, places: Any) -> Any:
    """Take one item as it is, or several as a tuple."""
    return (
        tuple(_take(adapter, batch, place) for place in places)
        if isinstance(places, list)
        else _take(adapter, batch, places)
    )


def _take(adapter: Adapter, batch: Any, place: int | str) -> Any:
    readable: Any = _fields(batch) if isinstance(place, str) else batch if isinstance(batch, (tuple, list)) else None
    if readable is not None:
        try:
            return readable[place]
        except LookupError:
            pass
    raise ConfigurationError(
        f"{adapter!r} was given, and the batch is {describe(batch)}.",
        f"It reads a batch with something at {place!r}.",
        "Name places that are in the batch.",
    )


def _check_places(owner: str, inputs: Any, target: Any, kind: type, *, example: str) -> None:
    listed = inputs if isinstance(inputs, list) else [inputs]
    places = [*listed, *([] if target is None else [target])]
    if not listed or not all(isinstance(place, kind) and not isinstance(place, bool) for place in places):
        raise ConfigurationError(
            f"{owner}(inputs={describe(inputs)}, target={describe(target)}) was given.",
            f"`inputs` is one {kind.__name__} or a list of some, `target` one or None.",
            f"Pass, for example, {example}.",
        )
