"""MonteCarloCallback: what predict returns and test measures, with a LightningModule that knows nothing of it."""

import hashlib
import random
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.cli import LightningCLI
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_ydrop import (
    ConductanceDropout,
    ConfigurationError,
    IndexAdapter,
    KeyAdapter,
    MonteCarloCallback,
    NoEffectWarning,
    YDropCallback,
    monte_carlo,
    progress,
)
from lightning_ydrop.uncertainty import MonteCarlo, MonteCarloMultilabel, MonteCarloRegression
from tests.sameness import assert_same

X = torch.randn(20, 4, generator=torch.Generator().manual_seed(1))
Y = torch.arange(20) % 3
MASKS = 15


class Net(LightningModule):
    """A classifier as anybody writes one."""

    def __init__(self, num_outputs: int = 3, p: float = 0.4) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(p), nn.Linear(16, num_outputs)
        )
        nn.init.normal_(self.net.get_parameter("4.weight"), std=2.0)
        self.accuracy = MulticlassAccuracy(3)
        self.stepped: list[str] = []

    def forward(self, x: Tensor) -> Any:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        x, y = batch
        logits = self(x)
        self.accuracy(logits, y)
        self.log("test_acc", self.accuracy)
        self.log("test_loss", nn.functional.cross_entropy(logits, y))

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        logits: Tensor = self(batch[0])
        return logits.argmax(1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loader(batch_size: int = 8) -> DataLoader[Any]:
    return DataLoader(TensorDataset(X, Y), batch_size=batch_size)


def trainer_of(*callbacks: Callback, **settings: Any) -> Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(accelerator="cpu", callbacks=list(callbacks), **{**quiet, "max_epochs": 2, **settings})


def generator_of(seed: int, rank: int = 0) -> torch.Generator:
    """The source of masks of a process, as the callback makes it."""
    digest = hashlib.blake2b(f"{seed} {rank}".encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def predictions(net: LightningModule, callback: Callback, data: Any = None, **settings: Any) -> list[Any]:
    found = trainer_of(callback, **settings).predict(net, data or loader())
    assert found is not None
    return found


KINDS: dict[str, type] = {
    "classification": MonteCarlo, "multilabel": MonteCarloMultilabel, "regression": MonteCarloRegression
}  # fmt: skip


@pytest.mark.parametrize("shared_masks", [False, True])
@pytest.mark.parametrize("task", KINDS)
def test_predict_returns_what_monte_carlo_returns(task: Any, shared_masks: bool) -> None:
    net, generator = Net(), generator_of(3)
    settings: dict[str, Any] = {"task": task, "shared_masks": shared_masks, "return_samples": True, "max_rows": 1}
    found = predictions(net, MonteCarloCallback(MASKS, seed=3, **settings))
    expected = [monte_carlo(net, x, MASKS, generator=generator, **settings) for x, _ in loader()]
    assert [type(each) for each in found] == [KINDS[task]] * 3
    for one, other in zip(found, expected, strict=True):
        assert_same(vars(one), vars(other))
        assert len(one.samples) == MASKS
    assert [len(each.mean) for each in found] == [8, 8, 4]


def test_noise_class_dim_and_rows_are_passed_on() -> None:
    class Positions(Net):
        def forward(self, x: Tensor) -> Tensor:
            assert len(x) <= 16
            logits: Tensor = self.net(x)
            return logits[:, None].expand(-1, 5, -1)

    (found, *_) = predictions(Positions(), MonteCarloCallback(MASKS, class_dim=-1, max_rows=16))
    assert found.entropy.shape == (8, 5)
    callback = MonteCarloCallback(MASKS, task="regression", noise="log_variance", class_dim=-1)
    with pytest.raises(AssertionError):
        predictions(Positions(4), callback)
    found = predictions(Positions(4), MonteCarloCallback(2, "regression", "log_variance", class_dim=-1))[0]
    assert found.mean.shape == found.aleatoric_variance.shape == (8, 5, 2)


def test_masks_come_from_the_seed_or_from_torch_and_streams_stay() -> None:
    net = Net()

    def first(seed: int | None) -> Tensor:
        mean: Tensor = predictions(net, MonteCarloCallback(MASKS, seed=seed))[0].mean
        return mean

    before = random.getstate(), str(np.random.get_state())  # noqa: NPY002
    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))
    assert not torch.equal(first(None), first(None))
    torch.manual_seed(1)
    one = first(None)
    torch.manual_seed(1)
    assert torch.equal(first(None), one)
    assert (random.getstate(), str(np.random.get_state())) == before  # noqa: NPY002


