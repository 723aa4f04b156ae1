"""Reading batches: what goes into the model, and what its output should be."""

import copy
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor

from lightning_ydrop.checks import check_flag, check_kind, is_list, is_whole
from lightning_ydrop.errors import ConfigurationError, describe
from lightning_ydrop.models.calls import Target

INPUT_NAMES = (
    *("x", "input", "inputs", "image", "images", "img", "pixel_values", "input_values", "input_features"),
    *("features", "data", "audio", "video", "input_ids", "inputs_embeds", "tokens"),
    # A model that takes these beside another input must not be called without them.
    *("attention_mask", "token_type_ids", "position_ids"),
)
TARGET_NAMES = ("y", "target", "targets", "label", "labels", "label_ids")
Places = TypeVar("Places", "IndexAdapter", "KeyAdapter")


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
            The inputs and the target. The inputs are what the model's `forward` takes: a tensor, a tuple of arguments,
            or a mapping of arguments by name. Arguments may nest tensors in lists, tuples and mappings. The target is a
            class index (B,), soft labels (B, C), dense labels (B, H, W), or None.

        """

    def without_target(self) -> "Adapter":
        """Give an adapter that reads the inputs alone, where this one names a place of the target."""
        return self

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({arguments})"


class IndexAdapter(Adapter):
    """Read batches that are tuples or lists.

    Args:
        inputs: Position of the model's input, or a list of the positions of all inputs in the order of `forward`.
        target: Position of the target, or None for the objectives that need none.

    Raises:
        ConfigurationError: If a position is not a whole number.

    Example:
        >>> IndexAdapter(inputs=[0, 2], target=1).read(["image", "label", "mask"])
        (('image', 'mask'), 'label')

    """

    def __init__(self, inputs: int | Sequence[int] = 0, target: int | None = 1) -> None:
        example = "IndexAdapter(inputs=[0, 1], target=2)"
        if not _are_places(inputs, target, is_whole):
            raise _wrong_places("IndexAdapter", "whole number", inputs, target, example)
        self.inputs: int | list[int] = _plain(inputs, int)
        self.target = None if target is None else int(target)

    def without_target(self) -> "IndexAdapter":
        """Give an adapter that reads the inputs alone."""
        return _without_target(self, IndexAdapter)

    def read(self, batch: Any) -> tuple[Any, Target]:
        """Take the items at the positions."""
        inputs = _take_each(self, batch, self.inputs)
        return inputs, None if self.target is None else _take(self, batch, self.target)


class KeyAdapter(Adapter):
    """Read batches that are mappings, dataclasses or named tuples.

    Args:
        inputs: Key of the model's input, or a list of the keys of all inputs in the order of `forward`.
        target: Key of the target, or None for the objectives that need none.
        keywords: Whether `forward` takes the inputs by these keys: `model(input_ids=..., attention_mask=...)`.

    Raises:
        ConfigurationError: If a key is not a string.

    Example:
        >>> KeyAdapter(inputs="image", target="class").read({"image": "pixels", "class": "label"})
        ('pixels', 'label')

    """

    def __init__(
        self, inputs: str | Sequence[str] = "pixel_values", target: str | None = "labels", keywords: bool = False
    ) -> None:
        example = 'KeyAdapter(inputs="image", target="label")'
        if not _are_places(inputs, target, _is_key):
            raise _wrong_places("KeyAdapter", "string", inputs, target, example)
        self.inputs: str | list[str] = _plain(inputs, str)
        self.target = None if target is None else str(target)
        self.keywords = check_flag("KeyAdapter", "keywords", keywords)

    def without_target(self) -> "KeyAdapter":
        """Give an adapter that reads the inputs alone."""
        return _without_target(self, KeyAdapter)

    def read(self, batch: Any) -> tuple[Any, Target]:
        """Take the items at the keys."""
        inputs = _take_each(self, batch, self.inputs)
        if self.keywords:
            names = [self.inputs] if isinstance(self.inputs, str) else self.inputs
            inputs = dict(zip(names, inputs if isinstance(inputs, tuple) else (inputs,), strict=True))
        return inputs, None if self.target is None else _take(self, batch, self.target)


class AutomaticAdapter(Adapter):
    """Read the usual batches.

    A tensor is the input. In a tuple or list the first item is the input and the second is the target. In a mapping,
    dataclass or named tuple, fields go by their names: the one with a usual name of inputs is the input, and the one
    with a usual name of targets, if any, is the target.
    """

    def read(self, batch: Any) -> tuple[Any, Target]:
        """Find the input and the target.

        Raises:
            ConfigurationError: If the input can't be told from the rest.

        """
        if isinstance(batch, Tensor):
            return batch, None
        named = fields_of(batch)
        if named is not None:
            inputs, targets = ([name for name in names if name in named] for names in (INPUT_NAMES, TARGET_NAMES))
            if len(inputs) == 1 and len(targets) <= 1:
                return named[inputs[0]], named[targets[0]] if targets else None
        if isinstance(batch, (tuple, list)) and batch and (named is None or not {*INPUT_NAMES} & named.keys()):
            return batch[0], batch[1] if len(batch) > 1 else None
        remedy = 'adapter=KeyAdapter(inputs="image", target="label"), or IndexAdapter.'
        if named is not None and "input_ids" in named:  # of a tokenizer
            known = [f'"{name}"' for name in named if name in INPUT_NAMES]
            target = next((f'"{name}"' for name in TARGET_NAMES if name in named), "None")
            remedy = (
                f"adapter=KeyAdapter(inputs=[{', '.join(known)}], target={target}, keywords=True). "
                "Name the embedding of words too, with interpolate_at=..., since nothing lies between two words."
            )
        raise ConfigurationError(
            f"The batch is {describe(batch)}.",
            "Y-Drop reads a tensor, (x, y, ...), and mappings, dataclasses and named tuples with one known input, such "
            f"as {', '.join(INPUT_NAMES[:7])}, and at most one known target: {', '.join(TARGET_NAMES)}.",
            "Give the LightningModule a method `ydrop_inputs(batch)` that returns (inputs, target), or name the places "
            f"in the batch: {remedy}",
        )


def check_adapter(owner: str, adapter: object) -> None:
    """Refuse what is not an adapter.

    Raises:
        ConfigurationError: If it is not.

    """
    check_kind(owner, "adapter", adapter, Adapter, example='KeyAdapter(inputs="image", target="label")')


def fields_of(batch: Any) -> Mapping[str, Any] | None:
    """View a mapping, dataclass or named tuple as a mapping. Anything else has no named fields: None."""
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


def _without_target(adapter: Places, cls: type[Places]) -> Places:
    if type(adapter).read is not cls.read:  # a subclass that reads in its own way, and may need the place
        return adapter
    alone = copy.copy(adapter)
    alone.target = None
    return alone


def _take(adapter: Adapter, batch: Any, place: int | str) -> Any:
    readable: Any = fields_of(batch) if isinstance(place, str) else batch if isinstance(batch, (tuple, list)) else None
    if readable is not None:
        try:
            return readable[place]
        except LookupError:
            pass
    raise ConfigurationError(
        f"{adapter!r} was given, and the batch is {describe(batch)}.",
        f"It reads a batch with something at {place!r}.",
        "Name places that are in the batch."
        + (" Where there is no target, pass target=None." if place == getattr(adapter, "target", None) else ""),
    )


def _are_places(inputs: Any, target: Any, is_place: Callable[[Any], bool]) -> bool:
    """Tell whether inputs are one place in a batch or a list of some, and the target one place or None."""
    listed = list(inputs) if is_list(inputs) else [inputs]
    return bool(listed) and all(map(is_place, listed)) and (target is None or is_place(target))


def _plain(places: Any, kind: type) -> Any:
    """Turn places into Python's own numbers or strings, and a list of them into a list."""
    return [kind(place) for place in places] if is_list(places) else kind(places)


def _is_key(place: Any) -> bool:
    return isinstance(place, str)


def _wrong_places(owner: str, kind: str, inputs: Any, target: Any, example: str) -> ConfigurationError:
    return ConfigurationError(
        f"{owner}(inputs={describe(inputs)}, target={describe(target)}) was given.",
        f"`inputs` is one {kind} or a list of some, `target` one or None.",
        f"Pass, for example, {example}.",
    )
