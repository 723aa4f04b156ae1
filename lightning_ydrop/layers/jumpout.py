"""A dropout for ReLU networks, without state."""

from torch import Tensor, nn

from lightning_ydrop.functional.masking import Granularity, check_jumpout, jumpout


class Jumpout(nn.Module):
    """Jumpout: dropout of active units at a rate drawn anew for each batch (Wang, Zhou, Bilmes, ICML 2019).

    It stands behind a ReLU. In training it drops a share `p = min(p_min + |N(0, sigma)|, p_max)` of all units, all of
    them active: it returns `x * m * (1 - p / q)**-scale_exponent` with `m ~ Bernoulli(1 - p / q)`, where `q` is the
    share of elements above 0 in the batch, under DDP in the local one. `p / q` is at most 0.95, also where nothing is
    active. In evaluation it returns its very input. It has no state.

    Args:
        p_min: Smallest and likeliest share of units to drop, in [0, 1).
        sigma: Spread of the normal that is halved, at least 0.
        p_max: Largest share, in [0, 1), at least `p_min`.
        granularity: Draw for each "element", or for each sample and "channel", which is dimension 1.
        scale_exponent: 1 keeps the mean of activations, 0.5 their second moment; the paper's lies between.

    Raises:
        ConfigurationError: If a value is out of range.

    Example:
        >>> network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), Jumpout(), nn.Linear(8, 3))

    """

    def __init__(
        self,
        p_min: float = 0.0,
        sigma: float = 0.1,
        p_max: float = 0.5,
        granularity: Granularity = "element",
        scale_exponent: float = 0.75,
    ) -> None:
        super().__init__()
        check_jumpout("Jumpout", p_min, sigma, p_max, granularity, scale_exponent)
        self.p_min = p_min
        self.sigma = sigma
        self.p_max = p_max
        self.granularity = granularity
        self.scale_exponent = scale_exponent
        # The layer of torch's in whose place `convert_dropout` has put this one; in a tuple it is no submodule.
        self.replaced: tuple[nn.Module, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        """Drop active units of `x` (B, *) in training, or return it untouched in evaluation."""
        if not self.training:
            return x
        return jumpout(x, self.p_min, self.sigma, self.p_max, self.granularity, self.scale_exponent)

    def extra_repr(self) -> str:
        """Show the arguments, as torch's own layers do."""
        return (
            f"p_min={self.p_min}, sigma={self.sigma}, p_max={self.p_max}, granularity={self.granularity!r}, "
            f"scale_exponent={self.scale_exponent}"
        )
