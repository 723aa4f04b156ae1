"""What there is to say of places: where patterns go, and what was done with them."""

from dataclasses import dataclass, field
from typing import Literal

from lightning_ydrop.layers.patterns import Pattern

Kind = Literal["conv", "token"]


@dataclass(frozen=True)
class Place:
    """Where one pattern goes.

    Attributes:
        name: "stage2.1" for the first block of the second stage, both counted from 1. In Transformers "queries",
            "keys", "values", "attention", "projection", "residual" or "feed_forward", or "block3.queries" where each
            block has places of its own.
        kind: "conv" takes a ConvPattern, "token" a TokenPattern.
        modules: Names of the modules whose outputs are masked, each with draws of its own. An ordinary dropout among
            them gives its place to the pattern.
        shortcuts: Names of the modules, or of the attributes that are None, whose outputs a ConvPattern with
            `residual=True` masks too.
        why: Why the pattern goes there.

    """

    name: str
    kind: Kind
    modules: tuple[str, ...]
    shortcuts: tuple[str, ...]
    why: str

    @property
    def is_of_attention(self) -> bool:
        """Whether attention weights (B, heads, queries, keys) are masked, and no tokens (B, T, C)."""
        return self.name.rpartition(".")[2] == "attention"

    def __str__(self) -> str:
        modules = ", ".join(name or "the model itself" for name in self.modules)
        shortcut = f"; shortcut {', '.join(self.shortcuts)}" if self.shortcuts else ""
        return f"{self.name}: {modules}{shortcut}; {self.why}"


@dataclass(frozen=True)
class PlaceReport:
    """What `find_places` found in a model.

    Attributes:
        places: The places by name, in the order of the model.
        not_reached: By what cannot be masked: why.

    """

    places: dict[str, Place]
    not_reached: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{len(self.places)} place(s) for patterns, {len(self.not_reached)} not reached."]
        lines += [f"  {place}" for place in self.places.values()]
        alike: dict[str, list[str]] = {}
        for name, why in self.not_reached.items():
            alike.setdefault(why, []).append(name)
        lines += [f"  {', '.join(names)}: not reached, {why}" for why, names in alike.items()]
        return "\n".join(lines)


@dataclass(frozen=True)
class PatternReport:
    """What `apply_patterns` or `remove_patterns` did with a model.

    Attributes:
        applied: By place: the pattern that was put there, or taken away.
        fitted: By place: whose pattern it took, in a network of another depth.
        replaced: By ordinary dropout at a place with a pattern: what became of it.
        left: By what was not done: why.

    """

    applied: dict[str, Pattern] = field(default_factory=dict)
    fitted: dict[str, str] = field(default_factory=dict)
    replaced: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    verb: str = "applied"

    def __str__(self) -> str:
        fitted = f", {len(self.fitted)} of them by relative depth" if self.fitted else ""
        lines = [
            f"{len(self.applied)} pattern(s) {self.verb}{fitted}, {len(self.replaced)} ordinary dropout layer(s) "
            f"{'replaced' if self.verb == 'applied' else 'restored'}, {len(self.left)} left."
        ]
        for name, pattern in self.applied.items():
            source = f", the pattern of {self.fitted[name]}" if name in self.fitted else ""
            lines.append(f"  {name}: {pattern}{source}")
        lines += [f"  {name}: {what}" for name, what in self.replaced.items()]
        lines += [f"  {name}: left, {why}" for name, why in self.left.items()]
        return "\n".join(lines)
