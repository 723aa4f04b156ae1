"""Which pattern goes to which place: by name, or by relative depth in a network of another depth."""

import re
from collections.abc import Iterable, Mapping

from lightning_ydrop.errors import ConfigurationError, describe
from lightning_ydrop.layers.patterns import ConvPattern, Pattern, TokenPattern
from lightning_ydrop.search.reports import PlaceReport

OF_STAGE = re.compile(r"stage([1-9]\d*)\.([1-9]\d*)")
OF_BLOCK = re.compile(r"block([1-9]\d*)\.(\w+)")
KINDS = {"conv": ConvPattern, "token": TokenPattern}


def wants_blocks(names: Iterable[str]) -> bool:
    """Tell whether names are those of the single blocks of a Transformer."""
    return any(OF_BLOCK.fullmatch(name) for name in names)


def fit_patterns(owner: str, report: PlaceReport, patterns: Mapping[str, Pattern]) -> dict[str, str]:
    """Find for each place of a model the name of the pattern that it takes.

    Names that count from 1 without gaps, in as many stages as the model has, are those of a whole network. If that is
    of another depth, of its m blocks of a stage, block i of n takes the pattern of block floor(i m / n), counted from
    0. Other names are the model's own.

    Args:
        owner: What the user called, for messages.
        report: The places of the model.
        patterns: By name of the place.

    Returns:
        From the places that get a pattern to the names in `patterns`, in the order of the model.

    Raises:
        ConfigurationError: If a name is that of no place, the stages are of another number, or a pattern is of the
            wrong kind.

    """
    sources = {name: name for name in patterns if not OF_STAGE.fullmatch(name) and not OF_BLOCK.fullmatch(name)}
    sources |= _fit_stages(owner, report, patterns) | _fit_blocks(report, patterns)
    if unknown := [name for name in sources if name not in report.places]:
        raise ConfigurationError(
            f"{owner} was given a pattern for {', '.join(map(describe, unknown))}.",
            _listed(report),
            "Name one of these places; print(find_places(model)) says why each is there, and what is not reached.",
        )
    for name, source in sources.items():
        kind = KINDS[report.places[name].kind]
        if not isinstance(patterns[source], kind):
            raise ConfigurationError(
                f"{owner} was given {source}={describe(patterns[source])}.",
                f"The place {name} takes a {kind.__name__}.",
                f"Pass, for example, {kind.__name__}(size={'0.25' if kind is ConvPattern else '2'}).",
            )
    return {name: sources[name] for name in report.places if name in sources}


def _fit_stages(owner: str, report: PlaceReport, names: Iterable[str]) -> dict[str, str]:
    names = [name for name in names if OF_STAGE.fullmatch(name)]
    given, there = _stages(names), _stages(report.places)
    is_part = len(given) < len(there) and all(name in report.places for name in names)
    if given == there or is_part or not _is_whole(given):
        return {name: name for name in names}
    if len(given) != len(there):
        raise ConfigurationError(
            f"{owner} was given patterns of {len(given)} stage(s): {', '.join(names)}.",
            f"The model has {len(there)} stage(s). {_listed(report)}",
            "Name a pattern for each stage; ConvPattern(size=0) leaves a place as it is.",
        )
    return {
        f"stage{stage}.{order}": f"stage{stage}.{_relative(order, len(orders), len(given[stage]))}"
        for stage, orders in there.items()
        for order in orders
    }


def _fit_blocks(report: PlaceReport, names: Iterable[str]) -> dict[str, str]:
    names = [name for name in names if OF_BLOCK.fullmatch(name)]
    given, there = _blocks(names), _blocks(report.places)
    if given == there or given != list(range(1, len(given) + 1)):
        return {name: name for name in names}
    sources: dict[str, str] = {}
    for place in report.places:
        if match := OF_BLOCK.fullmatch(place):
            source = f"block{_relative(int(match[1]), len(there), len(given))}.{match[2]}"
            sources |= {place: source} if source in names else {}
    lost = [name for name in names if name not in sources.values()]
    # In a shallower network some are of no use. A sublayer that none of its blocks has is unknown.
    sublayers = {place.partition(".")[2] for place in sources}
    return sources | {name: name for name in lost if name.partition(".")[2] not in sublayers}


def _relative(number: int, of: int, to: int) -> int:
    """Find the block at the same relative depth in a network of `to` blocks. Both count from 1."""
    return (number - 1) * to // of + 1


def _stages(names: Iterable[str]) -> dict[int, list[int]]:
    """List the orders that are named, by stage, both sorted."""
    stages: dict[int, list[int]] = {}
    for name in names:
        if match := OF_STAGE.fullmatch(name):
            stages.setdefault(int(match[1]), []).append(int(match[2]))
    return {stage: sorted(stages[stage]) for stage in sorted(stages)}


def _blocks(names: Iterable[str]) -> list[int]:
    return sorted({int(match[1]) for name in names if (match := OF_BLOCK.fullmatch(name))})


def _is_whole(stages: Mapping[int, list[int]]) -> bool:
    """Tell whether names count from 1 without gaps, as those of a whole network do."""
    counted = [*stages], *stages.values()
    return bool(stages) and all(numbers == list(range(1, len(numbers) + 1)) for numbers in counted)


def _listed(report: PlaceReport) -> str:
    return f"The places of the model are {', '.join(report.places) or 'none'}."
