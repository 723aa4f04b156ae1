import csv
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_ydrop import (
    ConductanceMonitor,
    ConfigurationError,
    NegativeLoss,
    NoEffectWarning,
    Objective,
    OutputSum,
    TargetLogit,
    YDropCallback,
    layer_conductance,
)
from lightning_ydrop.functional.attribution import gini, top_share
from tests.callbacks.test_styles import Net, data
from tests.callbacks.test_ydrop import trainer_of
from tests.networks import perceptron
from tests.sameness import assert_same

X, Y = torch.randn(40, 12), torch.randint(0, 5, (40,))


class Validated(Net):
    """A network without any layer of ours, that logs in its forward pass, and is validated."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.Dropout(), nn.ReLU(), nn.Linear(16, 5))

    def forward(self, x: Tensor) -> Any:
        logits = self.body(x)
        self.log("confidence", logits.max(), on_step=False, on_epoch=True)
        return logits

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", nn.functional.cross_entropy(self(x), y))

    def val_dataloader(self) -> DataLoader[Any]:
        return data(X, Y)


class Weights(Callback):
    """Keeps the conductance of what is validated."""

    def __init__(self, **measuring: Any) -> None:
        self.measuring = measuring
        self.means: list[Tensor] = []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self.means.append(layer_conductance(pl_module, **self.measuring)["body.3"].mean(0))


def logged(folder: Path) -> list[dict[str, float]]:
    with next(folder.rglob("metrics.csv")).open() as file:
        rows = list(csv.DictReader(file))
    return [
        {key: float(value) for key, value in row.items() if key.startswith("conductance/")}
        for row in rows
        if row["val_loss"]
    ]


def test_values_are_those_of_the_network_validated(tmp_path: Path) -> None:
    kept = Weights(inputs=X, target=Y, layers="body.3", n_steps=10, quadrature="trapezoid")
    monitor = ConductanceMonitor(layers=["body.3"], figures=False)
    trainer_of(monitor, kept, logger=CSVLogger(tmp_path)).fit(Validated(), data())
    rows = logged(tmp_path)
    assert len(rows) == len(kept.means) == 3
    for row, mean in zip(rows, kept.means, strict=True):
        assert row == {
            "conductance/body.3/top20_share": pytest.approx(top_share(mean).item(), abs=1e-5),
            "conductance/body.3/gini": pytest.approx(gini(mean).item(), abs=1e-5),
            "conductance/body.3/total": pytest.approx(mean.sum().item(), abs=1e-5),
        }
    assert rows[0] != rows[1]


def test_settings_reach_the_measure(tmp_path: Path) -> None:
    objective = NegativeLoss(nn.CrossEntropyLoss(reduction="none"))
    kept = Weights(inputs=X[:16], target=Y[:16], layers="body.3", n_steps=3, baseline=0.5, objective=objective)
    monitor = ConductanceMonitor(
        "body.3", num_batches=1, n_steps=3, quadrature="right", baseline=0.5, objective=objective, figures=False
    )
    trainer_of(monitor, kept, logger=CSVLogger(tmp_path)).fit(Validated(), data())
    for row, mean in zip(logged(tmp_path), kept.means, strict=True):
        assert row["conductance/body.3/total"] == pytest.approx(mean.sum().item(), abs=1e-5)


def test_a_run_that_is_watched_is_the_run_that_is_not() -> None:
    ends, logs = [], []
    for callbacks in ([], [ConductanceMonitor("body.3", figures=False)]):
        seed_everything(1, verbose=False)
        net = Validated()
        trainer = trainer_of(*callbacks)
        trainer.fit(net, data())
        ends.append(net.state_dict())
        logs.append({key: value for key, value in trainer.callback_metrics.items() if "conductance" not in key})
    assert_same(*ends)
    assert_same(*logs)


@pytest.mark.parametrize("objective", [TargetLogit(), NegativeLoss(nn.CrossEntropyLoss(reduction="none"))])
def test_it_measures_where_a_trainer_only_validates(objective: Objective) -> None:
    net = Validated()
    # Which epochs of a fit it measures in is nothing to what is no fit.
    trainer = trainer_of(ConductanceMonitor("body.3", every_n_epochs=7, objective=objective, figures=False))
    trainer.validate(net, verbose=False)
    measured = layer_conductance(net, X, Y, layers="body.3", n_steps=10, quadrature="trapezoid", objective=objective)
    total = trainer.callback_metrics["conductance/body.3/total"].item()
    assert total == pytest.approx(measured["body.3"].mean(0).sum().item(), abs=1e-5)


def test_what_is_logged_in_the_sanity_check_is_not_drawn(tmp_path: Path) -> None:
    trainer_of(ConductanceMonitor("body.3"), logger=CSVLogger(tmp_path), max_epochs=1).fit(Validated(), data())
    assert sorted(path.name for path in tmp_path.rglob("*.png")) == ["cumulative-4.png", "units-4.png"]


def test_it_sees_the_numbers_of_the_trainers_precision() -> None:
    seen = []
    net = Validated()
    net.body[3].register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    monitor = ConductanceMonitor("body.3", figures=False)
    trainer_of(monitor, max_epochs=1, precision="bf16-mixed").fit(net, data())
    assert set(seen) == {torch.bfloat16}


class Sentences(Validated):
    """Tokens, whose features come last."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 6)
        self.encoder = nn.Linear(6, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, tokens: Tensor) -> Any:
        return self.head(self.encoder(self.embedding(tokens)).relu().mean(1))

    def val_dataloader(self) -> DataLoader[Any]:
        return data(*self.batch)

    batch = (torch.randint(0, 9, (40, 7)), Y)


