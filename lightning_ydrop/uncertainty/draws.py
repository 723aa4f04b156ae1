"""What a model draws at random in a forward pass, and whether each row of a batch has draws of its own."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_ydrop.models.functional_dropout import Rates

# It fills the state of cuDNN's generator on first use, which is a draw of no mask.
STATE_OF_CUDNN = "aten::_cudnn_init_dropout_state"


@dataclass(frozen=True)
class Draw:
    """One random operation.

    Attributes:
        operation: The name of the operation.
        shape: The shape of what it drew. Dimensions that share their draws are left out.

    """

    operation: str
    shape: tuple[int, ...]


@dataclass
class MaskSharing:
    """What is known of a model's passes: whether all rows of a batch share some draws, or influence each other.

    Attributes:
        is_known: Whether the draws of two passes have been compared.
        is_shared: Whether a draw was the same for all rows, as far as these passes tell.
        rows_mix: Whether rows influence each other; None before two passes have been compared for that.
        rates_in_evaluation: At which rates calls of functional dropout drop in evaluation mode: most at 0.
        knows_rates: Whether a pass in training mode has shown which of these calls drop.
        rates: At which rates they do; None if the model does not run in training mode.
        has_told_of_calls: Whether a warning has named calls that are left out.

    """

    is_known: bool = False
    is_shared: bool = False
    rows_mix: bool | None = None
    rates_in_evaluation: Rates = field(default_factory=dict)
    knows_rates: bool = False
    rates: Rates | None = None
    has_told_of_calls: bool = False

    def compare(self, one_mask: Sequence[Draw], many_masks: Sequence[Draw], num_masks: int) -> None:
        """Learn from the draws of two passes: one with one mask for a batch, one with `num_masks` times the rows.

        A draw that grows with the number of rows has rows. A mask of a weight, of a table of positions or of a whole
        batch doesn't grow. A single pass can't tell: a batch may have as many rows as a weight.
        """
        self.is_known = True
        pairs_up = [draw.operation for draw in one_mask] == [draw.operation for draw in many_masks]
        # Where nothing was drawn as far as was seen, the masks come from elsewhere, such as NumPy.
        self.is_shared = (
            not one_mask
            or not pairs_up
            or not all(_grows(one.shape, many.shape, num_masks) for one, many in zip(one_mask, many_masks, strict=True))
        )


@contextmanager
def noting_draws() -> Iterator[list[Draw]]:
    """Note what is drawn, whatever draws: layers, functions, or parametrizations that compute weights.

    Compiled code runs eagerly inside: it shows no operations, and torch compiles nothing while it notes them.

    Yields:
        The draws in their order, filled while the model runs.

    """
    with torch.compiler.set_stance("force_eager"), _Noting() as noting:
        yield noting.draws


class _Noting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Note the shape of each random operation: torch marks these with a tag."""

    supports_higher_order_operators = True  # such as attention with a function of the user's

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.draws: list[Draw] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        # Operations that take functions have no tags. What these functions draw is not seen.
        if torch.Tag.nondeterministic_seeded in getattr(func, "tags", ()) and not _is_off(func, args, kwargs or {}):
            drawn = result[0] if isinstance(result, (tuple, list)) else result
            if isinstance(drawn, Tensor):
                self.draws.append(Draw(func.name(), _drawn_shape(func, drawn)))
        return result


def _is_off(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Tell whether an operation draws nothing this time: dropout at rate 0 or in evaluation mode."""
    names = [argument.name for argument in func._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    # The argument `p` is the rate where there is `train`: that of torch.bernoulli is something else.
    rates = [given[name] for name in ("dropout_p", "dropout", *(["p"] if "train" in names else [])) if name in given]
    return func._schema.name == STATE_OF_CUDNN or given.get("train") is False or rates == [0.0]


def _drawn_shape(func: Any, drawn: Tensor) -> tuple[int, ...]:
    """Give the shape of a mask from what the operation returned."""
    # Dropout of features draws for each entry of the first two dimensions. Torch shows that operation in inference
    # mode alone, otherwise what it consists of.
    return tuple(drawn.shape[:2] if "feature" in func._schema.name else drawn.shape)


def _grows(one: tuple[int, ...], many: tuple[int, ...], factor: int) -> bool:
    """Tell whether a shape has grown by a factor in some dimension."""
    return len(one) == len(many) and any(after == factor * before for before, after in zip(one, many, strict=True))
