"""Mean differences over pairs, with the 95% confidence interval of the paired t test."""

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from scipy.stats import ttest_rel


@dataclass(frozen=True)
class Difference:
    """A mean difference over pairs, and how far its 95% confidence interval reaches to either side.

    Attributes:
        mean: In the unit of the pairs. NaN for none.
        half_width: Infinite for fewer than two pairs.
        pairs: How many.
        p_value: Of the two-sided test that there is none. NaN where it can't be tested.

    """

    mean: float
    half_width: float
    pairs: int
    p_value: float = math.nan

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
        tested = ttest_rel(*zip(*pairs, strict=True))
        low, high = tested.confidence_interval()
    return Difference(float(low + high) / 2, float(high - low) / 2, len(pairs), float(tested.pvalue))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values of a family of tests by Holm's method, in their order. NaN, which was not tested, counts as 1."""
    given = [1.0 if math.isnan(value) else value for value in p_values]
    adjusted, highest = [0.0] * len(given), 0.0
    for rank, place in enumerate(sorted(range(len(given)), key=given.__getitem__)):
        highest = max(highest, min(1.0, (len(given) - rank) * given[place]))
        adjusted[place] = highest
    return adjusted
