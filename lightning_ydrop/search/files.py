"""Patterns as YAML files, in the form of LightningCLI."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_ydrop.errors import ConfigurationError, describe
from lightning_ydrop.layers.patterns import ConvPattern, Pattern, TokenPattern

CLASSES: dict[str, type[Pattern]] = {
    f"{package}.{pattern.__name__}": pattern
    for pattern in (ConvPattern, TokenPattern)
    for package in ("lightning_ydrop", pattern.__module__)
}
EXAMPLE = "stage1.1: {class_path: lightning_ydrop.ConvPattern, init_args: {size: 0.25}}"


def read_patterns(path: str | Path) -> dict[str, Pattern]:
    """Read the patterns of a network from a YAML file, as `write_patterns` writes it.

    Args:
        path: The file: a mapping from places to `class_path` and `init_args` of a ConvPattern or a TokenPattern.

    Returns:
        The patterns by place, in the order of the file.

    Raises:
        ConfigurationError: If there is no such file, it is no YAML, or it holds something else.

    """
    import yaml

    given = f"read_patterns({describe(str(path))}) was given"
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(
            f"{given}, and the file can't be read: {error.strerror}.",
            "Patterns come from a YAML file, which write_patterns writes.",
            f"Check the path; {str(Path(path).absolute())!r} is what it stands for here.",
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = " ".join(str(error).split())
        raise ConfigurationError(
            f"{given}, and the file is no YAML: {where}.",
            "It maps places to patterns.",
            f"Write, for example, {EXAMPLE}",
        ) from error
    return as_patterns(f"read_patterns({describe(str(path))})", content)


def write_patterns(patterns: Mapping[str, Pattern], path: str | Path) -> None:
    """Write the patterns of a network to a YAML file that `read_patterns` and `PatternCallback` read.

    Args:
        patterns: By place.
        path: The file. It is replaced if it is there.

    Raises:
        ConfigurationError: If something among them is no pattern.

    """
    import yaml

    content = as_plain(as_patterns("write_patterns", patterns))
    Path(path).write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")


def as_plain(patterns: Mapping[str, Pattern]) -> dict[str, dict[str, Any]]:
    """Turn patterns into what YAML and JSON can hold: the inverse of `as_patterns`.

    Args:
        patterns: By place.

    Returns:
        By place `class_path` and `init_args`.

    """
    return {
        place: {"class_path": f"lightning_ydrop.{type(pattern).__name__}", "init_args": dataclasses.asdict(pattern)}
        for place, pattern in patterns.items()
    }


def as_patterns(owner: str, patterns: object) -> dict[str, Pattern]:
    """Turn a mapping into patterns by place.

    Args:
        owner: What the user called, for messages.
        patterns: A mapping from places to patterns, or to what YAML makes of them.

    Returns:
        The patterns, in the same order.

    Raises:
        ConfigurationError: If it is something else.

    """
    if not isinstance(patterns, Mapping) or not all(isinstance(place, str) for place in patterns):
        raise ConfigurationError(
            f"{owner} found {describe(patterns)}.",
            "Patterns are a mapping from the names of places to a ConvPattern or a TokenPattern each.",
            f"Write, for example, {EXAMPLE}",
        )
    return {place: _as_pattern(owner, place, value) for place, value in patterns.items()}


def _as_pattern(owner: str, place: str, value: Any) -> Pattern:
    if isinstance(value, (ConvPattern, TokenPattern)):
        return value
    # What jsonargparse makes of a mapping is an object with these attributes.
    entries = value if isinstance(value, Mapping) else getattr(value, "__dict__", {})
    cls = CLASSES.get(str(entries.get("class_path")))
    arguments = entries.get("init_args", {})
    arguments = arguments if isinstance(arguments, Mapping) else getattr(arguments, "__dict__", None)
    if cls is None or set(entries) - {"class_path", "init_args"} or arguments is None:
        raise ConfigurationError(
            f"{owner} found {place}: {describe(value)}.",
            "A pattern is written as class_path, lightning_ydrop.ConvPattern or lightning_ydrop.TokenPattern, and "
            "init_args.",
            f"Write, for example, {EXAMPLE}",
        )
    fields = {field.name: field.default is dataclasses.MISSING for field in dataclasses.fields(cls)}
    unknown = [str(name) for name in arguments if name not in fields]
    missing = [name for name, is_needed in fields.items() if is_needed and name not in arguments]
    if unknown or missing:
        wrong = f"{place} with the argument {unknown[0]!r}" if unknown else f"{place} without {missing[0]!r}"
        raise ConfigurationError(
            f"{owner} found {wrong}.",
            f"The arguments of {cls.__name__} are {', '.join(fields)}.",
            f"Write, for example, {EXAMPLE}",
        )
    try:
        return cls(**arguments)
    except ConfigurationError as error:
        given, allowed, remedy = error.args
        raise ConfigurationError(f"{owner} found {place}: {given}", allowed, remedy) from error
