import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from examples.paper import experiment, report, results


def leave(folder: Path, row: str, arm: str, seed: int, test_acc: float, *settings: str, **varied: str) -> Path:
    """Write what run.py leaves."""
    result: dict[str, Any] = {"row": row, "arm": arm, "seed": seed, "varied": varied, "test_acc": test_acc}
    result |= {"settings": settings, "files": f"those of {arm}", "resumed": False}
    place = folder / row / "_".join([arm, *varied.values()]) / f"seed_{seed}"
    place.mkdir(parents=True)
    file = place / "result.json"
    file.write_text(json.dumps(result | {"val_loss": 0.05, "epochs": 20, "seconds": 61.4, "arguments": ["fit"]}))
    return file


def change(result: Path, **values: object) -> None:
    """Write a result anew with other values."""
    result.write_text(json.dumps(json.loads(result.read_text()) | values))


def test_differences_are_paired_with_their_confidence_interval() -> None:
    ours = {0: 0.98, 1: 0.97, 2: 0.99, 3: 0.5}
    theirs = {0: 0.97, 1: 0.968, 2: 0.981}
    runs = [{seed: {"test_acc": value} for seed, value in each.items()} for each in (ours, theirs | {3: math.nan})]
    found = results.difference(*runs)
    each = [1.0, 0.2, 0.9]
    assert found.mean == pytest.approx(0.7)
    assert found.pairs == 3
    interval = stats.ttest_1samp(each, 0).confidence_interval(0.95)
    assert found.mean - found.half_width == pytest.approx(interval.low)
    assert found.mean + found.half_width == pytest.approx(interval.high)
    alone = results.difference(runs[0], {0: {"test_acc": 0.97}})
    assert alone.mean == pytest.approx(1.0)
    assert alone.half_width == math.inf


def test_a_row_has_the_papers_figure_beside_ours(tmp_path: Path) -> None:
    for seed, (dropout, ydrop) in enumerate([(0.98, 0.985), (0.982, 0.984), (0.981, 0.986)]):
        leave(tmp_path, "mnist_fc_1", "dropout", seed, dropout, "trainer.max_epochs=9")
        leave(tmp_path, "mnist_fc_1", "ydrop", seed, ydrop, "trainer.max_epochs=9", "ydrop.n_steps=7")
    report.main(["--runs", str(tmp_path)])
    lines = (tmp_path / "report.md").read_text().splitlines()
    first, second = (next(line for line in lines if line.startswith(f"| {arm} |")) for arm in ("dropout", "ydrop"))
    assert first.startswith("| dropout | 98.10 ± 0.10 | 98.30 |  | +0.40 ± 0.43 (3) |")
    assert second.startswith("| ydrop | 98.50 ± 0.10 | 98.47 | +0.40 ± 0.43 (3) |  |")
    assert "from 6 runs" in "\n".join(lines)
    command = "--rows mnist_fc_1 --arms dropout ydrop --seeds 0 1 2 --set trainer.max_epochs=9 ydrop.n_steps=7"
    assert f"python -m examples.paper.run {command}" in lines


@pytest.mark.parametrize("setting", ["model.hidden=[8]", "data.train_fraction=0.01"])
def test_the_papers_figure_is_that_of_its_network_and_data(setting: str, tmp_path: Path) -> None:
    leave(tmp_path, "mnist_fc_1", "dropout", 0, 0.9, setting)
    report.main(["--runs", str(tmp_path)])
    assert "98.30" not in (tmp_path / "report.md").read_text()


def test_a_run_that_diverged_is_counted_and_has_no_loss(tmp_path: Path) -> None:
    for loss in (math.inf, math.nan):
        folder = tmp_path / str(loss)
        for share in ("0.1", "1"):
            for seed, accuracy in enumerate((0.1, 0.98)):
                leave(folder, "digits", "dropout", seed, 0.97, **{"data.train_fraction": share})
                diverged = leave(folder, "digits", "ydrop", seed, accuracy, **{"data.train_fraction": share})
                change(diverged, **({"val_loss": loss} if seed == 0 else {"resumed": True}))
        report.main(["--runs", str(folder)])
        written = (folder / "report.md").read_text()
        lines = [line for line in written.splitlines() if line.startswith("| ydrop | 54.00 ± 62.23 |  | -43.00 ")]
        assert [line.split("(2) |  ")[1] for line in lines] == 2 * ["| 0.0500 | 20 | 2 (1 diverged, 1 resumed) |"]
    file = leave(tmp_path / "alone", "digits", "ydrop", 0, 0.1)
    change(file, val_loss=math.inf, test_acc=math.nan)
    report.main(["--runs", str(tmp_path / "alone")])
    assert "| ydrop |  |  |  |  |  | 20 | 1 (1 diverged) |" in (tmp_path / "alone/report.md").read_text()


def test_runs_by_other_files_are_never_put_together(tmp_path: Path) -> None:
    file = leave(tmp_path, "digits", "ydrop", 0, 0.9)
    leave(tmp_path, "digits", "ydrop", 1, 0.8)
    report.main(["--runs", str(tmp_path)])
    change(file, files="older")
    with pytest.raises(SystemExit, match="ydrop of digits has runs by several versions of its YAML files"):
        report.main(["--runs", str(tmp_path)])


