"""The programs of examples/, whose modules stand beside them as in a folder of scripts."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


def imported(name: str) -> ModuleType:
    """Import a module of examples/ as its programs do."""
    if str(EXAMPLES) not in sys.path:
        sys.path.append(str(EXAMPLES))
    return importlib.import_module(name)
