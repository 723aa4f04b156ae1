"""Checks of arguments: each says what was given, what is allowed, and what to write."""

import math

from torch import nn

from lightning_ydrop.errors import ConfigurationError, describe


def check_rate(owner: str, name: str, value: float) -> None:
    """Refuse a drop rate outside [0, 1).

    Raises:
        ConfigurationError: If it is; at 1 nothing would be left to rescale.

    """
    if not (is_real(value) and 0.0 <= value < 1.0):
        raise ConfigurationError(
            f"{owner}({name}={describe(value)}) was given.",
            "A drop rate is a number in [0, 1): 0 drops nothing, and at 1 nothing would be left to rescale.",
            f"Pass, for example, {name}=0.5.",
        )


def check_fraction(owner: str, name: str, value: float, *, example: float) -> None:
    """Refuse a share outside [0, 1].

    Raises:
        ConfigurationError: If it is.

    """
    if not (is_real(value) and 0.0 <= value <= 1.0):
        raise ConfigurationError(
            f"{owner}({name}={describe(value)}) was given.",
            f"`{name}` is a number in [0, 1].",
            f"Pass, for example, {name}={example}.",
        )


def check_count(owner: str, name: str, value: object, *, minimum: int, example: int) -> None:
    """Refuse what is not a whole number of at least `minimum`.

    Raises:
        ConfigurationError: If it is not.

    """
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ConfigurationError(
            f"{owner}({name}={describe(value)}) was given.",
            f"`{name}` is a whole number of at least {minimum}.",
            f"Pass, for example, {name}={example}.",
        )


def check_unit_dim(owner: str, unit_dim: object) -> None:
    """Refuse what cannot be the dimension of units.

    Raises:
        ConfigurationError: If it is no whole number but 0.

    """
    if isinstance(unit_dim, bool) or not isinstance(unit_dim, int) or unit_dim == 0:
        raise ConfigurationError(
            f"{owner}(unit_dim={describe(unit_dim)}) was given.",
            "`unit_dim` is the dimension of the units, any but 0, which is the batch.",
            "Pass 1 for (B, U) and (B, C, H, W), or -1 for (B, T, U).",
        )


def check_choice(owner: str, name: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a word that is not among the choices.

    Raises:
        ConfigurationError: If it is not.

    """
    if value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ConfigurationError(
            f"{owner}({name}={describe(value)}) was given.",
            f"`{name}` is one of {listed}.",
            f"Pass, for example, {name}={choices[0]!r}.",
        )


def check_flag(owner: str, name: str, value: bool) -> None:
    """Refuse what is neither True nor False.

    Raises:
        ConfigurationError: If it is not.

    """
    if not isinstance(value, bool):
        raise ConfigurationError(
            f"{owner}({name}={describe(value)}) was given.",
            f"`{name}` is True or False.",
            f"Pass, for example, {name}=True.",
        )


def check_module(owner: str, model: object) -> None:
    """Refuse what is no module of torch.

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
    """Refuse an argument that is no instance of a class of ours that users may subclass.

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


def is_real(value: object) -> bool:
    """Tell whether a value is a finite number, which True and False are not."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return -math.inf < value < math.inf  # not math.isfinite, which torch.compile cannot trace
