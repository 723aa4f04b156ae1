"""Tuning elasticity and annealing."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from examples.paper import experiment
from examples.paper import tune as program
from lightning_ydrop import Buckets, HalfNormalRate, YDropCallback
from tests.examples.programs import said
from tests.examples.test_data import drawn, write_mnist


def loss_of(elasticity: float, annealing_epochs: int) -> float:
    return abs(math.log10(elasticity) + 2) + abs(annealing_epochs - 3)


@pytest.fixture
def tune(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The program, with runs that take no time: their loss is lowest at an elasticity of 1e-2, 3 epochs, and p=0.2.

    The run of that number fails that is in `fails`; `adds` is added to each loss.
    """
    trained: list[Any] = []

    def run(run: Any, waits: bool) -> str | None:
        trained.append(run)
        if len(trained) in tuned.fails:  # type: ignore[attr-defined]
            return "it failed"
        if len(trained) in tuned.killed:  # type: ignore[attr-defined]
            raise KeyboardInterrupt
        given = dict(each.split("=", 1) for each in run.settings)
        loss = loss_of(float(given.get("ydrop.elasticity", 1)), int(given.get("ydrop.annealing_epochs", 0)))
        loss += abs(float(given.get("model.p", 0.2)) - 0.2)
        loss += tuned.adds  # type: ignore[attr-defined]
        run.folder.mkdir(parents=True)
        # A test accuracy that would choose otherwise.
        (run.folder / "result.json").write_text(json.dumps({"val_loss": loss, "test_acc": loss}))
        return None

    monkeypatch.setattr(program, "carry_out", run)
    monkeypatch.chdir(tmp_path)

    def tuned(*args: str) -> list[Any]:
        trained.clear()
        program.main(["--row", "mnist_fc_1", *([] if "--arm" in args else ["--pairs"]), *args])
        return list(trained)

    tuned.fails, tuned.killed, tuned.adds = (), (), 0  # type: ignore[attr-defined]
    return tuned


def test_the_pair_of_the_lowest_validation_loss_is_found_once_all_were_tried(tune: Any, tmp_path: Path) -> None:
    runs = tune("--trials", "10", "--seeds", "0", "1")
    assert len(runs) == 20
    assert {run.seed for run in runs} == {0, 1}
    runs += tune("--seeds", "0", "1")
    assert len(runs) == 50
    assert len({run.settings for run in runs}) == 25
    report = (tmp_path / "runs/tune/mnist_fc_1_ydrop_pairs/study.md").read_text()
    assert "`--set ydrop.elasticity=0.01 ydrop.annealing_epochs=3`" in report
    assert "examples.paper.tune --row mnist_fc_1 --arm ydrop --pairs --seeds 0 1\n" in report
    rows = [line for line in report.splitlines() if line.startswith("| 0.001 | ")]
    losses = [(3, 1), (1, 3), (5, 3), (7, 5), (9, 7)]  # the lowest first
    assert sorted(rows) == sorted(f"| 0.001 | {epochs} | {loss + 0.0:.4f} |" for epochs, loss in losses)
    assert not tune("--seeds", "0", "1")  # nothing is left


def test_what_failed_is_tried_again(tune: Any, tmp_path: Path) -> None:
    tune.fails = (3,)
    with pytest.raises(SystemExit, match="it failed"):
        tune()
    tune.fails = ()
    assert len(tune()) == 23
    assert "of 25 points" in (tmp_path / "runs/tune/mnist_fc_1_ydrop_pairs/study.md").read_text()


def test_a_pair_whose_worker_was_killed_is_tried_again_in_its_folder(tune: Any, tmp_path: Path) -> None:
    tune.killed = (3,)
    with pytest.raises(KeyboardInterrupt):
        tune("--trials", "5")
    tune.killed = ()
    assert len(tune()) == 23
    folders = sorted(file.name for file in (tmp_path / "runs/tune/mnist_fc_1_ydrop_pairs").glob("trial-*"))
    assert len(folders) == 25
    assert "of 25 points" in (tmp_path / "runs/tune/mnist_fc_1_ydrop_pairs/study.md").read_text()


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_pairs_that_diverged_are_done_and_never_chosen(loss: float, tune: Any, tmp_path: Path) -> None:
    report = tmp_path / "runs/tune/mnist_fc_1_ydrop_pairs/study.md"
    tune.adds = loss
    assert len(tune("--trials", "2")) == 2
    assert "of 2 points" in report.read_text()
    assert "All of them diverged" in report.read_text()
    tune.adds = 0
    assert len(tune()) == 23
    assert "The lowest is that of" in report.read_text()


