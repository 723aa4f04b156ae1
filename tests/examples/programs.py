"""The programs of examples/, whose modules stand beside them as in folders of scripts."""

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


def imported(path: str) -> ModuleType:
    """Import a module of examples/ by its path there, as its program does."""
    for folder in (EXAMPLES, (EXAMPLES / path).parent):
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
    return importlib.import_module(Path(path).name)


def said(path: str, *args: str, cwd: Path) -> str:
    """Run a program of examples/ as its users do, to its end, and give its output."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / path), *args], capture_output=True, text=True, check=False, cwd=cwd
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
