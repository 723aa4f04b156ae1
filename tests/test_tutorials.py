"""What tutorials claim of the numbers that they print. `.ci/docs` runs all of them when it builds the site."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TUTORIALS = Path(__file__).parents[1] / "docs" / "tutorials"


def said_by(tutorial: str) -> str:
    """Run a tutorial as the site does, and give all that it prints."""
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", str(TUTORIALS / f"{tutorial}.py")],
        env=os.environ | {"MPLBACKEND": "agg", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert done.returncode == 0
    return done.stdout


@pytest.mark.slow
def test_a_network_of_timm_is_explained() -> None:
    said = said_by("6_explain")
    on_threes, on_others = re.search(r"accuracy: on 3 (\S+), on the others (\S+)", said).groups()  # type: ignore[union-attr]
    assert min(float(on_threes), float(on_others)) > 0.9
    change = float(re.search(r"change of the logit: (\S+)", said).group(1))  # type: ignore[union-attr]
    deltas = {
        int(steps): [float(each) for each in re.findall(r"layer\d ([\d.]+)", line)]
        for steps, line in re.findall(r"^ *(\d+) steps, mean size of delta: (.*)$", said, re.MULTILINE)
    }
    assert list(deltas) == [10, 40, 160]
    for few, more in zip(deltas[10], deltas[160], strict=True):
        assert more < 2e-3 * change
        assert few > 4 * more or few < 1e-3
    # The branch of a residual block and its skip connection carry the change together.
    (branch, beside), (skip, rest) = re.findall(r"carries +(\S+), delta +(\S+)", said)
    assert float(branch) + float(skip) == pytest.approx(change, rel=0.1)
    assert float(beside) == pytest.approx(-float(skip), rel=0.05, abs=0.1)
    assert float(rest) == pytest.approx(-float(branch), rel=0.05, abs=0.1)
    rows = [tuple(map(float, row)) for row in re.findall(r"^ +(\d) +(\S+) +(\S+) +(\S+) +(\S+)$", said, re.MULTILINE)]
    assert [row[0] for row in rows] == list(range(10))
    assert sum(own < 0.5 for _, own, _, _, _ in rows) >= 6  # "most digits are lost without their channels"
    assert min(others for _, _, others, _, _ in rows) > 0.9  # "and only they"
    assert min(by_chance for *_, by_chance, _ in rows) > 0.8
    sums, channel = (
        [float(each) for each in re.findall(r"'(-?[\d.]+)'", line)]
        for line in re.findall(r"^(?:sums over pixels|of the channel): (.*)$", said, re.MULTILINE)
    )
    assert len(sums) == 5
    assert sums == pytest.approx(channel, abs=0.03)