def test_a_study_whose_trials_are_elsewhere_is_reported_here(tune: Any, tmp_path: Path) -> None:
    tune("--trials", "0", "--storage", "studies.journal")
    assert "No trial is done." in (tmp_path / "runs/tune/mnist_fc_1_ydrop_pairs/study.md").read_text()
    tune("--trials", "1", "--storage", "studies.journal")
    tune("--trials", "0", "--storage", "studies.journal", "--out", "elsewhere")
    assert "of 1 points" in (tmp_path / "elsewhere/mnist_fc_1_ydrop_pairs/study.md").read_text()


def test_a_study_has_trials_by_one_version_of_the_files(tune: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tune("--trials", "1")
    monkeypatch.setattr(experiment, "_content", lambda file: "another")
    with pytest.raises(SystemExit, match="content of the YAML files"):
        tune("--trials", "1")


def test_a_study_goes_on_with_what_it_began_with_wherever_its_data_are(tune: Any) -> None:
    tune("--trials", "1", "--set", "model.lr=0.1", "data.root=here")
    assert len(tune("--trials", "1", "--set", "data.root=there", "--set", "model.lr=0.1")) == 1
    with pytest.raises(SystemExit, match=r"model\.lr=0\.1"):
        tune("--trials", "1", "--set", "model.lr=0.2")


def test_every_arm_is_tuned_with_the_same_points(tune: Any, tmp_path: Path) -> None:
    by_arm = {arm: tune("--arm", arm) for arm in ("dropout", "ydrop", "random", "jumpout", "plain")}
    assert {len(runs) for runs in by_arm.values()} == {12}
    given = {
        arm: [[each for each in run.settings if each.startswith("model.p=")] for run in runs]
        for arm, runs in by_arm.items()
    }
    assert given["dropout"] == given["ydrop"] == given["random"]
    assert len(set(map(tuple, given["dropout"]))) == 12
    assert all(run.settings[0].startswith("model.jumpout=") for run in by_arm["jumpout"])
    assert all(run.settings[0].startswith("model.lr=") for run in by_arm["plain"])
    report = (tmp_path / "runs/tune/mnist_fc_1_dropout/study.md").read_text()
    assert "`--set model.p=0.2`" in report
    assert report.count("\n| 0.") == 12
    with pytest.raises(SystemExit):
        program.main(["--row", "mnist_fc_1", "--arm", "dropout", "--pairs"])  # has neither of the two


def test_rates_lie_around_the_p_that_is_tried_in_buckets_of_the_share(tune: Any) -> None:
    settings = dict(each.split("=", 1) for each in tune("--arm", "ydrop", "--trials", "2")[1].settings)
    callback = YDropCallback(
        elasticity=float(settings["ydrop.elasticity"]), buckets=as_buckets(json.loads(settings["ydrop.buckets"]))
    )
    assert callback.settings.buckets == replace(Buckets.around(0.25), strong_fraction=0.75)
    assert settings["model.p"] == "0.25"


def as_buckets(given: Any) -> Buckets:
    rates = {name: HalfNormalRate(**given[name]) for name in ("low", "high")}
    return Buckets(**rates, strong_fraction=given["strong_fraction"])


def test_a_study_can_lie_in_a_database(tune: Any, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'studies.db'}"
    assert len(tune("--trials", "2", "--storage", url)) == 2
    assert len(tune("--trials", "3", "--storage", url)) == 3
    with pytest.raises(SystemExit, match="SQLite takes one worker"):
        tune("--trials", "3", "--storage", url, "--jobs", "2")
    assert "of 5 points" in (tmp_path / "runs/tune/mnist_fc_1_ydrop_pairs/study.md").read_text()


@pytest.mark.slow
def test_networks_are_tuned(tmp_path: Path) -> None:
    write_mnist(tmp_path / "data", drawn((1, 28, 28), 100, 10, 0), drawn((1, 28, 28), 20, 10, 1))
    settings = [f"data.root={tmp_path / 'data'}", "trainer.max_epochs=2", "model.hidden=[16]"]
    arguments = ["--row", "mnist_fc_1", "--trials", "2", "--jobs", "2", "--set", *settings]
    table = said("paper.tune", *arguments, cwd=tmp_path)
    files = list((tmp_path / "runs/tune").rglob("result.json"))
    losses = [json.loads(file.read_text())["val_loss"] for file in files]
    assert len(losses) == 2
    assert all(f"{loss:.4f}" in table for loss in losses)
