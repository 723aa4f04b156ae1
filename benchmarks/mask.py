"""What a layer costs by itself, forward and backward: ConductanceDropout and Jumpout against torch's dropout.

A ratio above 1 says that ours is slower. Also the bytes that each keeps for the backward pass, per element.
"""

from collections.abc import Callable, Sequence

import torch
from jsonargparse import auto_cli
from torch import Tensor, nn

from benchmarks.measuring import interleaved, quartiles, ratios
from benchmarks.report import write_report
from lightning_ydrop import ConductanceDropout, Jumpout

SHAPES = ((64, 1024), (64, 4096), (1024, 1024), (4096, 4096), (32, 256, 28, 28))
Step = Callable[[], None]


def main(
    device: str = "cpu", threads: int = 1, rounds: int = 30, shapes: Sequence[Sequence[int]] = SHAPES, seed: int = 0
) -> None:
    """Measure every shape, eager and compiled.

    Args:
        device: Where.
        threads: Of the CPU.
        rounds: How often each alternative is timed.
        shapes: Of the activations.
        seed: Of activations and rates.

    """
    settings = dict(locals())
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    where = torch.device(device)
    rows = []
    for shape in shapes:
        for elementwise in (True, False) if len(shape) > 2 else (True,):
            plain = nn.Dropout(0.5) if elementwise else nn.Dropout2d(0.5)
            driven = ConductanceDropout(0.5, elementwise=elementwise).to(where)
            driven.update(torch.rand(shape[1], device=where) / 2, elasticity=0.5, initial_drop_prob=0.35)
            ours = {"driven": driven, "jumpout": Jumpout(granularity="element" if elementwise else "channel")}
            x = torch.randn(*shape, device=where).relu().requires_grad_()
            modules: dict[str, Callable[[Tensor], Tensor]] = {"plain": plain, **ours}
            compiled = {f"compiled {name}": torch.compile(module, dynamic=False) for name, module in modules.items()}
            steps = {name: forward_and_backward(module, x) for name, module in (modules | compiled).items()}
            seconds = interleaved(steps, rounds=rounds, device=where)
            rows += [
                {
                    "shape": tuple(shape),
                    "layer": type(layer).__name__,
                    "against": type(plain).__name__,
                    "eager": ratios(seconds, "plain")[name],
                    "eager quartiles": quartiles(seconds, name, "plain"),
                    "compiled": ratios(seconds, "compiled plain")[f"compiled {name}"],
                    "compiled quartiles": quartiles(seconds, f"compiled {name}", "compiled plain"),
                    "bytes kept": bytes_kept(layer, x) / x.numel(),
                    "bytes kept by torch": bytes_kept(plain, x) / x.numel(),
                }
                for name, layer in ours.items()
            ]
    write_report("mask", where, settings, rows)


def forward_and_backward(module: Callable[[Tensor], Tensor], x: Tensor) -> Step:
    """Make a step of one layer, forward and backward."""
    gradient = torch.randn_like(x)

    def step() -> None:
        x.grad = None
        module(x).backward(gradient)

    return step


def bytes_kept(module: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """Count the bytes that wait for the backward pass."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.numel() * tensor.itemsize
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module(x)
    return sum(kept.values())


if __name__ == "__main__":
    auto_cli(main)
