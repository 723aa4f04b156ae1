"""Patterns of the names of modules."""

import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import translate

from lightning_ydrop.errors import ConfigurationError, describe


class NamePatterns:
    """Patterns as in fnmatch, such as "classifier.*", which are matched all at once.

    Args:
        patterns: The patterns, in the order in which they are tried.

    """

    def __init__(self, patterns: Sequence[str]) -> None:
        # Patterns without wildcards are looked up, so that a list of all names takes linear time.
        self._plain: dict[str, int] = {}
        self._wild: list[int] = []
        for index, pattern in enumerate(patterns):
            if _is_plain(pattern):
                self._plain.setdefault(pattern, index)
            else:
                self._wild.append(index)
        # One group for each pattern. `translate` makes groups that do not capture.
        self._regex = re.compile("|".join(f"({translate(patterns[index])})" for index in self._wild))

    def first(self, names: Iterable[str]) -> int | None:
        """Find the index of the first pattern that fits any of some names. None if no pattern does."""
        found = [self._plain[name] for name in names if name in self._plain]
        if self._wild:
            matches = [match for name in names if (match := self._regex.match(name))]
            found += [self._wild[match.lastindex - 1] for match in matches if match.lastindex is not None]
        return min(found, default=None)

    def fit(self, names: Iterable[str]) -> bool:
        """Tell whether any pattern fits any of some names."""
        return self.first(names) is not None


def fits_any(pattern: str, names: Mapping[str, object]) -> bool:
    """Tell whether a pattern fits any of some names, which are looked up if the pattern has no wildcards."""
    return pattern in names if _is_plain(pattern) else NamePatterns([pattern]).fit(names)


def _is_plain(pattern: str) -> bool:
    return not any(sign in pattern for sign in "*?[")


def reported(name: str) -> str:
    """Take out of a name what compilation adds."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod") if "_orig_mod" in name else name


def check_patterns(owner: str, name: str, patterns: object) -> None:
    """Refuse anything but None, a pattern of names, or a sequence of patterns, such as a list or a ListConfig.

    Raises:
        ConfigurationError: If it is something else.

    """
    listed = [patterns] if isinstance(patterns, str) else patterns
    if patterns is not None and not (isinstance(listed, Sequence) and all(isinstance(each, str) for each in listed)):
        raise ConfigurationError(
            f"{owner}({name}={describe(patterns)}) was given.",
            f"`{name}` holds patterns of the names of modules.",
            f'Pass, for example, {name}="classifier.*".',
        )
