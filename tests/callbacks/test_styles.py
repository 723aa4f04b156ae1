"""Ways to train: manual optimisation, GANs, endless data, and models of other kinds."""

from collections import UserDict
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_ydrop import (
    Conductance,
    ConductanceDropout,
    IndexAdapter,
    KeyAdapter,
    NegativeLoss,
    NoEffectWarning,
    OutputSum,
    PredictedLogit,
    Request,
    TargetLogit,
    YDropCallback,
)
from tests.callbacks.test_ydrop import Probe, X, Y, trainer_of
from tests.networks import perceptron


class Net(LightningModule):
    """A perceptron to vary."""

    def __init__(self) -> None:
        super().__init__()
        self.body: Any = perceptron()

    def forward(self, x: Tensor) -> Any:
        return self.body(x)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def data(*tensors: Tensor) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*(tensors or (X, Y))), batch_size=16)


def fit(net: LightningModule, loader: Any = None, ydrop: YDropCallback | None = None, **kwargs: Any) -> YDropCallback:
    callback = YDropCallback(annealing_epochs=0) if ydrop is None else ydrop
    trainer_of(callback, **({"max_epochs": 2} | kwargs)).fit(net, data() if loader is None else loader)
    assert callback.engine is not None
    return callback


def steps(callback: YDropCallback) -> int:
    assert callback.engine is not None
    taken: int = callback.engine.state_dict()["steps_taken"]
    return taken


class Manual(Net):
    """Steps two optimisers by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = super().training_step(batch, batch_idx)
        optimizers: Any = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in optimizers:
            optimizer.step()

    def configure_optimizers(self) -> Any:
        parts = self.body[:3], self.body[3:]
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in parts]


def test_manual_optimisation_with_two_optimisers(tmp_path: Any) -> None:
    callback = YDropCallback(annealing_epochs=0)
    trainer = trainer_of(callback, max_epochs=2, logger=CSVLogger(tmp_path), log_every_n_steps=3)
    trainer.fit(Manual(), data())
    assert steps(callback) == 8
    assert "ydrop/body.1/drop_prob" in trainer.logged_metrics


def test_lbfgs() -> None:
    class Closure(Net):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)

    assert steps(fit(Closure())) == 8  # once for a batch, however often it is evaluated


class Gan(LightningModule):
    """Images from noise, and a critic with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 12))
        self.critic = nn.Sequential(nn.Linear(12, 16), ConductanceDropout(), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, noise: Tensor) -> Tensor:
        images: Tensor = self.generator(noise)
        return images

    def ydrop_inputs(self, batch: Any) -> Any:
        return batch[0], None

    def ydrop_forward(self, images: Tensor) -> Any:
        return self.critic(images)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizers: Any = self.optimizers()
        real, made = batch[0], self(torch.randn(len(batch[0]), 4))
        for optimizer, loss in (
            (optimizers[0], lambda: self.critic(made.detach()).mean() - self.critic(real).mean()),
            (optimizers[1], lambda: -self.critic(made).mean()),
        ):
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(loss())
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), lr=0.01) for part in (self.critic, self.generator)]


def test_the_critic_of_a_gan_is_driven() -> None:
    net = Gan()
    assert steps(fit(net)) == 8
    assert len(net.critic[1].drop_prob) == 16  # type: ignore[arg-type]


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield from zip(X, Y, strict=True)


def test_endless_data_anneals_by_steps() -> None:
    probe = Probe()
    callback = YDropCallback(annealing_steps=5)
    loader = DataLoader(Endless(), batch_size=16)
    trainer_of(callback, probe, max_steps=12, max_epochs=-1).fit(Net(), loader)
    assert [active for _, active in probe.active] == [False] * 5 + [True] * 7


def test_annealing_steps_are_those_of_optimisers() -> None:
    probe = Probe()
    trainer_of(YDropCallback(annealing_steps=2), probe, max_epochs=2, accumulate_grad_batches=2).fit(Net(), data())
    assert [active for _, active in probe.active] == [False] * 4 + [True] * 4


