"""Networks that call F.dropout instead of a layer, with `functional=True`."""

from typing import Any
from unittest.mock import patch

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_ydrop import ConfigurationError, DropoutDistillation, MonteCarloCallback, NoEffectWarning, monte_carlo

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


# Which calls drop is what a pass in training mode shows.


class Attention(nn.Module):
    """Attention that drops in training mode at a rate under an unusual name, or not at all."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.values, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.dropout, self.its_own = nn.Dropout(0.5), rate  # the first is for another use

    def forward(self, x: Tensor) -> Any:
        x = x[:, None] * torch.arange(1.0, 7)[:, None]
        p = self.its_own if self.training else 0.0
        return self.head(F.scaled_dot_product_attention(x, x, self.values(x), dropout_p=p).mean(1))


class Helped(nn.Module):
    """One helper makes all calls, of which the second never drops."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 16), nn.Linear(16, 3)

    def drop(self, x: Tensor, p: float, on: bool) -> Tensor:
        return F.dropout(x, p, on)

    def forward(self, x: Tensor) -> Any:
        x = self.drop(self.first(x), 0.2, self.training)
        return self.drop(self.second(x), 0.9, False)


class Conditional(Calls):
    """A call under a condition, and a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Any:
        x = self.drop(self.first(x).relu())
        if self.training:
            x = F.dropout(x, 0.5)
        return self.second(x)


def variance(model: nn.Module, num_samples: int = 3000) -> float:
    """The variance over passes in training mode."""
    with torch.no_grad():
        return float(torch.stack([model(X) for _ in range(num_samples)]).var(0).mean())


@pytest.mark.parametrize("model", [Attention(0.5), Calls(), Helped()], ids=lambda model: type(model).__name__)
def test_calls_drop_at_the_rates_of_training_mode(model: nn.Module) -> None:
    torch.manual_seed(0)
    found = monte_carlo(model, X, 3000, task="regression", functional=True).variance.mean()
    assert float(found) == pytest.approx(variance(model), rel=0.15)


def test_an_attention_that_never_drops_stays_as_it_is() -> None:
    model = nn.Sequential(Attention(0.0), nn.Dropout(0.1))
    torch.manual_seed(0)
    found = monte_carlo(model, X, 3000, task="regression", functional=True).variance.mean()
    assert float(found) == pytest.approx(variance(model), rel=0.15)


@pytest.mark.parametrize("callback", [False, True])
def test_calls_that_are_left_out_are_named(callback: bool) -> None:
    class Both(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.calls, self.drop = Calls(), nn.Dropout()

        def forward(self, x: Tensor) -> Any:
            return self.calls(self.drop(x))

    model = Both()
    owner = "MonteCarloCallback" if callback else "monte_carlo"
    trainer = L.Trainer(callbacks=[MonteCarloCallback(9)], accelerator="cpu", logger=False, enable_progress_bar=False)
    loader: Any = torch.utils.data.DataLoader(list(X), batch_size=2)  # type: ignore[arg-type]
    message = rf"{owner} leaves out.*F\.dropout \(.*{__name__.split('.')[-1]}\.py:\d+\)"
    with pytest.warns(NoEffectWarning, match=message) as said:
        trainer.predict(model, loader) if callback else monte_carlo(model, X, 9)
    assert len([each for each in said if issubclass(each.category, NoEffectWarning)]) == 1


def test_calls_under_a_condition_are_named() -> None:
    with pytest.warns(NoEffectWarning, match=r"does not reach .*F\.dropout \("):
        monte_carlo(Conditional(), X, 9, functional=True)


def test_a_model_that_fails_in_training_mode_drops_wherever_it_calls() -> None:
    class Fails(Calls):
        def forward(self, x: Tensor) -> Any:
            if self.training:
                raise RuntimeError("targets are needed")
            return super().forward(x)

    assert not torch.equal(average(Fails(), functional=True), average(Fails().eval(), functional=True))
    model = Fails()
    samples = monte_carlo(model, X, 5, functional=True, return_samples=True).samples
    assert samples is not None
    assert not torch.equal(samples[0], samples[1])
    assert model.training


def test_the_look_at_training_mode_leaves_no_trace() -> None:
    model = nn.Sequential(Calls(), nn.BatchNorm1d(3)).eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    monte_carlo(model, X, 5, functional=True)
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
