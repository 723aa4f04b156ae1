"""From scores to drop probabilities: half-normal rates and buckets (Eq. 5 and 8, arXiv 2409.09088)."""

import math
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


def draw_rates(rate: HalfNormalRate, count: int, generator: torch.Generator) -> list[float]:
    """Draw independent rates `min(mean + |N(0, std)|, max)` (Eq. 8, arXiv 2409.09088).

    Args:
        rate: Their distribution.
        count: Number of rates, at least 0.
        generator: A generator on the CPU.

    Returns:
        The rates, each from `rate.mean` to `rate.max`.

    Raises:
        ConfigurationError: If `count` is not a whole number of at least 0.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> draw_rates(HalfNormalRate(mean=0.3, std=0.0, max=0.5), count=2, generator=generator)
        [0.3, 0.3]

    """
    count = check_count("draw_rates", "count", count, minimum=0, example=2)
    normal = torch.randn(count, dtype=torch.float32, generator=generator, device="cpu").tolist()
    return [min(rate.mean + rate.std * abs(each), rate.max) for each in normal]


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
