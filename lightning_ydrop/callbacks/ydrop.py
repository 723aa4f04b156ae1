"""Y-Drop in a Trainer."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_ydrop.errors import ConfigurationError, check_count
from lightning_ydrop.functional.attribution import Quadrature, top_share
from lightning_ydrop.functional.rates import Buckets
from lightning_ydrop.phase1.batches import read_batch
from lightning_ydrop.phase1.engine import YDrop, check_settings
from lightning_ydrop.phase1.measures import Conductance, Measure


class YDropCallback(Callback):
    """Drop the units that matter most more often (Y-Drop, arXiv 2409.09088).

    The model's `ConductanceDropout` layers are vanilla dropout for the first epochs. After that, before each training
    batch, phase 1 measures every unit's importance on some samples of the batch and sets its drop probability. Batches
    have the form (x, y). Whatever does not fit is refused on the first batch of a fit, before anything is trained.

    For each layer two values are logged every `trainer.log_every_n_steps` batches: `ydrop/<layer>/drop_prob`, the mean
    drop probability of its units, and `ydrop/<layer>/top20_share`, the share of the sum of positive scores that the
    highest-scored 20% of its units hold (0.2 where importance is evenly spread).

    Args:
        annealing_epochs: `K`, epochs of vanilla dropout before Y-Drop, at least 0; the paper tunes it in 1 to 10.
        elasticity: `alpha` of the running mean (Eq. 6), in [0, 1]; the paper tunes it in 1e-5 to 1e-1. 0 keeps
            `initial_drop_prob`, 1 follows each step.
        buckets: Rates and sizes of the two buckets, the weak and the strong units (Eq. 5 and 8).
        initial_drop_prob: `p_0`, where the running mean of every unit starts, in [0, 1).
        n_steps: `n_c`, steps on the path from the baseline to each sample, at least 1.
        num_samples: `B_c`, samples drawn from each batch of B to measure importance (Eq. 9), at least 1. By default
            max(1, (B - 1) // n_steps), so that phase 1 has no more rows than the batch: 12 for 64, 6 for 32.
        baseline: Where the path starts, in the model's input space, that is after normalisation.
        quadrature: Where on each step the gradient is taken: "right" (Eq. 2), "left" (Captum), or "trapezoid".
        measure: What makes a unit important; for the controls RandomImportance or Inverted.
        seed: Of the samples drawn and the rates. Masks follow torch's own random stream.

    Raises:
        ConfigurationError: If an argument is out of range.

    Example:
        >>> trainer = Trainer(callbacks=[YDropCallback(annealing_epochs=2, elasticity=1e-2)], logger=False)

    """

    def __init__(
        self,
        annealing_epochs: int = 2,
        elasticity: float = 1e-3,
        buckets: Buckets = Buckets(),
        initial_drop_prob: float = 0.35,
        n_steps: int = 5,
        num_samples: int | None = None,
        baseline: float = 0.0,
        quadrature: Quadrature = "right",
        measure: Measure = Conductance(),
        seed: int = 0,
    ) -> None:
        check_count("YDropCallback", "annealing_epochs", annealing_epochs, minimum=0, example=2)
        self._settings: dict[str, Any] = {
            "elasticity": elasticity,
            "buckets": buckets,
            "initial_drop_prob": initial_drop_prob,
            "n_steps": n_steps,
            "num_samples": num_samples,
            "baseline": baseline,
            "quadrature": quadrature,
            "measure": measure,
            "seed": seed,
        }
        # Now, though the engine checks them too: a bad YAML file should fail when it is parsed.
        check_settings("YDropCallback", **self._settings)
        self.annealing_epochs = annealing_epochs
        self.engine: YDrop | None = None
        self._state_to_load: dict[str, Any] = {}
        self._rehearsed = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what would train wrongly."""
        if stage == "fit" and trainer.world_size > 1:
            raise ConfigurationError(
                f"YDropCallback was given to a Trainer of {trainer.world_size} processes.",
                "All processes need the same drop probabilities, and so far only one process is supported.",
                "Train with devices=1 and num_nodes=1.",
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the layers: by now `setup` and `configure_model` have built them."""
        if self.engine is None or self.engine.model is not pl_module:
            self.engine = YDrop(pl_module, **self._settings)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take up the state of a checkpoint: some strategies restore callbacks no earlier than this."""
        assert self.engine is not None
        if self._state_to_load:
            self.engine.load_state_dict(self._state_to_load)
            self._state_to_load = {}
        self._rehearsed = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Run phase 1 on the batch that is about to be trained on, once annealing is over."""
        assert self.engine is not None
        inputs, target = read_batch(batch)
        # Lightning enters autocast for the training step alone; phase 1 has to see the same numbers.
        with trainer.precision_plugin.forward_context(), _logging_muted(pl_module):
            if not self._rehearsed:
                self.engine.rehearse(inputs, target)
                self._rehearsed = True
            # A trial run lasts one epoch, and yet has to try what comes after annealing.
            if trainer.current_epoch < self.annealing_epochs and not trainer.fast_dev_run:  # type: ignore[attr-defined]
                return
            self.engine.step(inputs, target)
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if trainer.loggers and every and (trainer.fit_loop.total_batch_idx + 1) % every == 0:
            self._log(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the layers as vanilla dropout: Lightning does not call `teardown` when a fit raises."""
        self._release()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the layers as vanilla dropout."""
        self._release()

    def state_dict(self) -> dict[str, Any]:
        """Give the running means and the number of steps; the model's own state_dict has no trace of them."""
        if self._state_to_load or self.engine is None:
            return self._state_to_load  # what is still to be taken up is the state, whoever asks before then
        return self.engine.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a checkpoint's state until training starts: testing and learning rate finders come here too."""
        self._state_to_load = state_dict

    def _release(self) -> None:
        if self.engine is not None:
            self.engine.deactivate()

    def _log(self, pl_module: LightningModule) -> None:
        assert self.engine is not None
        for name, scores in self.engine.scores.items():
            values = {
                f"ydrop/{name}/drop_prob": self.engine.layers[name].drop_prob.mean(),
                f"ydrop/{name}/top20_share": top_share(scores, 0.2),
            }
            pl_module.log_dict(values, on_step=True, on_epoch=False, batch_size=1)


@contextmanager
def _logging_muted(pl_module: LightningModule) -> Iterator[None]:
    """Keep what a model logs in its forward pass out of the logs: phase 1 is no training step."""
    modules = [module for module in pl_module.modules() if isinstance(module, LightningModule)]
    try:
        for module in modules:
            # Set on the instance, where it stands before the method of the class. `log_dict` comes here too.
            module.__dict__["log"] = _ignore
        yield
    finally:
        for module in modules:
            module.__dict__.pop("log", None)


def _ignore(*args: Any, **kwargs: Any) -> None:
    """Take what would have been logged."""
