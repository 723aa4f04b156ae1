import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_ydrop import ConductanceDropout, ConfigurationError, YDrop
from lightning_ydrop.importance import compiled
from tests.importance.test_compiled import Scaled, X, Y
from tests.networks import perceptron


@pytest.fixture(autouse=True)
def _replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the recorded graph run as it is: all but the compiler, which takes seconds."""
    monkeypatch.setattr(compiled, "compiled_graph", lambda graph, tensors: graph)


def by_value(model: Scaled, x: Tensor) -> Any:
    return 1.0 if x.sum() > 0 else 2.0


def by_chance(model: Scaled, x: Tensor) -> Any:
    return torch.rand(())


def by_tensor(model: Scaled, x: Tensor) -> Any:
    return model.tensor


def by_numpy(model: Scaled, x: Tensor) -> Any:
    return float(x.detach().numpy().std())


def by_values_of_an_attribute(model: Scaled, x: Tensor) -> Any:
    return model.tensor.item()


def by_values_of_a_buffer(model: Any, x: Tensor) -> Any:
    return 1.0 + float(model.count.numpy())


def by_rows_chosen(model: Scaled, x: Tensor) -> Any:
    return 1.0 + x[x[:, 0] > 0].square().sum()


def by_pythons_chance(model: Scaled, x: Tensor) -> Any:
    return random.random()


def by_iterator(model: Scaled, x: Tensor) -> Any:
    return next(model.numbers)


def by_many(model: Scaled, x: Tensor) -> Any:
    return len(model.many)


def by_writing_to_data(model: Any, x: Tensor) -> Any:
    model.count.data.add_(1)
    return 1.0


def by_writing(model: Any, x: Tensor) -> Any:
    return model.count.add_(1)


def by_replacing_data(model: Any, x: Tensor) -> Any:
    """As the max-norm layers of EEGNet do."""
    weight = model.body[0].weight
    weight.data = torch.renorm(weight.data, p=2, dim=0, maxnorm=100.0)
    return 1.0


def by_checkpoint(model: Scaled, x: Tensor) -> Any:
    return checkpoint(model.body, x, use_reentrant=False)


def by_trainer(model: Any, x: Tensor) -> Any:
    model.trainer = None
    return 1.0 if model.trainer is None else 2.0


@pytest.mark.parametrize(
    ("scale", "reason"),
    [
        (by_value, "its operations could not be recorded"),
        (by_chance, "forward draws random numbers"),
        (by_tensor, "forward reads a tensor that is no argument, parameter or buffer"),
        (by_numpy, "forward looks at values of tensors"),
        (by_values_of_an_attribute, "forward looks at values of tensors"),
        (by_values_of_a_buffer, "forward looks at values of tensors"),
        (by_rows_chosen, "forward makes tensors whose shapes depend on values"),
        (by_pythons_chance, "forward draws random numbers"),
        (by_iterator, "forward reads count, which does not show what it gives next"),
        (by_many, "the attributes that forward reads hold more than 1000 objects"),
        (by_writing_to_data, "forward writes to parameters or buffers"),
        (by_writing, "forward writes to parameters or buffers"),
        (by_replacing_data, "forward writes to parameters or buffers"),
        (by_checkpoint, "it checkpoints activations"),
        (by_trainer, "forward reads the Trainer"),
    ],
)
@pytest.mark.filterwarnings("ignore:The outputs of Scaled", "ignore:Phase 1 raised", "ignore:In phase 1")
def test_a_model_that_can_not_be_compiled_is_refused_in_the_dry_run(
    scale: Callable[[Scaled, Tensor], Any], reason: str
) -> None:
    with pytest.raises(ConfigurationError, match=f"YDrop.compile_phase1=True. was given, but .* {reason}"):
        YDrop(Scaled(scale), compile_phase1=True).dry_run(X, Y)


def by_constants(model: Scaled, x: Tensor) -> Any:
    return torch.tensor(model.factor).item() + len(torch.ones(3).tolist())


def test_a_module_with_an_eval_of_its_own_is_refused() -> None:
    """It may merge weights, as LoRA does, or swap them for averaged ones."""

    class Merging(nn.Linear):
        def train(self, mode: bool = True) -> "Merging":
            return super().train(mode)

    model = nn.Sequential(Merging(12, 16), *perceptron()[1:])
    with pytest.raises(ConfigurationError, match=r"train\(\) or eval\(\) of Merging is its own"):
        YDrop(model, compile_phase1=True).step(X, Y)


@pytest.mark.filterwarnings("ignore:All units of")
def test_a_deep_network_is_none_that_holds_too_much() -> None:
    layers = [nn.Conv2d(2, 2, 3, padding=1) for _ in range(115)]
    model = nn.Sequential(*layers, ConductanceDropout(), nn.Flatten(), nn.Linear(8, 5))
    YDrop(model, compile_phase1=True).step(torch.randn(8, 2, 2, 2), Y[:8])


def test_a_forward_may_look_at_constants() -> None:
    engine = YDrop(Scaled(by_constants), compile_phase1=True)
    engine.step(X, Y)
    assert engine.findings is not None
    assert engine.findings.plan.compiled is not None


def test_what_takes_more_than_one_pass_is_refused() -> None:
    with pytest.raises(ConfigurationError) as raised:
        YDrop(perceptron(), num_samples="all", compile_phase1=True).step(X, Y)
    assert str(raised.value) == (
        "YDrop(compile_phase1=True) was given, but phase 1 of Sequential can't be compiled: "
        "its rows take more than one pass: choose a smaller num_samples. "
        "Compilation takes a forward that runs the same operations on each batch, and computes them from its "
        "arguments, parameters, buffers and attributes that don't change. "
        "Change what the reason names, or leave out compile_phase1: the scores are the same."
    )