def test_what_varies_is_drawn(tmp_path: Path) -> None:
    for share in ("0.01", "0.1", "1"):
        for arm in ("dropout", "ydrop", "random"):
            leave(tmp_path, "mnist_fc_1", arm, 0, 0.9 + float(share) / 20, **{"data.train_fraction": share})
    report.main(["--runs", str(tmp_path), "--out", str(tmp_path / "report/all.md")])
    written = (tmp_path / "report/all.md").read_text()
    assert "## mnist_fc_1 against data.train_fraction\n" in written
    assert "--arms dropout ydrop random --seeds 0 --vary data.train_fraction=0.01,0.1,1\n" in written
    assert "### data.train_fraction=0.01\n" in written
    assert "98.47" not in written  # the paper's figure is that of all data
    assert "](mnist_fc_1_data.train_fraction.png)" in written
    assert (tmp_path / "report/mnist_fc_1_data.train_fraction.png").read_bytes().startswith(b"\x89PNG")


def test_arms_stand_against_what_varies(tmp_path: Path) -> None:
    for seed in range(2):
        leave(tmp_path, "digits", "dropout", seed, 0.9, **{"data.train_fraction": "0.1"})
        for share, accuracy in (("0.1", 0.91), ("1", 0.94)):
            leave(tmp_path, "digits", "ydrop", seed, accuracy + 0.01 * seed, **{"data.train_fraction": share})
    report.main(["--runs", str(tmp_path)])
    lines = (tmp_path / "report.md").read_text().splitlines()
    first = lines.index("| test accuracy % against data.train_fraction | 0.1 | 1 |")
    assert lines[first + 2 : first + 6] == [
        "| dropout | 90.00 ± 0.00 |  |",
        "| ydrop | 91.50 ± 0.71 | 94.50 ± 0.71 |",
        "| Y-Drop's gain over dropout (pairs) | +1.50 ± 6.35 (2) |  |",
        "",
    ]


def test_runs_of_the_row_itself_are_joined_to_those_that_varied_it(tmp_path: Path) -> None:
    scarce, whole = tmp_path / "scarce", tmp_path / "whole"
    for arm in ("dropout", "ydrop"):
        leave(scarce, "digits", arm, 0, 0.9, "early_stopping.patience=25", **{"data.train_fraction": "0.1"})
        leave(whole, "digits", arm, 0, 0.98)
    both = ["--runs", str(scarce), str(whole)]
    report.main([*both, "--join", "data.train_fraction=1", str(whole), "--out", str(tmp_path / "all.md")])
    written = (tmp_path / "all.md").read_text()
    assert "from 4 runs" in written
    assert "| dropout | 98.00 |" in written.partition("### data.train_fraction=1\n")[2]
    assert written.count("| dropout | 98.00 |") == 2  # and by itself
    joined = ["--runs", str(scarce), "--join", "data.train_fraction=1", str(whole)]
    report.main([*joined, "--out", str(tmp_path / "2.md")])
    assert "from 4 runs" in (tmp_path / "2.md").read_text()
    assert f"By `python -m examples.paper.report {' '.join(joined)}`." in (tmp_path / "2.md").read_text()
    grids = [line.partition(" --seeds ")[2] for line in written.splitlines() if "paper.run " in line]
    assert grids == ["0", "0 --vary data.train_fraction=0.1 --set early_stopping.patience=25", "0"]
    for argument in ("data.train_fraction=0.1", "data.train_fraction=0.10", "data.train_fraction=", "model.lr=1"):
        with pytest.raises(SystemExit, match="joins runs that varied nothing"):
            report.main([*both, "--join", argument, str(whole)])
    for file in whole.rglob("result.json"):
        change(file, files="newer")
    with pytest.raises(SystemExit, match="several versions"):
        report.main(["--runs", str(scarce), "--join", "data.train_fraction=1", str(whole)])


def test_arms_without_ydrop_stand_beside_its_settings(tmp_path: Path) -> None:
    half = "data.train_fraction=0.5"
    for seed in range(2):
        leave(tmp_path, "digits", "dropout", seed, 0.9, half)
        leave(tmp_path, "digits", "ydrop", seed, 0.91, half)
        leave(tmp_path / "other", "digits", "plain", seed, 0.8)
        for samples, accuracy in (("1", 0.92), ("12", 0.94)):
            leave(tmp_path, "digits", "ydrop", seed, accuracy, half, **{"ydrop.num_samples": samples})
            leave(tmp_path / "other", "digits", "ydrop", seed, accuracy, half, **{"data.batch_size": samples})
    report.main(["--runs", str(tmp_path)])
    varied = (tmp_path / "report.md").read_text().partition("## digits against ydrop.num_samples\n")[2]
    assert [line.partition(" --arms ")[2] for line in varied.splitlines() if "paper.run " in line] == [
        f"ydrop --seeds 0 1 --vary ydrop.num_samples=1,12 --set {half}",
        f"dropout --seeds 0 1 --set {half}",
    ]
    assert varied.count("| dropout | 90.00 ± 0.00 |  |") == 2
    assert "| ydrop | 94.00 ± 0.00 |  | +4.00 ± 0.00 (2) |" in varied
    assert "91.00" not in varied
    assert "80.00" not in varied
    assert "settings of their own" not in varied
    of_data = (tmp_path / "report.md").read_text().partition("## digits against data.batch_size\n")[2]
    assert "| dropout |" not in of_data.partition("\n## ")[0]


