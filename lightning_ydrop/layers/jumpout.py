"""A dropout layer for ReLU networks, without state."""

from torch import Tensor, nn
from torch.fx import Proxy

from lightning_ydrop.checks import check_flag
from lightning_ydrop.functional.masking import Granularity, active_dropout, check_jumpout
from lightning_ydrop.layers.tracing import can_be_leaf, is_scripting, leaf_call


class Jumpout(nn.Module):
    """Jumpout: dropout of active units at a rate drawn for each batch (Wang, Zhou, Bilmes, ICML 2019).

    Place it after a ReLU. In training mode each call draws the share of all units to drop,
    `p = min(p_min + |N(0, sigma)|, p_max)`, and drops active units only. It returns
    `x * m * (1 - p / q)**-scale_exponent` with `m ~ Bernoulli(1 - p / q)`, where `q` is the share of elements above 0
    in the batch. Under DDP this is the local batch. `p / q` is at most 0.95, also when nothing is active. In evaluation
    mode the layer returns its input itself. It has no state.

    torch.fx traces the layer as one call, as it does nn.Dropout, and torch.jit.script compiles it.

    Args:
        p_min: Smallest and likeliest share of units to drop, in [0, 1).
        sigma: Standard deviation of the normal distribution, at least 0.
        p_max: Largest share, in [0, 1), at least `p_min`.
        granularity: Draw for each "element", or for each sample and "channel", which is dimension 1.
        scale_exponent: 1 keeps the mean of the activations, 0.5 their second moment. The paper's 0.75 is in between.
        shared_masks: Draw once for all samples of a batch, instead of for each.

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
        shared_masks: bool = False,
    ) -> None:
        super().__init__()
        self.shared_masks = check_flag("Jumpout", "shared_masks", shared_masks)
        check_jumpout("Jumpout", p_min, sigma, p_max, granularity, scale_exponent)
        self.p_min = float(p_min)
        self.sigma = float(sigma)
        self.p_max = float(p_max)
        self.granularity = granularity
        self.scale_exponent = float(scale_exponent)
        # The layer that `convert_dropout` put this one in place of. A module in a tuple is no submodule.
        self.replaced: tuple[nn.Module, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        """Drop active units of `x` (B, *) in training mode. In evaluation mode return `x` itself."""
        # TorchScript does not compile what is under this condition, if it stands alone.
        if not is_scripting():  # noqa: SIM102
            if isinstance(x, Proxy) and can_be_leaf(self, Jumpout.forward, x):
                return leaf_call(self, x)
        if not self.training:
            return x
        if not is_scripting():  # the attributes may have been set since
            check_jumpout("Jumpout", self.p_min, self.sigma, self.p_max, self.granularity, self.scale_exponent)
        elementwise = self.granularity == "element"
        return active_dropout(
            x, self.p_min, self.sigma, self.p_max, elementwise, self.scale_exponent, shared_masks=self.shared_masks
        )

    def extra_repr(self) -> str:
        """Show the arguments, as torch's layers do."""
        return (
            f"p_min={self.p_min}, sigma={self.sigma}, p_max={self.p_max}, granularity={self.granularity!r}, "
            f"scale_exponent={self.scale_exponent}{', shared_masks=True' if self.shared_masks else ''}"
        )
