"""Dropout patterns in a Trainer."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.utils.hooks import RemovableHandle

from lightning_ydrop.callbacks.company import check_alone
from lightning_ydrop.checks import check_fraction
from lightning_ydrop.errors import ConfigurationError, NoEffectWarning, describe
from lightning_ydrop.layers.pattern_dropout import PatternDropout
from lightning_ydrop.layers.patterns import ConvPattern, Pattern, TokenPattern
from lightning_ydrop.models.modules import has_compiled_parts
from lightning_ydrop.search.applying import layers_of, places_of, reattach
from lightning_ydrop.search.files import as_patterns, read_patterns
from lightning_ydrop.search.places import apply_patterns, find_places, remove_patterns


class PatternCallback(Callback):
    """Train with dropout patterns at their places (AutoDropout, arXiv 2101.01761).

    The patterns are put into the model when a fit is set up, as `apply_patterns` does it, and taken out when it ends.
    They drop in training mode only. Checkpoints bear no trace of them: a model loads strictly without the callback.

    A network that the LightningModule builds in `setup` or `configure_model` gets its patterns after that.

    Args:
        patterns: A mapping from places to patterns, or a YAML file of one. `find_places` lists the places of a model.
        warmup: Share of the optimiser steps of a fit over which the `rate` of all patterns rises from 0, in [0, 1]. It
            follows `trainer.global_step`, so that a resumed fit equals an uninterrupted one. With several optimisers
            or manual optimisation, steps are those that Lightning counts.

    Attributes:
        idle_places: Places at which the first training step called no pattern, once there has been one.

    Raises:
        ConfigurationError: If an argument is out of range, or the file is not there or holds no patterns; when a fit
            is set up, if a pattern fits no place of the model, or the Trainer has several of these callbacks; when
            training starts, if it has a warm-up and no end.

    Example:
        >>> from lightning_ydrop import ConvPattern
        >>> callback = PatternCallback({"stage1.1": ConvPattern.spatial_dropout(0.1)}, warmup=0.2)
        >>> trainer = Trainer(callbacks=[callback], logger=False)

    """

    def __init__(self, patterns: Mapping[str, ConvPattern | TokenPattern] | str | Path, warmup: float = 0.0) -> None:
        # Now, though no model is there yet: a bad YAML file should fail when it is parsed.
        self.patterns: dict[str, Pattern] = (
            read_patterns(patterns) if isinstance(patterns, (str, Path)) else as_patterns("PatternCallback", patterns)
        )
        self.warmup = float(check_fraction("PatternCallback", "warmup", warmup, example=0.1))
        self._layers: list[PatternDropout] = []
        self._places: list[str] = []
        self._warmup_steps = 0.0
        self._not_called: dict[int, str] = {}
        self.idle_places: set[str] = set()
        self._handles: list[RemovableHandle] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put the patterns into the model, before a strategy wraps it."""
        if stage != TrainerFn.FITTING:
            return
        check_alone(
            trainer,
            PatternCallback,
            "PatternCallbacks",
            "A fit has one set of patterns: each callback would take out those of the other.",
            "Leave one of them out, or write the patterns of both into one mapping.",
        )
        try:
            self._apply(pl_module)
        except ConfigurationError:
            if not may_build_later(pl_module):
                raise

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the patterns into what `setup` and `configure_model` have built."""
        standing = layers_of(pl_module)
        is_as_it_was = list(map(id, standing)) == list(map(id, self._layers))
        # Patterns that fit a part of a network by relative depth fit the whole of it otherwise.
        has_grown = may_build_later(pl_module) and list(find_places(pl_module).places) != self._places
        if not standing or not is_as_it_was or has_grown:
            self._apply(pl_module)
        reattach(pl_module)  # Lightning may have made SyncBatchNorm of batch norms

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the end of the warm-up, which is a share of all steps."""
        total = trainer.estimated_stepping_batches if self.warmup > 0 else 0
        if math.isinf(total):
            raise ConfigurationError(
                f"PatternCallback(warmup={describe(self.warmup)}) was given to a Trainer that has no last step.",
                "The warm-up is a share of the steps of the fit.",
                "Pass max_epochs or max_steps to the Trainer, or leave warmup out.",
            )
        self._warmup_steps = self.warmup * total
        self._set_progress(trainer)
        self._watch(pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Let the rate rise."""
        self._set_progress(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Warn after the first batch of patterns that the forward did not reach."""
        if not self._handles:
            return
        not_called = self._not_called
        self.idle_places = places_of(self._layers) - places_of(
            layer for layer in self._layers if id(layer) not in not_called
        )
        self._stop_watching()
        if not_called:
            rank_zero_warn(
                f"The first training step did not call {', '.join(map(repr, not_called.values()))} in training mode, "
                "where a dropout pattern stands: nothing is dropped there. "
                "A forward may take the rate of a dropout layer and call F.dropout, or a fused attention; a part of "
                "the network may be frozen in evaluation mode. Leave these places out, or let forward call the layer.",
                category=NoEffectWarning,
            )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take the patterns out: Lightning does not call `teardown` when a fit raises."""
        self._remove(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the patterns out."""
        self._remove(pl_module)

    def _apply(self, pl_module: LightningModule) -> None:
        report = apply_patterns(pl_module, self.patterns)
        self._layers = layers_of(pl_module)
        self._places = list(find_places(pl_module).places) if may_build_later(pl_module) else []
        rank_zero_info(str(report).partition("\n")[0])

    def _watch(self, pl_module: LightningModule) -> None:
        """See in the first batch which patterns are called. Compiled code would be compiled again for that."""
        if has_compiled_parts(pl_module):
            return
        names = {id(module): name for name, module in pl_module.named_modules()}
        self._not_called = {
            id(layer): names.get(id(layer), "a layer that is no longer in the model") for layer in self._layers
        }

        def note(layer: nn.Module, args: Any, output: Any) -> None:
            if layer.training:
                self._not_called.pop(id(layer), None)

        self._handles = [layer.register_forward_hook(note) for layer in self._layers]

    def _stop_watching(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._not_called = [], {}

    def _remove(self, pl_module: LightningModule) -> None:
        self._stop_watching()
        if self._layers:
            remove_patterns(pl_module)
        self._layers = []

    def _set_progress(self, trainer: Trainer) -> None:
        progress = min(1.0, trainer.global_step / self._warmup_steps) if self._warmup_steps > 0 else 1.0
        for layer in self._layers:
            if layer.progress != progress:
                layer.progress = progress


def may_build_later(pl_module: LightningModule) -> bool:
    """Tell whether a LightningModule may build its network after its constructor, when a fit begins."""
    return any(is_overridden(hook, pl_module) for hook in ("setup", "configure_model"))
