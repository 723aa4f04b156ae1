"""A teacher: a copy of a trained network, with what its checkpoint holds."""

import copy
import json
import pickle
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_ydrop.errors import ConfigurationError
from lightning_ydrop.importance.engine import YDrop
from lightning_ydrop.layers import ConductanceDropout, convert_dropout
from lightning_ydrop.models.state import named_modules

Module = TypeVar("Module", bound=nn.Module)


def copied(model: Module) -> Module:
    """Copy a model, also one that computes weights anew before each pass, as a pruned one does, or keeps outputs."""
    held = (value for module in model.modules() for value in _tensors_in(vars(module)))
    return copy.deepcopy(model, {id(value): value.detach().clone() for value in held if not value.is_leaf})


def load_checkpoint(teacher: nn.Module, checkpoint: str, hparams: Mapping[str, Any]) -> None:
    """Take a teacher's weights from a checkpoint of a Trainer, and the probabilities that Y-Drop has left there.

    Where YDropCallback had put the ConductanceDropout layers into it, so does this.

    Args:
        teacher: A network of the class that was trained.
        checkpoint: Its file.
        hparams: What the teacher was made with, as far as it has saved that.

    Raises:
        ConfigurationError: If the checkpoint is not of such a network, or holds more than torch reads safely.

    """

    def refused(what: object) -> ConfigurationError:
        return ConfigurationError(
            f"DropoutDistillation(checkpoint={checkpoint!r}) was given for {type(teacher).__name__}: {what}.",
            "It is a checkpoint that a Trainer has saved of this very class, made with the same arguments.",
            "Pass the teacher with the arguments that it was trained with, and a checkpoint of that training; or load "
            "it yourself, with load_from_checkpoint, and pass the teacher alone. What Y-Drop has left is not in its "
            "weights: load the callback's state with YDrop(teacher).load_state_dict(state).",
        )

    try:
        held = torch.load(checkpoint, map_location="cpu", weights_only=True)
        state_dict = held["state_dict"]
    except (KeyError, TypeError, pickle.UnpicklingError) as error:
        raise refused(error) from error
    trained = held.get(LightningModule.CHECKPOINT_HYPER_PARAMS_KEY) or {}
    for name in sorted(trained.keys() & hparams.keys()):
        if _written(trained[name]) != _written(hparams[name]) and not name.startswith("_"):
            raise refused(f"it was trained with {name}={trained[name]!r}, and now has {name}={hparams[name]!r}")
    if isinstance(teacher, LightningModule):
        # As LightningModule.load_from_checkpoint does.
        teacher.on_load_checkpoint(held)
    state = _state_of_ydrop(held)
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


def _written(value: Any) -> str:
    """Write a hyperparameter as a YAML file would give it, in which a tuple is a list."""
    return json.dumps(value, default=str, skipkeys=True)


def _state_of_ydrop(held: Mapping[str, Any]) -> dict[str, Any] | None:
    """Find what YDropCallback, or a subclass of it, has saved after its first phase 1."""
    for state in held.get("callbacks", {}).values():
        if isinstance(state, dict) and state.keys() >= {"steps_taken", "progress", "scores", "layers"}:
            return state
    return None
