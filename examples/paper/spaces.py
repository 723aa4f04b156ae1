"""What of an arm is tuned, and the points that are tried: the same for every arm, as far as its parameters are.

Points are those of a Halton sequence, in the bases 2, 3, 5 and 7: the first of them are already spread over the space.
"""

import itertools
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from scipy.stats.qmc import Halton

from lightning_ydrop import Buckets

# A value of each parameter.
Point = Mapping[str, Any]


def between(low: float, high: float) -> Callable[[float], float]:
    """Take values between two."""
    return lambda share: round(low + share * (high - low), 6)


def between_powers(low: float, high: float) -> Callable[[float], float]:
    """Take values between two, whose logarithms are evenly spread."""
    return lambda share: float(f"{low * (high / low) ** share:.3g}")


def among(*values: Any) -> Callable[[float], Any]:
    """Take one of some values."""
    return lambda share: values[int(share * len(values))]


PARAMETERS: Mapping[str, Callable[[float], Any]] = {
    "p": between(0.05, 0.85),
    "lr": between_powers(1e-4, 1e-1),
    "strong_fraction": among(0.25, 0.5, 0.75),
    "elasticity": among(1e-3, 1e-2, 1e-1),
    "annealing_epochs": among(2, 5, 10),
    "p_min": between(0.0, 0.4),
    "sigma": among(0.05, 0.1, 0.3),
    "scale_exponent": among(0.5, 0.75, 1.0),
}
OF_YDROP = ("p", "strong_fraction", "elasticity", "annealing_epochs")
SPACES: Mapping[str, Sequence[str]] = {
    "plain": ("lr",),
    "dropout": ("p",),
    "jumpout": ("p_min", "sigma", "scale_exponent"),
    **dict.fromkeys(("ydrop", "random", "shuffled", "inverted"), OF_YDROP),
}
# Sec. 5, arXiv 2409.09088.
ELASTICITIES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
ANNEALING_EPOCHS = (1, 3, 5, 7, 9)


def points(names: Sequence[str], count: int) -> list[Point]:
    """Choose points of a space.

    Args:
        names: Parameters, of PARAMETERS.
        count: How many.

    """
    sequence = Halton(len(names), scramble=False)
    sequence.fast_forward(1)  # the first is 0 everywhere
    return [
        {name: PARAMETERS[name](share) for name, share in zip(names, shares, strict=True)}
        for shares in sequence.random(count).tolist()
    ]


def pairs() -> list[Point]:
    """List the paper's 25 pairs of elasticity and annealing, shuffled: a part of them is a random search."""
    product: list[Point] = [
        {"elasticity": elasticity, "annealing_epochs": epochs}
        for elasticity, epochs in itertools.product(ELASTICITIES, ANNEALING_EPOCHS)
    ]
    random.Random(0).shuffle(product)
    return product


def settings_of(point: Point) -> tuple[str, ...]:
    """Write a point as arguments of a run."""
    settings = {name: point[key] for name, key in (("model.p", "p"), ("model.lr", "lr")) if key in point}
    settings |= {f"ydrop.{name}": point[name] for name in ("elasticity", "annealing_epochs") if name in point}
    if "strong_fraction" in point:
        # The rates that a layer of this p has by default, in buckets of other sizes.
        buckets = replace(Buckets.around(point["p"]), strong_fraction=point["strong_fraction"])
        settings["ydrop.buckets"] = json.dumps(_rounded(asdict(buckets)), separators=(",", ":"))
    if jumpout := {name: point[name] for name in ("p_min", "sigma", "scale_exponent") if name in point}:
        settings["model.jumpout"] = json.dumps(jumpout | {"p_max": 0.9})
    return tuple(f"{name}={value}" for name, value in settings.items())


def in_words(point: Point) -> str:
    """Name a point."""
    return ", ".join(f"{name} {value:g}" for name, value in point.items())


def _rounded(content: Any) -> Any:
    if isinstance(content, dict):
        return {name: _rounded(each) for name, each in content.items()}
    return round(content, 6)
