from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from lightning_ydrop import (
    ConductanceMonitor,
    ConfigurationError,
    IndexAdapter,
    KeyAdapter,
    NegativeLoss,
    OutputSum,
    PredictedLogit,
    YDropCallback,
)
from lightning_ydrop.analysis import mean_conductance
from lightning_ydrop.models.adapters import AutomaticAdapter
from lightning_ydrop.models.first_batch import check_labels_are_read, check_other_labels
from tests.callbacks.test_ydrop import trainer_of
from tests.networks import perceptron
from tests.test_bad_input import Batches, Net, check_sentences

X, Y = torch.randn(16, 12, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 5
UNKNOWN = {"img": X, "id": "a photo", "fine_label": Y}
SUGGESTED = 'adapter=KeyAdapter(inputs="img", target="fine_label"). Where there are none, pass objective=OutputSum().'


class Reading(nn.Identity):
    def ydrop_inputs(self, batch: Any) -> Any:
        return batch["img"], None


class Pair(NamedTuple):
    img: Tensor
    fine_label: Tensor


@dataclass
class Fields:
    img: Tensor
    weight: Tensor
    fine_label: Tensor


def check(batch: Any, model: nn.Module | None = None, adapter: Any = None, batch_dim: int = 0) -> None:
    model, adapter = model or nn.Identity(), adapter or AutomaticAdapter()
    reader = model.ydrop_inputs if isinstance(model, Reading) else adapter.read
    inputs, target = reader(batch)
    check_labels_are_read(model, adapter, batch, inputs, target, batch_dim)


@pytest.mark.parametrize("batch", [UNKNOWN, Pair(X, Y), Fields(X, torch.ones(16), Y)], ids=lambda each: type(each))
def test_labels_of_an_unknown_name_are_asked_for(batch: Any) -> None:
    with pytest.raises(ConfigurationError) as caught:
        check(batch)
    assert "knows the input 'img' and no target" in str(caught.value)
    assert str(caught.value).endswith(SUGGESTED)
    check_sentences(caught.value)


def test_the_samples_may_be_another_dimension() -> None:
    batch = {"img": torch.randn(7, 16, 3), "fine_label": Y}
    check(batch)
    with pytest.raises(ConfigurationError, match="knows the input 'img' and no target"):
        check(batch, batch_dim=1)


@pytest.mark.parametrize(
    ("batch", "model", "adapter"),
    [
        ({"img": X}, None, None),
        ({"img": X, "label": Y, "more": Y}, None, None),
        ({"img": X, "label": None, "more": Y}, None, None),
        ({"img": X, "ids": ["a"] * 16, "mean": torch.zeros(3), "epoch": torch.tensor(3)}, None, None),
        (UNKNOWN, None, KeyAdapter("img", None)),
        (UNKNOWN, Reading(), None),
        (X, None, None),
        ((X, Y, Y), None, None),
        ([X], None, None),
    ],
)
def test_nothing_is_asked_where_labels_are_known_or_none_can_be_meant(batch: Any, model: Any, adapter: Any) -> None:
    check(batch, model, adapter)


class OfMappings(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step((batch["img"], batch["fine_label"]), batch_idx)


class Validated(OfMappings):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Leave it to the monitor."""


def test_the_callback_asks_before_it_trains() -> None:
    model = OfMappings()
    with pytest.raises(ConfigurationError, match="knows the input 'img' and no target"):
        trainer_of(YDropCallback(annealing_epochs=0)).fit(model, Batches(UNKNOWN))
    assert model.training_steps == 0


@pytest.mark.parametrize(
    "settings",
    [
        {"objective": OutputSum()},
        {"objective": PredictedLogit()},
        {"adapter": KeyAdapter("img", "fine_label")},
        {"adapter": KeyAdapter("img", None)},
    ],
)
def test_the_callback_is_silent_where_somebody_has_said_what_to_measure(settings: Any) -> None:
    model = OfMappings()
    trainer_of(YDropCallback(annealing_epochs=0, **settings), max_epochs=1).fit(model, Batches(UNKNOWN))
    assert model.training_steps == 1


def test_the_monitor_and_means_ask_too() -> None:
    with pytest.raises(ConfigurationError, match="knows the input 'img' and no target"):
        trainer_of(ConductanceMonitor(figures=False)).validate(Validated(), Batches(UNKNOWN), verbose=False)
    trainer_of(ConductanceMonitor(figures=False, objective=OutputSum())).validate(
        Validated(), Batches(UNKNOWN), verbose=False
    )
    with pytest.raises(ConfigurationError, match="knows the input 'img' and no target"):
        mean_conductance(perceptron(), [UNKNOWN])
    mean_conductance(perceptron(), [UNKNOWN], objective=OutputSum())


# Tuples of more than two items


def always(labels: Tensor) -> bool:
    return True


def test_another_item_that_could_be_the_labels_is_told_of() -> None:
    batch = (X, Y, X, Y.int())
    with pytest.warns(
        UserWarning, match=r"takes item 1, the second, .*item 3 could be.* target=1\), or target=3\."
    ) as caught:
        check_other_labels(nn.Identity(), AutomaticAdapter(), batch, Y, always)
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("batch", "adapter", "may_be_labels"),
    [
        ((X, Y), AutomaticAdapter(), always),
        ((X, Y, Y), IndexAdapter(), always),
        ((X, Y, Y), AutomaticAdapter(), lambda labels: False),
        ((X, Y, Y.float()), AutomaticAdapter(), always),
        ((X, Y, Y > 2), AutomaticAdapter(), always),
        ((X, Y, Y[:, None]), AutomaticAdapter(), always),
        ((X, Y, "abc"), AutomaticAdapter(), always),
        ({"x": X, "y": Y}, AutomaticAdapter(), always),
    ],
)
def test_nothing_is_told_where_it_is_clear(batch: Any, adapter: Any, may_be_labels: Any) -> None:
    _, target = adapter.read(batch)
    check_other_labels(nn.Identity(), adapter, batch, target, may_be_labels)


class OfThree(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch[:2], batch_idx)


LOSS = NegativeLoss(nn.CrossEntropyLoss(reduction="none"))


@pytest.mark.parametrize(
    ("third", "settings", "warns"),
    [
        (Y.roll(1), {}, True),
        (torch.arange(16), {}, False),  # an index: it names no class
        (Y.roll(1), {"adapter": IndexAdapter()}, False),
        (Y.roll(1), {"objective": OutputSum()}, False),
        (Y.roll(1), {"objective": LOSS}, False),
    ],
)
def test_the_callback_tells_of_a_third_item_once(
    third: Tensor, settings: Any, warns: bool, recwarn: pytest.WarningsRecorder
) -> None:
    batches = Batches(*[(X, Y, third)] * 3)
    trainer_of(YDropCallback(annealing_epochs=0, **settings), max_epochs=1).fit(OfThree(), batches)
    assert sum("item 2 could be the labels too" in str(each.message) for each in recwarn) == warns
