"""How well a trained network does without some of its units."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn

from lightning_ydrop.analysis.spread import mean_conductance
from lightning_ydrop.checks import check_choice, check_count, check_fraction
from lightning_ydrop.errors import ConfigurationError, describe
from lightning_ydrop.importance.attribution import check_layout
from lightning_ydrop.importance.recording import Tape, borrowed, recording
from lightning_ydrop.importance.selection import LayerChoice, check_called, count_units, select_layers, unit_dims_of
from lightning_ydrop.models.adapters import Adapter, AutomaticAdapter, check_adapter
from lightning_ydrop.models.batches import own_method, read_batch
from lightning_ydrop.models.calls import Target, arguments_of, read_output, signature_of
from lightning_ydrop.models.modules import device_of
from lightning_ydrop.models.state import logging_muted

Order = Literal["random", "conductance"] | Mapping[str, Tensor]
FRACTIONS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99)


@dataclass(frozen=True)
class RemovalCurve:
    """Accuracy while units are removed.

    Attributes:
        fractions: Of the units of every layer that are removed.
        accuracy: In [0, 1], shape (repeats, fractions), in float64 on the CPU.

    """

    fractions: tuple[float, ...]
    accuracy: Tensor

    @property
    def mean(self) -> Tensor:
        """Over repeats, shape (fractions,)."""
        return self.accuracy.mean(0)

    @property
    def std(self) -> Tensor:
        """Standard deviation over repeats, shape (fractions,): 0 where there is but one."""
        return self.accuracy.std(0) if len(self.accuracy) > 1 else torch.zeros(len(self.fractions))

    def threshold(self, loss: float = 0.01) -> float:
        """Give the largest fraction up to which accuracy falls by no more than this."""
        lost = self.mean[0] - self.mean > loss + 1e-9  # for what differences of fractions of samples are rounded by
        return self.fractions[int(lost.int().argmax()) - 1 if lost.any() else -1]


@torch.inference_mode(False)
def removal_curve(
    model: nn.Module,
    data: Iterable[Any],
    order: Order = "random",
    *,
    layers: LayerChoice | Sequence[LayerChoice] | None = None,
    fractions: Sequence[float] = FRACTIONS,
    repeats: int = 25,
    seed: int = 0,
    adapter: Adapter = AutomaticAdapter(),
    forward: Callable[..., Any] | None = None,
    unit_dim: int | None = None,
    **measuring: Any,
) -> RemovalCurve:
    """Measure accuracy while more and more units of every layer are removed (Fig. 3, arXiv 2409.09088).

    A unit is removed by setting the layer's output for it to 0; normalisation behind the layer still makes a constant
    of that. The model is used in evaluation mode, and given back as it was. The accuracy is that of the data of this
    process: nothing is exchanged with others.

    Args:
        model: A model that classifies: its output is, or has, logits (B, C).
        data: Batches with class indices (B,), such as a DataLoader gives; for order "conductance" more than once.
        order: Which units go first: those drawn at "random", those of the highest mean "conductance" over `data`, or
            those of the highest scores in a mapping from a layer's name to scores (U,). Weakest first is that of the
            negative scores.
        layers: The layers that lose units, as for `layer_conductance`: every `ConductanceDropout` by default. A layer
            that puts out the logits is better not among them.
        fractions: Of the units of every layer that are removed, rounded to whole units: in [0, 1], ascending from 0.
        repeats: How often units are drawn; other orders are of one kind.
        seed: Of the draws.
        adapter: How batches are read, where the model has no method `ydrop_inputs`.
        forward: As for `layer_conductance`; the model's method `ydrop_forward`, where it has one, by default.
        unit_dim: As for `layer_conductance`.
        **measuring: Other arguments of `mean_conductance`, where `order` is "conductance".

    Returns:
        The accuracy for each repeat and fraction.

    Raises:
        ConfigurationError: If an argument does not fit to the model, its forward does not call a layer, or outputs and
            targets have no accuracy.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> data = [(torch.rand(16, 4), torch.zeros(16, dtype=torch.long))]
        >>> removal_curve(model, data, layers="1", fractions=(0, 0.5, 1), repeats=3).accuracy.shape
        torch.Size([3, 3])

    """
    if not isinstance(order, Mapping):
        check_choice("removal_curve", "order", order, ("random", "conductance"))
    if measuring and order != "conductance":
        raise ConfigurationError(
            f"removal_curve(order={describe(order)}, {', '.join(measuring)}=...) was given.",
            "Other arguments are those of `mean_conductance`, and serve the order by conductance.",
            "Leave them out, or pass order='conductance'.",
        )
    check_count("removal_curve", "repeats", repeats, minimum=1, example=25)
    for fraction in fractions:
        check_fraction("removal_curve", "fractions", fraction, example=0.5)
    if not fractions or fractions[0] != 0 or list(fractions) != sorted(fractions):
        raise ConfigurationError(
            f"removal_curve(fractions={describe(tuple(fractions))}) was given.",
            "`fractions` ascend from 0, where nothing is removed.",
            "Pass, for example, fractions=(0, 0.2, 0.4, 0.6, 0.8).",
        )
    check_layout("removal_curve", unit_dim, None)
    check_adapter("removal_curve", adapter)
    if order == "conductance":
        order = mean_conductance(
            model, data, layers=layers, adapter=adapter, forward=forward, unit_dim=unit_dim, **measuring
        )
    chosen = select_layers("removal_curve", model, layers)
    dims = unit_dims_of(chosen, unit_dim)
    called = forward or own_method(model, "ydrop_forward") or model
    device, signature = device_of(model), signature_of(model, called)
    ranks: dict[str, Tensor] = {}
    correct = torch.zeros(repeats if order == "random" else 1, len(fractions), dtype=torch.float64)
    num_samples = 0
    with borrowed(model, device), torch.no_grad(), logging_muted(model), _removing(chosen, dims) as kept:
        for batch in data:
            inputs, target = read_batch(model, adapter, move_data_to_device(batch, device))
            positional, keywords = arguments_of(signature, inputs)
            if not ranks:
                with recording(chosen) as tape:
                    output = read_output(called(*positional, **keywords))
                num_units = _num_units(chosen, dims, tape, rows=len(output))
                ranks = _ranks(order, num_units, repeats, seed, device)
            for repeat, place in itertools.product(*map(range, correct.shape)):
                for name, rank in ranks.items():
                    kept[name] = rank[repeat] >= round(fractions[place] * num_units[name])
                logits = read_output(called(*positional, **keywords))
                correct[repeat, place] += _num_correct(logits, target).cpu()
            kept.clear()
            num_samples += len(logits)
    if num_samples == 0:
        raise ConfigurationError(
            f"removal_curve(data={describe(data)}) gave no batch.",
            "Accuracy is measured on batches of inputs and targets, which order='conductance' reads before that too.",
            "Pass a DataLoader, or a list of batches.",
        )
    return RemovalCurve(tuple(fractions), correct / num_samples)


def _num_units(chosen: Mapping[str, nn.Module], dims: Mapping[str, int], tape: Tape, *, rows: int) -> dict[str, int]:
    check_called("removal_curve", chosen, tape)
    return {name: count_units(name, layer, tape[name], dims[name], rows=rows) for name, layer in chosen.items()}


def _num_correct(logits: Tensor, target: Target) -> Tensor:
    fits = target is not None and not target.is_floating_point() and target.shape == logits.shape[:1]
    if target is None or not fits or logits.ndim != 2 or logits.shape[1] < 2:
        raise ConfigurationError(
            f"removal_curve read the target {describe(target)} from a batch, for the output {describe(logits)}.",
            "Accuracy is that of logits (B, C) of at least two classes, for a class index (B,) for each sample.",
            "Pass data with such targets, an adapter that finds them, or forward=... that gives such logits.",
        )
    return logits.argmax(1).eq(target).sum()


def _ranks(
    order: Literal["random"] | Mapping[str, Tensor],
    num_units: Mapping[str, int],
    repeats: int,
    seed: int,
    device: torch.device,
) -> dict[str, Tensor]:
    """Give to each unit of each layer its place in the order of removal, from 0: (repeats, U)."""
    if order == "random":
        generator = torch.Generator().manual_seed(seed)
        scores = {
            name: torch.rand(repeats, size, generator=generator, device="cpu") for name, size in num_units.items()
        }
    else:
        wrong = [name for name, size in num_units.items() if name not in order or order[name].shape != (size,)]
        if wrong:
            raise ConfigurationError(
                f"removal_curve(order={describe(order)}) was given.",
                f"Scores to order units by have the shape (U,) for each layer: {num_units}.",
                "Average them over samples, and choose the same `layers`.",
            )
        scores = {name: order[name].unsqueeze(0) for name in num_units}
    # The place of each unit in the sorted row is the inverse of the permutation that sorts it.
    return {
        name: values.to(device).argsort(dim=1, descending=True, stable=True).argsort(1)
        for name, values in scores.items()
    }


@contextmanager
def _removing(layers: Mapping[str, nn.Module], unit_dims: Mapping[str, int]) -> Iterator[dict[str, Tensor]]:
    """Let layers put out 0 for units.

    Yields:
        What is to be filled in: by the name of the layer which units are kept, as booleans (U,). A layer that is not
        named keeps all.

    """
    kept: dict[str, Tensor] = {}

    def remover(name: str) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        def remove(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            if name not in kept:
                return output
            # Not a product: what is removed could be infinite.
            return output.movedim(unit_dims[name], -1).where(kept[name], 0).movedim(-1, unit_dims[name])

        return remove

    handles = [layer.register_forward_hook(remover(name)) for name, layer in layers.items()]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()
