import sys
from collections.abc import Callable
from typing import Any

import pytest

from examples import train


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """The main of examples/train.py, to be called in this process."""
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # where Lightning leaves it for other tests
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning calls it by an older name
    main: Callable[..., Any] = train.main
    return main
