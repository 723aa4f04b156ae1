"""A LightningModule's own `on_train_batch_start` runs before phase 1, once for each batch."""

from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_ydrop import YDropCallback
from lightning_ydrop.callbacks.own_hook import HOOK, OwnHook
from tests.callbacks.test_ydrop import BATCHES, Net, loader, trainer_of
from tests.counting import recorder


class Gated(Net):
    """Sets a gate for each batch, which forward looks at."""

    def __init__(self, skips_from: int = 10**6) -> None:
        super().__init__()
        self.hooks, self.gates, self.skips_from = recorder(), recorder(), skips_from
        self.gate = -1.0

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        self.hooks((self.current_epoch, batch_idx))
        self.gate = float(batch[0].sum())
        return -1 if batch_idx >= self.skips_from else None

    def forward(self, x: Tensor) -> Tensor:
        self.gates((self.training, self.gate))
        return super().forward(x)


@pytest.mark.filterwarnings("ignore:With every_n_batches=")
@pytest.mark.parametrize("every_n_batches", [1, 3])
@pytest.mark.parametrize("annealing_epochs", [0, 1])
def test_both_phases_of_a_batch_see_the_same(annealing_epochs: int, every_n_batches: int) -> None:
    model = Gated()
    callback = YDropCallback(annealing_epochs=annealing_epochs, every_n_batches=every_n_batches)
    trainer_of(callback, max_epochs=2).fit(model, loader())
    assert model.hooks.seen == [(epoch, batch) for epoch in range(2) for batch in range(BATCHES)]
    of_training = [gate for training, gate in model.gates.seen if training]
    assert len(of_training) == 2 * BATCHES
    assert -1.0 not in of_training
    before: list[float] = []
    evaluated = 0
    for training, gate in model.gates.seen:
        if training:
            assert all(each == gate for each in before)
            evaluated += bool(before)
            before = []
        else:
            before.append(gate)
    due = (2 - annealing_epochs) * BATCHES
    rehearsed = int(annealing_epochs > 0)
    assert evaluated == -(-due // every_n_batches) + rehearsed
    assert HOOK not in model.__dict__


def test_an_answer_of_minus_one_skips_the_rest_of_the_epoch_as_without_us() -> None:
    steps, hooks = [], []
    for callbacks in ([], [YDropCallback(annealing_epochs=0)]):
        model = Gated(skips_from=2)
        trainer = trainer_of(*callbacks, max_epochs=2)
        trainer.fit(model, loader())
        steps.append(trainer.global_step)
        hooks.append(model.hooks.seen)
    assert steps == [4, 4]
    assert hooks[0] == hooks[1]


def test_a_first_batch_that_is_skipped_is_not_looked_at() -> None:
    model = Gated(skips_from=0)
    callback = YDropCallback(annealing_epochs=0)
    trainer_of(callback, max_epochs=1).fit(model, loader())
    assert model.gates.seen == []
    assert callback.engine is not None
    assert callback.engine.findings is None


def test_a_hook_that_was_set_on_the_instance_comes_back() -> None:
    model = Gated()
    told = recorder()
    own = lambda batch, batch_idx: told(batch_idx)  # noqa: E731
    model.__dict__[HOOK] = own
    trainer_of(YDropCallback(annealing_epochs=0), max_epochs=1).fit(model, loader())
    assert told.seen == list(range(BATCHES))
    assert model.__dict__[HOOK] is own


@pytest.mark.parametrize("where", ["hook", "forward", "later"])
def test_the_hook_comes_back_when_something_raises(where: str) -> None:
    class Raising(Gated):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            if where == "hook" or (where == "later" and batch_idx == 1):
                raise RuntimeError("out of order")
            return super().on_train_batch_start(batch, batch_idx)

        def forward(self, x: Tensor) -> Tensor:
            if where == "forward":
                raise RuntimeError("out of order")
            return super().forward(x)

    model = Raising()
    with pytest.raises(RuntimeError, match="out of order"):
        trainer_of(YDropCallback(annealing_epochs=0)).fit(model, loader())
    assert HOOK not in model.__dict__


def test_without_a_hook_of_its_own_a_module_is_left_alone() -> None:
    hook, model = OwnHook(), Net()
    assert hook.run_early(model, None, 0) is None
    assert HOOK not in model.__dict__


def test_it_runs_once_however_often_phase_1_asks() -> None:
    hook, model = OwnHook(), Gated()
    model.trainer = Trainer(logger=False, enable_checkpointing=False, barebones=True)
    for batch_idx in range(3):
        batch = (torch.ones(2, 12) * batch_idx, None)
        assert hook.run_early(model, batch, batch_idx) is None
        assert model.on_train_batch_start(batch, batch_idx) is None  # Lightning's own call
        assert HOOK not in model.__dict__
    assert [batch_idx for _, batch_idx in model.hooks.seen] == [0, 1, 2]
    hook.run_early(model, (torch.ones(2, 12), None), 3)
    hook.give_back()
    hook.give_back()
    assert HOOK not in model.__dict__
