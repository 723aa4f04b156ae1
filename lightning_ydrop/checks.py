"""Checks of arguments: each says what was given, what is allowed, and what to write.

Settings come from Python, from YAML, from Hydra and from NumPy. The checks take a number of any of these, a flag, and a
list, and return a plain Python value: with that, a repr, a checkpoint and a YAML dump show no type of another library.
"""

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
from torch import nn

from lightning_ydrop.errors import ConfigurationError, describe


def check_rate(owner: str, name: str, value: Any) -> float:
    """Refuse a drop rate outside [0, 1).

    Args:
        owner: What the user called, for the message.
        name: The name of the argument.
        value: Its value.

    Returns:
        The rate as a plain number.

    Raises:
        ConfigurationError: If it is outside; at 1 nothing would be left to rescale.

    """
    if not (is_real(value) and 0.0 <= value < 1.0):
        raise ConfigurationError(
            f"{owner}({name}={describe(value)}) was given.",
            "A drop rate is a number in [0, 1): 0 drops nothing, and at 1 nothing would be left to rescale.",
            f"Pass, for example, {name}=0.5.",
        )
    return plain_number(value)


def check_fraction(owner: str, name: str, value: Any, *, example: float) -> float:
    """Refuse a fraction outside [0, 1].

    Args:
        owner: What the user called, for the message.
        name: The name of the argument.
        value: Its value.
        example: A value that the message proposes.

    Returns:
        The fraction as a plain number.

    Raises:
        ConfigurationError: If it is outside.

    """
    if not (is_real(value) and 0.0 <= value <= 1.0):
        raise ConfigurationError(
            f"{owner}({name}={describe(value)}) was given.",
            f"`{name}` is a number in [0, 1].",
            f"Pass, for example, {name}={example}.",
        )
    return plain_number(value)


def check_number(owner: str, name: str, value: Any, *, example: float, positive: bool = False) -> float:
    """Refuse what is not a finite number of at least 0.

    Args:
        owner: What the user called, for the message.
        name: The name of the argument.
        value: Its value.
        example: A value that the message proposes.
        positive: Whether 0 is refused too.

    Returns:
        The number as a plain one.

    Raises:
        ConfigurationError: If it is not.

    """
    if not (is_real(value) and value >= 0.0) or (positive and value == 0.0):
        raise ConfigurationError(
            f"{owner}({name}={describe(value)}) was given.",
            f"`{name}` is a finite number {'above' if positive else 'of at least'} 0.",
            f"Pass, for example, {name}={example}.",
        )
    return plain_number(value)


def check_count(owner: str, name: str, value: Any, *, minimum: int, example: int) -> int:
    """Refuse what is not a whole number of at least `minimum`.

    Args:
        owner: What the user called, for the message.
        name: The name of the argument.
        value: Its value.
        minimum: The smallest number allowed.
        example: A value that the message proposes.

    Returns:
        The number as an int.

    Raises:
        ConfigurationError: If it is not.

    """
    if not is_whole(value) or value < minimum:
        raise ConfigurationError(
            f"{owner}({name}={describe(value)}) was given.",
            f"`{name}` is a whole number of at least {minimum}.",
            f"Pass, for example, {name}={example}.",
        )
    return int(value)


def check_unit_dim(owner: str, unit_dim: Any) -> int:
    """Refuse what cannot be the dimension of units.

    Args:
        owner: What the user called, for the message.
        unit_dim: The dimension.

    Returns:
        The dimension as an int.

    Raises:
        ConfigurationError: If it is 0 or not a whole number.

    """
    return _check_dim(owner, "unit_dim", unit_dim, "units", "Pass 1 for (B, U) and (B, C, H, W), or -1 for (B, T, U).")


def check_class_dim(owner: str, class_dim: Any) -> int:
    """Refuse what cannot be the dimension of classes.

    Args:
        owner: What the user called, for the message.
        class_dim: The dimension.

    Returns:
        The dimension as an int.

    Raises:
        ConfigurationError: If it is 0 or not a whole number.

    """
    return _check_dim(
        owner,
        "class_dim",
        class_dim,
        "classes in the output",
        "Pass 1 for (B, C) and (B, C, H, W), or -1 for (B, T, C).",
    )


def _check_dim(owner: str, name: str, value: Any, of: str, remedy: str) -> int:
    """Refuse a dimension that is the batch's, or no whole number."""
    if not is_whole(value) or value == 0:
        raise ConfigurationError(
            f"{owner}({name}={describe(value)}) was given.",
            f"`{name}` is the dimension of the {of}, any but 0, which is the batch.",
            remedy,
        )
    return int(value)


def check_choice(owner: str, name: str, value: object, choices: tuple[str, ...]) -> str:
    """Refuse a word that is not among the choices.

    Args:
        owner: What the user called, for the message.
        name: The name of the argument.
        value: Its value.
        choices: The words that are allowed.

    Returns:
        The word.

    Raises:
        ConfigurationError: If it is not among them.

    """
    if not isinstance(value, str) or value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ConfigurationError(
            f"{owner}({name}={describe(value)}) was given.",
            f"`{name}` is one of {listed}.",
            f"Pass, for example, {name}={choices[0]!r}.",
        )
    return str(value)


def check_flag(owner: str, name: str, value: object) -> bool:
    """Refuse what is neither True nor False.

    Args:
        owner: What the user called, for the message.
        name: The name of the argument.
        value: Its value.

    Returns:
        The flag as a bool.

    Raises:
        ConfigurationError: If it is neither.

    """
    if not isinstance(value, (bool, np.bool_)):
        raise ConfigurationError(
            f"{owner}({name}={describe(value)}) was given.",
            f"`{name}` is True or False.",
            f"Pass, for example, {name}=True.",
        )
    return bool(value)


def check_module(owner: str, model: object) -> None:
    """Refuse what is not a torch module.

    Raises:
        ConfigurationError: If it is not.

    """
    if not isinstance(model, nn.Module):
        raise ConfigurationError(
            f"{owner}({describe(model)}) was given.",
            "A model is an instance of torch.nn.Module.",
            "Pass the model itself.",
        )


def check_kind(owner: str, name: str, value: object, kind: type, *, example: str) -> None:
    """Refuse an argument that is not an instance of one of our classes, which users may subclass.

    Raises:
        ConfigurationError: If it is not.

    """
    if not isinstance(value, kind):
        raise ConfigurationError(
            f"{owner}({name}={describe(value)}) was given.",
            f"{'An' if name[0] in 'aeiou' else 'A'} {name} is an instance of a subclass of "
            f"lightning_ydrop.{kind.__name__}.",
            f"Pass, for example, {name}={example}.",
        )


def is_real(value: Any) -> bool:
    """Tell whether a value is a finite number, of Python or of NumPy. True and False are not numbers."""
    number: Any = value if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    return bool(-math.inf < number < math.inf)  # not math.isfinite, which torch.compile cannot trace


def is_whole(value: Any) -> bool:
    """Tell whether a value is a whole number, of Python or of NumPy. True and False are not numbers."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_list(value: object) -> bool:
    """Tell whether a value lists things: a list, a tuple, what OmegaConf makes of a list, or a row of NumPy."""
    return (isinstance(value, Sequence) and not isinstance(value, (str, bytes))) or (
        isinstance(value, np.ndarray) and value.ndim == 1
    )


def plain_number(value: Any) -> float:
    """Turn a number into Python's own: an int where it is whole by type, or else a float."""
    return int(value) if isinstance(value, Integral) else float(value)
