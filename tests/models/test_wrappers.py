import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.nn.parallel import DataParallel

from lightning_ydrop import YDrop, layer_conductance
from lightning_ydrop.models.wrappers import unwrapped
from tests.networks import perceptron

X, Y = torch.randn(6, 12, generator=torch.Generator().manual_seed(1)), torch.arange(6) % 5


def fabrics(model: nn.Module, precision: Any = "32-true") -> Any:
    return Fabric(accelerator="cpu", devices=1, precision=precision).setup(model)


@pytest.mark.parametrize(
    "wrap",
    [lambda model: model, DataParallel, lambda model: DataParallel(DataParallel(model))],
    ids=["plain", "parallel", "twice"],
)
def test_wrappers_are_taken_off(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = perceptron()
    assert unwrapped(wrap(model), None) == (model, model)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_fabrics_module_is_called_in_its_precision(precision: str) -> None:
    model = perceptron().eval()
    wrapped = fabrics(model, precision)
    inner, call = unwrapped(wrapped, None)
    assert inner is model
    assert torch.equal(call(X), wrapped(X))
    assert list(inspect.signature(call).parameters) == ["input"]


def test_a_compiled_one_of_fabrics_is_found() -> None:
    torch._dynamo.reset()
    model = perceptron()
    compiled: Any = torch.compile(fabrics(model), backend="eager")
    assert unwrapped(compiled, None)[0] is model


def test_what_the_user_calls_stays() -> None:
    model = perceptron()

    def forward(x: Tensor) -> Tensor:
        return model(x)

    assert unwrapped(DataParallel(model), forward) == (model, forward)
    wrapped = DataParallel(model)
    assert unwrapped(wrapped, wrapped) == (model, model)  # the wrapper itself is no other forward


def test_scores_of_a_wrapped_model_are_those_of_the_model() -> None:
    model = perceptron()
    expected = layer_conductance(model, X, Y, n_steps=3)
    for wrapped in (fabrics(model), DataParallel(model)):
        scores = layer_conductance(wrapped, X, Y, n_steps=3)
        assert scores.keys() == expected.keys()
        assert all(torch.equal(scores[name], expected[name]) for name in expected)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_an_engine_drives_fabrics_module_in_low_precision(precision: str) -> None:
    wrapped = fabrics(perceptron(), precision)
    ydrop = YDrop(wrapped)
    ydrop.step(X, Y)
    assert all(scores.isfinite().all() for scores in ydrop.scores.values())
    assert list(ydrop.scores) == ["1", "4"]
