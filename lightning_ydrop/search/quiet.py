"""Silence for hundreds of trainings that all say the same."""

import contextlib
import logging
import warnings
from collections.abc import Iterator

# What jsonargparse warns of, and writes instead of a value that it can't write, such as a device.
UNWRITTEN = "Unable to serialize instance"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep back what Lightning says of each training, which is the same for hundreds of them."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Lightning calls jsonargparse by an older name
            warnings.filterwarnings("ignore", ".*args parameter is intended to run from within Python")
            warnings.filterwarnings("ignore", rf"\s*{UNWRITTEN}")
            warnings.filterwarnings("ignore", ".*does not have many workers")
            warnings.filterwarnings("ignore", ".*`isinstance.treespec, LeafSpec.` is deprecated", FutureWarning)
            warnings.filterwarnings("ignore", ".*exists and is not empty")
            warnings.filterwarnings("ignore", ".*smaller than the logging interval")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
