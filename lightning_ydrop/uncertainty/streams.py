"""Masks from a seed: torch's random streams are set for a while, and given back."""

import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_ydrop.errors import ConfigurationError, describe
from lightning_ydrop.layers.kinds import drops

# As many seeds as torch's generators tell apart on every device.
MOST_SEEDS = 2**63 - 1


def check_generator(owner: str, generator: object) -> None:
    """Refuse what is neither a torch.Generator nor None.

    Raises:
        ConfigurationError: If it is not.

    """
    if not (generator is None or isinstance(generator, torch.Generator)):
        raise ConfigurationError(
            f"{owner}(generator={describe(generator)}) was given.",
            "`generator` is a torch.Generator, or None for torch's own random stream.",
            "Pass, for example, generator=torch.Generator().manual_seed(0).",
        )


def draw_seed(generator: torch.Generator | None) -> int:
    """Draw a seed from a generator, or from torch's own stream on the CPU, which moves on by one number."""
    device = torch.device("cpu") if generator is None else generator.device
    return int(torch.randint(MOST_SEEDS, (), generator=generator, device=device))


def devices_of(model: nn.Module, tensors: Iterable[Tensor]) -> list[torch.device]:
    """List the accelerators that a model and its inputs are on: layers draw from the stream of their device."""
    held = chain(model.parameters(), model.buffers(), tensors)
    return list(dict.fromkeys(each.device for each in held if each.device.type not in ("cpu", "meta")))


@contextmanager
def seeded(seed: int, accelerators: Sequence[torch.device]) -> Iterator[None]:
    """Set torch's random streams of the CPU and of some accelerators, and give them back."""
    former = torch.get_rng_state(), [_state(device) for device in accelerators]
    try:
        torch.default_generator.manual_seed(seed)
        for device in accelerators:
            _seed(device, seed)
        yield
    finally:
        torch.set_rng_state(former[0])
        for device, state in zip(accelerators, former[1], strict=True):
            _set_state(device, state)


@contextmanager
def seeds_obeyed(model: nn.Module, accelerators: Sequence[torch.device]) -> Iterator[None]:
    """Keep recurrent layers that drop off cuDNN, whose dropout goes on with a state of its own after a new seed."""
    on_cuda = any(device.type == "cuda" for device in accelerators)
    former: bool = torch.backends.cudnn.enabled
    if on_cuda and any(isinstance(module, nn.RNNBase) and drops(module) for module in model.modules()):
        torch.backends.cudnn.enabled = False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = former


def warn_of_equal_ranks(owner: str, remedy: str) -> None:
    """Warn where all ranks of a distributed run draw the same masks, because Lightning has given them one seed.

    It compares nothing between ranks, which need not all come here: `seed_everything` leaves its seed in the
    environment, where all ranks find it.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1 and dist.get_rank() == 0):
        return
    if os.environ.get("PL_GLOBAL_SEED") == str(torch.initial_seed()):
        warnings.warn(
            f"{owner} draws the same masks on all ranks: seed_everything gave each of them the seed "
            f"{torch.initial_seed()}. {remedy}",
            stacklevel=3,
        )


def _module(device: torch.device) -> Any:
    return getattr(torch, device.type)


def _state(device: torch.device) -> Any:
    return _module(device).get_rng_state(*_place(device))


def _set_state(device: torch.device, state: Any) -> None:
    _module(device).set_rng_state(state, *_place(device))


def _seed(device: torch.device, seed: int) -> None:
    if device.type == "mps":
        torch.mps.manual_seed(seed)
    else:
        with _module(device).device(device):
            _module(device).manual_seed(seed)


def _place(device: torch.device) -> tuple[torch.device, ...]:
    """Give the argument that names a device: there is one device of MPS, and its functions take none."""
    return () if device.type == "mps" else (device,)
