import copy
import pickle
from dataclasses import FrozenInstanceError, asdict
from itertools import product
from pathlib import Path
from typing import Any

import numpy
import pytest
import yaml
from jsonargparse import ArgumentParser

from lightning_ydrop import ConfigurationError, ConvPattern, TokenPattern
from lightning_ydrop.functional.stencils import list_stencil
from lightning_ydrop.layers.patterns import Pattern

PATTERNS: list[Pattern] = [
    ConvPattern(0.25),
    ConvPattern(0.25, 0.5, 3, 22.5, 0.3, -0.3, True, True, 0.5),
    ConvPattern.stochastic_depth(0.2),
    TokenPattern("all"),
    TokenPattern(4, 2, True, True, 0.3),
]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_patterns_are_frozen_values(pattern: Any) -> None:
    with pytest.raises(FrozenInstanceError):
        pattern.size = 0
    for twin in (copy.deepcopy(pattern), pickle.loads(pickle.dumps(pattern)), type(pattern)(**asdict(pattern))):
        assert twin == pattern
        assert hash(twin) == hash(pattern)
        assert repr(twin) == repr(pattern)


def test_numpys_values_and_whole_numbers_become_plain_ones() -> None:
    make_conv: Any = ConvPattern
    make_token: Any = TokenPattern
    conv = make_conv(
        numpy.float32(0.25), 1, numpy.int64(2), numpy.int64(45), 0, numpy.float64(0.5), numpy.bool_(True), rate=1
    )
    assert [type(value) for value in vars(conv).values()] == [float, float, int, float, float, float, bool, bool, float]
    assert conv == ConvPattern(0.25, 1.0, 2, 45.0, 0.0, 0.5, True)
    token = make_token(numpy.int64(2), numpy.int32(3), numpy.bool_(True), rate=numpy.float32(0.5))
    assert [type(value) for value in vars(token).values()] == [int, int, bool, bool, float]


@pytest.mark.parametrize(
    ("kind", "name", "values"),
    [
        (ConvPattern, "size", (-0.1, 1.1, float("nan"), "half", None, True)),
        (ConvPattern, "stride", (0, -0.1, 1.1, None)),
        (ConvPattern, "repeat", (0, 1.5, "2", True)),
        (ConvPattern, "rotate", (float("inf"), "45", None)),
        (ConvPattern, "shear_x", (float("nan"), None)),
        (ConvPattern, "shear_y", (float("nan"), None)),
        (ConvPattern, "share_c", (1, "yes", None)),
        (ConvPattern, "residual", (0, None)),
        (ConvPattern, "rate", (-0.1, 1.1, None)),
        (TokenPattern, "size", (-1, 1.5, "none", None, True)),
        (TokenPattern, "stride", (0, 1.5, None)),
        (TokenPattern, "share_t", (1, None)),
        (TokenPattern, "share_c", (1, None)),
        (TokenPattern, "rate", (-0.1, 1.1, None)),
    ],
)
def test_wrong_values_are_refused_by_name(kind: Any, name: str, values: tuple[Any, ...]) -> None:
    for value in values:
        with pytest.raises(ConfigurationError) as error:
            kind(**{"size": 0, name: value})
        assert error.value.args[0] == f"{kind.__name__}({name}={value!r}) was given."
        assert len(error.value.args) == 3


def test_a_pattern_that_drops_everything_is_refused() -> None:
    with pytest.raises(ConfigurationError) as error:
        ConvPattern(1)
    assert str(error.value) == (
        "ConvPattern(size=1.0, rate=1.0) was given. A pattern of size 1 covers the map, and at rate 1 nothing would be "
        "left. Pass, for example, rate=0.1, or a smaller size."
    )
    for covering in ({"rotate": 180}, {"share_c": True, "repeat": 3}):
        with pytest.raises(ConfigurationError, match="nothing would be left"):
            ConvPattern(1, **covering)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=r"TokenPattern\(size='all', rate=1\.0\) was given"):
        TokenPattern("all", rate=1)
    ConvPattern(1, rate=0.99)
    ConvPattern(1, rotate=45)
    TokenPattern("all", rate=0.99)
    TokenPattern(1, rate=1)


def test_size_or_rate_0_is_empty() -> None:
    assert ConvPattern(0).is_empty
    assert ConvPattern(0.5, rate=0).is_empty
    assert not ConvPattern(0.5).is_empty
    assert TokenPattern(0).is_empty
    assert TokenPattern("all", rate=0).is_empty
    assert not TokenPattern(1).is_empty


