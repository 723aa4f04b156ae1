"""Mean differences over pairs, with the 95% confidence interval of the paired t test."""

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass

from scipy.stats import ttest_rel


@dataclass(frozen=True)
class Difference:
    """A mean difference over pairs, and how far its 95% confidence interval reaches to either side.

    Attributes:
        mean: In the unit of the pairs. NaN for none.
        half_width: Infinite for fewer than two pairs.
        pairs: How many.

    """

    mean: float
    half_width: float
    pairs: int

    def __str__(self) -> str:
        if self.pairs > 1:
            return f"{self.mean:+.2f} ± {self.half_width:.2f} ({self.pairs})"
        return f"{self.mean:+.2f} (1)" if self.pairs else ""


def difference_of(pairs: Iterable[tuple[float, float]]) -> Difference:
    """Compare the first of each pair with the second."""
    pairs = list(pairs)
    if len(pairs) < 2:
        return Difference(pairs[0][0] - pairs[0][1] if pairs else math.nan, math.inf, len(pairs))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of differences that are all the same
        low, high = ttest_rel(*zip(*pairs, strict=True)).confidence_interval()
    return Difference(float(low + high) / 2, float(high - low) / 2, len(pairs))
