"""How well a trained network does without some of its units."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn

from lightning_ydrop.analysis.spread import device_of, mean_conductance
from lightning_ydrop.errors import ConfigurationError, check_choice, check_count, check_fraction, describe
from lightning_ydrop.layers import ConductanceDropout
from lightning_ydrop.models.adapters import Adapter, AutomaticAdapter
from lightning_ydrop.models.calls import arguments_of, read_output, signature_of
from lightning_ydrop.phase1.attribution import LayerChoice, select_layers
from lightning_ydrop.phase1.recording import borrowed, recording

Order = Literal["random", "conductance"] | Mapping[str, Tensor]
SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99)


@dataclass(frozen=True)
class RemovalCurve:
    """Accuracy while units are removed.

    Attributes:
        shares: Of the units of every layer that are removed.
        accuracy: In [0, 1], shape (repeats, shares), on the CPU.

    """

    shares: tuple[float, ...]
    accuracy: Tensor

    @property
    def mean(self) -> Tensor:
        """Over repeats, shape (shares,)."""
        return self.accuracy.mean(0)

    @property
    def std(self) -> Tensor:
        """Standard deviation over repeats, shape (shares,): 0 where there is but one."""
        return self.accuracy.std(0) if len(self.accuracy) > 1 else torch.zeros(len(self.shares))

    def threshold(self, loss: float = 0.01) -> float:
        """Give the largest share that can be removed, and all smaller ones, with no more than this loss of accuracy."""
        lost = self.mean[0] - self.mean > loss
        return self.shares[int(lost.int().argmax()) - 1 if lost.any() else -1]


def removal_curve(
    model: nn.Module,
    data: Iterable[Any],
    order: Order = "random",
    *,
    layers: LayerChoice | Sequence[LayerChoice] | None = None,
    shares: Sequence[float] = SHARES,
    repeats: int = 25,
    seed: int = 0,
    adapter: Adapter = AutomaticAdapter(),
    unit_dim: int = 1,
    **measuring: Any,
) -> RemovalCurve:
    """Measure accuracy while more and more units of every layer are removed (Fig. 3, arXiv 2409.09088).

    A unit is removed by setting the layer's output for it to 0. The model is used in evaluation mode, and given back as
    it was.

    Args:
        model: A model that classifies: its output is (B, C).
        data: Batches, such as a DataLoader gives, more than once.
        order: Which units go first: those drawn at "random", those of the highest mean "conductance" over `data`, or
            those of the highest scores in a mapping from a layer's name to scores (U,). Weakest first is that of the
            negative scores.
        layers: The layers that lose units, as for `layer_conductance`: every `ConductanceDropout` by default.
        shares: Of the units of every layer that are removed, rounded to whole units: in [0, 1], ascending from 0.
        repeats: How often units are drawn; other orders are of one kind.
        seed: Of the draws.
        adapter: How batches are read.
        unit_dim: As for `layer_conductance`.
        **measuring: Other arguments of `layer_conductance`, where `order` is "conductance".

    Returns:
        The accuracy for each repeat and share.

    Raises:
        ConfigurationError: If an argument does not fit to the model.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), ConductanceDropout(), nn.ReLU(), nn.Linear(8, 2))
        >>> data = [(torch.rand(16, 4), torch.zeros(16, dtype=torch.long))]
        >>> removal_curve(model, data, shares=(0, 0.5, 1), repeats=3).accuracy.shape
        torch.Size([3, 3])

    """
    if not isinstance(order, Mapping):
        check_choice("removal_curve", "order", order, ("random", "conductance"))
    if measuring and order != "conductance":
        raise ConfigurationError(
            f"removal_curve(order={describe(order)}, {', '.join(measuring)}=...) was given.",
            "Other arguments are those of `layer_conductance`, and serve the order by conductance.",
            "Leave them out, or pass order='conductance'.",
        )
    check_count("removal_curve", "repeats", repeats, minimum=1, example=25)
    for share in shares:
        check_fraction("removal_curve", "shares", share, example=0.5)
    if not shares or shares[0] != 0 or list(shares) != sorted(shares):
        raise ConfigurationError(
            f"removal_curve(shares={describe(tuple(shares))}) was given.",
            "`shares` ascend from 0, where nothing is removed.",
            "Pass, for example, shares=(0, 0.2, 0.4, 0.6, 0.8).",
        )
    if order == "conductance":
        order = mean_conductance(model, data, layers=layers, adapter=adapter, unit_dim=unit_dim, **measuring)
    chosen = select_layers(model, layers)
    dims = {name: each.unit_dim if isinstance(each, ConductanceDropout) else unit_dim for name, each in chosen.items()}
    device, signature = device_of(model), signature_of(model, model)
    ranks: dict[str, Tensor] = {}
    correct, num_samples = torch.zeros(repeats if order == "random" else 1, len(shares)), 0
    with borrowed(model, device), torch.no_grad(), _removing(chosen, dims) as kept:
        for batch in data:
            inputs, target = adapter.read(move_data_to_device(batch, device))
            if target is None or target.ndim != 1:
                raise ConfigurationError(
                    f"removal_curve read the target {describe(target)} from a batch.",
                    "Accuracy is that of a class index for each sample, (B,).",
                    "Pass data with such targets, or an adapter that finds them.",
                )
            positional, keywords = arguments_of(signature, inputs)
            if not ranks:
                with recording(chosen) as tape:
                    model(*positional, **keywords)
                num_units = {name: calls[0].shape[dims[name]] for name, calls in tape.items()}
                ranks = _ranks(order, num_units, repeats, seed, device)
            for repeat, place in itertools.product(*map(range, correct.shape)):
                for name, rank in ranks.items():
                    kept[name] = rank[repeat] >= round(shares[place] * num_units[name])
                predicted = read_output(model(*positional, **keywords)).argmax(1)
                correct[repeat, place] += predicted.eq(target).sum().cpu()
            kept.clear()
            num_samples += len(target)
    if num_samples == 0:
        raise ConfigurationError(
            f"removal_curve(data={describe(data)}) gave no batch.",
            "Accuracy is measured on batches of inputs and targets.",
            "Pass a DataLoader, or a list of batches.",
        )
    return RemovalCurve(tuple(shares), correct / num_samples)


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
        scores = {name: torch.rand(repeats, size, generator=generator) for name, size in num_units.items()}
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
