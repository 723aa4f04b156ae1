"""A progress bar for what may take more than a few seconds."""

import time
from collections.abc import Iterable, Sized
from typing import Any

import torch.distributed as dist
from tqdm.auto import tqdm

# A bar for what is over at once would only flicker.
SECONDS_BEFORE_IT_SHOWS = 5.0


def progress_bar(items: Iterable[Any] | None, what: str, shown: bool, total: int | None = None) -> Any:
    """Make a bar that shows on the first rank, once its loop takes longer than five seconds, and goes away at its end.

    Args:
        items: What is looped over; None for a bar that is updated by hand.
        what: What stands before the bar.
        shown: Whether it shows at all.
        total: How many items there are; by default as many as `items` has, if that is known.

    """
    is_first = not (dist.is_available() and dist.is_initialized() and dist.get_rank() > 0)
    if total is None and isinstance(items, Sized):
        try:
            total = len(items)
        except TypeError:  # a DataLoader of an iterable dataset has a length that raises
            total = None
    return tqdm(
        items, desc=what, total=total, leave=False, delay=SECONDS_BEFORE_IT_SHOWS, disable=not (shown and is_first)
    )


class RichBar:
    """A bar beneath the others of a `rich.progress.Progress`, which shows and goes as `progress_bar` does.

    Args:
        beneath: The Progress.
        what: What stands before the bar.
        total: How many items there are.

    """

    def __init__(self, beneath: Any, what: str, total: int) -> None:
        self._beneath, self._began = beneath, time.monotonic()
        self._task = beneath.add_task(what, total=total, visible=False)

    def update(self, count: int) -> None:
        """Say that some items more are done."""
        is_shown = time.monotonic() - self._began >= SECONDS_BEFORE_IT_SHOWS
        self._beneath.update(self._task, advance=count, visible=is_shown)
        if is_shown:
            self._beneath.refresh()

    def __enter__(self) -> "RichBar":
        """Go on."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Take the bar away."""
        self._beneath.remove_task(self._task)
