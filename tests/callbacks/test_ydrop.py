import copy
import csv
import itertools
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from lightning import seed_everything
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_ydrop import (
    Buckets,
    Conductance,
    ConductanceDropout,
    ConfigurationError,
    Measure,
    NoEffectWarning,
    OutputSum,
    RandomImportance,
    Request,
    YDrop,
    YDropCallback,
)
from tests.networks import perceptron
from tests.sameness import assert_same

BATCHES = 4
X = torch.randn(16 * BATCHES, 12, generator=torch.Generator().manual_seed(0))
Y = torch.arange(16 * BATCHES) % 5


class Net(LightningModule):
    """A perceptron that logs and counts in forward, as some models do."""

    def __init__(self, dropout: type[nn.Module] = ConductanceDropout) -> None:
        super().__init__()
        self.body = perceptron(dropout=dropout)
        self.seen = MulticlassAccuracy(5)
        self.optimiser_steps = 0
        forwards: list[tuple[int, bool, bool]] = []
        # Functions, since phase 1 gives back what lists in attributes hold.
        self.tell, self.told = forwards.append, lambda: forwards

    @property
    def forwards(self) -> list[tuple[int, bool, bool]]:
        return self.told()

    def forward(self, x: Tensor) -> Tensor:
        self.tell((len(x), self.training, torch.is_autocast_enabled("cpu")))
        logits: Tensor = self.body(x)
        self.log("rows", float(len(x)), on_step=True, on_epoch=True)
        self.log_dict({"norm": logits.detach().float().norm()}, on_step=True, on_epoch=True)
        if not self.training:
            self.log_dict({"evaluations": 1.0}, on_step=True, on_epoch=False)
        self.seen(logits, torch.zeros(len(x), dtype=torch.long))
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        self.log("test_loss", nn.functional.cross_entropy(self.body(x), y))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    def on_before_zero_grad(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimiser_steps += 1


class Validated(Net):
    """The same with a validation loop."""

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", nn.functional.cross_entropy(self.body(x), y))


class Probe(Callback):
    """Notes, behind the callback under test, whether the layers are driven in each batch."""

    def __init__(self) -> None:
        self.active: list[tuple[int, bool]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        layer = next(module for module in pl_module.modules() if isinstance(module, ConductanceDropout))
        self.active.append((trainer.current_epoch, layer.active))


def loader(x: Tensor = X, y: Any = Y) -> DataLoader[Any]:
    return DataLoader(TensorDataset(x, y), batch_size=16)


def trainer_of(*callbacks: Callback, **kwargs: Any) -> Trainer:
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 3,
        "log_every_n_steps": 2,
    }
    return Trainer(callbacks=list(callbacks), **(quiet | kwargs))


@pytest.mark.filterwarnings("ignore:Training is to end before the annealing")
@pytest.mark.parametrize("annealing_epochs", [0, 1, 2, 5])
def test_y_drop_follows_annealing(annealing_epochs: int) -> None:
    probe = Probe()
    trainer_of(YDropCallback(annealing_epochs), probe).fit(Net(), loader())
    assert probe.active == [(epoch, epoch >= annealing_epochs) for epoch in range(3) for _ in range(BATCHES)]


@pytest.mark.parametrize(
    ("annealing", "training", "outlasts"),
    [
        ({}, {"max_epochs": 2}, True),
        ({}, {"max_epochs": 3}, False),
        ({"annealing_epochs": 5}, {"max_epochs": 5}, True),
        ({"annealing_epochs": 5}, {"max_epochs": -1, "max_steps": 3}, True),
        ({"annealing_epochs": 1}, {"max_steps": BATCHES}, True),
        ({"annealing_epochs": 1}, {"max_steps": BATCHES + 1}, False),
        ({"annealing_epochs": 1}, {"max_steps": BATCHES, "accumulate_grad_batches": 2}, False),
        ({"annealing_epochs": 1}, {"max_steps": 3, "limit_train_batches": 2}, False),
        ({"annealing_epochs": 5, "transition": "linear"}, {"max_epochs": 2}, False),
        ({"annealing_epochs": 5}, {"fast_dev_run": True}, False),
        ({"annealing_steps": 3}, {"max_steps": 3}, True),
        ({"annealing_steps": 3}, {"max_steps": 4}, False),
        ({"annealing_steps": BATCHES}, {"max_epochs": 1}, True),
        ({"annealing_steps": BATCHES - 1}, {"max_epochs": 1}, False),
        ({"annealing_steps": BATCHES}, {"max_epochs": 1, "accumulate_grad_batches": 2}, True),
    ],
)
def test_annealing_that_outlasts_training_is_warned_of(
    annealing: dict[str, Any], training: dict[str, Any], outlasts: bool
) -> None:
    expected = pytest.warns(NoEffectWarning, match="all of it is ordinary dropout") if outlasts else nullcontext()
    with expected:
        trainer_of(YDropCallback(**annealing), **training).fit(Net(), loader())


def test_where_steps_are_not_known_beforehand_no_annealing_is_said_to_outlast_them() -> None:
    class Endless(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return itertools.cycle(loader().dataset)  # type: ignore[arg-type]

    scheduler = GradientAccumulationScheduler({0: 1, 1: 4})
    trainer_of(YDropCallback(annealing_epochs=1), max_steps=BATCHES).fit(Net(), DataLoader(Endless(), 16))
    trainer_of(YDropCallback(annealing_epochs=1), scheduler, max_steps=BATCHES).fit(Net(), loader())
    trainer_of(YDropCallback(annealing_steps=BATCHES), scheduler, max_epochs=1).fit(Net(), loader())


def test_phase_1_sees_the_batch_in_evaluation_with_few_rows() -> None:
    net = Net()
    trainer_of(YDropCallback(annealing_epochs=1), max_epochs=2).fit(net, loader())
    training = [(rows, mode) for rows, mode, _ in net.forwards]
    # All samples and half of them, then 5 steps of 3 samples and the baseline, and last the path of a single sample.
    rehearsal = [(16, False), (8, False), (16, False), (6, False)]
    assert training == rehearsal + [(16, True)] * BATCHES + [(16, False), (16, True)] * BATCHES


def test_a_trial_run_tries_phase_1() -> None:
    probe = Probe()
    trainer_of(YDropCallback(annealing_epochs=5), probe, fast_dev_run=2).fit(Net(), loader())
    assert probe.active == [(0, True), (0, True)]


def test_settings_reach_the_engine() -> None:
    class Seeing(Measure):
        seen: ClassVar[list[Request]] = []

        def score(self, phase1: Request) -> dict[str, Tensor]:
            self.seen.append(phase1)
            return Conductance().score(phase1)

    measure = Seeing()
    callback = YDropCallback(
        annealing_epochs=0, n_steps=3, num_samples=4, baseline=0.5, quadrature="left", measure=measure, seed=9,
        elasticity=0.25, initial_drop_prob=0.1, objective=OutputSum(), buckets=Buckets(strong_fraction=0.3),
    )  # fmt: skip
    trainer_of(callback, max_epochs=1).fit(Net(), loader())
    seen = measure.seen[-1]
    assert (seen.n_steps, len(seen.inputs[0]), seen.quadrature) == (3, 4, "left")
    assert isinstance(seen.objective, OutputSum)
    assert (seen.starts[0] == 0.5).all()
    assert callback.engine is not None
    assert (
        callback.engine.settings.seed,
        callback.engine.settings.elasticity,
        callback.engine.settings.initial_drop_prob,
    ) == (9, 0.25, 0.1)
    assert callback.engine.settings.buckets == Buckets(strong_fraction=0.3)


def test_it_trains_as_the_engine_in_a_plain_loop() -> None:
    seed_everything(1, verbose=False)
    net = Net()
    trainer_of(YDropCallback(annealing_epochs=0, elasticity=0.1)).fit(net, loader())

    seed_everything(1, verbose=False)
    body = Net().body
    engine = YDrop(body, elasticity=0.1)
    optimizer = torch.optim.SGD(body.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        torch.empty((), dtype=torch.int64).random_()  # a DataLoader draws a seed for each epoch
        for x, y in zip(X.split(16), Y.split(16), strict=True):
            engine.step(x, y)
            optimizer.zero_grad()
            nn.functional.cross_entropy(body(x), y).backward()
            optimizer.step()
    for one, other in zip(net.body.parameters(), body.parameters(), strict=True):
        assert torch.equal(one, other)


class Observing(YDropCallback):
    """Phase 1 runs, and its probabilities are not used."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        assert self.engine is not None
        self.engine.deactivate()


def fit_and_collect(
    callbacks: list[Callback], folder: Path, dropout: type[nn.Module]
) -> tuple[Net, list[dict[str, str]]]:
    seed_everything(1, verbose=False)
    net = Validated(dropout)
    logger = CSVLogger(folder, name="", version="")
    trainer_of(*callbacks, logger=logger).fit(net, loader(), loader())
    with (folder / "metrics.csv").open() as file:
        return net, list(csv.DictReader(file))


def test_weights_logs_and_metrics_are_those_of_nn_dropout_when_phase_1_only_observes(tmp_path: Path) -> None:
    plain, plain_logs = fit_and_collect([], tmp_path / "plain", nn.Dropout)
    observed, logs = fit_and_collect([Observing(annealing_epochs=0)], tmp_path / "observed", ConductanceDropout)
    for one, other in zip(plain.parameters(), observed.parameters(), strict=True):
        assert torch.equal(one, other)
    assert plain.seen.update_count == observed.seen.update_count
    for state, value in plain.seen.metric_state.items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(observed.seen.metric_state[state]))
    ours = [{key: value for key, value in row.items() if "ydrop" not in key} for row in logs]
    assert [
        row for row in ours if any(value for key, value in row.items() if key not in ("epoch", "step"))
    ] == plain_logs


@pytest.mark.filterwarnings("ignore:Training is to end before the annealing")
def test_without_the_callback_and_while_annealing_training_is_that_of_nn_dropout(tmp_path: Path) -> None:
    plain, _ = fit_and_collect([], tmp_path / "plain", nn.Dropout)
    for name, callbacks in {"without": [], "annealing": [YDropCallback(annealing_epochs=9)]}.items():
        net, _ = fit_and_collect(list(callbacks), tmp_path / name, ConductanceDropout)
        for one, other in zip(plain.parameters(), net.parameters(), strict=True):
            assert torch.equal(one, other)


def test_it_logs_rates_and_the_spread_of_importance(tmp_path: Path) -> None:
    _, logs = fit_and_collect([YDropCallback(annealing_epochs=1)], tmp_path, ConductanceDropout)
    for layer in ("body.1", "body.4"):
        rows = [row for row in logs if row[f"ydrop/{layer}/drop_prob"]]
        assert [int(row["step"]) for row in rows] == [5, 7, 9, 11]  # every second batch, once annealing is over
        for row in rows:
            assert 0.3 < float(row[f"ydrop/{layer}/drop_prob"]) < 0.7
            assert 0.2 <= float(row[f"ydrop/{layer}/top20_share"]) <= 1


@pytest.mark.parametrize(("listens", "times"), [(False, 0), (True, 6)])
def test_values_are_computed_when_a_logger_wants_them(
    listens: bool, times: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    logged: list[LightningModule] = []
    monkeypatch.setattr(YDropCallback, "_log", lambda callback, pl_module, progress: logged.append(pl_module))
    logger = CSVLogger(tmp_path) if listens else False
    trainer_of(YDropCallback(annealing_epochs=0), logger=logger).fit(Net(), loader())
    assert len(logged) == times


@pytest.mark.filterwarnings("ignore:Training is to end before the annealing")
def test_every_fit_is_is_dry_run_done() -> None:
    net, callback = Net(), YDropCallback(annealing_epochs=9)
    trainer_of(callback).fit(net, loader())
    with pytest.raises(ConfigurationError, match="for an output of 5 classes"):
        trainer_of(callback).fit(net, loader(y=Y + 5))


@pytest.mark.parametrize(("precision", "autocast"), [("32-true", False), ("bf16-mixed", True), ("bf16-true", False)])
def test_phase_1_runs_in_the_precision_of_training(precision: str, autocast: bool) -> None:
    net = Net()
    callback = YDropCallback(annealing_epochs=0)
    trainer_of(callback, precision=precision, max_epochs=1).fit(net, loader())
    assert {seen for _, _, seen in net.forwards} == {autocast}
    assert callback.engine is not None
    for name, layer in callback.engine.layers.items():
        assert (
            callback.engine.scores[name].dtype == layer.drop_prob.dtype == layer.mean_drop_prob.dtype == torch.float32
        )


def test_evaluation_and_checkpoints_are_those_of_nn_dropout(tmp_path: Path) -> None:
    net = Net()
    trainer = trainer_of(YDropCallback(annealing_epochs=0), max_epochs=1)
    trainer.fit(net, loader())
    trainer.save_checkpoint(tmp_path / "ours.ckpt")
    assert list(net.state_dict()) == list(Net(nn.Dropout).state_dict())
    plain = Net(nn.Dropout)
    plain.load_state_dict(torch.load(tmp_path / "ours.ckpt", weights_only=True)["state_dict"], strict=True)
    assert torch.equal(net.eval().body(X), plain.eval().body(X))
    with pytest.warns(UserWarning, match="Please add the following callbacks"):
        trainer_of().test(Net(nn.Dropout), loader(), ckpt_path=str(tmp_path / "ours.ckpt"), verbose=False)


@pytest.mark.filterwarnings("ignore:Training is to end before the annealing")
@pytest.mark.parametrize("stop", [1, 2, 3, 4])
@pytest.mark.parametrize("measure", [Conductance(), RandomImportance()], ids=repr)
def test_resumed_at_the_end_of_an_epoch_it_is_the_uninterrupted_run(
    stop: int, measure: Measure, tmp_path: Path
) -> None:
    class Reseed(Callback):
        """Sets torch's random stream for each batch: what is under test is what the callback itself keeps."""

        def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
            torch.manual_seed(trainer.global_step)

    class Saving(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            trainer.save_checkpoint(tmp_path / "last.ckpt")

    def callbacks() -> list[Callback]:
        return [YDropCallback(annealing_epochs=2, elasticity=0.1, measure=measure), Reseed()]

    def fresh() -> Net:
        seed_everything(1, verbose=False)
        return Net()

    whole, begun, resumed = fresh(), fresh(), fresh()
    uninterrupted = trainer_of(*callbacks(), max_epochs=5)
    uninterrupted.fit(whole, loader())
    interrupted, second = trainer_of(*callbacks(), Saving(), max_epochs=stop), trainer_of(*callbacks(), max_epochs=5)
    interrupted.fit(begun, loader())
    second.fit(resumed, loader(), ckpt_path=str(tmp_path / "last.ckpt"))

    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)
    ours, theirs = (next(c for c in t.callbacks if isinstance(c, YDropCallback)) for t in (uninterrupted, second))  # type: ignore[attr-defined]
    assert ours.engine is not None
    assert theirs.engine is not None
    for name, layer in ours.engine.layers.items():
        assert torch.equal(layer.mean_drop_prob, theirs.engine.layers[name].mean_drop_prob)


def test_a_checkpoint_of_plain_training_starts_y_drop_cold(tmp_path: Path) -> None:
    plain = trainer_of(max_epochs=1)
    plain.fit(Net(nn.Dropout), loader())
    plain.save_checkpoint(tmp_path / "plain.ckpt")
    probe = Probe()
    trainer = trainer_of(YDropCallback(annealing_epochs=1), probe, max_epochs=2)
    with pytest.warns(UserWarning, match="The checkpoint holds no state of YDropCallback") as caught:
        trainer.fit(Net(), loader(), ckpt_path=str(tmp_path / "plain.ckpt"))
    assert sum("holds no state" in str(warning.message) for warning in caught) == 1
    assert probe.active == [(1, True)] * BATCHES


@pytest.mark.filterwarnings("ignore:The checkpoint holds no state of YDropCallback")
def test_a_callback_that_was_used_before_starts_cold_too(tmp_path: Path) -> None:
    plain = trainer_of(max_epochs=1)
    plain.fit(Net(nn.Dropout), loader())
    plain.save_checkpoint(tmp_path / "plain.ckpt")
    callback, net = YDropCallback(annealing_epochs=0), Net()
    trainer_of(callback, max_epochs=1).fit(net, loader())
    trainer_of(callback, max_epochs=2).fit(net, loader(), ckpt_path=str(tmp_path / "plain.ckpt"))
    assert callback.state_dict()["steps_taken"] == BATCHES


@pytest.mark.filterwarnings("ignore:Training is to end before the annealing")
def test_a_state_that_is_not_taken_up_yet_is_not_lost() -> None:
    first = YDropCallback(annealing_epochs=0)
    trainer_of(first, max_epochs=1).fit(Net(), loader())
    state = first.state_dict()

    class Asking(Callback):
        """Saves and restores before training starts, as learning rate finders do."""

        def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            second.load_state_dict(second.state_dict())

    second = YDropCallback(annealing_epochs=9)
    second.load_state_dict(state)
    trainer_of(second, Asking(), max_epochs=1).fit(Net(), loader())
    assert second.state_dict()["steps_taken"] == state["steps_taken"] == BATCHES


@pytest.mark.parametrize("raises", [False, True])
def test_afterwards_the_layers_are_vanilla(raises: bool) -> None:
    class Failing(Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            raise RuntimeError("out of order")

    net = Net()
    trainer = trainer_of(YDropCallback(annealing_epochs=0), *([Failing()] if raises else []), max_epochs=1)
    if raises:
        with pytest.raises(RuntimeError, match="out of order"):
            trainer.fit(net, loader())
    else:
        trainer.fit(net, loader())
    layers = [module for module in net.modules() if isinstance(module, ConductanceDropout)]
    assert not any(layer.active for layer in layers)
    assert not any(module._forward_hooks for module in net.modules())
    assert "log" not in net.__dict__


def test_a_log_of_the_users_own_comes_back() -> None:
    seen: list[str] = []

    class Outer(Net):
        def __init__(self) -> None:
            super().__init__(nn.Identity)
            self.inner = Net()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    net = Outer()
    net.__dict__["log"] = lambda name, *args, **kwargs: seen.append(name)
    net.inner.__dict__["log"] = lambda name, *args, **kwargs: seen.append("inner " + name)
    own = net.log
    trainer_of(YDropCallback(annealing_epochs=0), max_epochs=1).fit(net, loader())
    assert net.log is own
    assert "inner norm" in seen
    assert "inner evaluations" not in seen  # phase 1 is muted in the modules inside too


def test_replaced_layers_get_an_engine_of_their_own() -> None:
    net, callback = Net(), YDropCallback(annealing_epochs=0)
    trainer_of(callback, max_epochs=1).fit(net, loader())
    net.body[1] = ConductanceDropout()
    trainer_of(callback, max_epochs=1).fit(net, loader())
    assert callback.engine is not None
    assert callback.engine.layers["body.1"] is net.body[1]
    assert callback.engine.state_dict()["steps_taken"] == BATCHES


def test_one_callback_serves_one_fit_after_another() -> None:
    callback = YDropCallback(annealing_epochs=0, elasticity=0.5)
    first, second = Net(), Net()
    trainer_of(callback, max_epochs=1).fit(first, loader())
    trainer_of(callback, max_epochs=1).fit(second, loader())
    assert callback.engine is not None
    assert callback.engine.model is second
    assert callback.engine.state_dict()["steps_taken"] == BATCHES


def test_another_module_around_the_same_layers_is_the_one_that_is_measured() -> None:
    callback, first, second = YDropCallback(annealing_epochs=0), Net(), Net()
    trainer_of(callback, max_epochs=1).fit(first, loader())
    second.body = first.body
    first.forwards.clear()
    trainer_of(callback, max_epochs=1).fit(second, loader())
    assert not first.forwards
    assert callback.engine is not None
    assert callback.engine.model is second


def test_a_second_fit_is_as_the_first() -> None:
    callback, net = YDropCallback(annealing_epochs=0, elasticity=0.5), Net()
    weights, ends = copy.deepcopy(net.state_dict()), []
    for _ in range(2):
        net.load_state_dict(weights)
        torch.manual_seed(3)
        trainer_of(callback, max_epochs=1).fit(net, loader())
        ends.append({"weights": copy.deepcopy(net.body.state_dict()), "ydrop": callback.state_dict()})
    assert_same(*ends)


def test_a_fit_that_goes_on_keeps_its_state() -> None:
    callback, net = YDropCallback(annealing_epochs=0), Net()
    trainer = trainer_of(callback, max_epochs=1)
    trainer.fit(net, loader())
    trainer.fit_loop.max_epochs = 2
    trainer.fit(net, loader())
    assert callback.state_dict()["steps_taken"] == 2 * BATCHES


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_batches_without_samples_are_passed_over() -> None:
    class Passing(Net):
        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) if len(batch[0]) else None

    batches = [(X[:0], Y[:0]), *([(X[:16], Y[:16])] * 2), (X[:0], Y[:0])]
    callback = YDropCallback(annealing_epochs=0)
    trainer_of(callback, max_epochs=1).fit(Passing(), DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    assert callback.state_dict()["steps_taken"] == 4
    assert callback.state_dict()["scores"]["body.1"].any()


@pytest.mark.filterwarnings("ignore:Training is to end before the annealing")
def test_where_the_first_batch_has_no_samples_the_second_is_rehearsed_on() -> None:
    class Passing(Net):
        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) if len(batch[0]) else next(self.parameters()).sum()

    batches = [(X[:0], Y[:0]), (X[:16], Y[:16] + 1)]
    trainer = trainer_of(YDropCallback(annealing_epochs=5), max_epochs=1)
    with pytest.raises(ConfigurationError, match="The target holds classes from 1 to 5"):
        trainer.fit(Passing(), DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    assert trainer.global_step == 1


def test_the_rates_that_are_logged_are_those_in_use(tmp_path: Path) -> None:
    applied: list[float] = []

    class Applied(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            applied.append(float(pl_module.body[1]._applied_drop_prob.mean()))

    callback = YDropCallback(annealing_steps=2 * BATCHES, transition="linear")
    logger = CSVLogger(tmp_path, name="", version="")
    trainer_of(callback, Applied(), logger=logger, log_every_n_steps=1).fit(Net(), loader())
    with (tmp_path / "metrics.csv").open() as file:
        logged = [row["ydrop/body.1/drop_prob"] for row in csv.DictReader(file)]
    assert [float(each) for each in logged if each] == pytest.approx(applied[1:])  # the first is a vanilla one


class Built(Net):
    """Gets its layers when training is set up."""

    def __init__(self, hook: str) -> None:
        super().__init__(nn.Identity)
        self.hook = hook

    def setup(self, stage: str) -> None:
        if self.hook == "setup":
            self.body[1] = ConductanceDropout()

    def configure_model(self) -> None:
        if self.hook == "configure_model":
            self.body[1] = ConductanceDropout()


@pytest.mark.parametrize("hook", ["setup", "configure_model"])
def test_layers_that_are_built_late_are_found(hook: str) -> None:
    callback = YDropCallback(annealing_epochs=0)
    trainer_of(callback, max_epochs=1).fit(Built(hook), loader())
    assert callback.engine is not None
    assert list(callback.engine.layers) == ["body.1"]


@pytest.mark.filterwarnings("ignore:Training is to end before the annealing")
@pytest.mark.parametrize("annealing_epochs", [0, 9])
@pytest.mark.parametrize(
    ("net", "data", "message"),
    [
        (lambda: Net(nn.Dropout), loader, r"Net holds no ConductanceDropout.*body\.1 \(Dropout\), body\.4 \(Dropout\)"),
        (Net, lambda: loader(y=Y + 1), "classes from 1 to 5"),
        (Net, lambda: loader(X.long()), "between whole numbers there is no path"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_first_step(
    net: Any, data: Any, message: str, annealing_epochs: int
) -> None:
    model = net()
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(ConfigurationError, match=message):
        trainer_of(YDropCallback(annealing_epochs)).fit(model, data())
    assert model.optimiser_steps == 0
    assert all(torch.equal(one, other) for one, other in zip(weights, model.parameters(), strict=True))


def test_testing_with_the_callback_needs_no_layers() -> None:
    trainer_of(YDropCallback()).test(Net(nn.Dropout), loader(), verbose=False)


class Wrong(Net):
    """Has labels that name no class in some batches, and trains without them."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self(x), y.clamp(0, 4))


def test_labels_out_of_range_in_later_batches_are_counted_and_told_once(tmp_path: Path) -> None:
    y = Y.clone()
    y[20:23] = 7
    callback = YDropCallback(annealing_epochs=0, num_samples="all")
    logger = CSVLogger(tmp_path)
    trainer = trainer_of(callback, logger=logger, log_every_n_steps=1, max_epochs=3)
    with pytest.warns(RuntimeWarning, match=r"3 label\(s\) so far named no class of the output") as caught:
        trainer.fit(Wrong(), loader(X, y))
    assert sum("named no class" in str(each.message) for each in caught) == 1
    assert callback.engine is not None
    assert callback.engine.unusable == 9
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        logged = [row["ydrop/unusable_labels"] for row in csv.DictReader(file) if row["ydrop/unusable_labels"]]
    assert float(logged[-1]) == 9.0


def test_a_resumed_run_goes_on_counting_unusable_labels(tmp_path: Path) -> None:
    y = Y.clone()
    y[20:23] = 7
    finals = []
    for stops in ((4,), (2, 4)):
        file: str | None = None
        seed_everything(1, verbose=False)
        for end in stops:
            callback = YDropCallback(annealing_epochs=0, elasticity=0.1, num_samples="all")
            trainer, model = trainer_of(callback, max_epochs=end), Wrong()
            with pytest.warns(RuntimeWarning, match="named no class"):
                trainer.fit(model, loader(X, y), ckpt_path=file)
            file = str(tmp_path / f"{end}.ckpt")
            trainer.save_checkpoint(file)
        assert callback.engine is not None
        finals.append(callback.engine.state_dict())
    assert finals[0]["unusable"] == 12
    for key in ("unusable", "steps_taken", "nonfinite"):
        assert finals[0][key] == finals[1][key]
