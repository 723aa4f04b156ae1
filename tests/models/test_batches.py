from typing import Any

import pytest
import torch
from torch import nn

from lightning_ydrop import Adapter, ConfigurationError, KeyAdapter
from lightning_ydrop.models.adapters import AutomaticAdapter
from lightning_ydrop.models.batches import own_method, read_batch

X, Y = torch.randn(4, 3), torch.arange(4)


class Reading(nn.Module):
    def ydrop_inputs(self, batch: Any) -> Any:
        return batch["image"].float(), batch["label"]


class Dividing(Adapter):
    def __init__(self, by: float) -> None:
        self.by = by

    def read(self, batch: Any) -> Any:
        return batch[0] / batch[2], batch[1]


def test_the_models_own_method_comes_first() -> None:
    inputs, target = read_batch(Reading(), KeyAdapter("nothing"), {"image": X, "label": Y})
    assert torch.equal(inputs, X)
    assert target is Y
    assert read_batch(nn.Identity(), AutomaticAdapter(), [X, Y]) == (X, Y)


@pytest.mark.parametrize(
    ("model", "adapter", "batch", "kind", "called"),
    [
        (Reading(), AutomaticAdapter(), {"image": X}, KeyError, "Reading.ydrop_inputs with the batch dict('image': "),
        (Reading(), AutomaticAdapter(), 3, TypeError, "Reading.ydrop_inputs with the batch 3."),
        (nn.Identity(), Dividing(2.0), (X, Y), IndexError, "Dividing(by=2.0).read with the batch tuple(Tensor(shape="),
    ],
)
def test_what_reading_raises_has_a_note(model: nn.Module, adapter: Adapter, batch: Any, kind: Any, called: str) -> None:
    with pytest.raises(kind) as caught:
        read_batch(model, adapter, batch)
    (note,) = caught.value.__notes__
    assert note.startswith(f"lightning_ydrop called {called}")
    assert "`ydrop_inputs(batch)`" in note
    assert "returns (inputs, target)" in note


@pytest.mark.parametrize(
    "returned", [X, None, (X,), (X, Y, Y), {"x": X, "y": Y}, "xy"], ids=lambda each: str(type(each))
)
def test_what_is_no_pair_is_refused_without_a_note(returned: Any) -> None:
    class Wrong(nn.Module):
        def ydrop_inputs(self, batch: Any) -> Any:
            return returned

    with pytest.raises(ConfigurationError, match=r"Wrong\.ydrop_inputs returned .*\(inputs, target\)") as caught:
        read_batch(Wrong(), AutomaticAdapter(), (X, Y))
    assert not hasattr(caught.value, "__notes__")


def test_an_adapters_own_error_has_no_note() -> None:
    with pytest.raises(ConfigurationError, match="It reads a batch with something at 'labels'") as caught:
        read_batch(nn.Identity(), KeyAdapter("x"), {"x": X})
    assert not hasattr(caught.value, "__notes__")


def test_an_attribute_that_is_no_method_is_refused() -> None:
    model = nn.Identity()
    assert own_method(model, "ydrop_inputs") is None
    model.ydrop_inputs = 3  # type: ignore[assignment]
    with pytest.raises(ConfigurationError, match=r"Identity\.ydrop_inputs is 3\."):
        own_method(model, "ydrop_inputs")
