"""From scores to drop probabilities: half-normal rates, buckets and the running mean (Eq. 5 to 8, arXiv 2409.09088)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_ydrop.checks import check_fraction, check_rate, is_real
from lightning_ydrop.errors import ConfigurationError, describe


@dataclass(frozen=True)
class HalfNormalRate:
    """A drop rate drawn anew in every step: `min(mean + |N(0, std)|, max)` (Eq. 8, arXiv 2409.09088).

    Args:
        mean: The smallest and likeliest rate, in [0, 1). (The paper's name: the mean of the normal that is halved.)
        std: Spread of the normal that is halved, at least 0; 0 always gives `mean`.
        max: Cap of the rate, in [0, 1), at least `mean`.

    Raises:
        ConfigurationError: If a value is out of range.

    """

    mean: float
    std: float
    max: float

    def __post_init__(self) -> None:
        check_rate("HalfNormalRate", "mean", self.mean)
        check_rate("HalfNormalRate", "max", self.max)
        if not (is_real(self.std) and self.std >= 0.0):
            raise ConfigurationError(
                f"HalfNormalRate(std={describe(self.std)}) was given.",
                "`std` is a finite number of at least 0, where 0 means the same rate in every step.",
                "Pass, for example, std=0.05.",
            )
        if self.max < self.mean:
            raise ConfigurationError(
                f"HalfNormalRate(mean={self.mean}, max={self.max}) was given.",
                "`max` caps the rate, so it is at least `mean`.",
                f"Pass a `max` from {self.mean} up, or a lower `mean`.",
            )


@dataclass(frozen=True)
class Buckets:
    """Two buckets of units, the weak and the strong, and the rates that they are dropped at (Eq. 5, arXiv 2409.09088).

    The caps 0.5 and 0.9 come from the authors' research code; the paper names none.

    Args:
        low: Rate of the weak bucket.
        high: Rate of the strong bucket; neither its mean nor its cap lies below those of `low`.
        strong_fraction: Share of a layer's units, those with the highest scores, that are strong, in [0, 1]. 0 drops
            all units at `low`, 1 all at `high`; shares of a unit round up.

    Raises:
        ConfigurationError: If a value is out of range, or `low` lies above `high`.

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
        check_fraction("Buckets", "strong_fraction", self.strong_fraction, example=0.5)
        if self.low.mean > self.high.mean or self.low.max > self.high.max:
            raise ConfigurationError(
                f"Buckets(low={self.low}, high={self.high}) was given.",
                "Strong units are dropped more often: neither `mean` nor `max` of `low` lies above that of `high`.",
                "Swap the two, or to drop the weak units instead wrap the measure: measure=Inverted(Conductance()).",
            )


def draw_rates(rate: HalfNormalRate, count: int, generator: torch.Generator) -> list[float]:
    """Draw `count` independent rates (Eq. 8) from a generator on the CPU."""
    normal = torch.randn(count, dtype=torch.float32, generator=generator, device="cpu").tolist()
    return [min(rate.mean + rate.std * abs(each), rate.max) for each in normal]


def strong_count(num_units: int, strong_fraction: float) -> int:
    """Size of the strong bucket: `U - floor((1 - strong_fraction) U)`, that is the share rounded up to whole units."""
    # The allowance undoes what binary fractions add: 0.07 * 100 is 7.000000000000001 and must stay 7 units.
    return math.ceil(strong_fraction * num_units - 1e-9)


def bucket_probabilities(scores: Tensor, low: float | Tensor, high: float | Tensor, strong_fraction: float) -> Tensor:
    """Drop the units with the highest scores at `high`, the others at `low` (Eq. 5).

    Args:
        scores: Shape (U,), or (L, U) for L layers at once; signed, ranked as they are. Of equal scores, the unit with
            the lower index counts as higher.
        low: Drop probability of the weak bucket, for all layers or, with shape (L, 1), for each.
        high: Drop probability of the strong bucket, likewise.
        strong_fraction: Share of the units that are strong.

    Returns:
        Shape of `scores`, float32, on their device.

    """
    # A stable sort, not topk: the same scores must give the same buckets on every rank and after a restart.
    ranking = scores.sort(dim=-1, descending=True, stable=True).indices
    top = ranking[..., : strong_count(scores.shape[-1], strong_fraction)]
    low, high = (torch.as_tensor(rate, dtype=torch.float32, device=scores.device) for rate in (low, high))
    return low.expand_as(scores).scatter(-1, top, high.expand_as(top))
