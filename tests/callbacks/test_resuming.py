"""Runs that are killed go on as if nothing had happened."""

import csv
import json
import os
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_ydrop import ConductanceDropout, ConfigurationError, YDropCallback
from tests.callbacks.killed import BATCHES, Net, train
from tests.callbacks.test_ydrop import Net as Small
from tests.callbacks.test_ydrop import Probe, loader, trainer_of
from tests.sameness import assert_same

ROOT = Path(__file__).parent.parent.parent
STEP: dict[str, Any] = {"annealing_epochs": 2}

# Settings, accumulation, and where the run is killed: in which epoch, and before which batch, or at its end.
CASES: dict[str, tuple[dict[str, Any], int, tuple[int, int | None]]] = {
    "while annealing": (STEP, 1, (0, 3)),
    "at the end of an epoch of annealing": (STEP, 1, (0, None)),
    "before the switch": (STEP, 1, (1, 5)),
    "at the switch": (STEP, 1, (1, None)),
    "after the first batch of Y-Drop": (STEP, 1, (2, 1)),
    "after the switch": (STEP, 1, (2, 4)),
    "at the end of an epoch of Y-Drop": (STEP, 1, (2, None)),
    "between two runs of phase 1": (STEP | {"every_n_batches": 4}, 1, (2, 3)),
    "in a linear transition": ({"annealing_steps": 15, "transition": "linear"}, 1, (1, 4)),
    "between two runs in a linear transition": (
        {"annealing_steps": 20, "transition": "linear", "every_n_batches": 4},
        1,
        (1, 3),
    ),
    "under accumulation": ({"annealing_steps": 4}, 2, (2, 4)),
}


pytestmark = [
    pytest.mark.filterwarnings("ignore:.*exists and is not empty"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:With every_n_batches="),  # of short epochs
    pytest.mark.filterwarnings("ignore:.*Experiment logs directory"),
]


def rows(folder: Path) -> dict[int, dict[str, str]]:
    """What was logged in each step, as written."""
    with (folder / "metrics.csv").open() as file:
        return {int(row["step"]): {key: value for key, value in row.items() if value} for row in csv.DictReader(file)}


def final(trainer: Trainer, net: Net, ydrop: YDropCallback) -> dict[str, Any]:
    assert ydrop.engine is not None
    return {
        "weights": net.state_dict(),
        "optimizer": trainer.optimizers[0].state_dict()["state"],
        "ydrop": ydrop.engine.state_dict(),
        "scores": ydrop.engine.scores,
    }


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @cache
    def run(settings: str, accumulate: int) -> tuple[dict[str, Any], dict[int, dict[str, str]]]:
        folder = tmp_path_factory.mktemp("uninterrupted")
        ended = final(*train(folder, json.loads(settings), accumulate))
        return ended, rows(folder)

    return run


# In every run of the tests one of each kind; the others differ in the batch at which the run is killed.
OFTEN = {"while annealing", "at the switch", "between two runs of phase 1", "in a linear transition"}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case in OFTEN else pytest.mark.slow) for case in CASES]
)
def test_a_killed_run_goes_on_as_the_uninterrupted_one(case: str, uninterrupted: Any, tmp_path: Path) -> None:
    settings, accumulate, (epoch, batch) = CASES[case]
    killed, resumed = tmp_path / "killed", tmp_path / "resumed"
    ran = subprocess.run(
        [sys.executable, "-m", "tests.callbacks.killed", str(killed), json.dumps(settings), str(accumulate),
         json.dumps([epoch, batch])],
        cwd=ROOT, env=os.environ | {"PYTHONWARNINGS": "ignore"}, capture_output=True, check=False,
    )  # fmt: skip
    assert ran.returncode == -signal.SIGKILL
    expected, expected_rows = uninterrupted(json.dumps(settings), accumulate)
    (last,) = killed.glob("*.ckpt")
    ended = final(*train(resumed, settings, accumulate, ckpt_path=str(last)))
    assert_same(ended, expected)
    taken = (epoch * BATCHES + (BATCHES if batch is None else batch)) // accumulate
    before, after = rows(killed), rows(resumed)
    assert {step for step in expected_rows if step < taken} == before.keys()
    assert {step for step in expected_rows if step >= taken} == after.keys()
    assert before | after == expected_rows
    assert any("ydrop/body.1/drop_prob" in row for row in after.values())


def test_annealing_that_has_become_longer_is_annealing(tmp_path: Path) -> None:
    class Saving(Probe):
        def on_train_epoch_end(self, trainer: Trainer, *args: Any) -> None:
            trainer.save_checkpoint(tmp_path / "driven.ckpt")

    trainer_of(YDropCallback(annealing_epochs=0), Saving(), max_epochs=1).fit(Small(), loader())
    probe = Probe()
    trainer = trainer_of(YDropCallback(annealing_epochs=3), probe, max_epochs=4)
    trainer.fit(Small(), loader(), ckpt_path=str(tmp_path / "driven.ckpt"))
    assert probe.active == [(epoch, epoch >= 3) for epoch in (1, 2, 3) for _ in range(4)]


