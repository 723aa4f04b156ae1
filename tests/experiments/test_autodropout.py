"""The comparisons of AutoDropout: what they compute, that they go on, and that the report is that of the records."""

import math
from pathlib import Path
from typing import Any

import pytest

from experiments.autodropout import report, trainings
from experiments.autodropout.compare import baselines, best_of, searches_of
from experiments.autodropout.noise import random_arms, variance_components
from experiments.autodropout.trainings import Arm, Bench
from lightning_ydrop import ConvPattern
from lightning_ydrop.search.program import main as search
from lightning_ydrop.search.training import Training

QUICK = ("--trainer.max_epochs=1", "--trainer.check_val_every_n_epoch=1", "--trainer.limit_train_batches=2")


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench("digits", tmp_path, where=(*QUICK, "--model.width=0.25", "--trainer.limit_val_batches=1"))


def test_the_report_is_that_of_the_records() -> None:
    assert report.text() == (report.PICTURES / "report.md").read_text()


def test_intervals_are_those_of_student_and_welch() -> None:
    assert report.interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 4.302653 / math.sqrt(3)))
    assert report.difference([1.0, 2.0, 3.0], [0.0, 1.0, 2.0]) == pytest.approx((1.0, 2.776445 * math.sqrt(2 / 3)))


def test_a_search_is_one_observation_and_a_seed_of_a_baseline_is_one() -> None:
    records = [{"arm": f"table-{search} trial 1", "val_loss": search + seed} for search in (0, 2) for seed in (0, 1)]
    records += [{"arm": "dropout 0.3", "val_loss": seed} for seed in (0, 1)]
    methods = report.methods_of(records)
    assert report.sample_of(methods["table"], "val_loss") == [0.5, 2.5]
    assert report.sample_of(methods["dropout"], "val_loss") == [0.0, 1.0]


def test_noise_between_seeds_and_patterns_is_told_apart() -> None:
    assert variance_components([(1.0, 1.0), (3.0, 3.0)]) == pytest.approx((0.0, math.sqrt(2)))
    assert variance_components([(0.0, 2.0), (0.0, 2.0)]) == pytest.approx((math.sqrt(2), 0.0))


def test_what_diverged_is_never_chosen() -> None:
    arms = [Arm("a"), Arm("b"), Arm("c")]
    records = [{"arm": name, "loss": value} for name, value in (("a", 2.0), ("b", math.nan), ("c", 1.0))]
    assert [arm.name for arm in best_of(records, arms, "loss", lower=True)] == ["c", "a", "b"]
    assert [arm.name for arm in best_of(records, arms, "loss", lower=False)] == ["a", "c", "b"]


def test_each_baseline_is_tuned_with_as_many_settings(bench: Bench) -> None:
    methods = baselines(bench.training().space(), 40)
    assert {name: len({arm.name for arm in arms}) for name, arms in methods.items()} == {
        "dropout": 40, "ydrop": 40, "spatial": 40, "dropblock": 40
    }  # fmt: skip
    assert len({arm.name for arm in random_arms(bench.training(), 3)}) == 3


def test_trainings_are_recorded_and_not_made_twice(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    arms = [Arm("none"), Arm("masked", {"stage1.1": ConvPattern(0.5, rate=0.5)}), Arm("p", args=("--model.p=0.5",))]
    records = bench.train("stage", arms, [0])
    assert [(record["arm"], record["seed"], record["stage"]) for record in records] == [
        ("masked", 0, "stage"), ("none", 0, "stage"), ("p", 0, "stage")
    ]  # fmt: skip
    assert len({record["val_loss"] for record in records}) == 3
    assert all("test_acc" in record for record in records)

    def forbidden(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("trained again")

    monkeypatch.setattr(Training, "__call__", forbidden)
    assert bench.train("stage", arms, [0]) == records
    with pytest.raises(SystemExit, match="has trained another none"):
        bench.train("stage", [Arm("none", args=("--model.p=0.1",))], [0])


def test_searches_come_from_journals_or_else_from_the_records(tmp_path: Path, bench: Bench) -> None:
    kept = {(each["sampler"], each["seed"]): each for each in trainings.read_records("digits", "searches")}
    config = str(trainings.HERE / "digits.yaml")
    search(["fit", "--config", config, "--sampler", "random", "--trials", "2", "--seed_everything", "3",
            "--storage", str(tmp_path / "random-3.journal"), "--out", str(tmp_path / "out"), *bench.where])  # fmt: skip
    found = {(each["sampler"], each["seed"]): each for each in searches_of("digits", tmp_path)}
    assert len(found["random", 3]["rewards"]) == 2
    assert {key: value for key, value in found.items() if key != ("random", 3)} == {
        key: value for key, value in kept.items() if key != ("random", 3)
    }
