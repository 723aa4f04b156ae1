"""Tuned baselines on small tasks: what is trained with what, and that the report is that of the records."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from examples.paper.differences import difference_of, holm
from examples.paper.experiment import Run
from experiments import first_minutes
from experiments.tasks import report
from experiments.tasks import run as program
from experiments.tasks.tasks import ARMS, TASKS, Plan, Task

TASK = Task("tabular_vote", "tables", "vote", "vote.csv", 100, (0.1, 0.5, 1.0), seeds=2)


def leave(run: Run, val_loss: float, test_acc: float = 0.5) -> None:
    """Leave what a run of that loss would."""
    run.folder.mkdir(parents=True, exist_ok=True)
    reached = {"val_loss": val_loss, "test_acc": test_acc, "epochs": 3, "seconds": 1.0, "resumed": False}
    (run.folder / "result.json").write_text(json.dumps({**run.identity, **reached}))


def value(run: Run, name: str) -> str | None:
    return dict(each.split("=", 1) for each in (*run.settings, *run.varied)).get(name)


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return Plan(TASK, ("data.root=data/vote.csv",), tmp_path, TASK.fractions)


def test_each_stage_takes_what_has_the_lowest_validation_loss(plan: Plan) -> None:
    rates = plan.rates()
    assert {value(run, "data.train_fraction") for run in rates} == {"0.5"}
    assert len({value(run, "model.lr") for run in rates}) == len(rates) == 12
    for number, run in enumerate(rates):
        leave(run, {3: 0.1, 4: math.nan}.get(number, 1.0), test_acc=number / 100)
    rate = value(rates[3], "model.lr")
    trials = plan.trials()
    assert len(trials) == 3 * 3 * 12
    assert {value(run, "model.lr") for run in trials} == {rate}
    assert len({run.folder for run in trials}) == len(trials)
    for run in trials:
        wanted = {"0.1": "0.2", "0.5": "0.35", "1": "0.75"}[value(run, "data.train_fraction") or ""]
        leave(run, 0.1 if value(run, "model.p") == wanted else 1.0)
    finals = plan.finals(1)
    assert [(run.arm, run.seed) for run in finals] == [(arm, 1) for _ in TASK.fractions for arm in ARMS]
    assert {value(run, "model.lr") for run in finals} == {rate}
    of_middle = {run.arm: value(run, "model.p") for run in finals if value(run, "data.train_fraction") == "0.5"}
    assert of_middle == {
        "plain": None, "dropout": "0.35", "jumpout": None, "ydrop": "0.35", "random": "0.35", "inverted": "0.35"
    }  # fmt: skip
    by_arm = {run.arm: run.settings for run in finals if value(run, "data.train_fraction") == "0.5"}
    assert by_arm["ydrop"] == by_arm["random"] == by_arm["inverted"]
    assert not plan.finals(2)


def test_a_given_learning_rate_stays(tmp_path: Path) -> None:
    plan = Plan(TASKS["digits"], (), tmp_path, (1.0,))
    assert not plan.rates()
    assert {run.arm for run in plan.trials()} == {"dropout", "ydrop"}
    assert {value(run, "model.lr") for run in plan.trials()} == {None}


def test_what_was_trained_is_recorded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages: list[tuple[str, int]] = []

    def run_all(runs: list[Run], known: Any) -> str | None:
        for number, run in enumerate(runs):
            leave(run, number / 100)
        stages.append((runs[0].arm, len(runs)))
        return "1 of 2 runs are not done" if len(stages) == 6 else None

    monkeypatch.setattr(program, "run_all", run_all)
    monkeypatch.setattr(program, "RECORDS", tmp_path / "records")
    monkeypatch.setattr(program, "TASKS", {"vote": TASK})
    for _ in range(2):
        arguments = ["--tasks", "vote", "--out", str(tmp_path / "out"), "--data", "here"]
        if len(stages) < 3:
            program.main(arguments)
            continue
        with pytest.raises(SystemExit, match="not done"):
            program.main(arguments)
    assert stages == 2 * [("plain", 12), ("dropout", 108), ("plain", 36)]
    for stage, count in (("rates", 12), ("trials", 108), ("finals", 36)):
        lines = (tmp_path / f"records/{stage}.jsonl").read_text().splitlines()
        assert len(lines) == len(set(lines)) == count
        assert not any("here" in line or str(tmp_path) in line for line in lines)


def test_another_machine_goes_on_from_the_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[Run] = []

    def run_all(runs: list[Run], known: Any) -> None:
        left = [run for run in runs if run.result is None]
        for run in left:
            leave(run, 1.0)
        trained.extend(left)

    monkeypatch.setattr(program, "run_all", run_all)
    monkeypatch.setattr(program, "RECORDS", tmp_path / "records")
    monkeypatch.setattr(program, "TASKS", {"vote": TASK})
    program.main(["--tasks", "vote", "--out", str(tmp_path / "lost"), "--data", "there"])
    assert len(trained) == 12 + 108 + 36
    record = tmp_path / "records/trials.jsonl"
    lines = record.read_text().splitlines()
    lines[5] = lines[5].replace('"files": "', '"files": "another')
    record.write_text("".join(f"{line}\n" for line in lines))
    trained.clear()
    program.main(["--tasks", "vote", "--out", str(tmp_path / "new"), "--data", "here"])
    (run,) = trained
    assert (run.arm, value(run, "data.train_fraction")) == (
        json.loads(lines[5])["arm"],
        json.loads(lines[5])["varied"]["data.train_fraction"],
    )


def test_some_sizes_can_be_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    carried: list[Run] = []

    def run_all(runs: list[Run], known: Any) -> None:
        for run in runs:
            leave(run, 1.0)
        carried.extend(runs)

    monkeypatch.setattr(program, "run_all", run_all)
    monkeypatch.setattr(program, "RECORDS", tmp_path / "records")
    monkeypatch.setattr(program, "TASKS", {"vote": TASK, "digits": TASKS["digits"]})
    arguments = ["--tasks", "vote", "digits", "--out", str(tmp_path / "out"), "--fractions"]
    program.main([*arguments, "0.1"])
    assert {(run.row, value(run, "data.train_fraction")) for run in carried} == {
        (TASK.row, "0.1"), (TASK.row, "0.5")  # the learning rate is tuned at the middle size
    }  # fmt: skip
    with pytest.raises(SystemExit):
        program.main([*arguments, "0.1", "0.07"])
    assert "and not [0.07]" in capsys.readouterr().err


def test_the_report_is_that_of_the_records(tmp_path: Path) -> None:
    report.main(["--out", str(tmp_path)])
    assert (tmp_path / "report.md").read_text() == (report.OUT / "report.md").read_text()
    assert (tmp_path / "gains.png").exists()


def test_the_picture_of_the_first_minutes_is_that_of_the_records(tmp_path: Path) -> None:
    first_minutes.main(["--seeds", "20", "--out", str(tmp_path)])
    assert (tmp_path / "report.md").read_text() == (first_minutes.OUT / "report.md").read_text()


def test_every_final_training_has_the_settings_of_a_lowest_trial() -> None:
    trials = report.read(program.RECORDS / "trials.jsonl")
    for cell in report.cells_of(report.read(program.RECORDS / "finals.jsonl")):
        for arm in ("dropout", "ydrop"):
            tried = [
                trial
                for trial in trials
                if (trial["row"], trial["arm"]) == (cell.task.row, arm)
                and float(trial["varied"]["data.train_fraction"]) == cell.fraction
            ]
            best = min(tried, key=lambda trial: math.inf if math.isnan(trial["val_loss"]) else trial["val_loss"])
            assert len(tried) == 12
            assert dict(each.split("=", 1) for each in best["settings"]) == cell.settings[arm]


def test_gains_are_compared_seed_by_seed() -> None:
    records = [
        {
            "row": "tabular_vote",
            "arm": arm,
            "seed": seed,
            "varied": {"data.train_fraction": "0.1"},
            "settings": ["model.lr=0.1", *extra],
            "test_acc": accuracy + seed / 10,
            "val_loss": 1.0 + (arm == "ydrop") * 0.1 + seed,
        }
        for arm, accuracy, extra in (
            ("dropout", 0.5, ["model.p=0.3"]),
            (
                "ydrop",
                0.52,
                [
                    "model.p=0.4",
                    "ydrop.elasticity=0.01",
                    "ydrop.annealing_epochs=5",
                    'ydrop.buckets={"strong_fraction":0.25}',
                ],
            ),
        )
        for seed in range(3)
    ]
    (cell,) = report.cells_of(records)
    gain = cell.gain("ydrop", "dropout")
    assert gain.mean == pytest.approx(2.0)
    assert gain.half_width == pytest.approx(0.0, abs=1e-6)
    assert cell.change("ydrop", "dropout").mean == pytest.approx(
        100 * sum(math.log((1.1 + seed) / (1 + seed)) for seed in range(3)) / 3
    )
    assert cell.label == "vote, 57"
    average = report.on_average([cell], "ydrop", "dropout")
    assert average[:3] == ["Y-Drop over dropout", "1", ""]
    assert report.chosen(cell, "ydrop") == "p=0.4, 25% strong, elasticity 0.01, annealing 5"
    assert math.isnan(cell.gain("ydrop", "random").mean)


def test_holm_adjusts_a_family() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, math.nan]) == [1.0, 1.0]
    assert difference_of([(1.0, 0.0), (3.0, 1.0), (2.0, 1.5)]).p_value == pytest.approx(0.11808, abs=1e-4)


def test_the_gain_of_a_task_is_that_of_seeds_over_sizes() -> None:
    # By size and seed, the gain in points: the means over sizes are 2 and 4.
    gains = {0.1: (1.0, 6.0), 0.5: (3.0, 2.0)}
    cells = [
        report.Cell(TASK, fraction, {"dropout": {0: 90.0, 1: 80.0}, "ydrop": dict(enumerate(values))}, {}, {})
        for fraction, values in (
            (fraction, [base + gain for base, gain in zip((90.0, 80.0), each, strict=True)])
            for fraction, each in gains.items()
        )
    ]
    line = report.table_by_task(cells).splitlines()[-1]
    expected = difference_of([(2.0, 0.0), (4.0, 0.0)])
    assert line.split("|")[1:4] == [f" {TASK.name} ", " 2 ", f" {expected.mean:+.2f} ± {expected.half_width:.2f} "]
