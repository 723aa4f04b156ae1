"""How evenly importance is spread over the units of a layer."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_ydrop import progress
from lightning_ydrop.checks import check_count, check_flag, check_fraction
from lightning_ydrop.errors import ConfigurationError, describe
from lightning_ydrop.functional.attribution import conductance_spread
from lightning_ydrop.importance.attribution import MaxRows, layer_conductance
from lightning_ydrop.importance.selection import LayerChoice
from lightning_ydrop.importance.tasks import objective_of
from lightning_ydrop.models.adapters import Adapter, AutomaticAdapter, check_adapter
from lightning_ydrop.models.batches import own_method, read_batch
from lightning_ydrop.models.first_batch import check_labels_are_read
from lightning_ydrop.models.modules import device_of
from lightning_ydrop.pictures import figure_of, finished, new_axes, results_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class ConductanceSpread(Metric):
    """The mean conductance of each unit over a data set, and how it is spread over them (Fig. 2, arXiv 2409.09088).

    It adds up over batches and over ranks, as metrics of torchmetrics do. `compute` gives a dictionary, see
    `functional.conductance_spread`:

    - "mean": the mean conductance of each unit, shape (U,). For a single unit it is a scalar, as usual in torchmetrics.
    - "top_share": the part of the sum of positive means that the units at the top hold.
    - "gini": the Gini coefficient of the means, 0 where all units are alike and nearly 1 where one has it all.
    - "total": the sum of the means. At a layer that every path crosses it is the mean change of F from the baseline.

    Args:
        num_units: U, the number of the layer's units, at least 1.
        top_fraction: The fraction of units at the top, in (0, 1].
        **kwargs: Arguments of torchmetrics.Metric.

    Raises:
        ConfigurationError: If an argument is out of range.

    Example:
        >>> spread = ConductanceSpread(num_units=4, top_fraction=0.25)
        >>> spread.update(torch.tensor([[1.0, 0.0, 1.0, 0.0], [5.0, 0.0, 1.0, 0.0]]))
        >>> spread.compute()["mean"], spread.compute()["top_share"]
        (tensor([3., 0., 1., 0.]), tensor(0.7500))

    """

    full_state_update = False
    sums: Tensor
    num_samples: Tensor

    def __init__(self, num_units: int, top_fraction: float = 0.2, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_units = check_count("ConductanceSpread", "num_units", num_units, minimum=1, example=1024)
        self.top_fraction = check_fraction("ConductanceSpread", "top_fraction", top_fraction, example=0.2)
        if self.top_fraction == 0:
            raise ConfigurationError(
                "ConductanceSpread(top_fraction=0) was given.",
                "The fraction of units at the top is above 0.",
                "Pass, for example, top_fraction=0.2.",
            )
        self.add_state("sums", torch.zeros(self.num_units), dist_reduce_fx="sum")
        self.add_state("num_samples", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, conductance: Tensor) -> None:
        """Add samples.

        Args:
            conductance: That of one layer, from `layer_conductance`, shape (B, U).

        Raises:
            ConfigurationError: If it has another shape.

        """
        if conductance.shape[1:] != self.sums.shape:
            raise ConfigurationError(
                f"ConductanceSpread(num_units={self.num_units}) was given {describe(conductance)}.",
                "It takes the conductance (B, U) of one layer.",
                "Make one for each layer, with its number of units, and update it with layer_conductance(...)[name].",
            )
        self.sums += conductance.sum(0)
        self.num_samples += len(conductance)

    def compute(self) -> dict[str, Tensor]:
        """Give "mean" (U,), "top_share", "gini" and "total"."""
        return conductance_spread(self.sums, self.num_samples, self.top_fraction)

    def plot(
        self, val: Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]] | None = None, ax: "Axes | None" = None
    ) -> tuple["Figure", "Axes"]:
        """Draw the mean conductance of each unit, from the highest to the lowest. It takes lightning-ydrop[plots].

        The legend names the share of the units at the top and the Gini coefficient.

        Args:
            val: What `compute` or `forward` returned, or several of these, such as one for each epoch. None: what
                `compute` returns now.
            ax: Where to draw. None: the axes of a new figure, which pyplot does not keep.

        Returns:
            The figure and the axes.

        Raises:
            ConfigurationError: If matplotlib is not installed.

        Example:
            >>> spread = ConductanceSpread(num_units=4)
            >>> spread.update(torch.tensor([[1.0, 0.0, 3.0, 2.0]]))
            >>> figure, axes = spread.plot()
            >>> axes.get_ylabel()
            'mean conductance'

        """
        ax = ax or new_axes("ConductanceSpread.plot()")
        results = results_of(self, val)
        for number, result in enumerate(results, 1):
            shares = f"top {self.top_fraction:.0%} hold {result['top_share']:.0%}, Gini {result['gini']:.2f}"
            ax.plot(falling(result["mean"]), label=shares if len(results) == 1 else f"{number}: {shares}")
        ax.set(xlabel="units, from the highest to the lowest", ylabel="mean conductance")
        return figure_of(finished(ax)), ax


def falling(means: Tensor) -> Tensor:
    """Sort the means of units from the highest to the lowest, to be drawn: on the CPU, shape (U,)."""
    return means.detach().float().cpu().reshape(-1).sort(descending=True).values


def mean_conductance(
    model: nn.Module,
    data: Iterable[Any],
    *,
    layers: LayerChoice | Sequence[LayerChoice] | None = None,
    adapter: Adapter = AutomaticAdapter(),
    forward: Callable[..., Any] | None = None,
    max_rows: MaxRows = "batch",
    progress_bar: bool = True,
    **measuring: Any,
) -> dict[str, Tensor]:
    """Average the conductance of each unit over a data set.

    The average is over the data of this process. Nothing is exchanged with other processes.

    Args:
        model: Any torch model.
        data: Batches, such as those of a DataLoader. They are moved to the model's device.
        layers: As for `layer_conductance`.
        adapter: It reads batches, unless the model has a method `ydrop_inputs`.
        forward: As for `layer_conductance`. By default the model's method `ydrop_forward`, if it has one.
        max_rows: As for `layer_conductance`. By default no more than the batch has.
        progress_bar: Whether a progress bar shows once it takes more than five seconds.
        **measuring: Other arguments of `layer_conductance`.

    Returns:
        For each layer, by name, the means of its units, shape (U,).

    Raises:
        ConfigurationError: If an argument does not fit the model, or there are no data.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> data = [(torch.rand(16, 4), torch.zeros(16, dtype=torch.long))] * 3
        >>> mean_conductance(model, data, layers=nn.ReLU)["1"].shape
        torch.Size([8])

    """
    check_adapter("mean_conductance", adapter)
    check_flag("mean_conductance", "progress_bar", progress_bar)
    spreads: dict[str, ConductanceSpread] = {}
    measuring |= {"layers": layers, "forward": forward or own_method(model, "ydrop_forward"), "max_rows": max_rows}
    device = device_of(model)
    for batch in progress.progress_bar(data, "mean conductance", progress_bar):
        batch = move_data_to_device(batch, device)
        inputs, target = read_batch(model, adapter, batch)
        update_spreads(spreads, layer_conductance(model, inputs, target, **measuring), sync_on_compute=False)
        if objective_of("mean_conductance", measuring.get("objective")).takes_target:
            check_labels_are_read(model, adapter, batch, inputs, target, measuring.get("batch_dim", 0))
    if not spreads:
        raise ConfigurationError(
            f"{describe(data)} gave no batch.",
            "Conductance is averaged over batches of inputs and targets.",
            "Pass a DataLoader, or a list of batches.",
        )
    return {name: spread.compute()["mean"].reshape(spread.num_units) for name, spread in spreads.items()}


def update_spreads(spreads: dict[str, ConductanceSpread], conductance: Mapping[str, Tensor], **kwargs: Any) -> None:
    """Add samples to the metric of each layer. A layer that has none yet gets one.

    Args:
        spreads: The metrics by name. They are updated, and new ones are added.
        conductance: The result of `layer_conductance`.
        **kwargs: Arguments of a new metric, except the number of units.

    """
    for name, values in conductance.items():
        if name not in spreads:
            spreads[name] = ConductanceSpread(values.shape[1], **kwargs).to(values.device)
        spreads[name].update(values)