def test_each_batch_has_masks_of_its_own() -> None:
    data = DataLoader(TensorDataset(X[:1].expand(16, -1)), 8)
    first, second = predictions(Net(), MonteCarloCallback(3, seed=0, shared_masks=True), data)
    assert torch.equal(first.mean[0], first.mean[7])
    assert not torch.equal(first.mean, second.mean)


@pytest.mark.usefixtures("rows_known_apart")
def test_what_a_batch_has_shown_of_the_draws_saves_a_pass_in_the_next() -> None:
    net, passes = Net(), []
    net.net[0].register_forward_hook(lambda module, args, output: passes.append(len(output)))
    predictions(net, MonteCarloCallback(5))
    assert passes == [8, 32, 40, 20]


@pytest.mark.parametrize("shared_masks", [False, True])
def test_test_metrics_are_those_of_the_average(shared_masks: bool) -> None:
    net, generator = Net(), generator_of(3)
    settings: dict[str, Any] = {"shared_masks": shared_masks, "max_rows": 1}
    (logged,) = trainer_of(MonteCarloCallback(MASKS, seed=3, **settings)).test(net, loader(), verbose=False)
    probabilities = torch.cat(
        [monte_carlo(net, x, MASKS, generator=generator, **settings).probabilities for x, _ in loader()]
    )
    assert logged["test_loss"] == pytest.approx(-float(probabilities[range(20), Y].log().mean()), rel=1e-5)
    accuracy = MulticlassAccuracy(3)(probabilities, Y)
    assert logged["test_acc"] == pytest.approx(float(accuracy))
    (plain,) = trainer_of().test(net, loader(), verbose=False)
    assert plain["test_loss"] != pytest.approx(logged["test_loss"], abs=1e-2)


class Labels(Net):
    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        target = (batch[0][:, :3] > 0).float()
        self.log("test_loss", nn.functional.binary_cross_entropy_with_logits(self(batch[0]), target))


def test_labels_in_test() -> None:
    net = Labels()
    callback = MonteCarloCallback(MASKS, "multilabel", seed=3, max_rows=1)
    (logged,) = trainer_of(callback).test(net, loader(20), verbose=False)
    p = monte_carlo(net, X, MASKS, task="multilabel", generator=generator_of(3), max_rows=1).probabilities
    expected = nn.functional.binary_cross_entropy(p, (X[:, :3] > 0).float())
    assert logged["test_loss"] == pytest.approx(float(expected), rel=1e-4)


class Numbers(Net):
    """A mean and a log-variance, in one of several forms."""

    def __init__(self, form: str) -> None:
        super().__init__(4)
        self.form = form

    def forward(self, x: Tensor) -> Any:
        output = self.net(x)
        mean, noise = output.chunk(2, 1)
        return {"tensor": output, "pair": (mean, noise), "mapping": {"mean": mean, "log_variance": noise}}[self.form]

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        output = self(batch[0])
        mean, noise = (
            output.values() if self.form == "mapping" else output if self.form == "pair" else output.chunk(2, 1)
        )
        self.log("test_loss", nn.functional.gaussian_nll_loss(mean, batch[0][:, :2], noise.exp()))


@pytest.mark.parametrize("form", ["tensor", "pair", "mapping"])
def test_numbers_in_test_have_the_total_variance_in_the_form_of_the_models_output(form: str) -> None:
    net, settings = Numbers(form), {"noise": "log_variance", "max_rows": 1}
    (logged,) = trainer_of(MonteCarloCallback(MASKS, "regression", seed=3, **settings)).test(  # type: ignore[arg-type]
        net, loader(20), verbose=False
    )
    found: Any = monte_carlo(net, X, MASKS, task="regression", generator=generator_of(3), **settings)  # type: ignore[call-overload]
    expected = nn.functional.gaussian_nll_loss(found.mean, X[:, :2], found.variance)
    assert logged["test_loss"] == pytest.approx(float(expected), rel=1e-4)


def test_numbers_alone_in_test() -> None:
    class Mean(Net):
        def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
            self.log("test_loss", self(x=batch[0]).mean())

    net = Mean()
    (logged,) = trainer_of(MonteCarloCallback(MASKS, "regression", seed=3)).test(net, loader(20), verbose=False)
    expected = monte_carlo(net, X, MASKS, task="regression", generator=generator_of(3)).mean.mean()
    assert logged["test_loss"] == pytest.approx(float(expected), rel=1e-4)


