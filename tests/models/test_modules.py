import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from lightning_ydrop import ConductanceDropout, YDrop, layer_conductance
from lightning_ydrop.models.modules import (
    all_modules,
    device_of,
    evaluation_mode,
    has_compiled_parts,
    is_training,
    kind_of,
    named_modules,
    overrides_train,
    set_training,
)
from tests.models.stateful import STATEFUL, build

X, Y = torch.randn(10, 6, generator=torch.Generator().manual_seed(1)), torch.arange(10) % 3


class Overriding(nn.Module):
    def eval(self) -> "Overriding":
        return super().eval()


class Minding(nn.Module):
    heard: ClassVar[list[Any]] = []

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        self.heard.append((name, value))


class LightningModule(nn.Module):
    """Named as Lightning's."""


class Mine(LightningModule):
    pass


def scripted() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(nn.Sequential(nn.Linear(2, 2)))


def test_kinds_of_classes() -> None:
    assert kind_of(ConductanceDropout()).ours
    assert kind_of(nn.Linear(1, 1)).of_torch
    assert kind_of(Mine()).logs
    assert kind_of(Overriding()).overrides_train
    assert kind_of(Minding()).minds_attributes
    assert kind_of(scripted()).script
    plain = kind_of(nn.Linear(1, 1))
    assert list(plain) == [name == "of_torch" for name in plain._fields]


@pytest.mark.parametrize("name", ["train", "eval"])
def test_an_instance_may_override_too(name: str) -> None:
    module = nn.Linear(1, 1)
    assert not overrides_train(module)
    setattr(module, name, lambda mode=True: module)
    assert overrides_train(module)


def test_flags_are_set_for_a_module_alone_and_heard_of() -> None:
    inner = nn.Linear(1, 1)
    for outer in (nn.Sequential(inner), Minding()):
        outer.inner = inner
        Minding.heard.clear()
        with evaluation_mode([outer]):
            assert not outer.training
            assert inner.training
        assert outer.training
    assert Minding.heard == [("training", False), ("training", True)]


def test_modules_that_were_in_evaluation_stay_there() -> None:
    one, other = nn.Linear(1, 1), nn.Linear(1, 1).eval()
    with evaluation_mode([one, other]):
        assert not one.training
    assert one.training
    assert not other.training


def test_a_frozen_script_has_no_mode() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        frozen: Any = torch.jit.freeze(torch.jit.script(nn.Sequential(nn.Linear(2, 2)).eval()))
    assert not is_training(frozen)
    with evaluation_mode([frozen]):
        pass
    script = scripted()
    set_training(script, False)
    assert not is_training(script)
    assert is_training(script[0])


def test_modules_are_listed_by_names_without_compilation() -> None:
    torch._dynamo.reset()
    inner: Any = torch.compile(nn.Sequential(nn.Linear(2, 2)), backend="eager")
    model = nn.Sequential(inner)
    assert set(named_modules(model)) == {"", "0", "0._orig_mod", "0.0"}
    assert has_compiled_parts(model)
    assert not has_compiled_parts(nn.Sequential(nn.Linear(2, 2)))
    assert {id(module) for module in all_modules(model)} == {id(module) for module in model.modules()}


def test_a_model_without_parameters_is_on_the_cpu() -> None:
    assert device_of(nn.ReLU()) == torch.device("cpu")
    assert device_of(nn.Linear(1, 1, device="meta")) == torch.device("meta")


# The state that `model.eval()` gives.


@pytest.mark.parametrize(
    "kind",
    ["Expanded", "EmptiesItsCache", "FrozenNorm", "TrainReplacedOnInstance", "LoraThatMerges", "BatchNormInList"],
)
def test_scores_are_those_of_a_model_that_its_user_has_put_in_evaluation(kind: str) -> None:
    expected = layer_conductance(build(kind).eval(), X, Y, n_steps=3)["drop"]
    model = build(kind)
    for _ in range(2):
        assert torch.allclose(layer_conductance(model, X, Y, n_steps=3)["drop"], expected, atol=1e-6)
    with torch.no_grad():
        for parameter in model.parameters():  # training goes on
            parameter.neg_()
    twin = build(kind)
    twin.load_state_dict(model.state_dict())
    expected = layer_conductance(twin.eval(), X, Y, n_steps=3)["drop"]
    assert torch.allclose(layer_conductance(model, X, Y, n_steps=3)["drop"], expected, atol=1e-6)