@pytest.mark.filterwarnings("ignore:With every_n_batches=")
def test_phase_1_runs_on_every_so_manyth_batch_from_the_switch_on() -> None:
    ran: list[int] = []

    class Noting(Conductance):
        def score(self, phase1: Request) -> dict[str, Tensor]:
            ran.append(len(probe.active))
            return super().score(phase1)

    probe = Probe()
    callback = YDropCallback(annealing_steps=5, every_n_batches=3, measure=Noting())
    trainer_of(callback, probe, max_epochs=4).fit(Net(), data())
    assert ran == [0, 5, 8, 11, 14]  # the first is the rehearsal
    assert [active for _, active in probe.active] == [False] * 5 + [True] * 11


@pytest.mark.parametrize("settings", [{"annealing_epochs": 2}, {"annealing_steps": 8}])
def test_a_linear_transition_moves_in_a_line(settings: Any) -> None:
    shares: list[float] = []

    class Noting(Probe):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            layer = pl_module.body[1]
            share = min(1.0, trainer.global_step / 8)
            shares.append(share)
            for applied, driven in (
                (layer._applied_drop_prob, layer.drop_prob),
                (layer._applied_mean, layer.mean_drop_prob),
            ):
                assert layer.active is (share > 0)
                if share > 0:
                    assert torch.allclose(applied, (1 - share) * 0.5 + share * driven)

    callback = YDropCallback(transition="linear", elasticity=0.1, **settings)
    trainer_of(callback, Noting(), max_epochs=3).fit(Net(), data())
    assert shares[-1] == 1.0
    assert steps(callback) == 11


def test_combined_loaders() -> None:
    class Both(Net):
        def ydrop_inputs(self, batch: Any) -> Any:
            return batch["labelled"]

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch["labelled"], batch_idx) + self(batch["other"][0]).mean()

    loader = CombinedLoader({"labelled": data(), "other": data(X)}, "min_size")
    assert steps(fit(Both(), loader)) == 8


class Dicts(DataLoader[Any]):
    """Batches as mappings."""

    kind: Any = dict

    def __iter__(self) -> Any:
        return (self.kind({"image": x, "label": y, "extra": y}) for x, y in super().__iter__())