def test_small_maps_are_covered_by_rounded_patterns() -> None:
    assert ConvPattern(0.9).covers(4, 4)
    assert not ConvPattern(0.9).covers(8, 8)
    assert not ConvPattern(0.9).covers(8, 4)
    assert ConvPattern(0.25).covers(1, 1)
    assert ConvPattern.spatial_dropout(0.1).covers(64, 32)
    assert not ConvPattern(1, rotate=45).covers(9, 9)
    assert not ConvPattern(0).covers(1, 1)


@pytest.mark.parametrize(
    ("pattern", "same"),
    [
        (ConvPattern(0, 0.5, 3, 45, 0.3, 0.3, True, True, 0.5), ConvPattern(0)),
        (ConvPattern(0.5, rate=0), ConvPattern(0)),
        (ConvPattern(0.25, 0.5), ConvPattern(0.25)),
        (ConvPattern(0.25, 0.5, 2), ConvPattern(0.25, 0.5, 2)),
        (ConvPattern(0.5, 0.5, 3), ConvPattern(0.5)),
        (ConvPattern(3 / 8, 0.5, 3), ConvPattern(3 / 8, 0.5, 2)),
        (ConvPattern(0.25, rotate=405, shear_y=-0.0), ConvPattern(0.25, rotate=45)),
        (ConvPattern(0.25, rotate=-45), ConvPattern(0.25, rotate=315)),
        (TokenPattern(0, 2, True, True, 0.3), TokenPattern(0)),
        (TokenPattern("all", rate=0), TokenPattern(0)),
        (TokenPattern("all", 4, True), TokenPattern("all", share_t=True)),
        (TokenPattern(1, 4, True), TokenPattern(1, 4)),
        (TokenPattern(2, 4, True), TokenPattern(2, 4, True)),
    ],
    ids=str,
)
def test_patterns_that_drop_alike_are_written_alike(pattern: Pattern, same: Pattern) -> None:
    assert pattern.canonical() == same
    assert repr(pattern.canonical()) == repr(same)
    assert same.canonical() == same


def test_the_canonical_pattern_is_the_same_on_every_map() -> None:
    values = product((1 / 8, 0.3, 0.34, 0.5, 0.6), (1 / 16, 1 / 2), (1, 2, 3, 4), (0, 30, 390))
    for pattern in (ConvPattern(size, stride, repeat, rotate) for size, stride, repeat, rotate in values):
        for height, width in ((1, 1), (2, 2), (3, 5), (5, 3), (8, 8), (9, 9)):
            stencils = [
                list_stencil(height, width, p.size, p.stride, p.repeat, p.rotate, p.shear_x, p.shear_y)
                for p in (pattern, pattern.canonical())
            ]
            assert stencils[0] == stencils[1]


def test_ready_made_patterns() -> None:
    assert ConvPattern.dropblock(0.25, 0.1) == ConvPattern(0.25, rate=0.1)
    assert ConvPattern.spatial_dropout(0.1) == ConvPattern(1, rate=0.1)
    assert ConvPattern.stochastic_depth(0.1) == ConvPattern(1, share_c=True, rate=0.1)
    assert ConvPattern.cutout(0.5) == ConvPattern(0.5, share_c=True)
    assert TokenPattern.variational_dropout(0.2) == TokenPattern("all", share_t=True, rate=0.2)
    assert TokenPattern.word_dropout(0.2) == TokenPattern("all", share_c=True, rate=0.2)
    assert TokenPattern.dropout(0.2) == TokenPattern("all", rate=0.2)


def instantiated(parser: ArgumentParser, config: Any) -> Any:
    """Call the method by the name that the installed release has."""
    return getattr(parser, "instantiate" if hasattr(parser, "instantiate") else "instantiate_classes")(config)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("kind", [Pattern, dict[str, Pattern]], ids=["one", "by name"])
def test_yaml_names_patterns_and_gets_them_back(pattern: Pattern, kind: Any, tmp_path: Path) -> None:
    written: Any = {"class_path": f"lightning_ydrop.{type(pattern).__name__}", "init_args": asdict(pattern)}
    expected: Any = pattern
    if kind is not Pattern:
        written, expected = {"place": written}, {"place": pattern}
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({"pattern": written}))
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_argument("--pattern", type=kind)
    config = parser.parse_args([f"--config={file}"])
    assert instantiated(parser, config).pattern == expected
    again = tmp_path / "again.yaml"
    again.write_text(parser.dump(config))
    assert instantiated(parser, parser.parse_args([f"--config={again}"])).pattern == expected
