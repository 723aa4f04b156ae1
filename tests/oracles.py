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
