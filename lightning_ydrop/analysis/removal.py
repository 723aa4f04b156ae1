"""The accuracy of a trained network without some of its units."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn

from lightning_ydrop import progress
from lightning_ydrop.analysis.spread import mean_conductance
from lightning_ydrop.checks import check_choice, check_count, check_flag, check_fraction, is_list
from lightning_ydrop.errors import ConfigurationError, describe
from lightning_ydrop.functional.removal import removal_threshold
from lightning_ydrop.importance.attribution import check_layout
from lightning_ydrop.importance.recording import Tape, borrowed, recording
from lightning_ydrop.importance.selection import LayerChoice, check_called, count_units, select_layers, unit_dims_of
from lightning_ydrop.models.adapters import Adapter, AutomaticAdapter, check_adapter
from lightning_ydrop.models.batches import own_method, read_batch
from lightning_ydrop.models.calls import Target, arguments_of, read_output, signature_of
from lightning_ydrop.models.holdings import modules_held
from lightning_ydrop.models.modules import device_of
from lightning_ydrop.models.sharing import parameters_shared_alone
from lightning_ydrop.models.state import leaving_no_trace

Order = Literal["random", "conductance"] | Mapping[str, Tensor]
FRACTIONS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99)


@dataclass(frozen=True)
class RemovalCurve:
    """Accuracy while units are removed.

    Attributes:
        fractions: The fractions of the units of every layer that are removed, ascending from 0.
        accuracy: In [0, 1], shape (repeats, fractions), in float64 on the CPU.

    """

    fractions: tuple[float, ...]
    accuracy: Tensor

    @property
    def mean(self) -> Tensor:
        """Mean accuracy over repeats, shape (fractions,)."""
        return self.accuracy.mean(0)

    @property
    def std(self) -> Tensor:
        """Standard deviation over repeats, shape (fractions,): 0 for a single one."""
        return self.accuracy.std(0) if len(self.accuracy) > 1 else torch.zeros(len(self.fractions))

    def threshold(self, loss: float = 0.01) -> float:
        """Give the largest fraction up to which mean accuracy falls by at most `loss`, see `functional`.

        Args:
            loss: By how much it may fall, in [0, 1].

        Raises:
            ConfigurationError: If `loss` is outside [0, 1].

        """
        return removal_threshold(self.mean, self.fractions, loss)


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
    progress_bar: bool = True,
    **measuring: Any,
) -> RemovalCurve:
    """Measure accuracy while more and more units of every layer are removed (Fig. 3, arXiv 2409.09088).

    To remove a unit, the layer's output for it is set to 0. Normalisation after the layer still turns that into a
    constant. The model is used in evaluation mode, and given back as it was. Accuracy is measured on the data of this
    process. Nothing is exchanged with other processes.

    Args:
        model: A classifier: its output is, or has, logits (B, C).
        data: Batches with class indices (B,), such as those of a DataLoader. The order "conductance" reads them twice.
        order: The units that go first: "random" ones, those with the highest mean "conductance" over `data`, or those
            with the highest scores in a mapping from a layer's name to scores (U,). Negate the scores to remove the
            weakest first.
        layers: The layers that lose units, as for `layer_conductance`. By default every `ConductanceDropout`. Leave out
            the layer that returns the logits.
        fractions: The fractions of the units of every layer that are removed, in [0, 1], ascending from 0. They are
            rounded to whole units.
        repeats: How often units are drawn, at least 1. Orders other than "random" have a single repeat.
        seed: Seed of the draws, at least 0.
        adapter: It reads batches, unless the model has a method `ydrop_inputs`.
        forward: As for `layer_conductance`. By default the model's method `ydrop_forward`, if it has one.
        unit_dim: As for `layer_conductance`.
        progress_bar: Whether a progress bar shows once it takes more than five seconds.
        **measuring: Other arguments of `mean_conductance`, for the order "conductance".

    Returns:
        The accuracy for each repeat and fraction.

    Raises:
        ConfigurationError: If an argument does not fit the model, its forward does not call a layer, or accuracy is
            not defined for its outputs and the targets.

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
            "Other arguments are those of `mean_conductance`, and need the order by conductance.",
            "Leave them out, or pass order='conductance'.",
        )
    repeats = check_count("removal_curve", "repeats", repeats, minimum=1, example=25)
    seed = check_count("removal_curve", "seed", seed, minimum=0, example=0)
    if not is_list(fractions):
        raise ConfigurationError(
            f"removal_curve(fractions={describe(fractions)}) was given.",
            "`fractions` is a list of numbers.",
            "Pass, for example, fractions=(0, 0.2, 0.4, 0.6, 0.8).",
        )
    fractions = tuple(check_fraction("removal_curve", "fractions", each, example=0.5) for each in fractions)
    if not fractions or fractions[0] != 0 or list(fractions) != sorted(fractions):
        raise ConfigurationError(
            f"removal_curve(fractions={describe(fractions)}) was given.",
            "`fractions` ascend from 0, where nothing is removed.",
            "Pass, for example, fractions=(0, 0.2, 0.4, 0.6, 0.8).",
        )
    check_layout("removal_curve", unit_dim, None)
    check_adapter("removal_curve", adapter)
    check_flag("removal_curve", "progress_bar", progress_bar)
    if order == "conductance":
        measuring |= {"adapter": adapter, "forward": forward, "unit_dim": unit_dim, "progress_bar": progress_bar}
        order = mean_conductance(model, data, layers=layers, **measuring)
    selected = select_layers("removal_curve", model, layers)
    unit_dims = unit_dims_of(selected, unit_dim)
    forward = forward or own_method(model, "ydrop_forward") or model
    device, signature = device_of(model), signature_of(model, forward)
    ranks: dict[str, Tensor] = {}
    num_correct = torch.zeros(repeats if order == "random" else 1, len(fractions), dtype=torch.float64)
    num_samples = 0
    beside: list[object] = [] if forward is model else [forward, *modules_held(forward)]
    with (
        parameters_shared_alone(),  # data may be read once only, so there is no other try
        borrowed(model, device, beside=beside),
        torch.no_grad(),
        _removing(selected, unit_dims) as kept_units,
    ):
        for batch in progress.progress_bar(data, "removal curve", progress_bar):
            inputs, target = read_batch(model, adapter, move_data_to_device(batch, device))
            positional, keywords = arguments_of(signature, inputs)
            if not ranks:
                with (
                    recording(selected) as tape,
                    leaving_no_trace((positional, keywords), evaluate=False, streams=False),
                ):
                    output = read_output(forward(*positional, **keywords))
                num_units = _num_units(selected, unit_dims, tape, num_rows=len(output))
                ranks = _ranks(order, num_units, repeats, seed, device)
            for repeat, place in itertools.product(*map(range, num_correct.shape)):
                for name, rank in ranks.items():
                    kept_units[name] = rank[repeat] >= round(fractions[place] * num_units[name])
                # A forward may write to its inputs, which the next removal passes with.
                with leaving_no_trace((positional, keywords), evaluate=False, streams=False):
                    logits = read_output(forward(*positional, **keywords))
                num_correct[repeat, place] += _num_correct(logits, target).cpu()
            kept_units.clear()
            num_samples += len(logits)
    if num_samples == 0:
        raise ConfigurationError(
            f"removal_curve(data={describe(data)}) gave no batch.",
            "Accuracy is measured on batches of inputs and targets. With order='conductance' they are read twice.",
            "Pass a DataLoader, or a list of batches.",
        )
    return RemovalCurve(fractions, num_correct / num_samples)


