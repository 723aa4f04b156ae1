"""Slow loops, written from the papers' equations alone: they know nothing of the package."""

import torch
from torch import Tensor, nn


def conductance_of_one_sample(
    model: nn.Module, layer: nn.Module, x: Tensor, target: int | None, baseline: Tensor, n_steps: int
) -> Tensor:
    """Eq. 2 of arXiv 2409.09088, one point of the path at a time: the layer's output shape, float64."""
    total = None
    previous = None
    for i in range(n_steps + 1):
        point = baseline + i / n_steps * (x - baseline)
        activation, gradient = _activation_and_gradient(model, layer, point, target)
        if previous is not None:
            term = gradient * (activation - previous)
            total = term if total is None else total + term
        previous = activation
    assert total is not None
    return total


def conductance_through_a_neuron(
    model: nn.Module, layer: nn.Module, place: tuple[int, ...], x: Tensor, target: int, baseline: Tensor, n_steps: int
) -> Tensor:
    """Eq. 2 of arXiv 1805.12233 for one sample, one feature and one point of the path at a time: the shape of x.

    `place` is the neuron's index in the layer's output for one sample. The derivative of the neuron with respect to
    each feature is a difference quotient.
    """
    total = torch.zeros_like(x)
    for i in range(1, n_steps + 1):
        point = baseline + i / n_steps * (x - baseline)
        _, gradient = _activation_and_gradient(model, layer, point, target)
        for feature in range(x.numel()):
            step = torch.zeros_like(x)
            step.view(-1)[feature] = 1e-6
            above, below = (_activation_and_gradient(model, layer, point + s * step, target)[0] for s in (1, -1))
            slope = (above - below)[place] / 2e-6
            change = (x - baseline).view(-1)[feature] / n_steps
            total.view(-1)[feature] += change * gradient[place] * slope
    return total


def _activation_and_gradient(
    model: nn.Module, layer: nn.Module, point: Tensor, target: int | None
) -> tuple[Tensor, Tensor]:
    kept = []

    def keep(module: nn.Module, args: object, output: Tensor) -> Tensor:
        leaf = output.detach().requires_grad_()
        kept.append(leaf)
        return leaf.clone()

    handle = layer.register_forward_hook(keep)
    output = model(point.unsqueeze(0))[0]
    handle.remove()
    value = output.sum() if target is None else output[target]
    (gradient,) = torch.autograd.grad(value, kept)
    return kept[0][0].detach().double(), gradient[0].double()


def running_mean(rates: list[float], initial: float, elasticity: float) -> float:
    """Eq. 6 of arXiv 2409.09088 in float64."""
    mean = initial
    for rate in rates:
        mean = (1 - elasticity) * mean + elasticity * rate
    return mean
