"""The programs of examples/, run as their users do."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = ROOT / "examples"
# Users stand in the root of a clone, and tests in folders of their own.
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}


def said(module: str, *args: str, cwd: Path) -> str:
    """Run a program of examples/ to its end, and give its output."""
    done = subprocess.run(
        [sys.executable, "-m", f"examples.{module}", *args],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env=ENVIRONMENT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
