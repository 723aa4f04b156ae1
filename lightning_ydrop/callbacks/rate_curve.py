"""How the rate of dropout goes over time."""

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from lightning_ydrop.checks import check_choice, check_count, check_number, check_rate
from lightning_ydrop.errors import ConfigurationError, describe

Kind = Literal["linear", "cosine", "cyclic", "early", "late", "curriculum"]
Clock = Literal["epochs", "steps"]
# These have no natural length: over a whole fit they would change nothing, or go up and down once.
WITH_A_LENGTH = ("cyclic", "early", "late")
DEFAULT_GAMMA = 10.0


@dataclass(frozen=True)
class RateCurve:
    """A rate that goes from `initial` to `p`, by the number of epochs or optimiser steps so far.

    Args:
        kind: As for `DropoutSchedule`, like all others.
        p: None: each layer's own rate.
        initial: Where the rate starts.
        length: None: up to the last epoch or step of the fit.
        by: What is counted.
        gamma: Of the kind "curriculum" alone.
        levels: How many different rates there are at most.

    Raises:
        ConfigurationError: If an argument is out of range, or the kind does not take it.

    """

    kind: Kind = "linear"
    p: float | None = None
    initial: float = 0.0
    length: int | None = None
    by: Clock = "epochs"
    gamma: float | None = None
    levels: int | None = None

    def __post_init__(self) -> None:
        owner = "DropoutSchedule"
        check_choice(owner, "kind", self.kind, get_args(Kind))
        check_choice(owner, "by", self.by, get_args(Clock))
        self._keep("initial", float(check_rate(owner, "initial", self.initial)))
        if self.p is not None:
            self._keep("p", float(check_rate(owner, "p", self.p)))
        if self.length is not None:
            least = 2 if self.kind == "cyclic" else 1
            self._keep("length", check_count(owner, "length", self.length, minimum=least, example=10))
        elif self.kind in WITH_A_LENGTH:
            what = "the length of a cycle" if self.kind == "cyclic" else "when dropout is switched"
            raise ConfigurationError(
                f"DropoutSchedule(kind={self.kind!r}) was given without `length`.",
                f"`length` is {what}, counted in {self.by}.",
                f"Pass, for example, length={10 if self.by == 'epochs' else 1000}.",
            )
        if self.gamma is not None:
            self._keep("gamma", float(check_number(owner, "gamma", self.gamma, example=DEFAULT_GAMMA, positive=True)))
            if self.kind != "curriculum":
                raise ConfigurationError(
                    f"DropoutSchedule(kind={self.kind!r}, gamma={describe(self.gamma)}) was given.",
                    '`gamma` is how fast the rate of kind="curriculum" rises.',
                    'Leave it out, or pass kind="curriculum".',
                )
        if self.levels is not None:
            self._keep("levels", check_count(owner, "levels", self.levels, minimum=2, example=5))

    def share(self, done: int, length: int) -> float:
        """Tell how far the rate is from `initial`, at 0, to `p`, at 1.

        Args:
            done: Epochs or steps so far.
            length: Of the curve, at least 1.

        """
        at = done / length
        if self.kind == "linear":
            share = min(1.0, at)
        elif self.kind == "cosine":
            share = (1.0 - math.cos(math.pi * min(1.0, at))) / 2
        elif self.kind == "cyclic":
            into = done % length
            share = 2.0 * min(into, length - into) / length
        elif self.kind == "early":
            share = float(done < length)
        elif self.kind == "late":
            share = float(done >= length)
        else:
            share = 1.0 - math.exp(-(self.gamma or DEFAULT_GAMMA) * at)
        if self.levels is not None:
            share = round(share * (self.levels - 1)) / (self.levels - 1)
        return share

    def rate(self, own: float, share: float) -> float:
        """Give the rate of a layer.

        Args:
            own: The rate that the layer had.
            share: What `share` returned.

        """
        p = own if self.p is None else self.p
        # Both ends are met exactly.
        return p if share == 1.0 else self.initial + (p - self.initial) * share

    def count_rates(self, total: float, length: int) -> float:
        """Count the different rates of a layer over a fit, or an upper bound of them.

        Args:
            total: Epochs or steps of the fit, perhaps infinite.
            length: Of the curve.

        """
        of_kind = {"early": 2, "late": 2, "cyclic": length // 2 + 1, "linear": length + 1, "cosine": length + 1}
        return min(total, of_kind.get(self.kind, math.inf), self.levels or math.inf)

    def _keep(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # plain numbers, whatever library the given ones came from