def test_an_output_that_holds_more_cannot_be_averaged_in_test() -> None:
    class Rich(Net):
        def forward(self, x: Tensor) -> Any:
            return {"logits": self.net(x), "hidden": x}

    assert len(predictions(Rich(), MonteCarloCallback(2))) == 3
    with pytest.raises(ConfigurationError, match=r"forward returned dict\..*`ydrop_forward`"):
        trainer_of(MonteCarloCallback(2)).test(Rich(), loader(), verbose=False)


class Own(Net):
    """Has methods for this package."""

    def forward(self, x: Tensor) -> Any:
        raise AssertionError("not to be called")

    def ydrop_forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits

    def ydrop_inputs(self, batch: list[Tensor]) -> tuple[Tensor, None]:
        return batch[0], None

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test_loss", nn.functional.cross_entropy(self.ydrop_forward(batch[0]), batch[1]))


def test_ydrop_forward_is_averaged_where_there_is_one() -> None:
    net = Own()
    callback = MonteCarloCallback(MASKS, seed=3, max_rows=1, adapter=KeyAdapter("nothing"))
    found = predictions(net, callback, loader(20))[0]
    (logged,) = trainer_of(callback).test(net, loader(20), verbose=False)
    assert logged["test_loss"] == pytest.approx(-float(found.probabilities[range(20), Y].log().mean()), rel=1e-5)


def test_the_adapter_reads_batches_of_predict() -> None:
    class Batches:
        def __iter__(self) -> Iterator[dict[str, Tensor]]:
            return iter([{"extra": Y, "pixels": X}])

        def __len__(self) -> int:
            return 1

    (found,) = predictions(Net(), MonteCarloCallback(2, adapter=KeyAdapter("pixels", None)), Batches())
    assert found.probabilities.shape == (20, 3)


class Inner(KeyAdapter):
    """Reads a part of the batch."""

    def read(self, batch: Any) -> Any:
        return batch["inner"][self.inputs], None if self.target is None else batch["inner"][self.target]


class Named(KeyAdapter):
    """Has another default."""

    def __init__(self) -> None:
        super().__init__("image")


@pytest.mark.parametrize("adapter", [KeyAdapter("image"), Named(), IndexAdapter(1, target=2)])
def test_batches_of_predict_need_no_target(adapter: Any) -> None:
    batches: Any = [{"image": X[:4], "path": "a.png"} if isinstance(adapter, KeyAdapter) else ["a.png", X[:4]]]
    averages: Any = trainer_of(MonteCarloCallback(5, adapter=adapter)).predict(
        Net(), DataLoader(batches, batch_size=None)
    )
    assert averages[0].probabilities.shape == (4, 3)


def test_an_adapter_of_ones_own_reads_batches_of_predict_in_its_way() -> None:
    batches: Any = [{"inner": {"image": X[:4], "labels": Y[:4]}}]
    adapter = Inner("image")
    averages: Any = trainer_of(MonteCarloCallback(5, adapter=adapter)).predict(
        Net(), DataLoader(batches, batch_size=None)
    )
    assert averages[0].probabilities.shape == (4, 3)
    assert adapter.target == "labels"


@pytest.mark.parametrize("stage", ["predict", "test"])
def test_several_loaders(stage: str) -> None:
    net = Net()  # whose predict_step takes no dataloader_idx
    trainer = trainer_of(MonteCarloCallback(2))
    if stage == "predict":
        found = trainer.predict(net, [loader(), loader(20)])
        assert found is not None
        assert [len(each) for each in found] == [3, 1]
    else:
        net.test_step = lambda batch, batch_idx, dataloader_idx: net.log("loss", net(batch[0]).sum())  # type: ignore[method-assign, assignment, misc]
        assert len(trainer.test(net, [loader(), loader(20)], verbose=False)) == 2


def test_a_forward_that_calls_itself_is_averaged_once() -> None:
    class Halving(Net):
        def forward(self, x: Tensor) -> Tensor:
            if len(x) > 10:
                return torch.cat([self(x[:10]), self(x[10:])])
            passes.append(len(x))
            logits: Tensor = self.net(x)
            return logits

    passes: list[int] = []
    trainer_of(MonteCarloCallback(2, max_rows=1)).test(Halving(), loader(20), verbose=False)
    assert passes == [10, 10, 10, 10]


