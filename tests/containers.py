"""Containers that are no list, tuple or dict, as OmegaConf makes them of the lists and mappings of a YAML file."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any


class ListConfig(Sequence[Any]):
    """A sequence."""

    def __init__(self, items: list[Any]) -> None:
        self._content = items

    def __getitem__(self, index: Any) -> Any:
        return self._content[index]

    def __len__(self) -> int:
        return len(self._content)


class DictConfig(Mapping[str, Any]):
    """A mapping."""

    def __init__(self, items: dict[str, Any]) -> None:
        self._content = items

    def __getitem__(self, key: str) -> Any:
        return self._content[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._content)

    def __len__(self) -> int:
        return len(self._content)
