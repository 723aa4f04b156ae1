"""Y-Drop in a Trainer."""

import inspect
import warnings
from dataclasses import replace
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_ydrop.callbacks.freshness import warn_of_stale_rankings
from lightning_ydrop.callbacks.own_hook import OwnHook
from lightning_ydrop.callbacks.schedule import Schedule, Transition
from lightning_ydrop.callbacks.strategies import check_strategy
from lightning_ydrop.callbacks.summary import rates_to_come, summary
from lightning_ydrop.checks import check_flag
from lightning_ydrop.errors import ConfigurationError, NoEffectWarning, describe
from lightning_ydrop.functional.attribution import Quadrature, top_share
from lightning_ydrop.functional.rates import Buckets
from lightning_ydrop.importance.engine import YDrop
from lightning_ydrop.importance.measures import Conductance, Measure
from lightning_ydrop.importance.objectives import Objective
from lightning_ydrop.importance.path import NumSamples, PathSettings
from lightning_ydrop.importance.selection import driven_layers
from lightning_ydrop.importance.settings import EngineSettings
from lightning_ydrop.importance.tasks import Task, objective_of
from lightning_ydrop.layers import convert_dropout
from lightning_ydrop.layers.names import check_patterns
from lightning_ydrop.models.adapters import Adapter, AutomaticAdapter, check_adapter
from lightning_ydrop.models.batches import own_method, read_batch
from lightning_ydrop.models.calls import Inputs, Target
from lightning_ydrop.models.first_batch import check_labels_are_read, check_other_labels, naming_other_labels

UNUSABLE = "ydrop/unusable_labels"


