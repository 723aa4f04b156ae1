import random
from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ydrop import YDrop, YDropCallback, layer_conductance, monte_carlo
from lightning_ydrop.analysis import mean_conductance, removal_curve
from lightning_ydrop.callbacks import ConductanceMonitor
from lightning_ydrop.uncertainty import DropoutDistillation
from tests.models.picture import assert_same_picture, identities_of, picture_of, surroundings
from tests.models.stateful import STATEFUL, Net, build

# What is said of models so odd is right, and no matter here.
quiet = pytest.mark.filterwarnings(
    "ignore:monte_carlo was given",
    "ignore:Phase 1 raised",
    "ignore:The outputs of (Net|Module) for",
    "ignore:All units of",
    "ignore:Training is to end before",
    "ignore:Found .* in eval mode",
)
X, Y = torch.randn(10, 6, generator=torch.Generator().manual_seed(1)), torch.arange(10) % 3


@pytest.fixture(autouse=True)
def _switches_as_they_were() -> Iterator[None]:
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)
    torch.set_default_device(None)


def first_step(model: nn.Module) -> None:
    YDrop(model).step(X, Y)


def removal(model: nn.Module) -> None:
    removal_curve(model, [(X, Y)], layers="inner", fractions=(0, 0.5), repeats=1)


CALLS: dict[str, Callable[[nn.Module], object]] = {
    "conductance": lambda model: layer_conductance(model, X, Y, n_steps=3),
    "several passes": lambda model: layer_conductance(model, X, Y, n_steps=3, max_rows=10),
    "first step": first_step,
    "mean": lambda model: mean_conductance(model, [(X, Y)], n_steps=3),
    "removal": removal,
    "monte carlo": lambda model: monte_carlo(model, X, 3),
}


@pytest.mark.filterwarnings("ignore:.*one mask passes at a time:UserWarning")  # one normalises by the batch
@quiet
@pytest.mark.parametrize(
    ("call", "fails"),
    [*((call, False) for call in CALLS), *((call, True) for call in ("conductance", "first step", "monte carlo"))],
)
@pytest.mark.parametrize("kind", list(STATEFUL))
def test_a_model_is_given_back_as_it_was(kind: str, call: str, fails: bool) -> None:
    model = build(kind)
    model.fails = fails
    before, around, where = picture_of(model), surroundings(), identities_of(model)
    if fails:
        with pytest.raises(RuntimeError, match="out of order"):
            CALLS[call](model)
    else:
        CALLS[call](model)
    if call == "monte carlo":
        around["torch"] = surroundings()["torch"]  # whence the masks come
    assert_same_picture(around, surroundings())
    assert identities_of(model) == where
    assert_same_picture(before, picture_of(model))


@quiet
@pytest.mark.parametrize("fails", [False, True], ids=["", "raises"])
@pytest.mark.parametrize("kind", list(STATEFUL))
def test_later_steps_give_a_model_back_as_it_was(kind: str, fails: bool) -> None:
    model = build(kind)
    ydrop = YDrop(model)
    ydrop.step(X, Y)
    model.fails = fails
    before, around, where = picture_of(model), surroundings(), identities_of(model)
    for _ in range(2):
        if fails:
            with pytest.raises(RuntimeError, match="out of order"):
                ydrop.step(X, Y)
        else:
            ydrop.step(X, Y)
    assert_same_picture(around, surroundings())
    assert identities_of(model) == where
    assert_same_picture(before, picture_of(model))
    assert ydrop.unguarded == []


# These turn gradients off, keep graphs of passes before, or warn in a backward pass: they can't be trained like this.
TRAINABLE = [kind for kind in STATEFUL if kind not in ("Switches", "KeysAndValues", "HooksRegisteredInside")]


@quiet
@pytest.mark.parametrize("kind", TRAINABLE)
def test_a_training_run_with_phase_1_observing_is_the_run_without_it(kind: str) -> None:
    finals = []
    for observed in (False, True):
        model = build(kind)
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002
        torch.manual_seed(1)
        engine = YDrop(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            if observed:
                engine.step(X, Y)
                engine.deactivate()
            loss = nn.functional.cross_entropy(model(X), Y)
            loss.backward()
            optimizer.step()
        finals.append((picture_of(model), surroundings()))
    (without, around), (observing, around_observing) = finals
    assert_same_picture(around, around_observing)
    assert_same_picture(without, observing)


class Module(L.LightningModule):
    """Trains, validates, and shows how the network was after each."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = net
        self.automatic_optimization = False  # what these networks do to gradients would stop a Trainer

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.net(batch[0])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def run(kind: str, stage: str, callbacks: list[L.Callback]) -> tuple[dict[str, Any], dict[str, Any]]:
    torch.set_default_dtype(torch.float32)  # one of them sets another
    model = Module(build(kind))
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    trainer = L.Trainer(
        max_epochs=1, callbacks=callbacks, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu", num_sanity_val_steps=0,
    )  # fmt: skip
    data = DataLoader(TensorDataset(X, Y), batch_size=5)
    if stage == "fit":
        trainer.fit(model, data, data)
    else:
        trainer.validate(model, data, verbose=False)
    return picture_of(model.net), surroundings()


MONITOR: dict[str, Any] = {"layers": "net.inner", "figures": False, "n_steps": 2}


@quiet
@pytest.mark.parametrize("kind", list(STATEFUL))
@pytest.mark.parametrize(
    ("stage", "callback"),
    [("validate", lambda: ConductanceMonitor(**MONITOR)), ("fit", lambda: YDropCallback(annealing_epochs=9))],
    ids=["monitor", "callback"],
)
def test_a_trainer_leaves_what_it_leaves_without_us(kind: str, stage: str, callback: Callable[[], L.Callback]) -> None:
    without, with_us = run(kind, stage, []), run(kind, stage, [callback()])
    assert_same_picture(without[1], with_us[1])
    assert_same_picture(without[0], with_us[0])


@pytest.mark.filterwarnings("ignore:.*one mask passes at a time:UserWarning")  # one normalises by the batch
@quiet
@pytest.mark.filterwarnings("ignore:DropoutDistillation was given")
@pytest.mark.parametrize("kind", [kind for kind in STATEFUL if kind != "AttributesOfParameters"])  # torch copies none
def test_a_teacher_is_as_it_was_after_a_step(kind: str) -> None:
    try:
        distillation = DropoutDistillation(build(kind), student=nn.Linear(6, 3), num_masks=2)
    except Exception as error:  # torch can't copy some modules
        pytest.skip(f"{type(error).__name__}: {error}")
    teacher = distillation.teacher
    distillation.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    before = picture_of(teacher)
    distillation.training_step((X, Y), 0)
    assert_same_picture(before, picture_of(teacher))