def test_units_of_sequences_are_features(tmp_path: Path) -> None:
    kept = {}
    for name, unit_dim in (("features", None), ("tokens", 1)):
        monitor = ConductanceMonitor("encoder", interpolate_at="embedding", unit_dim=unit_dim)
        net = Sentences()
        trainer = trainer_of(monitor, logger=CSVLogger(tmp_path / name))
        trainer.validate(net, verbose=False)
        kept[name] = layer_conductance(
            net,
            *net.batch,
            layers="encoder",
            interpolate_at="embedding",
            n_steps=10,
            quadrature="trapezoid",
            unit_dim=unit_dim,
        )["encoder"].mean(0)
        total = trainer.callback_metrics["conductance/encoder/total"].item()
        assert total == pytest.approx(kept[name].sum().item(), abs=1e-4)
        share = trainer.callback_metrics["conductance/encoder/top20_share"].item()
        assert share == pytest.approx(top_share(kept[name]).item(), abs=1e-4, nan_ok=True)
    assert (len(kept["features"]), len(kept["tokens"])) == (8, 7)


def test_it_takes_no_more_rows_at_once_than_a_batch_has() -> None:
    rows = []
    net = Validated()
    net.body.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    for monitor, most in (
        (ConductanceMonitor("body.3", figures=False), 16),
        (ConductanceMonitor("body.3", max_rows=99, figures=False), 99),
    ):
        rows.clear()
        trainer_of(monitor).validate(net, verbose=False)
        assert 0.8 * most < max(rows) <= most


def test_several_monitors_have_names_of_their_own(tmp_path: Path) -> None:
    net = Validated()
    both = [ConductanceMonitor("body.3"), ConductanceMonitor("body.3", objective=OutputSum(), prefix="sums")]
    trainer = trainer_of(*both, logger=CSVLogger(tmp_path))
    trainer.validate(net, verbose=False)
    totals = [trainer.callback_metrics[f"{prefix}/body.3/total"].item() for prefix in ("conductance", "sums")]
    assert totals[0] != pytest.approx(totals[1])
    assert {path.parent.name for path in tmp_path.rglob("*.png")} == {"conductance", "sums"}
    trainer = trainer_of(both[0], ConductanceMonitor("body.0", figures=False))
    with pytest.raises(ConfigurationError, match="several ConductanceMonitors with prefix='conductance'"):
        trainer.validate(net, verbose=False)


def test_own_methods_are_called(tmp_path: Path) -> None:
    class Own(Validated):
        def ydrop_inputs(self, batch: Any) -> Any:
            return batch[0] + 1, batch[1]

        def ydrop_forward(self, x: Tensor) -> Tensor:
            logits: Tensor = 2 * self.body(x)
            return logits

    kept = Weights(inputs=X + 1, target=Y, layers="body.3", n_steps=10, quadrature="trapezoid")
    trainer_of(ConductanceMonitor("body.3", figures=False), kept, logger=CSVLogger(tmp_path)).fit(Own(), data())
    for row, mean in zip(logged(tmp_path), kept.means, strict=True):
        assert row["conductance/body.3/total"] == pytest.approx(2 * mean.sum().item(), abs=1e-4)


def test_a_single_unit_is_drawn_too(tmp_path: Path) -> None:
    net = Validated()
    net.body = nn.Sequential(nn.Linear(12, 1), nn.Tanh(), nn.Linear(1, 5))
    trainer_of(ConductanceMonitor("body.1"), logger=CSVLogger(tmp_path), max_epochs=1).fit(net, data())
    assert len(list(tmp_path.rglob("*.png"))) == 2


def test_it_measures_in_every_so_manyth_epoch(tmp_path: Path) -> None:
    monitor = ConductanceMonitor("body.3", every_n_epochs=2, figures=True)
    trainer_of(monitor, logger=CSVLogger(tmp_path), max_epochs=4).fit(Validated(), data())
    pictures = sorted(path.name for path in tmp_path.rglob("*.png"))
    assert pictures == ["cumulative-16.png", "cumulative-8.png", "units-16.png", "units-8.png"]


