"""What trained networks show."""

from pathlib import Path

import pytest
import torch

from examples.paper import figures, kept
from lightning_ydrop.analysis import RemovalCurve
from tests.examples.programs import said
from tests.examples.test_data import drawn, write_mnist
from tests.examples.test_report import leave


def shown(conductance: list[float], strongest: list[float]) -> figures.Shown:
    accuracy = torch.tensor([strongest])
    curve = RemovalCurve(figures.FRACTIONS[: len(strongest)], accuracy)
    flat = RemovalCurve(figures.FRACTIONS, torch.full((25, len(figures.FRACTIONS)), 0.98))
    return figures.Shown({"network.1": torch.tensor(conductance)}, flat, curve, dict.fromkeys(figures.PRUNED_BY, flat))


def test_spread_and_thresholds_stand_beside_the_papers(tmp_path: Path) -> None:
    arms = {
        "plain": [shown([4.0, 1, 1, 1, 1], [0.98, 0.975, 0.9]), shown([2.0, 1, 1, 1, 1], [0.98, 0.975, 0.975])],
        "random": [shown([1.0, 1, 1, 1, 1], [0.98, 0.98, 0.98])],
    }
    its_own = {"row": "mnist_fig_2", "varied": {}, "settings": ["trainer.max_epochs=9"]}
    figures.write(figures.papers_of([its_own]), "run.py --rows mnist_fig_2", arms, tmp_path)
    lines = (tmp_path / "figures.md").read_text().splitlines()
    plain, random = (next(line for line in lines if line.startswith(f"| {arm} |")) for arm in arms)
    # Shares of 4/8 and 2/6, Gini coefficients of 0.3 and 2/15, totals of 8 and 6; 10% and 20% can be removed.
    assert plain == "| plain | 41.7 ± 11.8 | 50.0 | 0.22 ± 0.12 | 7.0 ± 1.4 | 99 ± 0 | 15 ± 7 | 20 | 2 |"
    assert random == "| random | 20.0 |  | 0.00 | 5.0 | 99 | 20 |  | 1 |"
    assert sum(line.startswith("| plain | 98.00 ± 0.00 |") for line in lines) == 1 + len(figures.PRUNED_BY) + 1
    for picture in ("fig_2.png", "fig_3.png", "pruning.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    for other in ({"row": "mnist_fc_1"}, {"varied": {"model.hidden": "[32]"}}, {"settings": ["data.val_fraction=0.1"]}):
        assert "| 50.0 |" not in figures.summary(figures.papers_of([its_own, its_own | other]), arms)


@pytest.mark.slow
def test_the_networks_of_a_grid_are_shown(tmp_path: Path) -> None:
    write_mnist(tmp_path / "data", drawn((1, 28, 28), 400, 10, 0), drawn((1, 28, 28), 50, 10, 1))
    settings = [
        f"data.root={tmp_path / 'data'}",
        "model.hidden=[32]",
        "trainer.max_epochs=2",
        "trainer.accelerator=cpu",
    ]
    grid = ["--rows", "mnist_fig_2", "--arms", "plain", "ydrop", "--seeds", "0", "--jobs", "2"]
    grid += ["--keep-checkpoints", "--set", *settings, "--out", "runs/figures"]
    said("paper.run", *grid, cwd=tmp_path)
    said("paper.figures", "--repeats", "2", cwd=tmp_path)
    written = (tmp_path / "runs/figures/figures.md").read_text()
    assert written.count("| ydrop | ") == written.count("| plain | ") == 6
    assert "nearly linear" not in written  # the paper's figure is that of 1024 units
    assert (
        "examples.paper.run --rows mnist_fig_2 --arms plain ydrop --seeds 0 --set 'model.hidden=[32]' trainer"
        in written
    )


def test_without_checkpoints_it_says_how_to_keep_them(tmp_path: Path) -> None:
    leave(tmp_path, "mnist_fig_2", "plain", 0, 0.98)
    with pytest.raises(SystemExit, match="--keep-checkpoints"):
        figures.main(["--runs", str(tmp_path)])
    leave(tmp_path, "digits", "plain", 0, 0.98)
    with pytest.raises(SystemExit, match="results of 2 rows"):
        figures.main(["--runs", str(tmp_path)])


def test_networks_of_one_arm_with_several_settings_are_refused(tmp_path: Path) -> None:
    for rate in ("0.01", "1"):
        result = leave(tmp_path, "digits", "dropout", 0, 0.98, **{"model.lr": rate})
        (result.parent / "checkpoints").mkdir()
        (result.parent / "checkpoints/epoch=1.ckpt").touch()
    with pytest.raises(SystemExit, match="results of dropout with several settings"):
        figures.main(["--runs", str(tmp_path)])
    assert len(kept.read(tmp_path / "digits/dropout_1")) == 1
