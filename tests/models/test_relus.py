import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_ydrop import ConductanceDropout, YDrop
from lightning_ydrop.models.relus import keep_inputs, seeing_relus
from lightning_ydrop.models.state import leaving_no_trace
from lightning_ydrop.torch_internals import memory_of


class Relus(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(4, 6), nn.Linear(6, 3)
        self.drop = ConductanceDropout()
        self.right, self.later, self.both, self.inplace = nn.ReLU(), nn.ReLU(), nn.ReLU(), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        dropped = self.drop(self.layer(x))
        hidden = (
            self.right(dropped) + self.both(dropped) + self.both(self.later(dropped + 1)) + self.inplace(x + 1)[:, :1]
        )
        logits: Tensor = self.head(hidden)
        return logits


def test_relus_that_take_what_a_layer_put_out_are_seen() -> None:
    model, recorded = Relus().eval(), dict[str, list[Tensor]]()
    model.drop.register_forward_hook(lambda module, args, output: recorded.setdefault("drop", []).append(output))
    with seeing_relus(model, recorded) as after:
        model(torch.randn(5, 4))
    assert after == [model.right]
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_forward_that_the_user_has_set_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 6), ConductanceDropout(), nn.ReLU(), nn.Linear(6, 3))
    forward: Callable[[Any], Any] = lambda x: F.relu(x) * 2  # noqa: E731
    model[2].forward = forward
    YDrop(model).step(torch.randn(10, 4), torch.zeros(10, dtype=torch.long))
    assert model[2].__dict__["forward"] is forward


class Overwriting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.drop, self.relu = nn.Linear(4, 6), ConductanceDropout(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        dropped = self.drop(self.layer(x))
        hidden: Tensor = self.relu(dropped)
        return hidden + dropped.add_(1)


def test_a_relu_whose_input_is_written_over_keeps_its_output() -> None:
    engine = YDrop(Overwriting())
    engine.step(torch.randn(10, 4), torch.zeros(10, dtype=torch.long))
    assert engine.findings is not None
    assert not engine.findings.plan.relus


def of_another_class(relu: nn.Module) -> None:
    relu.__class__ = nn.Sigmoid


def with_a_forward(relu: nn.Module) -> None:
    relu.forward = torch.sigmoid


def test_a_module_that_is_no_plain_relu_any_more_is_left_alone() -> None:
    for change in (of_another_class, with_a_forward, lambda relu: setattr(relu, "inplace", True)):
        relu = nn.ReLU()
        change(relu)
        before = relu.__dict__.copy()
        keep_inputs([relu])
        assert relu.__dict__ == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_values_and_gradients_are_those_of_relu(dtype: torch.dtype) -> None:
    relu = nn.ReLU()
    x = torch.tensor([-1.0, -0.0, 0.0, 2.0, math.nan, math.inf, -math.inf], dtype=dtype, requires_grad=True)
    slope = torch.arange(1.0, 8.0).to(dtype)
    expected = relu(x)
    (slope_expected,) = torch.autograd.grad(expected, x, slope)
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(memory_of(tensor))
        return tensor

    with leaving_no_trace([relu]), torch.autograd.graph.saved_tensors_hooks(pack, lambda each: each):
        keep_inputs([relu])
        given = relu(x)
        (slope_given,) = torch.autograd.grad(given, x, slope)
    assert kept == [memory_of(x)]
    assert torch.equal(given.nan_to_num(9), expected.nan_to_num(9))
    assert torch.equal(slope_given, slope_expected)
    assert "forward" not in relu.__dict__


def test_phase_1_leaves_no_trace_in_such_a_relu() -> None:
    model = nn.Sequential(nn.Linear(4, 6), ConductanceDropout(), nn.ReLU(), nn.Linear(6, 3))
    x, y = torch.randn(10, 4), torch.zeros(10, dtype=torch.long)
    ydrop = YDrop(model)
    ydrop.step(x, y)
    assert ydrop.findings is not None
    assert ydrop.findings.plan.relus == (model[2],)
    assert "forward" not in model[2].__dict__
