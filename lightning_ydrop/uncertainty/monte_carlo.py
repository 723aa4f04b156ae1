"""The average prediction of a network over its dropout masks, and how far other predictions are from it."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_ydrop import progress
from lightning_ydrop.checks import check_class_dim, check_count, check_flag, check_module
from lightning_ydrop.errors import ConfigurationError, describe
from lightning_ydrop.functional.uncertainty import monte_carlo_divergence, predictive_entropy
from lightning_ydrop.layers import ConductanceDropout
from lightning_ydrop.layers.kinds import draws_for_each_sample
from lightning_ydrop.models.calls import Inputs, arguments_of, read_output, read_rows, signature_of
from lightning_ydrop.models.functional_dropout import switching_dropout_calls
from lightning_ydrop.models.holdings import modules_held
from lightning_ydrop.models.sharing import without_lost_memory
from lightning_ydrop.models.state import leaving_no_trace
from lightning_ydrop.pictures import figure_of, finished, new_axes, results_of
from lightning_ydrop.uncertainty.draws import Draw, MaskSharing, noting_draws
from lightning_ydrop.uncertainty.masks import dropping, stochastic_modules

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class MonteCarlo:
    """The average prediction of a network over its masks.

    Attributes:
        probabilities: Of the classes, float32, shape (B, C, *).
        num_samples: The number of masks.

    """

    probabilities: Tensor
    num_samples: int

    @property
    def entropy(self) -> Tensor:
        """Predictive entropy in nats, shape (B, *): how uncertain the average prediction is."""
        return predictive_entropy(self.probabilities)


def monte_carlo(
    model: nn.Module,
    inputs: Inputs,
    num_samples: int = 100,
    *,
    class_dim: int = 1,
    max_rows: int | None = 4096,
    forward: Callable[..., Any] | None = None,
    progress_bar: bool = True,
    functional: bool = False,
) -> MonteCarlo:
    """Average a classifier's prediction over dropout masks (Monte Carlo dropout, Gal, Ghahramani, ICML 2016).

    The model is in evaluation mode, except for what drops: BatchNorm uses its running statistics and keeps them. A
    ConductanceDropout that has been driven drops at the running mean of its probabilities. A call of F.dropout in a
    forward method drops only where it follows a dropout layer, as attention does that reads the rate of the layer
    beside it, or with `functional=True`. The model is given back as it was.

    The first mask passes through the model alone. Then as many masks pass at once as `max_rows` allows, and half as
    many whenever a GPU has no memory for them. Where all rows share something that is drawn, such as the mask of a
    weight or the rate of a Jumpout, one mask passes at a time: the first two passes show that. Masks come from torch's
    random stream, so they depend on how many pass at once. Those that a layer draws with Python or NumPy follow from
    torch's stream too.

    Args:
        model: A model whose output is logits (B, C, *).
        inputs: What its forward takes: a tensor, a tuple for positional arguments, or a mapping for keyword arguments.
            Tensors that have a row for each sample, as the first one has, are repeated for each mask. An input that all
            samples share, such as a mask (T, T), may happen to have as many rows: pass max_rows=1 then.
        num_samples: Number of masks, at least 1.
        class_dim: Dimension of the classes in the output, -1 for logits (B, *, C).
        max_rows: At most this many rows pass through the model at once, but never fewer than the batch has. None: all.
        forward: Another method of the model, to be called instead of it.
        progress_bar: Whether a progress bar shows once it takes more than five seconds.
        functional: Whether calls of F.dropout and its kin, and of F.scaled_dot_product_attention, drop too, though the
            model is in evaluation mode. An attention that gets a rate of 0 there drops at the rate that its module
            keeps. Calls that stand under `if self.training` are not reached. Compiled parts run without compilation.

    Returns:
        The average of the softmax outputs.

    Raises:
        ConfigurationError: If nothing in the model drops, or an argument does not fit the model.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 3))
        >>> average = monte_carlo(model, torch.randn(5, 4), num_samples=20)
        >>> average.probabilities.shape, average.entropy.shape
        (torch.Size([5, 3]), torch.Size([5]))

    """
    check_module("monte_carlo", model)
    num_samples = check_count("monte_carlo", "num_samples", num_samples, minimum=1, example=100)
    class_dim = check_class_dim("monte_carlo", class_dim)
    if max_rows is not None:
        max_rows = check_count("monte_carlo", "max_rows", max_rows, minimum=1, example=4096)
    check_flag("monte_carlo", "progress_bar", progress_bar)
    functional = check_flag("monte_carlo", "functional", functional)
    if not functional:
        check_drops("monte_carlo", model)
    warn_of_vanilla_rates("monte_carlo", model)
    with dropping_in_calls("monte_carlo", model) if functional else nullcontext():
        probabilities = mean_probabilities(
            model,
            inputs,
            num_samples,
            class_dim=class_dim,
            max_rows=max_rows,
            forward=forward,
            progress_bar=progress_bar,
        )
    return MonteCarlo(probabilities, num_samples)


def mean_probabilities(
    model: nn.Module,
    inputs: Inputs,
    num_masks: int,
    *,
    temperature: float = 1.0,
    class_dim: int = 1,
    max_rows: int | None = None,
    forward: Callable[..., Any] | None = None,
    sharing: MaskSharing | None = None,
    progress_bar: bool = False,
) -> Tensor:
    """Average the softmax of a model's logits, divided by a temperature, over masks: see `monte_carlo`.

    Args:
        model: As for `monte_carlo`.
        inputs: As for `monte_carlo`.
        num_masks: Number of masks, at least 1.
        temperature: What logits are divided by, above 0.
        class_dim: As for `monte_carlo`.
        max_rows: As for `monte_carlo`.
        forward: As for `monte_carlo`.
        sharing: What earlier calls for the same model have learned of its draws. This call learns what is not known,
            and with what is known it saves the first pass, of one mask.
        progress_bar: As for `monte_carlo`.

    Returns:
        Shape (B, C, *), float32.

    """
    forward = forward or model
    sharing = sharing or MaskSharing()
    arguments = arguments_of(signature_of(model, forward), inputs)
    batch_size = _batch_size(inputs, arguments)
    at_once = num_masks if max_rows is None else max(1, max_rows // batch_size)

    bar = progress.progress_bar(None, "masks", progress_bar, num_masks)

    def probabilities_of(output: Any, count: int) -> Tensor:
        bar.update(count)
        logits = logits_of(output, count * batch_size, class_dim) / temperature
        return logits.softmax(1).reshape(count, batch_size, *logits.shape[1:]).sum(0)

    passes = (model, forward, arguments, batch_size, num_masks, at_once, sharing, probabilities_of)
    with bar:
        total = without_lost_memory(partial(_sum_over_masks, *passes))
    return total / num_masks


def _sum_over_masks(
    model: nn.Module,
    forward: Callable[..., Any],
    arguments: tuple[tuple[Any, ...], dict[str, Any]],
    batch_size: int,
    num_masks: int,
    at_once: int,
    sharing: MaskSharing,
    probabilities_of: Callable[[Any, int], Tensor],
) -> Tensor:
    """Add up the probabilities over masks, of which as many pass at once as `at_once` and the model allow."""
    positional, keywords = arguments
    draws_of_one_mask: list[Draw] | None = None
    total: Tensor | None = None
    beside: list[object] = [] if forward is model else [forward, *modules_held(forward)]
    with dropping(model, (*beside, *arguments)) as modules:
        if sharing.is_shared or not all(map(draws_for_each_sample, modules)):
            at_once = 1
        if num_masks == 2 and not sharing.is_known:
            at_once = 1  # after a first pass of one mask, there are no two left to compare it with
        masks_left = num_masks
        while masks_left > 0:
            is_compared = not sharing.is_known and at_once > 1
            count = 1 if is_compared and draws_of_one_mask is None else min(at_once, masks_left)
            noting: AbstractContextManager[list[Draw]] = noting_draws() if is_compared else nullcontext([])
            try:
                # A forward may write to its inputs, which the next mask passes with.
                with noting as draws, leaving_no_trace(arguments, evaluate=False, streams=False):
                    output = forward(
                        *_repeated(list(positional), batch_size, count), **_repeated(keywords, batch_size, count)
                    )
            except torch.OutOfMemoryError:
                if count == 1:
                    raise
                at_once = count // 2
                continue
            if is_compared and draws_of_one_mask is None:
                draws_of_one_mask = draws
            elif is_compared and draws_of_one_mask is not None:
                sharing.compare(draws_of_one_mask, draws, count)
                if sharing.is_shared:
                    # All masks of this pass are one mask in part, so it doesn't count.
                    at_once = 1
                    continue
            summed = probabilities_of(output, count)
            total = summed if total is None else total + summed
            masks_left -= count
    assert total is not None
    return total


def logits_of(output: Any, num_rows: int, class_dim: int) -> Tensor:
    """Find the logits in what a model returned.

    Args:
        output: What it returned.
        num_rows: The number of rows that went into it.
        class_dim: Dimension of the classes in the logits.

    Returns:
        Shape (num_rows, C, *), float32.

    Raises:
        ConfigurationError: If there are none of this shape, or fewer than two classes.

    """
    logits = read_rows(output, num_rows)
    if not 0 < abs(class_dim) < logits.ndim or logits.shape[class_dim] < 2:
        raise ConfigurationError(
            f"The model's forward returned {describe(logits)} for {num_rows} rows, with class_dim={class_dim}.",
            "Logits have, besides that of the rows, a dimension of two classes or more.",
            "Return logits of shape (B, C, *), or name the dimension of the classes with class_dim. Turn a single "
            "logit into two: 0 and itself.",
        )
    return logits.movedim(class_dim, 1).float()


def check_drops(owner: str, model: nn.Module) -> None:
    """Refuse a model in which nothing drops: all its predictions would be the same.

    Raises:
        ConfigurationError: If nothing does.

    """
    if not stochastic_modules(model):
        raise ConfigurationError(
            f"{owner} was given {describe(model)}, which has no layer that drops.",
            "It averages over masks of dropout: nn.Dropout and its kin, ConductanceDropout, Jumpout.",
            "Pass the network that was trained with dropout, with its dropout layers. If it calls F.dropout instead, "
            "pass functional=True.",
        )


@contextmanager
def dropping_in_calls(owner: str, model: nn.Module) -> Iterator[None]:
    """Let calls of functional dropout drop, in passes of a model inside.

    Raises:
        ConfigurationError: At the end, if neither a layer nor a call has dropped.

    """
    with switching_dropout_calls(True) as calls:
        yield
    if not any(call.rate for call in calls.values()) and not stochastic_modules(model):
        raise ConfigurationError(
            f"{owner}(functional=True) was given {describe(model)}, in which neither a layer nor a call drops.",
            "It averages over masks of dropout. Calls that stand under `if self.training` are not reached.",
            "Write F.dropout(x, p, self.training), or use nn.Dropout.",
        )


def warn_of_vanilla_rates(owner: str, model: nn.Module) -> None:
    """Warn where layers made for Y-Drop's probabilities have none, such as after loading weights only."""
    layers = [module for module in stochastic_modules(model) if isinstance(module, ConductanceDropout)]
    if any(len(layer.mean_drop_prob) == 0 for layer in layers):
        warnings.warn(
            f"{owner} was given {describe(model)}, in which each ConductanceDropout drops at its p. If Y-Drop has "
            "trained it, its probabilities are in the Trainer's checkpoint, not among the weights: "
            "DropoutDistillation(model, checkpoint=...) takes them from there, and its `teacher` has them.",
            stacklevel=3,
        )


