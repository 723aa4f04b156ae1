"""What a search chooses from: the values of each field of a pattern, at each place of a network."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

from lightning_ydrop.checks import check_choice, is_list, is_whole
from lightning_ydrop.errors import ConfigurationError, describe
from lightning_ydrop.layers.patterns import ConvPattern, Pattern, TokenPattern

Value = bool | int | float | str
Kind = Literal["conv", "token"]


@dataclass(frozen=True)
class ConvValues:
    """The values that a search tries for each field of a ConvPattern.

    A field with one value is not searched. The paper publishes no values; these are ours. The order of the fields is
    that of the tokens in Figure 3 of arXiv 2101.01761.

    Args:
        size: Sides of a rectangle, as shares of the side of the map. 0: no pattern.
        stride: Gaps between rectangles, as shares of the side of the map.
        repeat: Rectangles per direction.
        rotate: Degrees.
        shear_x: Shears along x.
        shear_y: Shears along y.
        share_c: Whether all channels share one placement.
        residual: Whether the shortcut takes the pattern too.
        rate: Probabilities that a sample, or a channel of a sample, takes the pattern. Not in the paper.

    Raises:
        ConfigurationError: If a field has no values, a value twice, or a value that no ConvPattern takes.

    """

    makes: ClassVar[type[ConvPattern]] = ConvPattern
    # Values of the fields that are not under test: with them a pattern is valid whatever its other fields are.
    plain: ClassVar[Mapping[str, Any]] = {"size": 0.5, "rate": 0.5}

    size: Sequence[float] = (0.0, 1 / 8, 1 / 4, 3 / 8, 1 / 2)
    stride: Sequence[float] = (1 / 16, 1 / 8, 1 / 4, 1 / 2)
    repeat: Sequence[int] = (1, 2, 3)
    rotate: Sequence[float] = (0.0, 22.5, 45.0, 67.5)
    shear_x: Sequence[float] = (-0.3, 0.0, 0.3)
    shear_y: Sequence[float] = (-0.3, 0.0, 0.3)
    share_c: Sequence[bool] = (False, True)
    residual: Sequence[bool] = (False, True)
    rate: Sequence[float] = (1.0,)

    def __post_init__(self) -> None:
        _check_values(self)


@dataclass(frozen=True)
class TokenValues:
    """The values that a search tries for each field of a TokenPattern. A field with one value is not searched.

    Args:
        size: How many consecutive tokens are affected, or "all". 0: no pattern.
        stride: How many tokens lie between affected ones.
        share_t: Whether affected tokens share their noise.
        share_c: Whether channels share their noise.
        rate: Drop rates. An empty sequence fixes the rate to `fixed_rate`.
        fixed_rate: The rate of all patterns where `rate` is empty: the model's own dropout rate, for example.

    Raises:
        ConfigurationError: If a field has no values, a value twice, or a value that no TokenPattern takes.

    """

    makes: ClassVar[type[TokenPattern]] = TokenPattern
    plain: ClassVar[Mapping[str, Any]] = {"size": 1, "rate": 0.5}

    size: Sequence[int | str] = (0, 1, 2, 4, 8, "all")
    stride: Sequence[int] = (1, 2, 4, 8)
    share_t: Sequence[bool] = (False, True)
    share_c: Sequence[bool] = (False, True)
    rate: Sequence[float] = (0.1, 0.2, 0.4)
    fixed_rate: float = 0.1

    def __post_init__(self) -> None:
        if is_list(self.rate) and len(self.rate) == 0:
            object.__setattr__(self, "rate", (self.fixed_rate,))
        _check_values(self)


def _check_values(of: ConvValues | TokenValues) -> None:
    """Turn each field into a tuple of plain values, and refuse what no pattern takes."""
    for name in _searched(of):
        values = getattr(of, name)
        if not is_list(values) or len(values) == 0:
            raise ConfigurationError(
                f"{type(of).__name__}({name}={describe(values)}) was given.",
                f"`{name}` lists the values that a search tries, at least one.",
                f"Pass, for example, {name}={_default_of(of, name)}.",
            )
        taken = tuple(_value_as_taken(of, name, value) for value in values)
        if len(set(taken)) < len(taken):
            raise ConfigurationError(
                f"{type(of).__name__}({name}={describe(taken)}) was given.",
                "Each value stands in the list once: the search would take equal values for different ones.",
                f"Pass, for example, {name}={tuple(dict.fromkeys(taken))}.",
            )
        object.__setattr__(of, name, taken)
    for size in of.size:  # a size may be too large for a rate
        for rate in of.rate:
            _made(of, "size", size, {"size": size, "rate": rate})


def _value_as_taken(of: ConvValues | TokenValues, name: str, value: Any) -> Value:
    """Give a value as a pattern holds it: Python's own type."""
    taken: Value = getattr(_made(of, name, value, {**of.plain, name: value}), name)
    return taken


