import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.distributed.resume import PLACES
from tests.sameness import assert_same

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_two_ranks_resume_exactly(tmp_path: Path) -> None:
    for place in ("whole", *PLACES):
        program = [sys.executable, "-m", "tests.distributed.resume", str(tmp_path), place]
        subprocess.run(program, cwd=ROOT, env=os.environ | {"PYTHONWARNINGS": "ignore"}, check=True)
    expected = torch.load(tmp_path / "whole.pt")
    for place in PLACES:
        assert_same(dict(torch.load(tmp_path / f"{place}.pt")), dict(expected))
