"""Conductance in the logs of a Trainer."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_ydrop.analysis.plots import plot_conductance, plot_cumulative_conductance
from lightning_ydrop.analysis.spread import ConductanceSpread, update_spreads
from lightning_ydrop.checks import check_count, check_flag
from lightning_ydrop.errors import ConfigurationError, NoEffectWarning, describe
from lightning_ydrop.functional.attribution import Quadrature
from lightning_ydrop.importance.attribution import check_layout, conductance_along
from lightning_ydrop.importance.objectives import Objective
from lightning_ydrop.importance.path import PathSettings
from lightning_ydrop.importance.ranks import gather_over_ranks
from lightning_ydrop.importance.selection import select_layers
from lightning_ydrop.importance.tasks import Task, objective_of
from lightning_ydrop.layers import ConductanceDropout
from lightning_ydrop.models.adapters import Adapter, AutomaticAdapter, check_adapter
from lightning_ydrop.models.batches import own_method, read_batch
from lightning_ydrop.models.first_batch import check_labels_are_read
from lightning_ydrop.models.modules import named_modules

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class ConductanceMonitor(Callback):
    """Log how importance is spread over the units of a network while it is validated, whatever it is trained by.

    At the end of each validation it logs for each layer `<prefix>/<layer>/top20_share`, the share of the sum of
    positive means that the highest 20% of the units hold, `.../gini`, their Gini coefficient, and `.../total`, the sum
    of all, over the batches of all ranks. With `figures` it hands the curves of all layers to TensorBoard and Weights &
    Biases, and writes them as PNG files beside what other loggers write. TensorBoard also gets histograms:
    `<prefix>/<layer>/units` of the means, and of layers that Y-Drop drives `.../drop_prob`.

    Batches are read and the LightningModule is called as `YDropCallback` does it: its methods `ydrop_inputs` and
    `ydrop_forward` come first, where it has them.

    Args:
        layers: Names of the layers; every `ConductanceDropout` by default. Any module that puts out one floating tensor
            will do.
        num_batches: Validation batches of each loader that are measured, at least 1.
        every_n_epochs: In a fit it measures at the end of every nth epoch, at least 1. With 2 these are the epochs that
            `check_val_every_n_epoch=2` validates.
        figures: Whether to draw; this takes matplotlib.
        n_steps: Steps on the path, at least 1.
        quadrature: Where on each step the gradient is taken.
        baseline: Where the path starts.
        objective: What is differentiated: an objective, or the name of a task as for `YDropCallback`.
        interpolate_at: Name of a module at whose output the paths end instead of at the inputs.
        unit_dim: As for `layer_conductance`: dimension of the units where a layer does not say.
        max_rows: The largest number of rows that pass through the model at once, at least 2. "batch" takes as many as
            the batch has.
        adapter: How batches are read, where the LightningModule has no method `ydrop_inputs`.
        batch_dim: The dimension of the samples in inputs, targets, outputs and layers: 1 for models of (T, B, F).
        prefix: It starts the names of values and figures. Each monitor of a Trainer needs its own.

    Raises:
        ConfigurationError: If an argument is out of range, or figures are wanted and matplotlib is not installed; when
            a Trainer sets up, if it has another monitor with the same prefix.

    Example:
        >>> trainer = Trainer(callbacks=[ConductanceMonitor(layers=["body.0"], figures=False)], logger=False)

    """

    def __init__(
        self,
        layers: str | list[str] | None = None,
        num_batches: int = 10,
        every_n_epochs: int = 1,
        figures: bool = True,
        n_steps: int = 10,
        quadrature: Quadrature = "trapezoid",
        baseline: float | list[float | None] = 0.0,
        objective: Objective | Task | None = None,
        interpolate_at: str | None = None,
        unit_dim: int | None = None,
        max_rows: int | Literal["batch"] = "batch",
        adapter: Adapter = AutomaticAdapter(),
        prefix: str = "conductance",
        batch_dim: int = 0,
    ) -> None:
        check_count("ConductanceMonitor", "num_batches", num_batches, minimum=1, example=10)
        check_count("ConductanceMonitor", "every_n_epochs", every_n_epochs, minimum=1, example=1)
        self._path = PathSettings(
            *("ConductanceMonitor", n_steps, "all", baseline, quadrature),
            *(objective_of("ConductanceMonitor", objective), interpolate_at, batch_dim),
        )
        check_layout("ConductanceMonitor", unit_dim, max_rows)
        check_adapter("ConductanceMonitor", adapter)
        check_flag("ConductanceMonitor", "figures", figures)
        if figures:
            try:
                import matplotlib as _matplotlib  # noqa: F401
            except ImportError as error:
                raise ConfigurationError(
                    "ConductanceMonitor(figures=True) was given, and matplotlib is not installed.",
                    "Figures are drawn with matplotlib.",
                    "Install lightning-ydrop[plots], or pass figures=False.",
                ) from error
        if not isinstance(prefix, str) or not prefix:
            raise ConfigurationError(
                f"ConductanceMonitor(prefix={describe(prefix)}) was given.",
                "`prefix` stands before the names of what is logged.",
                'Pass, for example, prefix="conductance".',
            )
        self.layers = layers
        self.num_batches = num_batches
        self.every_n_epochs = every_n_epochs
        self.figures = figures
        self.adapter = adapter
        self.prefix = prefix
        self._unit_dim = unit_dim
        self._max_rows = max_rows
        self._spreads: dict[str, ConductanceSpread] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse another monitor whose values would be averaged with those of this one."""
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        monitors = [callback for callback in callbacks if isinstance(callback, ConductanceMonitor)]
        if [monitor.prefix for monitor in monitors].count(self.prefix) > 1:
            raise ConfigurationError(
                f"The Trainer has several ConductanceMonitors with prefix={describe(self.prefix)}.",
                "What they log would have the same names.",
                'Give each its own, for example prefix="conductance/loss".',
            )

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse layers that are not there. By now a YDropCallback with `convert=True` has converted its layers."""
        select_layers("ConductanceMonitor", pl_module, self.layers)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse layers that are not there, where there was no sanity check, and warn where nothing is validated."""
        select_layers("ConductanceMonitor", pl_module, self.layers)
        if not trainer.enable_validation:
            rank_zero_warn(
                "ConductanceMonitor measures while a network is validated, and this fit has no validation: nothing "
                "is logged. Pass a validation loader to fit, write `validation_step`, and leave limit_val_batches "
                "above 0.",
                category=NoEffectWarning,
            )

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the last validation."""
        self._spreads = {}

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Measure a batch."""
        if batch_idx >= self.num_batches or not self._is_due(trainer):
            return
        inputs, target = read_batch(pl_module, self.adapter, batch)
        if not self._spreads and self._path.objective.takes_target:
            check_labels_are_read(pl_module, self.adapter, batch, inputs, target, self._path.batch_dim)
        forward = own_method(pl_module, "ydrop_forward")
        with trainer.precision_plugin.forward_context():
            measured = conductance_along(
                self._path, pl_module, inputs, target, self.layers, forward, self._unit_dim, self._max_rows
            )
        update_spreads(self._spreads, measured)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what was measured: of all ranks, since the metrics add up over them."""
        computed = self._computed(pl_module)
        for name, values in computed.items():
            logged = {"top20_share": values["top_share"], "gini": values["gini"], "total": values["total"]}
            # The values are the same on all ranks, but Lightning warns without `sync_dist`.
            pl_module.log_dict({f"{self.prefix}/{name}/{key}": each for key, each in logged.items()}, sync_dist=True)
        if computed and trainer.is_global_zero and not trainer.sanity_checking:
            means = {name: values["mean"].reshape(self._spreads[name].num_units) for name, values in computed.items()}
            self._add_histograms(trainer, pl_module, means)
            if self.figures:
                self._draw(trainer, means)

    def _is_due(self, trainer: Trainer) -> bool:
        return trainer.state.fn != TrainerFn.FITTING or (trainer.current_epoch + 1) % self.every_n_epochs == 0

    def _computed(self, pl_module: LightningModule) -> dict[str, dict[str, Tensor]]:
        """Compute the metrics of the layers that any rank has measured: some may have had no batch."""
        sizes: dict[str, int] = {}
        for theirs in gather_over_ranks({name: spread.num_units for name, spread in self._spreads.items()}):
            sizes |= theirs
        computed = {}
        for name, size in sizes.items():
            if name not in self._spreads:
                nothing = torch.empty(0, size, device=pl_module.device)  # torchmetrics warns of a metric without any
                update_spreads(self._spreads, {name: nothing})
            computed[name] = self._spreads[name].compute()
        return computed

    def _add_histograms(self, trainer: Trainer, pl_module: LightningModule, means: dict[str, Tensor]) -> None:
        histograms = {f"{name}/units": values for name, values in means.items()}
        layers = {name: module for name, module in named_modules(pl_module).items() if name in means}
        histograms |= {
            f"{name}/drop_prob": layer.drop_prob
            for name, layer in layers.items()
            if isinstance(layer, ConductanceDropout) and len(layer.drop_prob) > 0
        }
        for logger in trainer.loggers:
            experiment: Any = getattr(logger, "experiment", None)
            if hasattr(experiment, "add_histogram"):
                for name, values in histograms.items():
                    experiment.add_histogram(f"{self.prefix}/{name}", values, trainer.global_step)

    def _draw(self, trainer: Trainer, means: dict[str, Tensor]) -> None:
        for name, axes in (
            (f"{self.prefix}/units", plot_conductance(means)),
            (f"{self.prefix}/cumulative", plot_cumulative_conductance(means)),
        ):
            figure: Any = axes.figure
            for logger in trainer.loggers:
                log_figure(logger, name, figure, trainer.global_step, Path(trainer.default_root_dir))


def log_figure(logger: Logger, name: str, figure: "Figure", step: int, folder: Path) -> None:
    """Give a figure to a logger that takes pictures, or write it beside what the logger writes.

    Args:
        logger: One of Lightning's, or any other.
        name: What the figure is called there.
        figure: A figure of matplotlib.
        step: The optimiser step that it belongs to.
        folder: Where the file goes if the logger has no folder.

    """
    experiment: Any = getattr(logger, "experiment", None)
    if hasattr(experiment, "add_figure"):  # TensorBoard
        experiment.add_figure(name, figure, step)
    elif hasattr(logger, "log_image"):  # Weights & Biases
        logger.log_image(name, [figure])
    else:
        file = Path(logger.log_dir or logger.save_dir or folder) / f"{name}-{step}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file)