def test_it_measures_wherever_the_trainer_validates_as_rarely(tmp_path: Path) -> None:
    monitor = ConductanceMonitor("body.3", every_n_epochs=2, figures=False)
    trainer = trainer_of(monitor, logger=CSVLogger(tmp_path), max_epochs=2, check_val_every_n_epoch=2)
    trainer.fit(Validated(), data())
    assert "conductance/body.3/gini" in trainer.callback_metrics


def test_tensorboard_shows_the_figures(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path)
    trainer_of(ConductanceMonitor("body.3"), logger=logger, max_epochs=1).fit(Validated(), data())
    logger.experiment.close()
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    assert set(events.Tags()["images"]) == {"conductance/units", "conductance/cumulative"}
    assert set(events.Tags()["histograms"]) == {"conductance/body.3/units"}


def test_tensorboard_shows_histograms_of_scores_and_rates(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path)
    monitor = ConductanceMonitor(figures=False)
    driver = YDropCallback(annealing_epochs=1, convert=True)
    trainer_of(monitor, driver, logger=logger, max_epochs=2).fit(Validated(), data())
    logger.experiment.close()
    events = EventAccumulator(logger.log_dir, {"histograms": 0})  # 0: all of them
    events.Reload()
    scores, rates = (
        [events.Histograms(name) for name in events.Tags()["histograms"] if name.endswith(kind)]
        for kind in ("/units", "/drop_prob")
    )
    assert len(scores) == len(rates) > 0
    assert all(len(each) == 2 for each in scores)  # an epoch each
    (driven,) = rates[0]  # in the first epoch there are no rates yet
    assert 0.1 <= driven.histogram_value.min < 0.5 < driven.histogram_value.max <= 0.9


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::ResourceWarning")  # wandb's
def test_wandb_shows_the_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    trainer_of(ConductanceMonitor("body.3"), logger=logger, max_epochs=1).fit(Validated(), data())
    wandb.finish()
    pictures = {path.parent.name + "/" + path.name.partition("_")[0] for path in tmp_path.rglob("*.png")}
    assert pictures == {"conductance/units", "conductance/cumulative"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_batches": 0}, "num_batches=0"),
        ({"every_n_epochs": 0}, "every_n_epochs=0"),
        ({"figures": "yes"}, "figures='yes'"),
        ({"n_steps": 0}, "n_steps=0"),
        ({"quadrature": "middle"}, "quadrature='middle'"),
        ({"baseline": "black"}, "baseline='black'"),
        ({"objective": nn.MSELoss()}, "objective=MSELoss"),
        ({"max_rows": 1}, "max_rows=1"),
        ({"unit_dim": 0}, "unit_dim=0"),
        ({"adapter": len}, "adapter="),
    ],
)
def test_what_is_out_of_range_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        ConductanceMonitor(**arguments)


def test_figures_take_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigurationError, match=r"Install lightning-ydrop\[plots\]"):
        ConductanceMonitor()
    ConductanceMonitor(figures=False)


@pytest.mark.parametrize("first", ["monitor", "callback"])
def test_layers_that_a_callback_converts_are_there(first: str) -> None:
    callbacks = [ConductanceMonitor(figures=False), YDropCallback(annealing_epochs=0, convert=True)]
    trainer = trainer_of(*callbacks[:: 1 if first == "monitor" else -1], max_epochs=1)
    net = Validated()
    net.body = perceptron(dropout=nn.Dropout)
    trainer.fit(net, data())
    assert "conductance/body.1/gini" in trainer.callback_metrics


@pytest.mark.parametrize("num_sanity_val_steps", [0, 1])
def test_layers_that_are_not_there_are_refused_before_training(num_sanity_val_steps: int) -> None:
    net = Validated()
    trainer = trainer_of(ConductanceMonitor("head", figures=False), num_sanity_val_steps=num_sanity_val_steps)
    with pytest.raises(ConfigurationError, match="head"):
        trainer.fit(net, data())
    assert trainer.global_step == 0


@pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader` but have no `validation_step`")
@pytest.mark.parametrize(
    ("net", "validated", "settings"), [(Net, True, {}), (Net, False, {}), (Validated, True, {"limit_val_batches": 0})]
)
def test_a_fit_without_validation_is_told_of(net: Any, validated: bool, settings: Any) -> None:
    trainer = trainer_of(ConductanceMonitor("body.3", figures=False), max_epochs=1, **settings)
    with pytest.warns(NoEffectWarning, match="this fit has no validation: nothing is logged"):
        trainer.fit(net(), data(X, Y), data(X, Y) if validated else None)