def test_what_was_tested_does_not_leak_into_a_later_fit(tmp_path: Path) -> None:
    first, net = YDropCallback(annealing_epochs=0), Small()
    trainer = trainer_of(first, max_epochs=1)
    trainer.fit(net, loader())
    trainer.save_checkpoint(tmp_path / "other.ckpt")
    callback = YDropCallback(annealing_epochs=0)
    trainer_of(callback).test(Small(), loader(), ckpt_path=str(tmp_path / "other.ckpt"), verbose=False)
    trainer_of(callback, max_epochs=1).fit(Small(), loader())
    assert callback.state_dict()["steps_taken"] == 4  # those of this fit alone


def test_a_checkpoint_of_a_fit_that_failed_does_not_leak_into_a_later_one(tmp_path: Path) -> None:
    class Unvalidated(Small):
        def validation_step(self, *args: Any) -> None:
            raise KeyError("before anything is trained")

    class Wider(Small):
        def __init__(self) -> None:
            super().__init__()
            self.body.append(ConductanceDropout())

    trainer = trainer_of(YDropCallback(annealing_epochs=0), max_epochs=1)
    trainer.fit(Small(), loader())
    trainer.save_checkpoint(tmp_path / "other.ckpt")
    callback, path = YDropCallback(annealing_epochs=0), str(tmp_path / "other.ckpt")
    with pytest.raises(KeyError, match="before anything"):
        trainer_of(callback, max_epochs=2).fit(Unvalidated(), loader(), loader(), ckpt_path=path)
    assert callback.state_dict()["steps_taken"] == 4  # whoever saves now loses nothing
    trainer_of(callback, max_epochs=1).fit(Small(), loader())
    assert callback.state_dict()["steps_taken"] == 4  # those of this fit alone
    with pytest.raises(ConfigurationError, match="A Y-Drop state of the layers"):
        trainer_of(callback, max_epochs=2).fit(Wider(), loader(), ckpt_path=path)
    trainer_of(callback, max_epochs=1).fit(Wider(), loader())


class Quiet(Small):
    """Its forward logs nothing, so that phase 1 can be compiled."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.body(x)
        return logits


@pytest.mark.parametrize("compile_phase1", [False, True])
@pytest.mark.parametrize("transition", ["step", "linear"])
def test_what_is_saved_after_a_fit_goes_on_in_step(
    transition: Any, compile_phase1: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The recorded graph, without torch's compiler, which takes seconds.
    monkeypatch.setattr("lightning_ydrop.importance.compiled.compiled_graph", lambda graph, tensors: graph)

    class Reseeding(Callback):
        def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
            torch.manual_seed(trainer.global_step)

    def run(net: Small, epochs: int, path: Path | None = None) -> Trainer:
        callback = YDropCallback(
            annealing_steps=6, transition=transition, every_n_batches=3, compile_phase1=compile_phase1
        )
        trainer = trainer_of(callback, Reseeding(), max_epochs=epochs)
        trainer.fit(net, loader(), ckpt_path=path and str(path))
        assert callback.engine is not None
        assert callback.engine.findings is not None
        assert (callback.engine.findings.plan.compiled is not None) == compile_phase1
        return trainer

    kind = Quiet if compile_phase1 else Small
    whole, part = kind(), kind()
    part.load_state_dict(whole.state_dict())
    run(whole, 4)
    run(part, 2).save_checkpoint(tmp_path / "after.ckpt")
    run(part, 4, tmp_path / "after.ckpt")
    assert_same(part.body.state_dict(), whole.body.state_dict())


def test_what_a_finder_has_put_back_in_the_middle_of_a_fit_is_the_state(tmp_path: Path) -> None:
    callback = YDropCallback(annealing_epochs=0)

    class Restoring(Callback):
        def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
            callback.load_state_dict(callback.state_dict())

    trainer_of(callback, Restoring(), max_epochs=2).fit(Small(), loader())
    assert callback.state_dict()["steps_taken"] == 8


def test_weights_alone_can_be_loaded_and_start_cold(tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path, "weights", save_weights_only=True)
    first = trainer_of(YDropCallback(annealing_epochs=0), saving, max_epochs=1, enable_checkpointing=True)
    first.fit(Small(), loader())
    callback, path = YDropCallback(annealing_epochs=0), str(tmp_path / "weights.ckpt")
    # Lightning refuses to resume from them: there is no optimiser to go on with.
    with pytest.raises(KeyError, match="contains only the model"):
        trainer_of(callback, max_epochs=2).fit(Small(), loader(), ckpt_path=path)
    trainer_of(callback, max_epochs=1).fit(Small.load_from_checkpoint(path), loader())
    assert callback.state_dict()["steps_taken"] == 4


def test_a_checkpoint_without_our_state_starts_cold_with_one_warning(tmp_path: Path) -> None:
    plain = trainer_of(max_epochs=1)
    plain.fit(Small(), loader())
    plain.save_checkpoint(tmp_path / "plain.ckpt")
    callback = YDropCallback(annealing_epochs=0)
    with pytest.warns(UserWarning, match="holds no state of YDropCallback") as caught:
        trainer_of(callback, max_epochs=2).fit(Small(), loader(), ckpt_path=str(tmp_path / "plain.ckpt"))
    assert sum("holds no state" in str(warning.message) for warning in caught) == 1
    assert callback.state_dict()["steps_taken"] == 4
    trainer_of(callback, max_epochs=1).fit(Small(), loader())  # no checkpoint, nothing to say
