"""Fits that go on as if they had not been interrupted."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader

from lightning_ydrop.callbacks.company import check_alone
from lightning_ydrop.callbacks.followed_loader import FollowedLoader, Replay
from lightning_ydrop.callbacks.lightning_internals import (
    accumulates,
    add_logged,
    begin_epoch_anew,
    logged_so_far,
    metric_states,
    set_metric_states,
    skips_validation,
    training_loaders,
)
from lightning_ydrop.callbacks.random_state import random_state, set_random_state
from lightning_ydrop.errors import ConfigurationError
from lightning_ydrop.importance.ranks import gather_over_ranks, rank, world_size

KEY = "exact_resume"


class ExactResume(Callback):
    """Resume a fit exactly: what comes after a checkpoint is bit for bit what an uninterrupted fit does.

    It adds to every checkpoint what Lightning leaves out: for each rank the random state of Python, NumPy and torch
    (CPU and CUDA), the place in the training batches, the values logged with `on_epoch=True` so far and the states of
    torchmetrics, and whether training was over. `trainer.fit(..., ckpt_path=...)` with this callback puts all of it
    back, at the end of an epoch and in the middle of one. It works with any LightningModule, with and without Y-Drop.

    To find its place in the middle of an epoch, it draws the epoch's order again and loads the batches that come
    before, without training on them. That works for a DataLoader, shuffled or not, with workers or without. Loaders
    with a `state_dict` find their place themselves. Any other loader can be resumed at the end of an epoch only.

    Build the model, the data and the Trainer as in the first run. Randomness outside these streams is not restored: a
    dataset that is a stream, generators of your own, a GPU's non-deterministic operations.

    Raises:
        ConfigurationError: When a fit begins, if the Trainer has several of these callbacks; when it resumes, if the
            place can't be found, or the number of processes has changed.

    Example:
        >>> from lightning.pytorch.callbacks import ModelCheckpoint
        >>> callbacks = [ExactResume(), ModelCheckpoint("checkpoints", every_n_train_steps=100, save_last=True)]
        >>> trainer = Trainer(callbacks=callbacks, logger=False)

    After an interruption, run the same program with `trainer.fit(model, data, ckpt_path="last")`.

    """

    def __init__(self) -> None:
        self._loaders: list[FollowedLoader] = []
        self._loaded: dict[str, Any] = {}
        self._has_loaded = False
        # Until the first batch: the random state with which an epoch is to start.
        self._at_epoch_start: dict[str, Any] | None = None
        self._logged: dict[str, Any] = {}
        self._last_places: list[dict[str, Any]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse several of these callbacks, and warn of what can't be followed.

        Raises:
            ConfigurationError: If the Trainer has another one.

        """
        if stage == TrainerFn.FITTING:
            check_alone(
                trainer,
                ExactResume,
                "ExactResume callbacks",
                "One of them follows the training batches, and adds its place in them to every checkpoint.",
                "Leave the others out.",
            )
        every: int = trainer.reload_dataloaders_every_n_epochs  # type: ignore[attr-defined]
        if stage == TrainerFn.FITTING and every:
            rank_zero_warn(
                f"ExactResume was given to a Trainer(reload_dataloaders_every_n_epochs={every}). Lightning does not "
                "save in which epoch it has loaded the data, so a resumed fit may load it in others, and can't find "
                "its place in the middle of an epoch. Leave reload_dataloaders_every_n_epochs out.",
            )

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep it until training starts."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._has_loaded = True
            self._loaded = checkpoint.get(KEY, {})

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on where the checkpoint was saved."""
        loaded, self._loaded = self._loaded, {}
        self._check(loaded)
        self._follow(trainer)
        own: dict[str, Any] = loaded["ranks"][rank()] if loaded else {}
        if loaded and loaded["mid_epoch"]:
            self._find_place(trainer, pl_module, own, loaded["batches"])
        if self._loaders:
            begin_epoch_anew(trainer)
        if loaded:
            self._restore(pl_module, own["random"])
            self._at_epoch_start = None if loaded["mid_epoch"] else own["random"]
            if loaded["mid_epoch"]:
                self._logged = own["logged"]
                set_metric_states(pl_module, own["metrics"])
            trainer.should_stop = trainer.should_stop or loaded["stopped"]

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Undo what hooks have drawn that an uninterrupted fit does not call between two epochs."""
        if self._at_epoch_start is not None:
            self._restore(pl_module, self._at_epoch_start)
            self._at_epoch_start = None
            if not all(loader.has_length for loader in self._loaders):
                begin_epoch_anew(trainer)  # here Lightning asks for the first batch before training on it

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Be done with the start."""
        self._at_epoch_start = None
        for loader in self._loaders:
            loader.call_resumable(False)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add what was logged before the interruption."""
        if self._logged:
            self._logged = add_logged(trainer, self._logged)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget what was logged in batches of another kind than those that came."""
        self._logged = {}

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the random state be that after the validation that comes first."""
        if not trainer.sanity_checking:
            self._at_epoch_start = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep what Lightning leaves out. Every rank comes here."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        progress = trainer.fit_loop.epoch_loop.batch_progress
        batches: int = progress.current.processed  # type: ignore[attr-defined]
        mid_epoch = batches > 0 and not progress.is_last_batch
        own: dict[str, Any] = {"random": random_state(pl_module.device, self._generators())}
        if mid_epoch:
            is_followed = [each.loader for each in self._loaders] == training_loaders(trainer)
            own["loaders"] = self._places() if is_followed or not self._loaders else []
            own["logged"] = logged_so_far(trainer) | self._logged
            own["metrics"] = metric_states(pl_module)
            if accumulates(trainer):
                rank_zero_warn(
                    "A checkpoint was saved between two optimiser steps, while gradients accumulate. Checkpoints hold "
                    "no gradients, so a fit that resumes from it is not exact. Save after a step, as "
                    "ModelCheckpoint(every_n_train_steps=...) does.",
                )
        checkpoint[KEY] = {
            "ranks": gather_over_ranks(own),
            "batches": batches,
            "mid_epoch": mid_epoch,
            "unvalidated": skips_validation(trainer),
            "stopped": trainer.should_stop,
        }

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the loaders back: Lightning does not call `teardown` when a fit raises."""
        self._release()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the loaders back."""
        self._release()
        self._loaded, self._has_loaded = {}, False  # of a finder, which puts a checkpoint back in the middle of a fit

    def _check(self, loaded: dict[str, Any]) -> None:
        """Refuse or warn of a checkpoint that a fit can't go on from exactly.

        Raises:
            ConfigurationError: If it was saved by another number of processes.

        """
        has_loaded, self._has_loaded = self._has_loaded, False
        if has_loaded and not loaded:
            rank_zero_warn(
                "The checkpoint holds no state of ExactResume: it comes from training without the callback. Random "
                "numbers and the order of batches are those of a new fit.",
            )
        if loaded and len(loaded["ranks"]) != world_size():
            raise ConfigurationError(
                f"The checkpoint was saved by {len(loaded['ranks'])} process(es), and this fit has {world_size()}.",
                "Each process has a random state and a part of the data of its own.",
                f"Resume with {len(loaded['ranks'])} process(es), or leave ExactResume out.",
            )
        if loaded and loaded["unvalidated"]:
            rank_zero_warn(
                "The checkpoint was saved after a batch that validation or the epoch's end follows, and before that. "
                "Lightning leaves this validation out when it resumes, so what follows is not exact. Resume from a "
                "checkpoint that validation saved, or of another step.",
            )

    def _follow(self, trainer: Trainer) -> None:
        """Follow the training loaders, if all of them are DataLoaders that do not find their place by themselves."""
        self._release()
        self._last_places = []
        loaders = training_loaders(trainer)
        if all(isinstance(each, DataLoader) and not hasattr(each, "state_dict") for each in loaders):
            once = {id(each): each for each in loaders}
            if len(once) == len(loaders):
                self._loaders = [FollowedLoader(each, lambda: bool(trainer.training)) for each in loaders]
        if any(each.loader.persistent_workers for each in self._loaders):
            rank_zero_warn(
                "ExactResume can't restore the random state of persistent workers: the order of batches is exact, but "
                "what workers draw themselves, such as augmentations, is not. Pass persistent_workers=False if they "
                "draw.",
            )

    def _find_place(self, trainer: Trainer, pl_module: LightningModule, own: dict[str, Any], batches: int) -> None:
        """Let the loaders skip what was trained on.

        Raises:
            ConfigurationError: If a loader can't find its place.

        """
        kept = own["loaders"]
        loaders = training_loaders(trainer)
        if not self._loaders and all(hasattr(each, "state_dict") for each in loaders):
            return  # Lightning has restored them
        if len(kept) != len(self._loaders) or not kept or any(each["before"] is None for each in kept):
            raise ConfigurationError(
                f"The checkpoint was saved after {batches} batches of an epoch, and the training data is "
                f"{', '.join(type(each).__name__ for each in loaders)}.",
                "In the middle of an epoch, ExactResume finds the place in DataLoaders, and in loaders that have "
                "`state_dict` and `load_state_dict`.",
                "Use one of these, or resume from a checkpoint of an epoch's end.",
            )
        generators = own["random"]["generators"]
        # Where Lightning doesn't know the length, it has fetched one more. Of several loaders, the one that has given
        # the most counts: shorter ones may have begun again.
        ahead = max(each["given"] for each in kept) - batches
        for each, loader in zip(kept, self._loaders, strict=True):
            count = len(loader.generators)
            given = each["given"]
            # The first one is asked first, so the others find the random state restored.
            after = own["random"] if loader is self._loaders[0] else None
            own_generators, generators = generators[:count], generators[count:]
            loader.replay = Replay(
                each["before"], max(0, given - ahead), given, each["ahead"], after, pl_module.device, own_generators
            )
            loader.call_resumable(True)

    def _places(self) -> list[dict[str, Any]]:
        places = [{"before": each.before, "given": each.given, "ahead": each.ahead} for each in self._loaders]
        return places or self._last_places  # a checkpoint may be saved after a fit

    def _generators(self) -> list[torch.Generator]:
        return [each for loader in self._loaders for each in loader.generators]

    def _restore(self, pl_module: LightningModule, state: dict[str, Any]) -> None:
        set_random_state(state, pl_module.device, self._generators())

    def _release(self) -> None:
        self._last_places = self._places()
        for loader in self._loaders:
            loader.release()
        self._loaders, self._logged, self._at_epoch_start = [], {}, None