def test_a_step_that_goes_past_forward_is_told() -> None:
    class Past(Net):
        def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
            self.log("test_loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    with pytest.warns(NoEffectWarning, match=r"Past\.test_step did not call forward for its predictions") as warned:
        trainer_of(MonteCarloCallback(2)).test(Past(), loader(), verbose=False)
    assert sum(each.category is NoEffectWarning for each in warned) == 1


class Failing(Net):
    """Fails in its third forward pass."""

    error: type[BaseException] = RuntimeError

    def forward(self, x: Tensor) -> Tensor:
        if len(x) == 4:
            raise self.error("no")
        logits: Tensor = self.net(x)
        return logits


@pytest.mark.parametrize("stage", ["predict", "test"])
@pytest.mark.parametrize("fails", [None, RuntimeError, KeyboardInterrupt])
def test_the_module_is_given_back(stage: str, fails: type[BaseException] | None) -> None:
    net = Failing() if fails else Net()
    if isinstance(net, Failing) and fails:
        net.error = fails
    weights = {name: value.clone() for name, value in net.state_dict().items()}
    names = ("predict_step", "test_step", "forward")
    callback = MonteCarloCallback(2, max_rows=1)

    def run() -> None:
        trainer = trainer_of(callback)
        if stage == "predict":
            trainer.predict(net, loader())
        else:
            trainer.test(net, loader(), verbose=False)

    for own in (None, lambda batch, batch_idx: net(batch[0])):
        if own is not None:
            net.predict_step = net.test_step = own  # type: ignore[method-assign]
        before = [net.__dict__.get(name) for name in names]
        if fails:
            with pytest.raises((RuntimeError, SystemExit)):  # Lightning ends the program at Ctrl-C
                run()
        else:
            run()
        assert [net.__dict__.get(name) for name in names] == before
    assert_same(dict(net.state_dict()), weights)
    assert net.eval()(X[:2]).shape == (2, 3)


def fitted(*callbacks: Callback) -> tuple[Net, Trainer]:
    torch.manual_seed(2)
    net, trainer = Net(), trainer_of(*callbacks)
    trainer.fit(net, loader(), loader())
    return net, trainer


def test_fits_and_validations_are_as_without_it() -> None:
    (net, trainer), (plain, plain_trainer) = fitted(MonteCarloCallback(2)), fitted()
    assert_same(dict(net.state_dict()), dict(plain.state_dict()))
    assert_same(dict(trainer.callback_metrics), dict(plain_trainer.callback_metrics))


def test_a_network_trains_on_after_a_prediction_and_a_test() -> None:
    callback = MonteCarloCallback(2, seed=0)
    net, trainer = fitted(callback)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    trainer.predict(net, loader())
    trainer.test(net, loader(), verbose=False)
    assert_same(dict(net.state_dict()), before)
    trainer_of(callback).fit(net, loader(), loader())
    assert not torch.equal(net.state_dict()["net.0.weight"], before["net.0.weight"])


def test_layers_that_ydrop_drives_drop_at_their_running_means() -> None:
    net, layer = Net(), ConductanceDropout(0.2)
    net.net[3] = layer
    trainer = trainer_of(YDropCallback(annealing_epochs=0, elasticity=0.5), MonteCarloCallback(400, seed=3))
    trainer.fit(net, loader(), loader())
    assert layer.mean_drop_prob.std() > 0
    found = trainer.predict(net, loader(20))
    assert found is not None
    expected = monte_carlo(net, X, 400, generator=generator_of(3)).probabilities
    assert torch.allclose(found[0].probabilities, expected)  # type: ignore[union-attr]


def test_it_warns_where_a_weights_file_may_have_left_ydrops_probabilities_behind() -> None:
    net = Net()
    net.net[3] = ConductanceDropout(0.2)
    with pytest.warns(UserWarning, match="MonteCarloCallback was given Net, in which each ConductanceDropout"):
        predictions(net, MonteCarloCallback(2))


@pytest.mark.parametrize("stage", ["predict", "test"])
def test_a_compiled_module(stage: str) -> None:
    torch._dynamo.reset()
    net = Net()
    net.net[3].compile(backend="eager")
    compiled: Any = torch.compile(net, backend="eager")
    trainer, settings = trainer_of(MonteCarloCallback(MASKS, seed=3, max_rows=1)), {"max_rows": 1}
    found = monte_carlo(net, X, MASKS, generator=generator_of(3), **settings)  # type: ignore[call-overload]
    if stage == "predict":
        (average,) = trainer.predict(compiled, loader(20)) or []
        assert torch.allclose(average.probabilities, found.probabilities, atol=1e-6)  # type: ignore[union-attr]
    else:
        (logged,) = trainer.test(compiled, loader(20), verbose=False)
        expected = -float(found.probabilities[range(20), Y].log().mean())
        assert logged["test_loss"] == pytest.approx(expected, rel=1e-5)


class Built(Net):
    """Builds its network when a Trainer asks for it."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        del self.net

    def configure_model(self) -> None:
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(self.p), nn.Linear(8, 3))


@pytest.mark.parametrize("stage", ["predict", "test"])
@pytest.mark.parametrize("net", [lambda: Net(p=0.0), lambda: Built(0.0)])
def test_a_model_without_dropout_is_refused_before_the_first_batch(net: Any, stage: str) -> None:
    class Loader:
        def __iter__(self) -> Iterator[Any]:
            batches.append(X)
            yield X

        def __len__(self) -> int:
            return 3

    batches: list[Tensor] = []
    trainer = trainer_of(MonteCarloCallback(2))
    with pytest.raises(ConfigurationError, match=r"MonteCarloCallback was given .*, which has no layer that drops"):
        getattr(trainer, stage)(net(), Loader())
    assert batches == []


def test_a_model_that_is_built_late_is_averaged() -> None:
    assert len(predictions(Built(0.5), MonteCarloCallback(2))) == 3


def test_several_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="several MonteCarloCallbacks"):
        trainer_of(MonteCarloCallback(2), MonteCarloCallback(3)).predict(Net(), loader())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_samples": 0}, r"MonteCarloCallback\(num_samples=0\)"),
        ({"task": "sequence"}, r"MonteCarloCallback\(task='sequence'\)"),
        ({"noise": "variance"}, r"MonteCarloCallback\(task='classification', noise='variance'\)"),
        ({"seed": -1}, r"MonteCarloCallback\(seed=-1\)"),
        ({"seed": 1.5}, r"MonteCarloCallback\(seed=1.5\)"),
        ({"return_samples": "yes"}, r"MonteCarloCallback\(return_samples='yes'\)"),
        ({"shared_masks": "yes"}, r"MonteCarloCallback\(shared_masks='yes'\)"),
        ({"class_dim": 0}, r"MonteCarloCallback\(class_dim=0\)"),
        ({"max_rows": 0}, r"MonteCarloCallback\(max_rows=0\)"),
        ({"adapter": "pixels"}, r"MonteCarloCallback\(adapter='pixels'\)"),
        ({"progress_bar": 1}, r"MonteCarloCallback\(progress_bar=1\)"),
    ],
)
def test_bad_arguments_are_refused_when_it_is_made(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        MonteCarloCallback(**settings)


def test_masks_show_beneath_the_trainers_own_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "SECONDS_BEFORE_IT_SHOWS", 0)
    shown = []
    for bar, wanted in ((True, True), (True, False), (False, True)):
        for kind in (TQDMProgressBar, partial(RichProgressBar, console_kwargs={"force_terminal": True})):
            bars = [kind()] if bar else []
            callback = MonteCarloCallback(5, max_rows=1, progress_bar=wanted)
            trainer_of(callback, *bars, enable_progress_bar=bar).predict(Net(), loader())
            said = capsys.readouterr()
            shown.append("masks" in said.err + said.out)
            assert ("5/5" in said.out) == (shown[-1] and kind is not TQDMProgressBar)  # tqdm draws too seldom
    assert shown == [True, True, False, False, False, False]


class Data(LightningDataModule):
    def predict_dataloader(self) -> Any:
        return loader()

    test_dataloader = predict_dataloader


YAML = """
trainer:
  accelerator: cpu
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: lightning_ydrop.MonteCarloCallback
      init_args:
        num_samples: 15
        seed: 3
        max_rows: 1
        adapter:
          class_path: lightning_ydrop.IndexAdapter
          init_args:
            target: null
"""


@pytest.mark.parametrize("stage", ["predict", "test"])
def test_yaml(stage: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning calls it by an older name
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # where Lightning leaves it for other tests
    (tmp_path / "config.yaml").write_text(YAML)
    monkeypatch.setattr(sys, "argv", ["train.py", stage, "--config", str(tmp_path / "config.yaml")])
    cli = LightningCLI(Net, Data, save_config_callback=None, seed_everything_default=0)
    net, generator = cli.model, generator_of(3)
    expected = [monte_carlo(net, x, 15, generator=generator, max_rows=1).probabilities for x, _ in loader()]
    if stage == "test":
        loss = -float(torch.cat(expected)[range(20), Y].log().mean())
        assert float(cli.trainer.callback_metrics["test_loss"]) == pytest.approx(loss, rel=1e-5)
    else:
        found = cli.trainer.predict_loop.predictions
        assert_same([each.probabilities for each in found], expected)
