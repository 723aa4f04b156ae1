"""A teacher: a copy of a trained network, with what its checkpoint holds."""

import copy
import json
import pickle
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_ydrop.errors import ConfigurationError
from lightning_ydrop.layers import ConductanceDropout, convert_dropout
from lightning_ydrop.phase1.engine import YDrop

Module = TypeVar("Module", bound=nn.Module)


def copied(model: Module) -> Module:
    """Copy a model, also one that computes some of its weights anew before each pass, as a pruned one does."""
    computed = [
        value
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    ]
    return copy.deepcopy(model, {id(value): value.detach().clone() for value in computed})


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
            "it yourself, with load_from_checkpoint, and pass the teacher alone.",
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
        teacher.configure_model()
        teacher.on_load_checkpoint(held)
    state = _state_of_ydrop(held)
    if state is not None and not any(isinstance(module, ConductanceDropout) for module in teacher.modules()):
        convert_dropout(teacher, include=list(state["layers"]))
    try:
        teacher.load_state_dict(state_dict)
    except RuntimeError as error:
        raise refused(error) from error
    if state is not None:
        YDrop(teacher).load_state_dict(state)


def _written(value: Any) -> str:
    """Write a hyperparameter as a YAML file would give it, in which a tuple is a list."""
    return json.dumps(value, default=str, skipkeys=True)


def _state_of_ydrop(held: Mapping[str, Any]) -> dict[str, Any] | None:
    """Find what YDropCallback, or a subclass of it, has saved after its first phase 1."""
    for state in held.get("callbacks", {}).values():
        if isinstance(state, dict) and state.keys() >= {"steps_taken", "share", "scores", "layers"}:
            return state
    return None
