"""The layer that Y-Drop drives."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_ydrop.errors import ConfigurationError, check_rate, describe
from lightning_ydrop.functional.masking import unit_dropout, vanilla_dropout


class ConductanceDropout(nn.Module):
    """Dropout with a probability for each unit, which `YDrop` or `YDropCallback` sets before each training step.

    Left alone it is torch's own dropout at rate `p`: `nn.Dropout` on (B, U) and where `elementwise`, and
    `nn.Dropout1d`, `2d` or `3d` (one draw for each sample and channel) on the outputs of convolutions. Driven, it
    returns `x * m / (1 - mean_drop_prob)` with `m ~ Bernoulli(1 - drop_prob)` (sec. 4.1, arXiv 2409.09088). In
    evaluation it returns its very input. The probabilities are no part of the `state_dict`, so that checkpoints are
    those of the network with `nn.Dropout`; the engine's or callback's own state holds them.

    Args:
        p: Vanilla drop rate, in [0, 1): 0 drops nothing. For networks that are not driven, and while annealing.
        unit_dim: Dimension of the units: 1 for the features of (B, U) and the channels of (B, C, H, W), -1 for the
            features of (B, T, U). Never 0, which is the batch.
        elementwise: Draw for each element, with the probability of its unit, instead of each sample and unit.

    Attributes:
        drop_prob: Probability that a unit is dropped, float32, shape (U,); empty until the first update.
        mean_drop_prob: Its running mean (Eq. 6), float32, shape (U,); empty until the first update.
        active: Whether the two are in use.

    Raises:
        ConfigurationError: If `p` or `unit_dim` is out of range.

    Example:
        >>> layer = ConductanceDropout(0.5)
        >>> layer.eval()(torch.ones(2, 3))
        tensor([[1., 1., 1.],
                [1., 1., 1.]])

    """

    def __init__(self, p: float = 0.5, unit_dim: int = 1, elementwise: bool = False) -> None:
        super().__init__()
        check_rate("ConductanceDropout", "p", p)
        if isinstance(unit_dim, bool) or not isinstance(unit_dim, int) or unit_dim == 0:
            raise ConfigurationError(
                f"ConductanceDropout(unit_dim={describe(unit_dim)}) was given.",
                "`unit_dim` is the dimension of the units, any but 0, which is the batch.",
                "Pass 1 for (B, U) and (B, C, H, W), or -1 for (B, T, U).",
            )
        self.p = p
        self.unit_dim = unit_dim
        self.elementwise = elementwise
        self.active = False
        # Plain tensors, not buffers: buffers of a size found later break strict loading, weight averaging and DDP.
        self.drop_prob = torch.empty(0)
        self.mean_drop_prob = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        """Drop units of `x` (B, *) in training, or return it untouched in evaluation."""
        if not self.training:
            return x
        if self.active:
            return unit_dropout(x, self.drop_prob, self.mean_drop_prob, self.unit_dim, self.elementwise)
        return vanilla_dropout(x, self.p, self.unit_dim, self.elementwise)

    def update(self, drop_prob: Tensor, *, elasticity: float, initial_drop_prob: float) -> None:
        """Take this step's probabilities, move the running mean (Eq. 6, arXiv 2409.09088), and become active.

        Args:
            drop_prob: `g`, shape (U,), float32, with values in [0, 1), on the device of the activations.
            elasticity: `alpha` of `p[n] = (1 - alpha) p[n-1] + alpha g[n]`.
            initial_drop_prob: `p[0]`, used at the first update.

        Raises:
            ConfigurationError: If the layer had another number of units before.

        """
        if self.drop_prob.numel() == 0:
            self.drop_prob = torch.empty_like(drop_prob)
            self.mean_drop_prob = torch.full_like(drop_prob, initial_drop_prob)
        elif self.drop_prob.shape != drop_prob.shape:
            raise ConfigurationError(
                f"A ConductanceDropout of {len(self.drop_prob)} units was given probabilities for {len(drop_prob)}.",
                "The number of units of a layer stays what it was at its first update.",
                "Give activations of different width layers of their own, or load the state of this very network.",
            )
        # In place, so that compiled code keeps reading the same tensors.
        self.drop_prob.copy_(drop_prob)
        self.mean_drop_prob.lerp_(drop_prob, elasticity)
        self.active = True

    def extra_repr(self) -> str:
        """Show the arguments, as torch's own layers do."""
        return f"p={self.p}, unit_dim={self.unit_dim}, elementwise={self.elementwise}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ConductanceDropout":
        """Follow the model to its device but not to its dtype: in bfloat16 a running mean would stand still."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.drop_prob = self.drop_prob.to(fn(self.drop_prob).device)
        self.mean_drop_prob = self.mean_drop_prob.to(fn(self.mean_drop_prob).device)
        return self
