"""From scores to drop probabilities: half-normal rates and buckets (Eq. 5 and 8, arXiv 2409.09088)."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_ydrop.checks import check_count, check_fraction, check_number, check_rate
from lightning_ydrop.errors import ConfigurationError, describe


@dataclass(frozen=True)
class HalfNormalRate:
    """A drop rate that is drawn again in each step: `min(mean + |N(0, std)|, max)` (Eq. 8, arXiv 2409.09088).

    Args:
        mean: The smallest and likeliest rate, in [0, 1). The paper calls it so: it is the mean of the normal
            distribution before halving.
        std: Standard deviation of the normal distribution before halving, at least 0. At 0 every rate is `mean`.
        max: Cap of the rate, in [0, 1), at least `mean`.

    Raises:
        ConfigurationError: If a value is out of range.

    Example:
        >>> HalfNormalRate(mean=0.1, std=0.05, max=0.5)
        HalfNormalRate(mean=0.1, std=0.05, max=0.5)

    """

    mean: float
    std: float
    max: float

    def __post_init__(self) -> None:
        # Plain numbers, whatever they came as. A frozen dataclass can be set in no other way.
        object.__setattr__(self, "mean", check_rate("HalfNormalRate", "mean", self.mean))
        object.__setattr__(self, "max", check_rate("HalfNormalRate", "max", self.max))
        object.__setattr__(self, "std", check_number("HalfNormalRate", "std", self.std, example=0.05))
        if self.max < self.mean:
            raise ConfigurationError(
                f"HalfNormalRate(mean={self.mean}, max={self.max}) was given.",
                "`max` caps the rate, so it is at least `mean`.",
                f"Pass a `max` from {self.mean} up, or a lower `mean`.",
            )

    def around(self, p: float) -> "HalfNormalRate":
        """Scale a rate that is meant for layers of p=0.5 to layers of another rate.

        Args:
            p: Drop rate of a layer, in [0, 1).

        """
        return HalfNormalRate(rate_around(self.mean, p), self.std * 2 * min(p, 1 - p), rate_around(self.max, p))

    @property
    def expected(self) -> float:
        """The mean of the rates drawn, apart from the cap."""
        return min(self.mean + self.std * math.sqrt(2 / math.pi), self.max)


def rate_around(rate: float, p: float) -> float:
    """Scale a rate that is meant for layers of p=0.5 to layers of another rate.

    Up to p=0.5 the drop rate is proportional to p, from there on the keep rate to 1 - p. So it stays in [0, 1), and
    rates keep their order.

    Args:
        rate: In [0, 1).
        p: Drop rate of a layer, in [0, 1).

    Example:
        >>> rate_around(0.6, 0.25), round(rate_around(0.6, 0.75), 2)
        (0.3, 0.8)

    """
    return rate * 2 * p if p <= 0.5 else 1 - (1 - rate) * 2 * (1 - p)


@dataclass(frozen=True)
class Buckets:
    """The weak and the strong bucket of units, and the rates at which they are dropped (Eq. 5, arXiv 2409.09088).

    The caps 0.5 and 0.9 come from the authors' research code, since the paper names none.

    Args:
        low: Rate of the weak bucket.
        high: Rate of the strong bucket. Neither its mean nor its cap is below that of `low`.
        strong_fraction: The fraction of a layer's units that are strong, those with the highest scores, in [0, 1]. At 0
            all units are dropped at `low`, at 1 all at `high`. It is rounded up to whole units.

    Raises:
        ConfigurationError: If a value is out of range, or `low` lies above `high`.

    Example:
        >>> Buckets(high=HalfNormalRate(mean=0.7, std=0.05, max=0.9), strong_fraction=0.3).high.mean
        0.7

    """

    low: HalfNormalRate = HalfNormalRate(0.1, 0.05, 0.5)
    high: HalfNormalRate = HalfNormalRate(0.6, 0.05, 0.9)
    strong_fraction: float = 0.5

    def __post_init__(self) -> None:
        for name in ("low", "high"):
            if not isinstance(getattr(self, name), HalfNormalRate):
                raise ConfigurationError(
                    f"Buckets({name}={describe(getattr(self, name))}) was given.",
                    f"`{name}` is a HalfNormalRate.",
                    f"Pass, for example, {name}=HalfNormalRate(mean=0.3, std=0.05, max=0.6).",
                )
        strong_fraction = check_fraction("Buckets", "strong_fraction", self.strong_fraction, example=0.5)
        object.__setattr__(self, "strong_fraction", strong_fraction)
        if self.low.mean > self.high.mean or self.low.max > self.high.max:
            raise ConfigurationError(
                f"Buckets(low={self.low}, high={self.high}) was given.",
                "Strong units are dropped more often: neither `mean` nor `max` of `low` lies above that of `high`.",
                "Swap the two, or to drop the weak units instead wrap the measure: measure=Inverted(Conductance()).",
            )

    @classmethod
    def around(cls, p: float) -> "Buckets":
        """Scale the paper's rates, which are for layers of p=0.5, to a layer of another rate.

        Ours: the paper has one pair of rates for all layers, at which a layer of p=0.1 drops 39% of its units.

        Args:
            p: Drop rate of the layer as vanilla dropout, in [0, 1).

        Raises:
            ConfigurationError: If `p` is out of range.

        Example:
            >>> buckets = Buckets.around(0.25)
            >>> buckets.low.mean, buckets.high.mean
            (0.05, 0.3)

        """
        return _around(check_rate("Buckets.around", "p", p))


@functools.lru_cache(maxsize=1024)
def _around(p: float) -> Buckets:
    paper = Buckets()
    return Buckets(paper.low.around(p), paper.high.around(p), paper.strong_fraction)


def draw_rates(rates: Sequence[HalfNormalRate], generator: torch.Generator) -> list[float]:
    """Draw independent rates `min(mean + |N(0, std)|, max)` (Eq. 8, arXiv 2409.09088).

    Args:
        rates: The distribution of each.
        generator: A generator on the CPU.

    Returns:
        The rates, each from its `mean` to its `max`.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> draw_rates([HalfNormalRate(mean=0.3, std=0.0, max=0.5)] * 2, generator)
        [0.3, 0.3]

    """
    normal = torch.randn(len(rates), dtype=torch.float32, generator=generator, device="cpu").tolist()
    return [min(rate.mean + rate.std * abs(each), rate.max) for rate, each in zip(rates, normal, strict=True)]


def strong_count(num_units: int, strong_fraction: float) -> int:
    """Give the size of the strong bucket: `U - floor((1 - strong_fraction) U)` (Eq. 5, arXiv 2409.09088).

    Args:
        num_units: U, at least 0.
        strong_fraction: The fraction of the units that are strong, in [0, 1], rounded up to whole units.

    Returns:
        A number from 0 to U.

    Raises:
        ConfigurationError: If a value is out of range.

    Example:
        >>> strong_count(10, 0.5), strong_count(10, 0.41)
        (5, 5)

    """
    num_units = check_count("strong_count", "num_units", num_units, minimum=0, example=1024)
    strong_fraction = check_fraction("strong_count", "strong_fraction", strong_fraction, example=0.5)
    # The allowance undoes what binary fractions add: 0.07 * 100 is 7.000000000000001 and must stay 7 units.
    return math.ceil(strong_fraction * num_units - 1e-9)


def bucket_probabilities(scores: Tensor, low: float | Tensor, high: float | Tensor, strong_fraction: float) -> Tensor:
    """Drop the units with the highest scores at `high`, the others at `low` (Eq. 5, arXiv 2409.09088).

    Args:
        scores: Shape (U,), or (L, U) for L layers at once. Negative scores rank below positive ones. Of equal scores,
            the unit with the lower index counts as higher.
        low: Drop probability of the weak bucket: one for all layers or, with shape (L, 1), one for each.
        high: Drop probability of the strong bucket, in the same way.
        strong_fraction: The fraction of the units that are strong, in [0, 1].

    Returns:
        Shape of `scores`, float32, on their device.

    Raises:
        ConfigurationError: If `strong_fraction` is outside [0, 1].

    Example:
        >>> bucket_probabilities(torch.tensor([3.0, -1.0, 2.0, 0.5]), low=0.1, high=0.6, strong_fraction=0.5)
        tensor([0.6000, 0.1000, 0.6000, 0.1000])

    """
    # A stable sort, not topk: the same scores must give the same buckets on every rank and after a restart.
    ranking = scores.sort(dim=-1, descending=True, stable=True).indices
    top = ranking[..., : strong_count(scores.shape[-1], strong_fraction)]
    low, high = (
        rate.to(scores.device, torch.float32)
        if isinstance(rate, Tensor)
        # Filled in by the device. A tensor made of a number would be copied there, and the host would wait.
        else torch.full((), rate, dtype=torch.float32, device=scores.device)
        for rate in (low, high)
    )
    return low.expand_as(scores).scatter(-1, top, high.expand_as(top))