class YDropCallback(Callback):
    """Drop the most important units more often (Y-Drop, arXiv 2409.09088).

    The model's `ConductanceDropout` layers are vanilla dropout for the first epochs. After that, before each training
    batch, phase 1 measures every unit's importance on some samples of the batch and sets its drop probability. What
    phase 1 cannot work with is refused on the first batch of a fit, before anything is trained. A batch without samples
    is skipped. Every fit starts anew, whatever the callback was used for before, except one that resumes from a
    checkpoint or goes on with the same Trainer.

    Batches are read by the LightningModule's method `ydrop_inputs(batch)`, where it has one, which returns (inputs,
    target), otherwise by `adapter`. Phase 1 calls the LightningModule's method `ydrop_forward`, where it has one,
    otherwise the LightningModule. A trial run with `Trainer(fast_dev_run=True)` skips annealing, to try what comes
    after it.

    Every `trainer.log_every_n_steps` batches it logs for each layer `ydrop/<layer>/drop_prob`, the mean drop
    probability of its units, and `ydrop/<layer>/top20_share`, the share of the sum of positive scores that the
    highest-scored 20% of its units hold (0.2 where importance is evenly spread); and `ydrop/nonfinite`, how often so
    far a layer's scores were not finite, so that its probabilities stayed what they were. Where labels name no class of
    the output, they count for nothing, and `ydrop/unusable_labels` is how many did so far, among the samples drawn.

    Args:
        annealing_epochs: `K`, epochs of vanilla dropout before Y-Drop, at least 0; the paper tunes it in 1 to 10. 2,
            unless `annealing_steps` is given.
        elasticity: `alpha` of the running mean (Eq. 6), in [0, 1]; the paper tunes it in 1e-5 to 1e-1. 0 keeps
            `initial_drop_prob`, 1 follows each step. 0.1, with `transition="linear"`, makes it small how far validation
            accuracy falls when Y-Drop takes over.
        buckets: Rates and sizes of the two buckets, the weak and the strong units (Eq. 5 and 8). By default those of
            `Buckets.around(p)` for each layer, from its own `p`: at 0.5 these are the paper's.
        initial_drop_prob: `p_0`, where the running mean of every unit starts, in [0, 1). By default the paper's 0.35,
            scaled like the rates where these follow the layer.
        n_steps: `n_c`, steps on the path from the baseline to each sample, at least 1.
        num_samples: `B_c`, samples drawn from each batch of B to measure importance (Eq. 9), at least 1, or "all". By
            default as many as the batch has rows for: max(1, (B - 1) // n_steps), which is 12 for 64 and 6 for 32; see
            `YDrop` for when it is fewer, and for what happens to more.
        baseline: Where the path starts, in the model's input space, that is after normalisation: a number, or a list of
            one for each floating input, null for one that stays as it is.
        quadrature: Where on each step the gradient is taken: "right" (Eq. 2), "left" (Captum), or "trapezoid".
        measure: What makes a unit important; for the controls RandomImportance, Shuffled or Inverted.
        seed: Seed of the samples drawn and of the rates. Masks come from torch's own random stream.
        annealing_steps: Instead of `annealing_epochs`: optimiser steps, as `Trainer(max_steps=...)` counts them, of
            vanilla dropout before Y-Drop, at least 0.
        transition: "step" changes from vanilla dropout to Y-Drop at the end of annealing; "linear" runs phase 1 from
            the start, and moves in a line from the vanilla rate to the buckets' while annealing.
        every_n_batches: Phase 1 runs on every nth batch, at least 1. Its probabilities serve until the next phase 1,
            and their running mean moves as far as in n updates. Rankings have to be fresh: with fewer than two of them
            in an epoch a fit warns.
        adapter: How batches are read; by default tuples, mappings, dataclasses and named tuples of the usual form.
        objective: What phase 1 differentiates: the name of a task ("multiclass", "binary", "multilabel", "regression"
            or "reconstruction"), or an objective such as OutputSum(). By default the logit of the labelled class, as
            for "multiclass", but a first batch is refused that looks like another task.
        interpolate_at: For models of tokens, the name of a module, such as the embedding. Paths run through its
            outputs instead of the inputs.
        convert: Whether every nn.Dropout, 1d, 2d and 3d of the model becomes a ConductanceDropout when a fit starts.
        include: With `convert`, names of the modules to convert, as patterns such as "classifier.*"; all by default.
        exclude: With `convert`, names of the modules to leave, as patterns.
        batch_dim: The dimension of the samples in inputs, targets, outputs and layers: 1 for models of (T, B, F), such
            as `nn.LSTM` and `nn.Transformer` by default. A tensor with its samples first, such as lengths, may keep
            them there.
        compile_phase1: Whether the first batch compiles phase 1, for batches of the same shape, on a GPU as a CUDA
            graph: less work for the host, and the same scores up to rounding. Other batches run it eagerly.

    Raises:
        ConfigurationError: If an argument is out of range.

    Example:
        >>> trainer = Trainer(callbacks=[YDropCallback(annealing_epochs=2, elasticity=1e-2)], logger=False)

    """

    def __init__(
        self,
        annealing_epochs: int | None = None,
        elasticity: float = 1e-2,
        buckets: Buckets | None = None,
        initial_drop_prob: float | None = None,
        n_steps: int = 5,
        num_samples: NumSamples = None,
        baseline: float | list[float | None] = 0.0,
        quadrature: Quadrature = "right",
        measure: Measure = Conductance(),
        seed: int = 0,
        annealing_steps: int | None = None,
        transition: Transition = "step",
        every_n_batches: int = 1,
        adapter: Adapter = AutomaticAdapter(),
        objective: Objective | Task | None = None,
        interpolate_at: str | None = None,
        convert: bool = False,
        include: str | list[str] | None = None,
        exclude: str | list[str] | None = None,
        batch_dim: int = 0,
        compile_phase1: bool = False,
    ) -> None:
        # Now, though no model is there yet: a bad YAML file should fail when it is parsed.
        owner, chosen, is_named = "YDropCallback", objective_of("YDropCallback", objective), objective is not None
        path = PathSettings(
            owner, n_steps, num_samples, baseline, quadrature, chosen, interpolate_at, batch_dim, is_named
        )
        self.settings = EngineSettings(
            path, elasticity, buckets, initial_drop_prob, measure, seed, every_n_batches, compile_phase1
        )
        self._schedule = Schedule(annealing_epochs, annealing_steps, transition)
        check_adapter("YDropCallback", adapter)
        check_flag("YDropCallback", "convert", convert)
        check_patterns("YDropCallback", "include", include)
        check_patterns("YDropCallback", "exclude", exclude)
        if not convert and (include is not None or exclude is not None):
            raise ConfigurationError(
                f"YDropCallback(convert={convert}, include={describe(include)}, exclude={describe(exclude)}) was "
                "given.",
                "`include` and `exclude` say what to convert.",
                "Pass convert=True, or leave the two out.",
            )
        self.adapter = adapter
        self.convert = convert
        self.include = include
        self.exclude = exclude
        self.engine: YDrop | None = None
        self._state_to_load: dict[str, Any] = {}
        self._is_stale = False
        self._is_dry_run_done = False
        self._is_annealing = False
        self._warned: set[str] = set()
        self._own_hook = OwnHook()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what would train wrongly."""
        if self._is_stale:  # from a checkpoint of an earlier stage that did not use it
            self._state_to_load = {}
        if stage == "fit":
            if type(trainer).__module__.partition(".")[0] == "pytorch_lightning":
                raise ConfigurationError(
                    "YDropCallback was given to a Trainer of pytorch_lightning.",
                    "It is written for the package lightning, whose classes are others.",
                    "Write `import lightning as L`, and take Trainer and LightningModule from there.",
                )
            check_strategy(trainer)
            drivers = [each for each in trainer.callbacks if isinstance(each, YDropCallback)]  # type: ignore[attr-defined]
            if len(drivers) > 1:
                raise ConfigurationError(
                    f"The Trainer has {len(drivers)} callbacks that drive the same layers: "
                    f"{', '.join(type(each).__name__ for each in drivers)}.",
                    "A layer has one driver: of two, each would undo the probabilities of the other.",
                    "Leave one of them out.",
                )
            if "dataloader_iter" in inspect.signature(pl_module.training_step).parameters:
                raise ConfigurationError(
                    f"{type(pl_module).__name__}.training_step(dataloader_iter) takes its batches itself.",
                    "Phase 1 runs on a batch before the training step does.",
                    "Write training_step(batch, batch_idx).",
                )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the layers: by now `setup` and `configure_model` have built them."""
        report = None
        if self.convert:
            report = convert_dropout(pl_module, include=self.include, exclude=self.exclude)
            if report.converted or report.left:
                # With rates of its own, those that follow the layers' are not to come.
                rank_zero_info(str(report if self.settings.buckets is None else replace(report, rates={})))
        layers = list(map(id, driven_layers(pl_module, report).values()))
        before = self.engine
        if before is None or before.model is not pl_module or list(map(id, before.layers.values())) != layers:
            self.engine = YDrop.from_settings(pl_module, self.settings, own_method(pl_module, "ydrop_forward"))
        else:
            before.take_over()  # of a fit by another callback between this one's fits

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Load the state of a checkpoint, which some strategies restore only now, or start anew."""
        assert self.engine is not None
        if self._state_to_load:
            self._take_up()
        elif trainer.global_step == 0:  # whatever an earlier fit left; finders leave a ckpt_path too
            self.engine.reset()
        elif trainer.ckpt_path is not None:
            self.engine.reset()
            rank_zero_warn(
                "The checkpoint holds no state of YDropCallback: it holds weights alone, or comes from training "
                "without the callback. Y-Drop starts anew, with a running mean of initial_drop_prob. "
                "Resume from a full checkpoint of a run with the callback for the run to go on as it was.",
            )
        self._is_dry_run_done, self._is_annealing = False, False
        warn_of_stale_rankings(trainer, self.settings.every_n_batches)
        if lengths := self._schedule.outlasts(trainer):
            training, annealing = lengths
            rank_zero_warn(
                f"Training is to end before the annealing of YDropCallback does, after {training}, where annealing "
                f"takes {annealing}: all of it is ordinary dropout. "
                "Train for longer, or pass a smaller annealing_epochs or annealing_steps.",
                category=NoEffectWarning,
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Run phase 1 on the batch that is about to be trained on, once annealing is over."""
        assert self.engine is not None
        if self._state_to_load:  # from a finder that has restored everything in the middle of a fit
            self._take_up()
        progress = self._schedule.progress(trainer, batch_idx)
        if progress == 0 and self.engine.active:
            self.engine.deactivate()  # a checkpoint of an earlier, shorter annealing may have left the layers active
        due = progress > 0 and self.engine.is_due
        if due or not self._is_dry_run_done:
            if self._own_hook.run_early(pl_module, batch, batch_idx) == -1:
                return  # Lightning skips this batch and the rest of the epoch
            inputs, target = read_batch(pl_module, self.adapter, batch)
            # Lightning enters autocast for the training step alone; phase 1 has to see the same numbers.
            with trainer.precision_plugin.forward_context():
                if not self._is_dry_run_done:
                    self._dry_run(pl_module, batch, inputs, target)
                    self._introduce(trainer, batch, inputs, target, progress)
                if due:
                    self.engine.step(inputs, target, progress=progress)
        self._announce(trainer, progress)
        if progress > 0 and not due:
            self.engine.skip(progress=progress)
        if progress > 0 and trainer.loggers and _is_logging_step(trainer, pl_module):
            self._log(pl_module, progress)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn once of what was counted on the device: here the host waits for it anyway."""
        self._warn_once()
        if self.engine is not None and "unusable" in self._warned and trainer.loggers:
            pl_module.log(UNUSABLE, self.engine.unusable.float(), on_epoch=True, batch_size=1)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn also if training ends within an epoch."""
        self._warn_once()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the layers as vanilla dropout: Lightning does not call `teardown` when a fit raises."""
        self._release()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the layers as vanilla dropout."""
        self._release()

    def state_dict(self) -> dict[str, Any]:
        """Give the running means and the number of steps; the model's own state_dict has no trace of them."""
        if self._state_to_load or self.engine is None:
            return self._state_to_load  # until it is loaded, this is the state
        return self.engine.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a checkpoint's state until training starts. Testing and learning rate finders call this too."""
        self._state_to_load = state_dict
        self._is_stale = False

    def __repr__(self) -> str:
        path = self.settings.path
        values = {"objective": (path.objective.task or path.objective) if path.task_is_named else None}
        kept = vars(self._schedule) | vars(self.settings.path) | vars(self.settings) | vars(self) | values
        parameters = inspect.signature(YDropCallback).parameters.values()
        chosen = [
            f"{each.name}={kept[each.name]!r}" for each in parameters if repr(kept[each.name]) != repr(each.default)
        ]
        return f"{type(self).__name__}({', '.join(chosen)})"

    def _dry_run(self, pl_module: LightningModule, batch: Any, inputs: Inputs, target: Target) -> None:
        """Check what was read of a first batch, and what phase 1 makes of it."""
        assert self.engine is not None
        engine, path = self.engine, self.settings.path
        if path.objective.takes_target:
            check_labels_are_read(pl_module, self.adapter, batch, inputs, target, path.batch_dim)
        with naming_other_labels(pl_module, self.adapter, batch, target):
            engine.dry_run(inputs, target)
        self._is_dry_run_done = engine.findings is not None
        if path.objective.takes_target and self._is_dry_run_done:
            check_other_labels(
                pl_module, self.adapter, batch, target, lambda item: bool(engine.count_unusable(item) == 0)
            )

    def _introduce(self, trainer: Trainer, batch: Any, inputs: Inputs, target: Target, progress: float) -> None:
        """Say how the first batch was read and what is to come, once the dry run is done."""
        if self._is_dry_run_done:
            assert self.engine is not None
            announcement = self._schedule.announcement(trainer, progress)
            jumps = progress == 0 and self._schedule.changes_at_once
            rank_zero_info(summary(self.engine, announcement, batch, inputs, target, jumps))

    def _announce(self, trainer: Trainer, progress: float) -> None:
        """Say that Y-Drop takes over, once in a fit that begins with vanilla dropout."""
        assert self.engine is not None
        if progress == 0:
            self._is_annealing = True
        elif self._is_annealing and self._is_dry_run_done:
            self._is_annealing = False
            rank_zero_info(f"Epoch {trainer.current_epoch}: Y-Drop takes over. {rates_to_come(self.engine)}")

    def _take_up(self) -> None:
        assert self.engine is not None
        state, self._state_to_load = self._state_to_load, {}
        self.engine.load_state_dict(state)

    def _log(self, pl_module: LightningModule, progress: float) -> None:
        assert self.engine is not None
        values = {"ydrop/nonfinite": self.engine.nonfinite.float()}
        if "unusable" in self._warned:
            values[UNUSABLE] = self.engine.unusable.float()
        for name, scores in self.engine.scores.items():
            layer = self.engine.layers[name]
            values[f"ydrop/{name}/drop_prob"] = (1 - progress) * layer.p + progress * layer.drop_prob.mean()
            values[f"ydrop/{name}/top20_share"] = top_share(scores, 0.2)
        pl_module.log_dict(values, on_step=True, on_epoch=False, batch_size=1)

    def _warn_once(self) -> None:
        """Warn once of what was counted on the device so far. Call it where the host waits for the device anyway."""
        if self.engine is None:
            return
        if "nonfinite" not in self._warned and (times := int(self.engine.nonfinite)):
            self._warned.add("nonfinite")
            warnings.warn(
                f"Scores of Y-Drop's layers were not finite {times} time(s) so far; the layers kept their "
                "probabilities. Under 16-mixed the activations may overflow: try bf16-mixed, smaller inputs, or "
                "another objective.",
                RuntimeWarning,
                stacklevel=3,
            )
        if "unusable" not in self._warned and (times := int(self.engine.unusable)):
            self._warned.add("unusable")
            warnings.warn(
                f"{times} label(s) so far named no class of the output, and counted for nothing in phase 1. "
                "Classes are numbered from 0, and there are as many as the output has logits. "
                "Where such a label means that a sample does not count, say so: "
                "objective=TargetLogit(ignore_index=...).",
                RuntimeWarning,
                stacklevel=3,
            )
        for name in self.engine.unguarded:
            if name not in self._warned:
                self._warned.add(name)
                warnings.warn(
                    f"In phase 1 forward has written to {name}, for the first time after the dry run, and that could "
                    "not be undone. "
                    "Phase 1 guards what the first batch shows to be written to, and from now on this too. "
                    "Where training alone should write to it, do so `if self.training`.",
                    RuntimeWarning,
                    stacklevel=3,
                )

    def _release(self) -> None:
        self._is_stale = True
        self._own_hook.give_back()
        if self.engine is not None:
            self.engine.deactivate()


def _is_logging_step(trainer: Trainer, pl_module: LightningModule) -> bool:
    """Tell whether Lightning passes what is logged in this batch to loggers."""
    if trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
        return False
    # It counts batches that step an optimiser, however many optimisers they step; by hand, all batches count.
    steps = trainer.global_step if pl_module.automatic_optimization else trainer.fit_loop.total_batch_idx
    return bool((steps + 1) % trainer.log_every_n_steps == 0)  # type: ignore[attr-defined]
