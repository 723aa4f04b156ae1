"""Measures that experiments compare with conductance."""

import pytest
import torch
from torch import nn

from experiments.measures import ActivationMagnitude, DeepLift, GradientTimesActivation, InternalInfluence
from lightning_ydrop import ConductanceDropout, YDrop


@pytest.fixture
def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), ConductanceDropout(0.5), nn.Tanh(), nn.Linear(6, 3))


def slow(network: nn.Sequential, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The activations of the layer, and the gradient of the labelled logit with respect to them."""
    activation = network[0](x).detach().requires_grad_()
    logits = network[3](network[2](activation))
    (gradient,) = torch.autograd.grad(logits.gather(1, y[:, None]).sum(), activation)
    return activation.detach(), gradient


def test_each_is_what_its_name_says(network: nn.Sequential) -> None:
    x, y = torch.randn(16, 4), torch.randint(3, (16,))
    activation, gradient = slow(network, x, y)
    start, _ = slow(network, torch.zeros_like(x), y)
    path = [slow(network, x * share, y)[1] for share in torch.linspace(0, 1, 2001)]
    influence = sum(path[1:-1], (path[0] + path[-1]) / 2) / 2000
    # Captum weighs n points with 1 / n and half of it at the ends, which is 1 - 1 / n in total.
    influence = influence * (1 - 1 / 500)
    # The rescale rule on Linear, Tanh, Linear: the slope of tanh between the two ends, times the change.
    slopes = (activation.tanh() - start.tanh()) / (activation - start)
    last = network[3]
    assert isinstance(last, nn.Linear)
    expected = {
        ActivationMagnitude: activation.abs(),
        GradientTimesActivation: activation * gradient,
        InternalInfluence: influence,
        DeepLift: (activation - start) * slopes * last.weight[y],
    }
    for measure, scores in expected.items():
        engine = YDrop(network, measure=measure(), num_samples="all", n_steps=500)
        engine.step(x, y)
        assert torch.allclose(engine.scores["1"], scores.mean(0), atol=5e-4), measure
