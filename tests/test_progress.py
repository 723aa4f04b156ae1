"""Progress bars: they show what takes long, and nothing else."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_ydrop import monte_carlo, progress
from lightning_ydrop.analysis import mean_conductance, removal_curve

MODEL = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 3))
DATA = [(torch.rand(16, 4), torch.arange(16) % 3)] * 3
LONG: dict[str, tuple[Callable[..., Any], str]] = {
    "removal curve": (lambda **shown: removal_curve(MODEL, DATA, layers="1", repeats=2, **shown), "3/3"),
    "mean conductance": (lambda **shown: mean_conductance(MODEL, DATA, layers="1", **shown), "3/3"),
    "masks": (lambda **shown: monte_carlo(MODEL, DATA[0][0], 20, max_rows=32, **shown), "20/20"),
}


@pytest.mark.parametrize("what", LONG)
def test_a_bar_shows_what_takes_long(
    what: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call, end = LONG[what]
    call()
    assert capsys.readouterr().err == ""  # over in less than five seconds
    monkeypatch.setattr(progress, "SECONDS_BEFORE_IT_SHOWS", 0)
    call()
    said = capsys.readouterr().err
    assert what in said
    assert f"/{end.partition('/')[2]}" in said
    call(progress_bar=False)
    assert capsys.readouterr().err == ""


def test_data_without_a_length_have_a_bar_too() -> None:
    class Endless(IterableDataset[torch.Tensor]):
        def __iter__(self) -> Any:
            return iter(torch.rand(6, 4))

    bar = progress.progress_bar(DataLoader(Endless(), batch_size=2), "data", True)
    assert bar.total is None
    assert len(list(bar)) == 3
