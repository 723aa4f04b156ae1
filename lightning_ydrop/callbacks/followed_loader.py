"""A DataLoader whose place in an epoch is known, and can be found again."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from lightning_ydrop.callbacks.random_state import random_state, set_random_state
from lightning_ydrop.torch_internals import set_class

CPU = torch.device("cpu")  # where batches are drawn
_FOLLOWING: dict[type, type] = {}


@dataclass
class Replay:
    """How to find a place again.

    Attributes:
        before: The random state before the epoch's iterator was made.
        skipped: The number of batches that were trained on.
        given: The number of batches that were given out. It is one more than `skipped` where Lightning looks ahead.
        ahead: The random state before the last of these, if so.
        after: The random state after that. None: the state in which the replay is asked for.
        device: Where the network computes.
        generators: The states of the loader's own generators after that.

    """

    before: dict[str, Any]
    skipped: int
    given: int
    ahead: dict[str, Any] | None
    after: dict[str, Any] | None
    device: torch.device
    generators: list[Tensor]


class FollowedLoader:
    """Follows a DataLoader: its class changes for one with an `__iter__` that counts, until `release`.

    Iterators are made when their first batch is asked for, so that the random numbers that this takes are drawn at the
    same time in a fit that is resumed and in one that is not.

    Args:
        loader: The loader.
        is_training: Whether an iterator that begins now is of training. A loader may serve validation too.

    Attributes:
        before: The random state before its latest iterator was made. None before the first.
        given: The number of batches that this iterator has given out.
        ahead: The random state before the last of these, if the loader's length is unknown: Lightning asks for a batch
            more than it trains on then.
        replay: What the next iterator is to do first.

    """

    def __init__(self, loader: Any, is_training: Callable[[], bool]) -> None:
        self.loader: DataLoader[Any] = loader
        self.is_training = is_training
        self.before: dict[str, Any] | None = None
        self.given = 0
        self.ahead: dict[str, Any] | None = None
        self.replay: Replay | None = None
        self._class: Any = type(loader)
        loader.__dict__["_followed_by"] = self
        if self._class not in _FOLLOWING:
            _FOLLOWING[self._class] = _following(self._class)
        set_class(loader, _FOLLOWING[self._class])

    @property
    def generators(self) -> list[torch.Generator]:
        """The generators of the loader and of all samplers in it, each once, whatever attributes they are in."""
        found: dict[int, torch.Generator] = {}
        seen: set[int] = set()
        left: list[Any] = [self.loader, self.loader.sampler, self.loader.batch_sampler]
        while left:
            holder = left.pop(0)
            if id(holder) not in seen:
                seen.add(id(holder))
                for name, value in getattr(holder, "__dict__", {}).items():
                    if isinstance(value, torch.Generator):
                        found[id(value)] = value
                    elif isinstance(value, Sampler) or "sampler" in name:
                        left.append(value)
        return list(found.values())

    @property
    def has_length(self) -> bool:
        """Whether the loader knows the number of its batches."""
        try:
            return len(self.loader) >= 0
        except (TypeError, NotImplementedError):
            return False

    def release(self) -> None:
        """Give the loader back as it was."""
        self.call_resumable(False)
        del self.loader.__dict__["_followed_by"]
        set_class(self.loader, self._class)

    def call_resumable(self, resumable: bool) -> None:
        """Let the loader look like one that finds its place by itself: Lightning warns of any other."""
        for name in ("state_dict", "load_state_dict"):
            if resumable:
                self.loader.__dict__[name] = dict
            else:
                self.loader.__dict__.pop(name, None)

    def iterate(self) -> Iterator[Any]:
        """Give the batches of an epoch, after those that a replay skips."""
        if not self.is_training():
            yield from self._class.__iter__(self.loader)
            return
        replay, self.replay = self.replay, None
        after: dict[str, Any] = {}
        if replay is not None:
            after = (replay.after or random_state(replay.device)) | {"generators": replay.generators}
            set_random_state(replay.before, CPU, self.generators)
        self.before, self.given = random_state(CPU, self.generators), 0
        batches = self._class.__iter__(self.loader)
        while True:
            if replay is not None and self.given == replay.given:
                set_random_state(after, replay.device, self.generators)
            elif replay is not None and self.given == replay.skipped and replay.ahead is not None:
                set_random_state(replay.ahead, CPU, self.generators)
            if not self.has_length:
                self.ahead = random_state(CPU, self.generators)
            try:
                batch = next(batches)
            except StopIteration:
                return
            self.given += 1
            if replay is None or self.given > replay.skipped:
                yield batch


def _following(cls: Any) -> Any:
    def __iter__(self: Any) -> Iterator[Any]:
        followed: FollowedLoader = self.__dict__["_followed_by"]
        return followed.iterate()

    return type(cls.__name__, (cls,), {"__iter__": __iter__, "__module__": cls.__module__})
