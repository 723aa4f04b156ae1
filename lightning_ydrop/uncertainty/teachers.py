"""A teacher: a copy of a trained network, with the content of its checkpoint."""

import copy
import json
import pickle
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_ydrop.checks import is_list
from lightning_ydrop.errors import ConfigurationError
from lightning_ydrop.importance.engine import YDrop
from lightning_ydrop.layers import ConductanceDropout, convert_dropout
from lightning_ydrop.models.modules import named_modules

Module = TypeVar("Module", bound=nn.Module)


def copy_of(model: Module) -> Module:
    """Copy a model, even if it keeps outputs or computes weights before each pass, as a pruned one does."""
    tensors = (tensor for module in model.modules() for tensor in _tensors_in(vars(module)))
    # deepcopy refuses tensors that are the result of a differentiable operation.
    return copy.deepcopy(model, {id(tensor): tensor.detach().clone() for tensor in tensors if not tensor.is_leaf})


def load_checkpoint(teacher: nn.Module, checkpoint: str, hparams: Mapping[str, Any]) -> None:
    """Load a Trainer's checkpoint into a teacher: its weights, and the probabilities that Y-Drop has left there.

    Dropout layers that YDropCallback had converted are converted here too.

    Args:
        teacher: A network of the class that was trained.
        checkpoint: The path of the file.
        hparams: The arguments that the teacher was made with, as far as it has saved them.

    Raises:
        ConfigurationError: If the checkpoint is not one of such a network, or torch can't read it safely.

    """

    def refused(what: object) -> ConfigurationError:
        return ConfigurationError(
            f"DropoutDistillation(checkpoint={checkpoint!r}) was given for {type(teacher).__name__}: {what}.",
            "It is a checkpoint that a Trainer has saved of this very class, made with the same arguments.",
            "Pass the teacher with the arguments that it was trained with, and a checkpoint of that training. Or load "
            "it yourself with load_from_checkpoint, and pass the teacher alone. Y-Drop's probabilities are not among "
            "the weights: load the callback's state with YDrop(teacher).load_state_dict(state).",
        )

    try:
        content = torch.load(checkpoint, map_location="cpu", weights_only=True)
        state_dict = content["state_dict"]
    except (KeyError, TypeError, pickle.UnpicklingError) as error:
        raise refused(error) from error
    trained_with = content.get(LightningModule.CHECKPOINT_HYPER_PARAMS_KEY) or {}
    for name in sorted(trained_with.keys() & hparams.keys()):
        before, now = trained_with[name], hparams[name]
        if _as_yaml(before) != _as_yaml(now) and not name.startswith("_"):
            raise refused(f"it was trained with {name}={before!r}, and now has {name}={now!r}")
    if isinstance(teacher, LightningModule):
        # As LightningModule.load_from_checkpoint does.
        teacher.on_load_checkpoint(content)
    state = _state_of_ydrop(content)
    try:
        if state is not None:
            modules = named_modules(teacher)
            converted = [name for name in state["layers"] if not isinstance(modules.get(name), ConductanceDropout)]
            convert_dropout(teacher, include=converted)
        teacher.load_state_dict(state_dict)
        if state is not None:
            YDrop(teacher).load_state_dict(state)
    except (RuntimeError, ConfigurationError) as error:
        raise refused(error) from error


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """Find the tensors in a container."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors_in(item)


def _as_yaml(value: Any) -> str:
    """Write a hyperparameter as a YAML file would give it: a tuple is a list, and numbers and containers are plain."""
    return json.dumps(_plain(value))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if is_list(value):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return value.item()
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _state_of_ydrop(content: Mapping[str, Any]) -> dict[str, Any] | None:
    """Find the state that YDropCallback, or a subclass of it, has saved after its first phase 1."""
    for state in content.get("callbacks", {}).values():
        if isinstance(state, dict) and state.keys() >= {"steps_taken", "progress", "scores", "layers"}:
            return state
    return None
