"""Deployed students beside averages over masks: what is measured, and that the report is made of the records."""

import json
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from experiments import deploy


def test_what_is_measured_of_predictions() -> None:
    inputs, labels = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0, 1, 0, 1])
    reference = {kind: torch.tensor([0.1, 0.2, 0.3, 0.4]) for kind in deploy.KINDS}

    def predict(x: Tensor) -> deploy.Uncertain:
        # All say class 0, so that the second and the last are wrong. Inverted ones are more certain than all others.
        probabilities = torch.zeros(4, 10)
        probabilities[:, 0] = 1.0
        return probabilities, {"total": torch.where(x > 0, 0.2 * x, 0.0), "epistemic": torch.where(x > 0, 5 - x, 9.0)}

    found = deploy.judged(predict, inputs, labels, reference)
    assert found["accuracy"] == 50
    assert found["auroc"] == pytest.approx({"total": 0.75, "epistemic": 0.25})
    assert found["rank"] == pytest.approx({"total": 1.0, "epistemic": -1.0})
    assert found["level"] == pytest.approx({"total": 2.0, "epistemic": 10.0})
    assert found["inverted"] == pytest.approx({"total": 0.0, "epistemic": 1.0})


def test_times_are_of_each_run_and_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deploy, "BATCHES", {1: 2, 3: 4})
    sizes: list[int] = []

    def waste(inputs: Tensor) -> None:
        sizes.append(len(inputs))
        for _ in range(20 * len(inputs)):
            torch.randn(200, 200)

    found = deploy.times({"waste": waste, "nothing": len}, torch.zeros(5, 2))
    assert sizes == [1] * 3 + [3] * 5  # one round before each does not count
    assert found["waste"]["3"] > found["waste"]["1"] > found["nothing"]["3"] >= 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_a_seed_has_a_record_of_each_model(monkeypatch: pytest.MonkeyPatch) -> None:
    students = {"student": (False, 0.1, 1), "student with a head": (True, 0.1, 1)}
    masks = {"teacher, 10 masks": 10}
    monkeypatch.setattr(deploy, "STUDENTS", students)
    monkeypatch.setattr(deploy, "MASKS", masks)
    monkeypatch.setattr(deploy, "MODELS", (deploy.ONE_PASS, *masks, *students))
    monkeypatch.setattr(deploy, "BATCHES", {1: 1})
    records = deploy.measured(0, 0.01)
    kinds = {record["model"]: set(record["auroc"]) for record in records}
    assert kinds == {
        "teacher, one pass": {"total"},
        "teacher, 10 masks": set(deploy.KINDS),
        "student": {"total"},
        "student with a head": set(deploy.KINDS),
    }
    assert [record.get("difference", 0.0) < 1e-5 for record in records] == [True] * 4
    assert ["ms in onnxruntime" in record for record in records] == [True, False, True, True]
    table = deploy.cost(json.loads(json.dumps(records)))
    assert "| teacher, one pass | 1.00 |" in table


def test_the_report_is_made_of_the_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = (deploy.OUT / "report.md").read_text()
    command = re.search(r"By `python -m experiments\.deploy --seeds (\d+)`", report)
    assert command is not None
    monkeypatch.setattr(deploy, "measured", None)  # nothing is trained again
    deploy.main(["--seeds", command.group(1), "--out", str(tmp_path)])
    assert (tmp_path / "report.md").read_text() == report


def test_no_seeds_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        deploy.main(["--seeds", "0"])
    assert "at least 1" in capsys.readouterr().err
