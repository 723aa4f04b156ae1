"""Networks that call F.dropout instead of a layer, with `functional=True`."""

from typing import Any
from unittest.mock import patch

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_ydrop import ConfigurationError, DropoutDistillation, MonteCarloCallback, monte_carlo

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


class Calls(nn.Module):
    """A perceptron with F.dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 16), nn.Linear(16, 3)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=2.0)

    def forward(self, x: Tensor) -> Any:
        return self.second(F.dropout(self.first(x).relu(), 0.5, self.training))


class Layers(Calls):
    """The same with nn.Dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Any:
        return self.second(self.drop(self.first(x).relu()))


class Nothing(Calls):
    """The same without dropout."""

    def forward(self, x: Tensor) -> Any:
        return self.second(self.first(x).relu())


def twins() -> tuple[Calls, Layers]:
    calls, layers = Calls(), Layers()
    layers.load_state_dict(calls.state_dict())
    return calls, layers


def average(model: nn.Module, **arguments: Any) -> Tensor:
    torch.manual_seed(1)
    return monte_carlo(model, X, num_samples=20, **arguments).probabilities


def test_calls_drop_as_layers_do() -> None:
    calls, layers = twins()
    calls.eval()
    assert torch.equal(average(calls, functional=True), average(layers))
    assert torch.equal(average(layers, functional=True), average(layers))
    assert torch.equal(calls(X), calls(X))
    assert not calls.training


def test_compiled_calls_drop_too() -> None:
    calls, _ = twins()
    compiled: Any = torch.compile(calls, backend="eager")
    compiled.eval()(X)
    assert torch.equal(average(compiled, functional=True), average(calls, functional=True))


def test_a_network_in_which_nothing_drops_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"has no layer that drops.*pass functional=True"):
        average(Calls())
    with pytest.raises(ConfigurationError, match="neither a layer nor a call drops"):
        average(Nothing(), functional=True)
    with pytest.raises(ConfigurationError, match="`functional` is True or False"):
        average(Calls(), functional="yes")
    with pytest.raises(ConfigurationError, match="has no layer that drops"):
        DropoutDistillation(Calls())
    with pytest.raises(ConfigurationError, match="neither a layer nor a call drops"):
        loss_of(DropoutDistillation(Nothing(), functional=True))


def loss_of(distillation: DropoutDistillation) -> Tensor:
    torch.manual_seed(2)
    with patch.object(distillation, "log"):
        return distillation.training_step([X], 0)


def test_a_teacher_s_calls_drop_and_its_student_s_do_not() -> None:
    calls, layers = twins()
    functional = DropoutDistillation(calls, num_masks=3, functional=True)
    assert functional.student.training
    assert torch.equal(loss_of(functional), loss_of(DropoutDistillation(layers, num_masks=3)))
    # A student of another class drops as it likes.
    other = DropoutDistillation(layers, student=calls.train(), num_masks=3, functional=True)
    assert not torch.equal(loss_of(other), loss_of(functional))


class CallsInATrainer(Calls, L.LightningModule):
    """The one that calls F.dropout, as a LightningModule."""


def test_a_trainer_predicts_with_calls_too() -> None:
    model = CallsInATrainer()

    def predict(**arguments: Any) -> Any:
        trainer = L.Trainer(
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_checkpointing=False,
            callbacks=[MonteCarloCallback(20, **arguments)],
        )
        (result,) = trainer.predict(model, torch.utils.data.DataLoader(X, batch_size=5)) or []  # type: ignore[arg-type]
        return result

    with pytest.raises(ConfigurationError, match="pass functional=True"):
        predict()
    assert predict(functional=True).mutual_information.min() > 0
