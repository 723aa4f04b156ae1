"""REINFORCE with a moving-average baseline, as pure functions and one running statistic.

    J(theta) = E_{a ~ pi} R(a) + beta H(pi)
    grad J   ~ w A grad log pi(a) + beta w grad H,   A = (R - b) / s,   w = min(c, pi(a) / pi_old(a))

`a` is a candidate, drawn from `pi_old` before the policy moved on to `pi`. `b` and `s` are the running mean and
standard deviation of the rewards before R.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from lightning_ydrop.checks import check_number
from lightning_ydrop.errors import ConfigurationError, describe

# Of importance weights without a cap. Their squares are still numbers.
LARGEST_WEIGHT = 1e100


@dataclass(frozen=True)
class Reinforce:
    """The constants of REINFORCE. The defaults are for some hundred trials: see `python -m benchmarks.budget`.

    Args:
        baseline_decay: Weight of the past in the running mean and deviation of rewards, in [0, 1). 0.95 remembers about
            20 rewards; 0.8 to 0.95 find the same, 0.99 finds less. The 0.999 of ENAS is for thousands of trials.
        entropy_weight: `beta`, at least 0. Advantages are normalised, so it means the same for any reward. 0 to 0.03
            find the same; at 0.1 the policy stays broader and learns more slowly.
        weight_cap: `c`, the largest importance weight of a reward that comes late, at least 1. Infinite: no cap. Larger
            caps correct more and add variance.
        advantage_cap: The largest absolute advantage, above 0. Infinite: no cap. Without one, a rare failed candidate
            decides the direction of many updates, and searches differ far more from seed to seed.

    Raises:
        ConfigurationError: If a constant is out of range.

    """

    baseline_decay: float = 0.95
    entropy_weight: float = 0.01
    weight_cap: float = 2.0
    advantage_cap: float = 3.0

    def __post_init__(self) -> None:
        check_number("Reinforce", "entropy_weight", self.entropy_weight, example=0.01)
        for name, lowest, highest, example in (
            ("baseline_decay", 0.0, math.nextafter(1.0, 0.0), 0.95),
            ("weight_cap", 1.0, math.inf, 2.0),
            ("advantage_cap", math.nextafter(0.0, 1.0), math.inf, 3.0),
        ):
            _check_range(name, getattr(self, name), lowest, highest, example)
            object.__setattr__(self, name, float(getattr(self, name)))


def _check_range(name: str, value: object, lowest: float, highest: float, example: float) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not lowest <= value <= highest:  # type: ignore[operator]
        allowed = {"baseline_decay": "in [0, 1)", "weight_cap": "of at least 1", "advantage_cap": "above 0"}[name]
        raise ConfigurationError(
            f"Reinforce({name}={describe(value)}) was given.",
            f"`{name}` is a number {allowed}.",
            f"Pass, for example, {name}={example}.",
        )


class Rewards:
    """The running mean and standard deviation of rewards, weighted by decay ** age.

    The weights are normalised by their sum, so that the first mean is the first reward and not drawn towards 0.

    Args:
        decay: Weight of the past, in [0, 1).

    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.mean = 0.0
        self.variance = 0.0
        self._sum_of_weights = 0.0

    def add(self, reward: float) -> None:
        """Take in a reward."""
        self._sum_of_weights = self.decay * self._sum_of_weights + 1.0
        share = 1.0 / self._sum_of_weights
        deviation = reward - self.mean
        self.mean += share * deviation
        self.variance = (1.0 - share) * (self.variance + share * deviation**2)

    def advantage(self, reward: float, cap: float) -> float:
        """Say by how many standard deviations a reward exceeds those before it.

        Args:
            reward: A reward that was not added yet.
            cap: The largest absolute value.

        Returns:
            The advantage. 0 for the first reward, which there is nothing to compare with, and one that equals the mean.

        """
        deviation = reward - self.mean
        if self._sum_of_weights == 0.0 or deviation == 0.0:
            return 0.0
        spread = math.sqrt(self.variance)
        size = min(cap, abs(deviation) / spread) if spread > 0.0 else min(cap, 1.0)
        return math.copysign(size, deviation)


def capped_weight(log_prob: float, log_prob_when_drawn: float | None, cap: float) -> float:
    """Compute the importance weight of a candidate whose reward comes late.

    Args:
        log_prob: Log-probability under the policy of today.
        log_prob_when_drawn: Log-probability under the policy that drew the candidate; None if it is not known.
        cap: The largest weight.

    Returns:
        min(cap, pi / pi_old), or 1 if that policy is not known.

    """
    if log_prob_when_drawn is None:
        return 1.0
    # In logarithms, and below where the ratio itself overflows.
    return math.exp(min(math.log(min(cap, LARGEST_WEIGHT)), log_prob - log_prob_when_drawn))


def effective_sample_size(weights: Iterable[float]) -> float:
    """Compute how many equally weighted samples are worth as much: (sum w)^2 / sum w^2. 0 for no weights."""
    squares = total = 0.0
    for weight in weights:
        total += weight
        squares += weight**2
    return total**2 / squares if squares > 0.0 else 0.0


def surrogate(
    log_probs: Tensor,
    entropies: Tensor,
    *,
    advantage: float,
    weight: float,
    entropy_weight: float,
    usual_entropies: Tensor | None,
) -> Tensor:
    """Build the number whose gradient is the estimate of grad J of one candidate.

    The entropy of a sequence is the sum of the entropies of its tokens, each given the tokens before it. Where these
    depend on what was drawn, a choice also decides how large the entropies of later tokens are. So these count as its
    reward, less a baseline that lowers the variance.

    Args:
        log_probs: (T,). log pi of each token, given those before it.
        entropies: (T,). Entropy of each token, given those before it.
        advantage: `A`.
        weight: `w`.
        entropy_weight: `beta`.
        usual_entropies: (T,). Running mean of the entropies, the baseline. None: tokens are independent.

    Returns:
        A scalar. Its value means nothing.

    """
    entropy = entropies.sum()
    if usual_entropies is not None:
        surplus = entropies.detach() - usual_entropies
        later = surplus.sum() - surplus.cumsum(0)
        entropy = entropy + (later * log_probs).sum()
    return weight * (advantage * log_probs.sum() + entropy_weight * entropy)