def _made(of: ConvValues | TokenValues, name: str, value: Any, arguments: Mapping[str, Any]) -> Pattern:
    """Make a pattern with a value, and name the list of values in the error if it can't be made."""
    try:
        return of.makes(**arguments)
    except ConfigurationError as error:
        _, allowed, _ = error.args
        raise ConfigurationError(
            f"{type(of).__name__}({name}=...) was given with the value {describe(value)}.",
            allowed,
            f"Pass, for example, {name}={_default_of(of, name)}.",
        ) from error


def _searched(of: ConvValues | TokenValues) -> list[str]:
    """List the fields that are fields of a pattern, in the order of its tokens."""
    return [each.name for each in fields(of) if each.name != "fixed_rate"]


def _default_of(of: ConvValues | TokenValues, name: str) -> Any:
    return getattr(type(of), name)  # a dataclass keeps the defaults of its fields as attributes of the class


@dataclass(frozen=True)
class Token:
    """One choice of a search: a field of the pattern at a place.

    Args:
        name: `place.field`, which names the parameter in Optuna too.
        place: The place.
        kind: The kind of pattern at that place.
        field: The field of the pattern.
        values: The values to choose from, two or more.

    """

    name: str
    place: str
    kind: Kind
    field: str
    values: tuple[Value, ...]