def _num_units(
    layers: Mapping[str, nn.Module], unit_dims: Mapping[str, int], tape: Tape, *, num_rows: int
) -> dict[str, int]:
    check_called("removal_curve", layers, tape)
    return {
        name: count_units(name, layer, tape[name], unit_dims[name], rows=num_rows, is_movable=False)
        for name, layer in layers.items()
    }


def _num_correct(logits: Tensor, target: Target) -> Tensor:
    is_class_index = target is not None and not target.is_floating_point() and target.shape == logits.shape[:1]
    if target is None or not is_class_index or logits.ndim != 2 or logits.shape[1] < 2:
        raise ConfigurationError(
            f"removal_curve read the target {describe(target)} from a batch, for the output {describe(logits)}.",
            "Accuracy needs logits (B, C) of at least two classes, and a class index (B,) for each sample.",
            "Pass data with such targets, an adapter that reads them, or forward=... that returns such logits.",
        )
    return logits.argmax(1).eq(target).sum()


def _ranks(
    order: Literal["random"] | Mapping[str, Tensor],
    num_units: Mapping[str, int],
    repeats: int,
    seed: int,
    device: torch.device,
) -> dict[str, Tensor]:
    """Give each unit of each layer its place in the order of removal, from 0: shape (repeats, U)."""
    if order == "random":
        generator = torch.Generator().manual_seed(seed)
        scores = {
            name: torch.rand(repeats, size, generator=generator, device="cpu") for name, size in num_units.items()
        }
    else:
        if any(name not in order or order[name].shape != (size,) for name, size in num_units.items()):
            raise ConfigurationError(
                f"removal_curve(order={describe(order)}) was given.",
                f"The scores of each layer have the shape (U,). The numbers of units are {num_units}.",
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
    """Let layers return 0 for removed units.

    Yields:
        A mapping to be filled in: for the name of a layer, the units that it keeps, as booleans (U,). A layer without
        an entry keeps all.

    """
    kept_units: dict[str, Tensor] = {}

    def remover(name: str) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        def remove(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            if name not in kept_units:
                return output
            # Not a product: a removed value could be infinite.
            return output.movedim(unit_dims[name], -1).where(kept_units[name], 0).movedim(-1, unit_dims[name])

        return remove

    handles = [layer.register_forward_hook(remover(name)) for name, layer in layers.items()]
    try:
        yield kept_units
    finally:
        for handle in handles:
            handle.remove()
