"""What resuming needs of Lightning's loops, and no public name offers. Tests fail when Lightning changes it."""

import math
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor
from torchmetrics import Metric, MetricCollection


def training_loaders(trainer: Trainer) -> list[Any]:
    """List the loaders that a fit takes its batches from, as Lightning has changed them."""
    loader = trainer.fit_loop._combined_loader
    return [] if loader is None else list(loader.flattened)


def begin_epoch_anew(trainer: Trainer) -> None:
    """Make the iterator of batches again: Lightning has made one before callbacks see that training starts."""
    fetcher = trainer.fit_loop._data_fetcher
    assert fetcher is not None
    iter(fetcher)


def accumulates(trainer: Trainer) -> bool:
    """Tell whether the optimiser has not stepped since the last batch, because gradients accumulate."""
    return bool(trainer.fit_loop._should_accumulate())


def steps_in_epoch(trainer: Trainer) -> float:
    """Count the optimiser steps of an epoch, infinitely many where nobody knows.

    `Trainer.estimated_stepping_batches` is -1 without a length, half of the steps of two optimisers, and raises where
    accumulation changes.
    """
    model: LightningModule = trainer.lightning_module
    optimisers: list[Any] = trainer.optimizers
    steps_by_itself = not model.automatic_optimization and len(optimisers) > 1
    if steps_by_itself or any(isinstance(each, GradientAccumulationScheduler) for each in _callbacks(trainer)):
        return math.inf
    batches = float(trainer.num_training_batches)
    return batches if math.isinf(batches) else math.ceil(batches / trainer.accumulate_grad_batches)


def skips_validation(trainer: Trainer) -> bool:
    """Tell whether a fit that resumes from a checkpoint of this moment leaves out the validation that comes next.

    Lightning does so where a hook saves after a batch, before the validation that follows this batch.
    """
    loop = trainer.fit_loop.epoch_loop
    progress = loop.batch_progress.current
    # A batch counts as completed after the hooks that save after it.
    is_saved_by_hook = progress.completed < progress.processed  # type: ignore[attr-defined]
    fetcher = trainer.fit_loop._data_fetcher
    is_due = loop.batch_progress.is_last_batch or (fetcher is not None and loop._should_check_val_fx(fetcher))
    return bool(is_saved_by_hook and is_due)


def _callbacks(trainer: Trainer) -> list[Any]:
    return list(trainer.callbacks)  # type: ignore[attr-defined]


def logged_so_far(trainer: Trainer) -> dict[str, dict[str, Tensor]]:
    """Give what has been logged of an epoch, and is to become the value of the epoch, by Lightning's own keys."""
    results = trainer.fit_loop.epoch_loop._results
    return {
        key: {name: state.detach().cpu() for name, state in metric.metric_state.items() if isinstance(state, Tensor)}
        for key, metric in results.items()
        if metric.is_tensor and metric.meta.on_epoch
    }


def add_logged(trainer: Trainer, logged: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Add what was logged before a fit was interrupted to what has been logged since.

    Args:
        trainer: The Trainer.
        logged: What `logged_so_far` gave.

    Returns:
        What is still to be added, because nothing was logged by that name yet.

    """
    results = trainer.fit_loop.epoch_loop._results
    for key in logged.keys() & results.keys():
        metric, kept = results[key], {name: value.to(results[key].value.device) for name, value in logged[key].items()}
        if metric.meta.is_mean_reduction:
            metric.cumulated_batch_size = kept["cumulated_batch_size"] + metric.cumulated_batch_size
        if metric.meta.is_max_reduction or metric.meta.is_min_reduction:
            metric.value = metric.meta.reduce_fx(kept["value"], metric.value)
        else:
            metric.value = kept["value"] + metric.value
    return {key: value for key, value in logged.items() if key not in results}


def metric_states(pl_module: LightningModule) -> dict[str, Any]:
    """Give the states of the metrics of torchmetrics in a LightningModule: its checkpoints do not hold them."""
    for module in pl_module.modules():
        if isinstance(module, MetricCollection):
            module.values()  # metrics that share a state get their own
    return {name: (metric.update_count, _on(metric.metric_state, "cpu")) for name, metric in _metrics(pl_module)}


def set_metric_states(pl_module: LightningModule, states: dict[str, Any]) -> None:
    """Restore what `metric_states` gave."""
    for name, metric in _metrics(pl_module):
        if name in states:
            metric._update_count, values = states[name]
            metric._computed = None
            for key, value in _on(values, metric.device).items():
                setattr(metric, key, value)


def _metrics(pl_module: LightningModule) -> list[tuple[str, Metric]]:
    return [(name, module) for name, module in pl_module.named_modules() if isinstance(module, Metric)]


def _on(values: Any, device: torch.device | str) -> Any:
    if isinstance(values, Tensor):
        return values.detach().to(device, copy=True)
    if isinstance(values, dict):
        return {key: _on(value, device) for key, value in values.items()}
    return [_on(value, device) for value in values]
