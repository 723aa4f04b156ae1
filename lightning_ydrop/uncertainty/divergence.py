"""How far predictions are from averages over masks."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_ydrop.errors import ConfigurationError, describe
from lightning_ydrop.functional.uncertainty import monte_carlo_divergence
from lightning_ydrop.models.calls import read_output
from lightning_ydrop.pictures import figure_of, finished, new_axes, results_of
from lightning_ydrop.uncertainty.results import MonteCarlo

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class MonteCarloDivergence(Metric):
    """The divergence of predictions from Monte Carlo averages, KL(average || prediction) in nats, mean over samples.

    It adds up over batches and ranks, as metrics of torchmetrics do. At 0, one pass gives what the average of many
    gives. Dropout distillation minimises it (Rota Bulo, Porzi, Kontschieder, ICML 2016). Its function is
    `functional.monte_carlo_divergence`.

    Example:
        >>> from torch import nn
        >>> from lightning_ydrop import monte_carlo
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 3))
        >>> x = torch.randn(5, 4)
        >>> divergence = MonteCarloDivergence()
        >>> divergence.update(model.eval()(x), monte_carlo(model, x, num_samples=1000))
        >>> float(divergence.compute()) < 0.1
        True

    """

    full_state_update = False
    higher_is_better = False
    total: Tensor
    num_rows: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("num_rows", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, logits: Any, average: MonteCarlo) -> None:
        """Add a batch.

        Args:
            logits: Predictions, shape (B, C, *), or an output that holds them.
            average: What `monte_carlo` returned for the same samples.

        Raises:
            ConfigurationError: If the two have different shapes, or the average is of another task.

        """
        if not isinstance(average, MonteCarlo):
            raise ConfigurationError(
                f"MonteCarloDivergence was given {describe(average)}.",
                "It compares predicted classes with the average of a classifier.",
                'Pass what `monte_carlo` returns with task="classification".',
            )
        divergence = monte_carlo_divergence(read_output(logits), average.probabilities, reduction="none")
        self.total += divergence.sum()
        self.num_rows += divergence.numel()

    def compute(self) -> Tensor:
        """Give the mean over all samples and positions."""
        return self.total / self.num_rows

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: "Axes | None" = None) -> tuple["Figure", "Axes"]:
        """Draw the divergence, as a point or over several evaluations. It takes lightning-ydrop[plots].

        Args:
            val: What `compute` or `forward` returned, or several of these, such as one for each epoch. None: what
                `compute` returns now.
            ax: Where to draw. None: the axes of a new figure, which pyplot does not keep.

        Returns:
            The figure and the axes.

        Raises:
            ConfigurationError: If matplotlib is not installed.

        Example:
            >>> divergence = MonteCarloDivergence()
            >>> figure, axes = divergence.plot([torch.tensor(0.02), torch.tensor(0.01)])
            >>> axes.get_xlabel()
            'evaluation'

        """
        ax = ax or new_axes("MonteCarloDivergence.plot()")
        points = [float(value) for value in results_of(self, val)]
        ax.plot(range(1, len(points) + 1), points, ".-", label=f"prediction, at last {points[-1]:.3g}")
        ax.axhline(0, color="gray", linestyle=":", label="the average itself")
        ax.locator_params("x", integer=True)
        ax.set(xlabel="evaluation", ylabel="KL(average || prediction), nats")
        return figure_of(finished(ax)), ax