def test_a_train_that_was_switched_off_keeps_a_module_in_its_mode() -> None:
    modes: list[bool] = []
    model = build("TrainReplacedOnInstance")
    part: Any = model.part
    part.norm.register_forward_hook(lambda module, *_: modes.append(module.training))
    model.eval()(X)
    model.train()
    layer_conductance(model, X, Y, n_steps=3)
    assert set(modes) == {True}


def test_an_eval_that_raises_is_passed_over() -> None:
    class Stubborn(nn.Linear):
        def train(self, mode: bool = True) -> "Stubborn":
            raise AssertionError

    model = nn.Sequential(Stubborn(6, 8), nn.BatchNorm1d(8), ConductanceDropout(), nn.Linear(8, 3))
    model.register_forward_pre_hook(lambda module, _: modes.append(any(each.training for each in module.modules())))
    modes: list[bool] = []
    layer_conductance(model, X, Y, n_steps=3)
    assert modes == [False]
    assert all(module.training for module in model.modules())


# Hooks of backward passes.


class Hooked(nn.Module):
    """Registers a hook of some kind in its forward."""

    head: nn.Linear

    def __init__(self, register: Callable[[nn.Linear, Tensor, Any], Any], tell: Any) -> None:
        super().__init__()
        self.linear, self.drop, self.head = nn.Linear(6, 8), ConductanceDropout(), nn.Linear(8, 3)
        self.register, self.tell = register, tell

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.drop(self.linear(x))
        self.register(self.head, hidden, self.tell)
        logits: Tensor = self.head(hidden)
        return logits


HOOKS: dict[str, Callable[[nn.Linear, Tensor, Any], Any]] = {
    "full": lambda module, tensor, tell: module.register_full_backward_hook(tell),
    "full pre": lambda module, tensor, tell: module.register_full_backward_pre_hook(tell),
    "tensor": lambda module, tensor, tell: tensor.requires_grad and tensor.register_hook(tell),
    "several": lambda module, tensor, tell: torch.autograd.graph.register_multi_grad_hook((tensor,), tell),
    "any": lambda module, tensor, tell: torch.autograd.graph.register_multi_grad_hook((tensor,), tell, mode="any"),
    "parameter": lambda module, tensor, tell: module.weight.requires_grad and module.weight.register_hook(tell),
    "accumulated": lambda module, tensor, tell: (
        module.weight.requires_grad and module.weight.register_post_accumulate_grad_hook(tell)
    ),
}


@pytest.mark.parametrize("kind", list(HOOKS))
@pytest.mark.parametrize("way", ["step", "function"])
def test_hooks_of_a_forward_do_not_fire(kind: str, way: str) -> None:
    fired: list[int] = []

    def tell(*args: Any) -> None:
        fired.append(1)

    model = Hooked(HOOKS[kind], tell)
    if way == "function":
        layer_conductance(model, X, Y, n_steps=3)
    else:
        ydrop = YDrop(model)
        ydrop.step(X, Y)
        ydrop.step(X, Y)
    assert fired == []
    assert not model.head._backward_hooks
    assert not model.head._backward_pre_hooks
    weight: Any = model.head.weight
    assert not weight._backward_hooks
    assert not getattr(weight, "_post_accumulate_grad_hooks", None)
    nn.functional.cross_entropy(model(X), Y).backward()
    assert fired


@pytest.mark.parametrize("way", ["step", "function"])
def test_hooks_that_were_there_do_not_fire(way: str) -> None:
    fired: list[int] = []

    def tell(*args: Any) -> None:
        fired.append(1)

    first, last = nn.Linear(6, 8), nn.Linear(8, 3)
    model = nn.Sequential(first, ConductanceDropout(), nn.ReLU(), last)
    handles: list[Any] = [
        last.register_full_backward_hook(tell),
        last.register_full_backward_pre_hook(tell),
        last.weight.register_hook(tell),
        first.weight.register_post_accumulate_grad_hook(tell),
        nn.modules.module.register_module_full_backward_hook(tell),
        nn.modules.module.register_module_full_backward_pre_hook(tell),
    ]
    try:
        if way == "function":
            layer_conductance(model, X, Y, n_steps=3)
        else:
            ydrop = YDrop(model)
            ydrop.step(X, Y)
            ydrop.step(X, Y)
        assert fired == []
        nn.functional.cross_entropy(model(X.clone().requires_grad_()), Y).backward()
        assert len(fired) >= 6
    finally:
        for handle in handles:
            handle.remove()


def test_every_kind_of_state_is_built() -> None:
    assert len(STATEFUL) > 60
