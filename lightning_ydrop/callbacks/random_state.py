"""The random state of a process, in a form that a checkpoint holds and torch loads safely."""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


def random_state(device: torch.device, generators: Sequence[torch.Generator] = ()) -> dict[str, Any]:
    """Give the state of Python's, NumPy's and torch's random numbers.

    Args:
        device: Where a network computes. The state of a CUDA device is added to that of the CPU.
        generators: Generators of torch, whose states are added.

    Returns:
        Numbers, tuples and tensors.

    """
    kind, keys, *others = np.random.get_state(legacy=True)  # noqa: NPY002
    return {
        "python": random.getstate(),
        "numpy": (str(kind), torch.tensor(np.asarray(keys).tolist()), *map(_plain, others)),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "generators": [each.get_state() for each in generators],
    }


def set_random_state(state: dict[str, Any], device: torch.device, generators: Sequence[torch.Generator] = ()) -> None:
    """Restore what `random_state` gave.

    Args:
        state: The state. A state of CUDA is left out where `device` is another.
        device: Where a network computes.
        generators: The generators, in the same order.

    """
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    kind, keys, *others = state["numpy"]
    np.random.set_state((kind, keys.cpu().numpy().astype(np.uint32), *others))  # noqa: NPY002
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
    for generator, each in zip(generators, state["generators"], strict=False):
        generator.set_state(each.cpu())


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value
