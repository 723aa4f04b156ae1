"""What reaches loggers: the engine's values, at the steps at which Lightning logs."""

import csv
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger

from lightning_ydrop import YDropCallback
from lightning_ydrop.functional.attribution import top_share
from tests.callbacks.test_styles import Net, data
from tests.callbacks.test_ydrop import trainer_of

Values = dict[int, dict[str, float]]


class Keeping(Callback):
    """Keeps the engine's values of each batch, under the step that is logged for it."""

    def __init__(self, ydrop: YDropCallback) -> None:
        self.ydrop = ydrop
        self.seen: Values = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        engine = self.ydrop.engine
        assert engine is not None
        self.seen[trainer.global_step] = {"ydrop/nonfinite": 0.0} | {
            f"ydrop/{name}/{key}": value
            for name, scores in engine.scores.items()
            for key, value in (
                ("drop_prob", engine.layers[name].drop_prob.mean().item()),
                ("top20_share", top_share(scores, 0.2).item()),
            )
        }


def fit(logger: Any, accumulate: int = 1) -> Values:
    """Train, and give what should have been logged."""
    ydrop = YDropCallback(annealing_epochs=1)
    keeping = Keeping(ydrop)
    trainer_of(
        ydrop, keeping, logger=logger, log_every_n_steps=2, max_epochs=3, accumulate_grad_batches=accumulate
    ).fit(Net(), data())
    return {step: values for step, values in keeping.seen.items() if len(values) > 1 and step % 2 == 1}


def assert_logged(logged: Values, expected: Values) -> None:
    assert logged.keys() == expected.keys()
    for step, values in expected.items():
        assert logged[step] == pytest.approx(values)


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_csv(accumulate: int, tmp_path: Path) -> None:
    expected = fit(CSVLogger(tmp_path, "", ""), accumulate)
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    logged = {
        int(row["step"]): {key: float(value) for key, value in row.items() if key.startswith("ydrop") and value}
        for row in rows
        if row["ydrop/nonfinite"]
    }
    assert_logged(logged, expected)


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path)
    expected = fit(logger)
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    logged: Values = {}
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            if tag.startswith("ydrop"):
                logged.setdefault(event.step, {})[tag] = event.value
    assert_logged(logged, expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::ResourceWarning")  # wandb's
def test_wandb_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    kept: Values = {}
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    log = logger.experiment.log

    def keep(values: dict[str, Any], **kwargs: Any) -> None:
        ours = {key: float(value) for key, value in values.items() if key.startswith("ydrop")}
        if ours:
            kept[values["trainer/global_step"]] = ours
        log(values, **kwargs)

    monkeypatch.setattr(logger.experiment, "log", keep)
    expected = fit(logger)
    wandb.finish()
    assert_logged(kept, expected)
    assert list(tmp_path.rglob("*.wandb"))