class MonteCarloDivergence(Metric):
    """The divergence of predictions from Monte Carlo averages, KL(average || prediction) in nats, mean over samples.

    It adds up over batches and ranks, as metrics of torchmetrics do. At 0, one pass gives what the average of many
    gives. Dropout distillation minimises it (Rota Bulo, Porzi, Kontschieder, ICML 2016). Its function is
    `functional.monte_carlo_divergence`.

    Example:
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
            ConfigurationError: If the two have different shapes.

        """
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


def _batch_size(inputs: Inputs, arguments: Any) -> int:
    tensors: list[Tensor] = []
    apply_to_collection(arguments, Tensor, tensors.append)
    sizes = [len(tensor) for tensor in tensors if tensor.ndim > 0]
    if not sizes or sizes[0] == 0:
        raise ConfigurationError(
            f"The inputs are {describe(inputs)}.",
            "They hold at least one tensor, the first of them with a row for each sample, and at least one sample.",
            "Pass a batch of samples.",
        )
    return sizes[0]


def _repeated(arguments: Any, batch_size: int, count: int) -> Any:
    """Repeat the rows of a batch `count` times. Tensors of another size stay as they are."""

    def repeat(tensor: Tensor) -> Tensor:
        return torch.cat([tensor] * count) if tensor.ndim > 0 and len(tensor) == batch_size else tensor

    return arguments if count == 1 else apply_to_collection(arguments, Tensor, repeat)