@pytest.mark.parametrize("kind", [dict, UserDict, lambda items: SimpleNamespace(**items)])
@pytest.mark.parametrize("way", ["automatic", "keys", "method"])
def test_batches_of_other_kinds(kind: Any, way: str) -> None:
    class Reading(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(self.read(batch), batch_idx)

        def read(self, batch: Any) -> Any:
            return (batch.image, batch.label) if hasattr(batch, "image") else (batch["image"], batch["label"])

    class Knowing(Reading):
        def ydrop_inputs(self, batch: Any) -> Any:
            return self.read(batch)

    loader = Dicts(TensorDataset(X, Y), batch_size=16)
    loader.__dict__["kind"] = kind
    if kind not in (dict, UserDict) and way != "method":
        pytest.skip("an object without fields has to be read by the module")
    # The module's own method wins over an adapter that could not read a thing.
    adapters: dict[str, Any] = {"keys": KeyAdapter("image", "label"), "method": IndexAdapter(7)}
    settings = {"adapter": adapters[way]} if way in adapters else {}
    net = Knowing() if way == "method" else Reading()
    assert steps(fit(net, loader, YDropCallback(annealing_epochs=0, **settings))) == 8


@pytest.mark.parametrize(
    "shape", [lambda y: {"logits": y}, lambda y: SimpleNamespace(logits=y), lambda y: (y, y.sum()), lambda y: [y]]
)
def test_outputs_of_other_kinds(shape: Any) -> None:
    class Shaping(Net):
        def forward(self, x: Tensor) -> Any:
            return shape(self.body(x))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self(batch[0])
            return nn.functional.cross_entropy(self.body(batch[0]), batch[1])

    assert steps(fit(Shaping())) == 8


class Segmenting(Net):
    """A class for each pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.Dropout2d(), nn.ReLU(), nn.Conv2d(6, 3, 1))


def test_dense_labels_with_some_that_do_not_count() -> None:
    images, labels = torch.randn(32, 1, 6, 6), torch.randint(-1, 3, (32, 6, 6))
    labels[labels == -1] = -100
    net = Segmenting()
    assert steps(fit(net, data(images, labels), YDropCallback(annealing_epochs=0, convert=True))) == 4
    assert len(net.body[1].drop_prob) == 6


@pytest.mark.parametrize(
    ("objective", "target"),
    [
        (TargetLogit(), Y),
        (TargetLogit(), nn.functional.one_hot(Y, 5).float() * 0.9 + 0.02),
        (PredictedLogit(), Y),
        (OutputSum(), Y),
        (NegativeLoss(nn.CrossEntropyLoss(reduction="none")), Y),
    ],
)
def test_objectives(objective: Any, target: Tensor) -> None:
    assert steps(fit(Net(), data(X, target), YDropCallback(annealing_epochs=0, objective=objective))) == 8


def test_autoencoders_have_no_labels() -> None:
    class Auto(Net):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(12, 8), ConductanceDropout(), nn.ReLU(), nn.Linear(8, 12))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return nn.functional.mse_loss(self(batch[0]), batch[0])

    assert steps(fit(Auto(), data(X))) == 8


def test_integers_are_carried_beside_floating_inputs() -> None:
    class Mixed(Net):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(5, 12)

        def forward(self, x: Tensor, kind: Tensor) -> Any:  # type: ignore[override]
            return self.body(x + self.embedding(kind))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            x, kind, y = batch
            return nn.functional.cross_entropy(self(x, kind), y)

    adapter = IndexAdapter(inputs=[0, 1], target=2)
    assert steps(fit(Mixed(), data(X, Y, Y), YDropCallback(annealing_epochs=0, adapter=adapter))) == 8


class Built(Net):
    """Gets torch's dropout where and when it is told to."""

    def __init__(self, when: str) -> None:
        super().__init__()
        self.when = when
        self.body = self.build() if when == "init" else nn.Identity()

    def build(self) -> nn.Module:
        return perceptron(dropout=nn.Dropout)

    def setup(self, stage: str) -> None:
        if self.when == "setup":
            self.body = self.build()

    def configure_model(self) -> None:
        if self.when == "configure_model" and isinstance(self.body, nn.Identity):
            self.body = self.build()


@pytest.mark.parametrize("when", ["init", "setup", "configure_model"])
def test_conversion_whenever_the_model_is_built(when: str) -> None:
    callback = fit(Built(when), ydrop=YDropCallback(annealing_epochs=0, convert=True))
    assert callback.engine is not None
    assert list(callback.engine.layers) == ["body.1", "body.4"]
    only = fit(Built(when), ydrop=YDropCallback(annealing_epochs=0, convert=True, exclude="*.4"))
    assert only.engine is not None
    assert list(only.engine.layers) == ["body.1"]


@pytest.mark.parametrize(("convert", "is_said"), [(True, True), (False, False)])
def test_conversion_says_what_it_has_left_even_where_it_finds_nothing_to_do(
    convert: bool, is_said: bool, caplog: pytest.LogCaptureFixture
) -> None:
    net = Net()
    net.body[4] = nn.AlphaDropout()
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        fit(net, ydrop=YDropCallback(annealing_epochs=0, convert=convert))
    report = "0 dropout layer(s) converted, 1 left.\n  body.4: left, AlphaDropout is none of"
    assert (report in caplog.text) is is_said


def test_frozen_parts_clipping_and_validation_first() -> None:
    class Validating(Net):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self(batch[0])

    net, callback = Validating(), YDropCallback(annealing_epochs=0)
    net.body[0].requires_grad_(False)
    frozen = net.body[0].weight.clone()
    trainer = trainer_of(callback, max_epochs=1, gradient_clip_val=0.1)
    trainer.validate(net, data(), verbose=False)  # in inference mode
    trainer.fit(net, data(), data())
    assert torch.equal(net.body[0].weight, frozen)
    assert steps(callback) == 4
    trainer_of(callback, max_epochs=1).fit(net, data(), data())
    assert steps(callback) == 4  # a fit of its own, with an annealing of its own


def test_a_generator_alone_leaves_the_critic_vanilla() -> None:
    class Generator(Gan):
        def __init__(self) -> None:
            super().__init__()
            self.generator.insert(1, ConductanceDropout())

        def ydrop_inputs(self, batch: Any) -> Any:
            return torch.randn(len(batch[0]), 4), None

        def ydrop_forward(self, images: Tensor) -> Any:
            return self(images)

    net = Generator()
    with pytest.warns(NoEffectWarning, match="'critic.1'"):
        fit(net)
    assert len(net.generator[1].drop_prob) == 8  # type: ignore[arg-type]
    assert len(net.critic[1].drop_prob) == 0  # type: ignore[arg-type]