def test_values_stand_in_their_order(tmp_path: Path) -> None:
    for widths in ("[1024,1024]", "[256,256]", "[256]"):
        leave(tmp_path, "mnist_fc_1", "ydrop", 0, 0.9, **{"model.hidden": widths})
    report.main(["--runs", str(tmp_path)])
    written = (tmp_path / "report.md").read_text()
    assert "--vary 'model.hidden=[256],[256,256],[1024,1024]'" in written
    assert [results.order(value) for value in ("0.5", "[4,2]")] == [(0.5,), (4, 2)]
    assert [results.order(value) for value in ("all", "null")] == [
        (math.inf, "all"),
        (math.inf, "null"),
    ]


def test_runs_with_other_settings_are_never_put_together(tmp_path: Path) -> None:
    for fraction, accuracy in (("0.1", 0.9), ("0.25", 0.8)):
        leave(tmp_path / fraction, "digits", "ydrop", 0, accuracy, f"data.val_fraction={fraction}")
    report.main(
        ["--runs", *(str(tmp_path / fraction) for fraction in ("0.1", "0.25")), "--out", str(tmp_path / "all.md")]
    )
    written = (tmp_path / "all.md").read_text()
    assert "## digits, data.val_fraction=0.1\n" in written
    assert "## digits, data.val_fraction=0.25\n" in written
    assert "--set data.val_fraction=0.1\n" in written
    assert "--set data.val_fraction=0.25\n" in written
    assert "| ydrop | 90.00 |" in written
    assert "| ydrop | 80.00 |" in written


def test_arms_have_settings_of_their_own(tmp_path: Path) -> None:
    for number, arm, setting in ((0, "ydrop", "ydrop.n_steps=3"), (1, "ydrop", "ydrop.n_steps=5"), (2, "random", "")):
        leave(tmp_path / str(number), "digits", arm, 0, 0.9 + number / 100, "data.val_fraction=0.1", *setting.split())
    leave(tmp_path / "3", "digits", "plain", 0, 0.8, "data.val_fraction=0.1")
    report.main(["--runs", str(tmp_path)])
    written = (tmp_path / "report.md").read_text()
    for line in ("plain | 80.00", "random | 92.00", "ydrop n_steps=3 | 90.00", "ydrop n_steps=5 | 91.00"):
        assert f"| {line} |" in written
    grids = [line.partition(" --arms ")[2] for line in written.splitlines() if "paper.run " in line]
    common = "--seeds 0 --set data.val_fraction=0.1"
    assert grids == [f"plain random {common}", *(f"ydrop {common} ydrop.n_steps={steps}" for steps in (3, 5))]


def test_values_may_have_seeds_of_their_own(tmp_path: Path) -> None:
    for share, seeds in (("0.01", 3), ("0.1", 3), ("0.3", 2)):
        for seed in range(seeds):
            for arm in ("dropout", "ydrop"):
                leave(tmp_path, "digits", arm, seed, 0.9, **{"data.train_fraction": share})
    report.main(["--runs", str(tmp_path)])
    grids = [line.partition(" --arms ")[2] for line in (tmp_path / "report.md").read_text().splitlines()]
    assert [grid for grid in grids if grid] == [
        "dropout ydrop --seeds 0 1 2 --vary data.train_fraction=0.01,0.1",
        "dropout ydrop --seeds 0 1 --vary data.train_fraction=0.3",
    ]


def test_what_run_py_gathers_is_reported_as_its_folder_is(tmp_path: Path) -> None:
    runs, alone = tmp_path / "runs", tmp_path / "alone"
    for share in ("0.1", "1"):
        for seed, arm in itertools.product(range(2), ("dropout", "ydrop")):
            leave(runs, "digits", arm, seed, 0.9, **{"data.train_fraction": share})
    alone.mkdir()
    experiment.gather(experiment.results_in([runs]), alone / "a.jsonl")
    for given in (runs, alone / "a.jsonl"):
        report.main(["--runs", str(given)])
    reports = [folder / "report.md" for folder in (runs, alone)]
    assert reports[0].read_text().replace(str(runs), str(alone / "a.jsonl")) == reports[1].read_text()
    assert f"By `python -m examples.paper.report --runs {runs}`." in reports[0].read_text()


def test_a_run_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    for folder in ("first", "second"):
        leave(tmp_path / folder, "digits", "ydrop", 4, 0.9)
    with pytest.raises(SystemExit, match="ydrop of digits is there twice with seed 4"):
        report.main(["--runs", str(tmp_path)])


def test_without_results_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"run `python -m examples\.paper\.run` first"):
        report.main(["--runs", str(tmp_path)])
