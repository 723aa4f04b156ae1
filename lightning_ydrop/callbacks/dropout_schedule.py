"""Schedules for the rate of dropout."""

import inspect
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_ydrop.callbacks.lightning_internals import steps_in_epoch
from lightning_ydrop.callbacks.patterns import PatternCallback
from lightning_ydrop.callbacks.rate_curve import Clock, Kind, RateCurve
from lightning_ydrop.callbacks.ydrop import YDropCallback
from lightning_ydrop.checks import check_flag
from lightning_ydrop.errors import ConfigurationError, NoEffectWarning, describe, listed
from lightning_ydrop.layers import ConductanceDropout
from lightning_ydrop.layers.names import NamePatterns, check_patterns, fits_any
from lightning_ydrop.layers.pattern_dropout import PatternDropout
from lightning_ydrop.layers.rates import RatedLayer, has_rate
from lightning_ydrop.models.modules import has_compiled_parts
from lightning_ydrop.search.applying import layers_of
from lightning_ydrop.torch_internals import compilations_allowed, without_compilation

# Graphs that a compiled model needs beside one for each rate: for validation, and for batches of another size.
OTHER_GRAPHS = 3


class DropoutSchedule(Callback):
    """Change the rate of dropout layers while a network trains.

    The rate goes from `initial` to `p`. With `t` epochs or optimiser steps so far, and `n = length`, the share of this
    way is

    - "linear": `min(1, t / n)`;
    - "cosine": `(1 - cos(pi * min(1, t / n))) / 2`;
    - "cyclic": up in a line for half of each `n`, and down again;
    - "early": 1 for the first `n`, then 0: dropout in the first part of training alone (arXiv 2303.01500);
    - "late": 0 for the first `n`, then 1 (arXiv 2303.01500);
    - "curriculum": `1 - exp(-gamma * t / n)` (arXiv 1703.06229).

    A rate that falls has an `initial` above its `p`: early dropout that fades is `kind="linear", initial=0.5, p=0.0`.

    It sets `p` of nn.Dropout, 1d, 2d, 3d, AlphaDropout, FeatureAlphaDropout and ConductanceDropout, `p_max` of Jumpout,
    and `dropout` of nn.MultiheadAttention and of nn.RNN, LSTM and GRU (where it was above 0). A PatternDropout drops
    its pattern at the rate, up to the pattern's own. After a fit, also one that raises, each layer has the rate that it
    had before. Checkpoints of the model bear no trace.

    The rate depends on counters that the Trainer saves, so a resumed fit equals an uninterrupted one.

    A compiled model is compiled again for every new rate, and torch stops compiling after a few of them: pass
    `by="epochs"` with a short `length`, or `levels`. A warning says how many rates are possible.

    Args:
        kind: The shape of the schedule.
        p: The rate at its end, in [0, 1); of "cyclic" the highest, of "early" and "late" that while dropout is on.
            None: the rate that each layer has.
        initial: The rate at its beginning, in [0, 1); of "cyclic" the lowest, of "early" and "late" that while
            dropout is off.
        length: `n`, in epochs or steps, at least 1; of "cyclic" that of a cycle, at least 2; of "early" and "late" when
            dropout is switched. None, except for these three: up to the last epoch or step of the fit.
        by: "epochs", in which the rate changes once for each epoch, or "steps" of optimisers, as
            `Trainer(max_steps=...)` counts them.
        gamma: Of "curriculum": how fast the rate rises, above 0. By default 10: after `n` it is 5e-5 of the way short
            of `p`.
        levels: How many different rates there are at most, at least 2: they are evenly spaced. None: any number.
        include: Names of the layers to schedule, as patterns such as "classifier.*"; all by default.
        exclude: Names of the layers to leave, as patterns.
        log_rates: Whether to log the rate of each layer as `dropout/<layer>`.

    Raises:
        ConfigurationError: If an argument is out of range; when training starts, if there is no layer to schedule, a
            pattern fits none, `length` is None and the fit has no end, or another callback sets the same layers.

    Example:
        >>> callback = DropoutSchedule("curriculum", p=0.5, exclude="head.*")
        >>> trainer = Trainer(callbacks=[callback], logger=False)

    """

    def __init__(
        self,
        kind: Kind = "linear",
        p: float | None = None,
        initial: float = 0.0,
        length: int | None = None,
        by: Clock = "epochs",
        gamma: float | None = None,
        levels: int | None = None,
        include: str | list[str] | None = None,
        exclude: str | list[str] | None = None,
        log_rates: bool = False,
    ) -> None:
        # Now, though no model is there yet: a bad YAML file should fail when it is parsed.
        self.curve = RateCurve(kind, p, initial, length, by, gamma, levels)
        check_patterns("DropoutSchedule", "include", include)
        check_patterns("DropoutSchedule", "exclude", exclude)
        self.include = include
        self.exclude = exclude
        self.log_rates = check_flag("DropoutSchedule", "log_rates", log_rates)
        self._layers: list[RatedLayer] = []
        self._length = 1
        self._is_compiled = False
        self._loaded: dict[str, Any] = {}

    @property
    def state_key(self) -> str:
        """Tell apart the states of several schedules in one Trainer, by the layers that they are for."""
        return self._generate_state_key(include=self.include, exclude=self.exclude)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the layers: by now all callbacks have changed the model as they want it."""
        self._give_back()
        layers = self._find(pl_module)
        self._check_company(trainer, pl_module, layers)
        total = self._total(trainer)
        self._length = self.curve.length or max(1, int(total) - 1)
        self._layers = layers
        self._is_compiled = has_compiled_parts(pl_module)
        self._warn(trainer, total)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Set the rate."""
        share = self._share(trainer)
        rates = {layer: self.curve.rate(layer.own, share) for layer in self._layers}
        for layer, rate in rates.items():
            layer.set(rate)
        if self.log_rates:
            logged = {f"dropout/{layer.name}": rate for layer, rate in rates.items()}
            pl_module.log_dict(logged, on_step=True, on_epoch=False, batch_size=1)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Spare a compiled model a graph of its evaluation for each rate, which drops nothing."""
        if self._is_compiled:
            for layer in self._layers:
                layer.give_back()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the rates back: Lightning does not call `teardown` when a fit raises."""
        self._give_back()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the rates back."""
        self._give_back()
        self._loaded = {}  # of a test, whose checkpoint says nothing of a later fit

    def state_dict(self) -> dict[str, Any]:
        """Give what the rate of a step follows from."""
        return {**asdict(self.curve), "length": self._length}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a checkpoint's schedule, to compare it with this one when training starts."""
        self._loaded = state_dict

    def __repr__(self) -> str:
        values = vars(self) | asdict(self.curve)
        parameters = inspect.signature(DropoutSchedule).parameters.values()
        chosen = [f"{each.name}={values[each.name]!r}" for each in parameters if values[each.name] != each.default]
        return f"{type(self).__name__}({', '.join(chosen)})"

    def _find(self, pl_module: LightningModule) -> list[RatedLayer]:
        """Find the layers to schedule.

        Raises:
            ConfigurationError: If there is none, or a pattern fits none.

        """
        names: dict[nn.Module, list[str]] = {}
        for name, module in pl_module.named_modules(remove_duplicate=False):
            if has_rate(module):
                names.setdefault(module, []).append(without_compilation(name))
        known = {name: None for each in names.values() for name in each}
        there = listed(f"{each[0]} ({type(module).__name__})" for module, each in names.items()) or "none"
        for which, patterns in (("include", self.include), ("exclude", self.exclude)):
            for pattern in _as_list(patterns):
                if not fits_any(pattern, known):
                    raise ConfigurationError(
                        f"DropoutSchedule({which}={describe(pattern)}) was given for {type(pl_module).__name__}.",
                        f"A pattern fits the name of a dropout layer: {there}.",
                        f"Pass, for example, {which}={next(iter(known), 'classifier.*')!r}.",
                    )
        included, excluded = NamePatterns(_as_list(self.include)), NamePatterns(_as_list(self.exclude))
        layers = [
            RatedLayer(each[0], module)
            for module, each in names.items()
            if (self.include is None or included.fit(each)) and not excluded.fit(each)
        ]
        if names and not layers:
            taken = "all dropout layers" if self.include is None else "every layer that `include` chooses"
            raise ConfigurationError(
                f"{self!r} was given for {type(pl_module).__name__}, where `exclude` takes away {taken}.",
                f"At least one layer is left to schedule. Dropout layers: {there}.",
                "Leave out `exclude`, or let it fit fewer layers.",
            )
        if all(self.curve.rate(layer.own, 1.0) == self.curve.initial for layer in layers):
            raise ConfigurationError(
                f"{self!r} was given for {type(pl_module).__name__}, where it changes no rate.",
                f"Rates go from initial={self.curve.initial} to p, or to each layer's own. Dropout layers: {there}.",
                "Pass p=0.5, or put nn.Dropout(0.5) into the network. F.dropout is not seen.",
            )
        if over := [layer.name for layer in layers if self._most(layer) > layer.most]:
            raise ConfigurationError(
                f"{self!r} was given for {listed(map(repr, over))}, whose pattern has a lower rate.",
                "A PatternDropout drops at the rate of its pattern at most.",
                "Raise the `rate` of the pattern, leave out `p`, or exclude these layers.",
            )
        return layers

    def _most(self, layer: RatedLayer) -> float:
        return max(self.curve.initial, self.curve.rate(layer.own, 1.0))

    def _check_company(self, trainer: Trainer, pl_module: LightningModule, layers: list[RatedLayer]) -> None:
        """Refuse layers that another callback of the Trainer sets.

        Raises:
            ConfigurationError: If there are any.

        """
        mine = {id(layer.layer): layer.name for layer in layers}
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            theirs: Sequence[nn.Module] = []
            remedy = "Leave them to one of the two"
            if isinstance(other, YDropCallback) and other.engine is not None:
                theirs = list(other.engine.layers.values())
                remedy = "Y-Drop follows the p of its layers. Leave them to it"
            elif isinstance(other, PatternCallback):
                theirs = layers_of(pl_module)
                remedy = "PatternCallback(warmup=...) lets the rate of patterns rise. Leave them to it"
            elif isinstance(other, DropoutSchedule) and other is not self:
                theirs = [layer.layer for layer in other._layers]
            both = [mine[id(layer)] for layer in theirs if id(layer) in mine]
            if both:
                raise ConfigurationError(
                    f"{type(other).__name__} and DropoutSchedule set the rates of the same layers: "
                    f"{listed(map(repr, both))}.",
                    "A layer has one driver: of two, each would undo the rates of the other.",
                    f"{remedy}: DropoutSchedule(exclude={both!r}).",
                )

    def _total(self, trainer: Trainer) -> float:
        """Count the epochs or steps of the fit, perhaps infinitely many.

        Raises:
            ConfigurationError: If the length of the schedule is that of a fit without an end.

        """
        epochs = math.inf if trainer.max_epochs in (None, -1) else float(trainer.max_epochs)
        steps = math.inf if trainer.max_steps == -1 else float(trainer.max_steps)
        in_epoch = steps_in_epoch(trainer)
        if self.curve.by == "steps":
            total = min(steps, epochs * in_epoch)
        else:
            total = epochs if math.isinf(steps) or math.isinf(in_epoch) else min(epochs, math.ceil(steps / in_epoch))
        if math.isinf(total) and self.curve.length is None:
            raise ConfigurationError(
                f"{self!r} was given to a Trainer with max_epochs={trainer.max_epochs} and "
                f"max_steps={trainer.max_steps}, which does not say how many {self.curve.by} the fit has.",
                "Without `length` the schedule ends with the fit. Steps are not known in advance where the training "
                "loader has no length, several optimisers step in manual optimisation, or accumulation changes.",
                "Pass length=..., or max_epochs to the Trainer.",
            )
        return total

    def _share(self, trainer: Trainer) -> float:
        done = trainer.current_epoch if self.curve.by == "epochs" else trainer.global_step
        return self.curve.share(done, self._length)

    def _warn(self, trainer: Trainer, total: float) -> None:
        """Warn of what trains, but not as it seems."""
        loaded, self._loaded = self._loaded, {}
        if loaded and loaded != self.state_dict():
            before, now = (
                ", ".join(f"{key}={each[key]!r}" for key in loaded if loaded[key] != self.state_dict().get(key))
                for each in (loaded, {key: self.state_dict().get(key) for key in loaded})
            )
            rank_zero_warn(
                f"The checkpoint was saved with a DropoutSchedule of {before}. This one has {now}, so the rate of "
                "dropout may jump. Pass the same values, and the same length where the fit has become longer.",
            )
        is_trial = trainer.fast_dev_run  # type: ignore[attr-defined]
        if self.curve.kind in ("early", "late") and self._length >= total and not is_trial:
            rank_zero_warn(
                f"Training is to end before DropoutSchedule switches dropout, after {total:g} {self.curve.by}, where "
                f"length={self._length}. Train for longer, or pass a smaller length.",
                category=NoEffectWarning,
            )
        # Compiled code reads the rate of a prepared ConductanceDropout, and of a pattern, from a tensor.
        fixed = [each for each in self._layers if not isinstance(each.layer, (ConductanceDropout, PatternDropout))]
        if self._is_compiled and fixed:
            possible = max(2, compilations_allowed() - OTHER_GRAPHS)
            if self.curve.count_rates(total, self._length) <= possible:
                return
            rank_zero_warn(
                f"{self!r} changes the rate of a compiled model more than {possible} times. torch.compile compiles it "
                "for each rate, and after its recompile_limit runs new rates without compilation. "
                f"Pass levels={possible}, or raise torch._dynamo.config.recompile_limit.",
            )

    def _give_back(self) -> None:
        for layer in self._layers:
            layer.give_back()
        self._layers, self._is_compiled = [], False


def _as_list(patterns: str | Sequence[str] | None) -> list[str]:
    return [patterns] if isinstance(patterns, str) else list(patterns or [])
