"""Everything that a model holds, bit for bit: written without a look at how the package finds it."""

import random
from collections import deque
from types import FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_ydrop import ConductanceDropout

# What belongs to an engine, and what a Trainer sets.
NOT_OF_THE_MODEL = (ConductanceDropout,)
SET_BY_A_TRAINER = {"_trainer", "_current_fx_name", "_device", "_dtype", "_param_requires_grad_state", "driver"}


def picture_of(*things: object) -> dict[str, Any]:
    """Describe all that things hold by the path to it; objects are numbered, so that it shows which are the same."""
    picture: dict[str, Any] = {}
    numbers: dict[int, int] = {}
    alive: list[object] = []

    def look(path: str, value: Any) -> None:
        if isinstance(
            value, (bool, int, float, complex, str, bytes, type(None), torch.device, torch.dtype, torch.Size)
        ):
            picture[path] = value
            return
        if id(value) in numbers:
            picture[path] = f"number {numbers[id(value)]}"
            return
        numbers[id(value)] = len(numbers)
        alive.append(value)
        picture[path] = f"number {numbers[id(value)]}, a {type(value).__name__}"
        if isinstance(value, Tensor):
            picture[f"{path}:tensor"] = _tensor(value)
            look(f"{path}.grad", value.grad if value.is_leaf else None)
            look(f"{path}.hooks", dict(value._backward_hooks or {}))
            look(f"{path}.attributes", dict(value.__dict__))
        elif isinstance(value, torch.jit.ScriptModule):
            for name in torch._C.ConcreteModuleType.from_jit_type(value._c._type()).get_attributes():  # type: ignore[attr-defined]
                look(f"{path}.{name}", value._c.getattr(name))
            for name, child in value.named_children():
                look(f"{path}.{name}", child)
        elif isinstance(value, NOT_OF_THE_MODEL):
            picture[f"{path}.training"] = value.training
        elif isinstance(value, dict):
            # Handles of hooks are numbered through: a network built a second time has others.
            numbered = "hooks" in path
            picture[f"{path}:keys"] = len(value) if numbered else [str(key) for key in value]
            for index, (key, item) in enumerate(value.items()):
                if numbered:
                    look(f"{path}[{index}]", item)
                elif key not in SET_BY_A_TRAINER:
                    look(f"{path}[{key}]", item)
        elif isinstance(value, (list, tuple, deque)):
            picture[f"{path}:length"] = len(value)
            for index, item in enumerate(value):
                look(f"{path}[{index}]", item)
        elif isinstance(value, (set, frozenset, bytearray)):
            picture[f"{path}:items"] = sorted(map(str, value))
        elif isinstance(value, np.ndarray):
            picture[f"{path}:array"] = (value.shape, value.dtype, value.tobytes())
        elif isinstance(value, torch.Generator):
            picture[f"{path}:state"] = value.get_state().tolist()
        elif isinstance(value, random.Random):
            picture[f"{path}:state"] = value.getstate()
        elif isinstance(value, np.random.Generator):
            picture[f"{path}:state"] = str(value.bit_generator.state)
        elif isinstance(value, np.random.RandomState):
            picture[f"{path}:state"] = str(value.get_state())
        elif isinstance(value, MethodType):
            look(f"{path}.self", value.__self__)
        elif not isinstance(value, (FunctionType, type)):
            for name in getattr(type(value), "__slots__", ()):
                name = f"_{type(value).__name__}{name}" if name.startswith("__") else name
                picture[f"{path}.{name}:set"] = hasattr(value, name)
                if hasattr(value, name):
                    look(f"{path}.{name}", getattr(value, name))
            if type(value).__module__.partition(".")[0] not in ("lightning", "torch") or isinstance(value, nn.Module):
                look(f"{path}.attributes", getattr(value, "__dict__", None))

    for index, thing in enumerate(things):
        look(f"<{index}>", thing)
    return picture


def identities_of(*things: nn.Module) -> list[int]:
    """List where the tensors and attributes of modules are."""
    return [
        id(value)
        for thing in things
        for module in thing.modules()
        if not isinstance(module, (*NOT_OF_THE_MODEL, torch.jit.ScriptModule))
        for held in (module, module.__dict__, *module._buffers.values(), *module._parameters.values())
        for value in (held,)
    ]


def surroundings() -> dict[str, Any]:
    """Describe what belongs to the process: random streams and switches."""
    numpy_state: Any = np.random.get_state()  # noqa: NPY002
    return {
        "python": random.getstate(),
        "numpy": (numpy_state[1].tolist(), *numpy_state[2:]),
        "torch": torch.get_rng_state().tolist(),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "anomaly": (torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()),
        "dtype": torch.get_default_dtype(),
        "device": torch.zeros(0).device,  # torch 2.6 has no answer once a default device was unset
        "autocast cache": torch.is_autocast_cache_enabled(),
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "parametrize": (nn.utils.parametrize._cache_enabled, dict(nn.utils.parametrize._cache)),
    }


def assert_same_picture(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Name what differs: a comparison of the whole would print pages."""
    differing = {
        path: (_short(before.get(path, "-")), _short(after.get(path, "-")))
        for path in [*before, *(after.keys() - before.keys())]
        if before.get(path, "-") != after.get(path, "-")
    }
    assert not differing


def _tensor(tensor: Tensor) -> Any:
    with torch.no_grad():
        dense = tensor.detach()
        if dense.layout != torch.strided:
            dense = dense.to_dense()
        values = bytes(dense.cpu().contiguous().clone().reshape(-1).view(torch.uint8).tolist())
    stride = tensor.stride() if tensor.layout == torch.strided else tensor.layout
    return (tensor.shape, tensor.dtype, stride, tensor.requires_grad, tensor.grad_fn is None, values)


def _short(value: Any) -> str:
    return repr(value)[:120]