@dataclass(frozen=True)
class PatternSpace:
    """All patterns that a search can give to a network.

    A candidate is a sequence of choices: for each token the index of its value. Tokens stand in the order of places,
    and within a place in the order of the fields.

    Args:
        kinds: For each place its kind of pattern, "conv" or "token", in the order of `find_places`.
        conv: The values for the places of kind "conv".
        token: The values for the places of kind "token".
        unsearched: The places of the network that take no pattern, with their kinds. Candidates name them all the same:
            names of some places alone would mean others in a network of another depth.

    Raises:
        ConfigurationError: If there is no place, no field with two values, or a kind that does not exist.

    Example:
        >>> space = PatternSpace({"stage1.1": "conv", "stage2.1": "conv"})
        >>> len(space.tokens), space.tokens[0].name
        (16, 'stage1.1.size')
        >>> space.patterns([1, 1, 0, 0, 1, 1, 1, 0] + [0] * 8)["stage1.1"].size
        0.125

    """

    kinds: Mapping[str, Kind]
    conv: ConvValues = ConvValues()
    token: TokenValues = TokenValues()
    unsearched: Mapping[str, Kind] = field(default_factory=dict)
    tokens: tuple[Token, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.kinds, Mapping) or not self.kinds:
            raise ConfigurationError(
                f"PatternSpace(kinds={describe(self.kinds)}) was given.",
                "`kinds` says for each place of a network which kind of pattern it takes: at least one place.",
                'Pass, for example, kinds={"stage1.1": "conv"}; `find_places(model)` lists the places.',
            )
        for values, kind, name in ((self.conv, ConvValues, "conv"), (self.token, TokenValues, "token")):
            if not isinstance(values, kind):
                raise ConfigurationError(
                    f"PatternSpace({name}={describe(values)}) was given.",
                    f"`{name}` is an instance of {kind.__name__}.",
                    f"Pass, for example, {name}={kind.__name__}().",
                )
        for place, kind_of_place in self.kinds.items():
            check_choice("PatternSpace", f"kinds[{place!r}]", kind_of_place, ("conv", "token"))
        object.__setattr__(self, "kinds", dict(self.kinds))
        object.__setattr__(self, "tokens", tuple(self._tokens()))
        if not self.tokens:
            raise ConfigurationError(
                f"{describe(self)} was given.",
                "At least one field has two values or more: there is nothing to search.",
                "Pass, for example, conv=ConvValues(size=(0, 1 / 4)).",
            )

    def __hash__(self) -> int:
        return hash(self.tokens)

    def _tokens(self) -> list[Token]:
        tokens = []
        for place, kind in self.kinds.items():
            values = self._values_at(place)
            for name in _searched(values):
                choices = tuple(getattr(values, name))
                if len(choices) > 1:
                    tokens.append(Token(f"{place}.{name}", place, kind, name, choices))
        return tokens

    def _values_at(self, place: str) -> ConvValues | TokenValues:
        return self.conv if self.kinds[place] == "conv" else self.token

    @property
    def num_candidates(self) -> int:
        """How many sequences of choices there are. Many of them mean the same patterns: see `distinct`."""
        product = 1
        for token in self.tokens:
            product *= len(token.values)
        return product

    def check_choices(self, choices: Sequence[int]) -> list[int]:
        """Refuse what is no sequence of choices of this space.

        Args:
            choices: For each token the index of its value.

        Returns:
            The choices as plain ints.

        Raises:
            ConfigurationError: If there are too few or too many, or an index is out of range.

        """
        if not is_list(choices) or len(choices) != len(self.tokens):
            raise ConfigurationError(
                f"{describe(choices)} was given as choices.",
                f"A candidate of this space has {len(self.tokens)} choices, one for each token.",
                "Pass the choices that `sample` of a policy of this space returns.",
            )
        for token, choice in zip(self.tokens, choices, strict=True):
            if not is_whole(choice) or not 0 <= choice < len(token.values):
                raise ConfigurationError(
                    f"{describe(choice)} was given as the choice of {token.name!r}.",
                    f"It is the index of one of the {len(token.values)} values {token.values}.",
                    "Pass, for example, 0.",
                )
        return [int(choice) for choice in choices]

    def patterns(self, choices: Sequence[int]) -> dict[str, Pattern]:
        """Give the pattern of each place.

        Args:
            choices: For each token the index of its value.

        Returns:
            The patterns by place, empty ones included, and those that are not searched.

        Raises:
            ConfigurationError: If these are no choices of this space.

        """
        arguments: dict[str, dict[str, Any]] = {
            place: {name: getattr(values, name)[0] for name in _searched(values)}
            for place, values in ((place, self._values_at(place)) for place in self.kinds)
        }
        for token, choice in zip(self.tokens, self.check_choices(choices), strict=True):
            arguments[token.place][token.field] = token.values[choice]
        empty = {
            place: ConvPattern(size=0.0) if kind == "conv" else TokenPattern(size=0)
            for place, kind in self.unsearched.items()
        }
        return {place: self._values_at(place).makes(**each) for place, each in arguments.items()} | empty

    def choices(self, patterns: Mapping[str, Pattern]) -> list[int]:
        """Give the choices that make patterns: the inverse of `patterns`, as far as there is one.

        Args:
            patterns: The patterns by place. A place that is missing has an empty pattern.

        Returns:
            For each token the index of its value. A value that changes nothing may be another than the pattern's: the
            stride of a pattern with one rectangle, for example.

        Raises:
            ConfigurationError: If this space does not contain the patterns.

        """
        for place in patterns:
            if place not in self.kinds and not (place in self.unsearched and patterns[place].is_empty):
                raise ConfigurationError(
                    f"A pattern for {place!r} was given.",
                    f"The places of this space are {', '.join(map(repr, self.kinds))}.",
                    "Pass patterns for these places.",
                )
        wanted = {
            place: patterns[place] if place in patterns else self._values_at(place).makes(size=0)
            for place in self.kinds
        }
        choices = [
            _index(token.values, getattr(wanted[token.place], token.field, None)) for token in self.tokens
        ]  # a value that is not there may not matter: the comparison tells
        made_at = self.patterns(choices)
        for place, made in ((place, made_at[place]) for place in self.kinds):
            if type(made) is not type(wanted[place]) or made.canonical() != wanted[place].canonical():
                raise ConfigurationError(
                    f"{describe(wanted[place])} was given for {place!r}.",
                    f"This space has there the patterns of {describe(self._values_at(place))}.",
                    "Add the pattern's values to those of the space, or pass another pattern.",
                )
        return choices

    def distinct(self, choices: Sequence[int]) -> tuple[Pattern, ...]:
        """Give what tells candidates apart: equal for choices that mean the same patterns.

        Args:
            choices: For each token the index of its value.

        Returns:
            The canonical pattern of each place, in order. It is hashable.

        """
        return tuple(pattern.canonical() for pattern in self.patterns(choices).values())


def _index(values: tuple[Value, ...], value: object) -> int:
    return values.index(value) if value in values else 0
