"""A layer has one driver; what a checkpoint keeps of layers."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_ydrop import ConductanceDropout, ConfigurationError, YDrop, YDropCallback
from lightning_ydrop.importance.driving import restore, states_of
from tests.callbacks.test_ydrop import Net, loader, trainer_of
from tests.networks import perceptron
from tests.sameness import assert_same

X, Y = torch.randn(16, 12), torch.arange(16) % 5


class OwnCallback(YDropCallback):
    """A subclass, as users write them."""


def test_of_two_engines_the_one_that_was_made_last_drives() -> None:
    model = perceptron()
    first, second = YDrop(model), YDrop(model)
    with pytest.raises(ConfigurationError, match=r"^YDrop\.step was called for '1', '4'.*made last"):
        first.step(X, Y)
    second.step(X, Y)
    first.take_over()
    first.step(X, Y)
    with pytest.raises(ConfigurationError, match="A layer has one driver"):
        second.step(X, Y)


def test_one_layer_in_common_is_enough() -> None:
    model = perceptron()
    engine = YDrop(model)
    YDrop(nn.Sequential(model[4]))
    with pytest.raises(ConfigurationError, match=r"called for '4', for which"):
        engine.step(X, Y)


def test_an_engine_that_is_made_anew_replaces_the_old_one() -> None:
    model = perceptron()
    for seed in range(3):  # as where a cell of a notebook runs again
        engine = YDrop(model, seed=seed)
        engine.step(X, Y)
        engine.step(X, Y)
        assert engine.layers["1"].active


def test_copies_of_a_model_and_its_engine_go_on_as_the_original() -> None:
    class Writing(nn.Module):
        """Writes to a buffer of BatchNorm, in evaluation too."""

        def __init__(self) -> None:
            super().__init__()
            self.norm, self.body = nn.BatchNorm1d(12), perceptron()

        def forward(self, x: Tensor) -> Any:
            assert self.norm.num_batches_tracked is not None
            self.norm.num_batches_tracked.add_(1)
            return self.body(self.norm(x))

    model = Writing()
    engine = YDrop(model, elasticity=0.5)
    engine.step(X, Y)
    copied_model, copied = copy.deepcopy((model, engine))
    assert copied.model is copied_model
    before = copy.deepcopy(copied_model.state_dict())
    for _ in range(2):
        engine.step(X, Y)
        copied.step(X, Y)
    assert_same(copied.state_dict(), engine.state_dict())
    assert_same(copied_model.state_dict(), before)  # it guards its own tensors, not those of the original
    assert not copied.unguarded
    assert copied.findings is not None


def test_an_engine_crosses_processes() -> None:
    engine = YDrop(perceptron(), elasticity=0.5)
    engine.step(X, Y)
    there = pickle.loads(pickle.dumps(engine))
    there.step(X, Y)
    engine.step(X, Y)
    assert_same(there.state_dict(), engine.state_dict())


def test_a_trainer_takes_one_callback_or_a_subclass() -> None:
    trainer = trainer_of(YDropCallback(annealing_epochs=0), OwnCallback(annealing_epochs=0))
    text = r"2 callbacks that drive the same layers: YDropCallback, OwnCallback\."
    with pytest.raises(ConfigurationError, match=text):  # two of one class are refused by Lightning itself
        trainer.fit(Net(), loader())


def test_an_engine_beside_a_callback_is_refused() -> None:
    class Both(Net):
        def __init__(self) -> None:
            super().__init__()
            self.engines = [YDrop(self.body)]

        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            self.engines[0].step(*batch)
            return super().training_step(batch, batch_idx)

    with pytest.raises(ConfigurationError, match=r"^YDrop\.step was called for '1', '4'"):
        trainer_of(YDropCallback(annealing_epochs=0)).fit(Both(), loader())
    model = Net()

    class Late(YDropCallback):
        def on_train_start(self, *args: Any) -> None:
            super().on_train_start(*args)
            YDrop(model)

    with pytest.raises(ConfigurationError, match=r"^YDropCallback\.step was called for 'body\.1', 'body\.4'"):
        trainer_of(Late(annealing_epochs=0)).fit(model, loader())


def test_callbacks_that_fit_one_model_in_turn_take_its_layers_over() -> None:
    model = Net()
    callbacks = [YDropCallback(annealing_epochs=0), OwnCallback(annealing_epochs=0)]
    for callback in (*callbacks, *callbacks):
        trainer_of(callback, max_epochs=1).fit(model, loader())
        assert callback.engine is not None
        assert callback.engine.state_dict()["steps_taken"] == 4


def test_layers_are_restored_as_they_were() -> None:
    model = perceptron()
    engine = YDrop(model, elasticity=0.5)
    engine.step(X, Y)
    engine.layers["4"].deactivate()
    states = states_of(engine.layers)
    kept = copy.deepcopy(states)
    engine.step(X, Y)
    assert_same(states, kept)  # copies
    others = {"1": ConductanceDropout(), "4": ConductanceDropout()}
    restore(others, states, 0.5, torch.device("cpu"))
    assert_same(states_of(others), kept)
    x = torch.ones(20_000, 16)
    expected = (0.5 + kept["1"]["drop_prob"]) / 2
    assert ((others["1"](x) == 0).float().mean(0) - expected).abs().max() < 0.02  # progress is half
