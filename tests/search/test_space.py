import math
import pickle
import random
from typing import Any

import numpy as np
import pytest

from lightning_ydrop.errors import ConfigurationError
from lightning_ydrop.layers.patterns import ConvPattern, TokenPattern
from lightning_ydrop.search.space import ConvValues, PatternSpace, TokenValues
from tests.search.spaces import FEW, MIXED, SMALL, WIDE, candidates

FIELDS = ["size", "stride", "repeat", "rotate", "shear_x", "shear_y", "share_c", "residual"]


def test_tokens_stand_in_the_order_of_the_paper() -> None:
    space = PatternSpace({"stage1.1": "conv", "queries": "token"})
    conv = [f"stage1.1.{field}" for field in FIELDS]
    token = [f"queries.{field}" for field in ("size", "stride", "share_t", "share_c", "rate")]
    assert [token.name for token in space.tokens] == conv + token
    assert {token.place for token in space.tokens} == {"stage1.1", "queries"}
    assert [token.kind for token in space.tokens] == ["conv"] * 8 + ["token"] * 5
    assert space.tokens[8].values == (0, 1, 2, 4, 8, "all")


def test_the_default_space_has_8640_patterns_a_place() -> None:
    assert PatternSpace({"stage1.1": "conv"}).num_candidates == 8640
    assert PatternSpace({"stage1.1": "conv", "stage1.2": "conv"}).num_candidates == 8640**2
    assert SMALL.num_candidates == len(candidates(SMALL)) == 144


def test_choices_make_patterns() -> None:
    space = PatternSpace({"stage1.1": "conv", "keys": "token"})
    patterns = space.patterns([2, 0, 1, 3, 0, 2, 1, 1, 5, 3, 1, 0, 2])
    assert patterns == {
        "stage1.1": ConvPattern(1 / 4, 1 / 16, 2, 67.5, -0.3, 0.3, True, True),
        "keys": TokenPattern("all", 8, True, False, 0.4),
    }


def test_fields_with_one_value_are_fixed() -> None:
    assert [token.field for token in SMALL.tokens] == ["size", "repeat", "share_c"] * 2
    assert SMALL.patterns([1, 1, 1, 0, 0, 0])["stage1.1"] == ConvPattern(1 / 4, repeat=2, share_c=True)
    fixed = PatternSpace({"keys": "token"}, token=TokenValues(rate=(), fixed_rate=0.3))
    assert [token.field for token in fixed.tokens] == ["size", "stride", "share_t", "share_c"]
    assert fixed.patterns([1, 0, 0, 0])["keys"].rate == 0.3


def test_the_rate_of_conv_patterns_can_be_searched() -> None:
    space = PatternSpace({"stage1.1": "conv"}, ConvValues(size=(0, 1), rate=(0.1, 0.2), stride=(0.5,), repeat=(1,)))
    assert space.tokens[-1].name == "stage1.1.rate"
    pattern = ConvPattern.spatial_dropout(0.2)
    choices = space.choices({"stage1.1": pattern})
    assert space.distinct(choices) == (pattern.canonical(),)


@pytest.mark.parametrize("space", [SMALL, WIDE, MIXED], ids=["small", "wide", "mixed"])
def test_choices_of_patterns_make_the_same_patterns(space: PatternSpace) -> None:
    draw = random.Random(0)
    for _ in range(50):
        choices = [draw.randrange(len(token.values)) for token in space.tokens]
        assert space.choices(space.patterns(choices)) == choices
        canonical = dict(zip(space.kinds, space.distinct(choices), strict=True))
        assert space.distinct(space.choices(canonical)) == space.distinct(choices)


def test_missing_places_have_no_pattern() -> None:
    choices = WIDE.choices({"stage1.2": ConvPattern(0.5, repeat=1)})
    assert [pattern.is_empty for pattern in WIDE.patterns(choices).values()] == [True, False, True, True]


def test_candidates_that_mean_the_same_are_not_distinct() -> None:
    nothing = {SMALL.distinct([0, repeat, share, 0, 0, 0]) for repeat in (0, 1) for share in (0, 1)}
    assert len(nothing) == 1
    assert len({SMALL.distinct(choices) for choices in candidates(SMALL)}) < 144
    assert len({SMALL.distinct(choices) for choices in candidates(SMALL)}) > 36


def test_a_pattern_outside_the_space_has_no_choices() -> None:
    with pytest.raises(ConfigurationError) as error:
        WIDE.choices({"stage1.5": ConvPattern(0.5)})
    assert str(error.value) == (
        "A pattern for 'stage1.5' was given. The places of this space are 'stage1.1', 'stage1.2', 'stage1.3', "
        "'stage1.4'. Pass patterns for these places."
    )
    for pattern in (ConvPattern(0.3), ConvPattern(0.5, shear_x=0.1), TokenPattern(1)):
        with pytest.raises(ConfigurationError, match="This space has there the patterns of ConvValues"):
            WIDE.choices({"stage1.1": pattern})


def test_values_come_from_numpy_and_lists() -> None:
    values = ConvValues(
        size=np.array([0, 0.25], dtype=np.float64),  # type: ignore[arg-type]
        repeat=np.array([1, 2]),  # type: ignore[arg-type]
        share_c=[np.True_],  # type: ignore[list-item]
        rotate=[0, 45],
    )
    assert values == ConvValues(size=(0, 1 / 4), repeat=(1, 2), share_c=(True,), rotate=(0, 45))
    assert repr(values.size) == "(0.0, 0.25)"
    assert repr(values.share_c) == "(True,)"
    assert hash(values) == hash(ConvValues(size=(0, 1 / 4), repeat=(1, 2), share_c=(True,), rotate=(0, 45)))


def test_values_that_no_pattern_takes_are_refused() -> None:
    with pytest.raises(ConfigurationError) as error:
        ConvValues(stride=(0.5, 0.0))
    assert str(error.value) == (
        "ConvValues(stride=...) was given with the value 0.0. `stride` is a number in (0, 1]: the gap between two "
        "squares over the side of the map. Pass, for example, stride=(0.0625, 0.125, 0.25, 0.5)."
    )
    conv: list[dict[str, Any]] = [
        {"size": ()},
        {"size": 0.5},
        {"size": "all"},
        {"size": (0, 1.5)},
        {"size": (0, 1)},
        {"size": (0, 0.0)},
        {"repeat": (0,)},
        {"repeat": (1.5,)},
        {"rotate": (math.inf,)},
        {"shear_x": ("0",)},
        {"share_c": (0, 1)},
        {"rate": (1.1,)},
        {"rate": ()},
    ]
    for arguments in conv:
        with pytest.raises(ConfigurationError, match=f"ConvValues.{next(iter(arguments))}="):
            ConvValues(**arguments)
    token: list[dict[str, Any]] = [
        {"size": ("every",)},
        {"size": (0.5,)},
        {"stride": (0,)},
        {"share_t": (None,)},
        {"rate": (2,)},
        {"rate": (0.5, 0.5)},
    ]
    for arguments in token:
        with pytest.raises(ConfigurationError, match=f"TokenValues.{next(iter(arguments))}="):
            TokenValues(**arguments)


def test_spaces_without_a_choice_are_refused() -> None:
    with pytest.raises(ConfigurationError) as error:
        PatternSpace({})
    assert str(error.value) == (
        "PatternSpace(kinds=dict()) was given. `kinds` says for each place of a network which kind of pattern it "
        'takes: at least one place. Pass, for example, kinds={"stage1.1": "conv"}; `find_places(model)` lists the '
        "places."
    )
    one = ConvValues((0.5,), (0.5,), (1,), (0,), (0,), (0,), (True,), (True,))
    with pytest.raises(ConfigurationError, match="there is nothing to search"):
        PatternSpace({"stage1.1": "conv"}, one)
    with pytest.raises(ConfigurationError, match="is one of 'conv', 'token'"):
        PatternSpace({"stage1.1": "convolution"})  # type: ignore[dict-item]
    with pytest.raises(ConfigurationError, match="`conv` is an instance of ConvValues"):
        PatternSpace({"stage1.1": "conv"}, TokenValues())  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="was given as choices"):
        SMALL.patterns([0])


def test_spaces_compare_by_what_they_hold() -> None:
    twin = PatternSpace({"stage1.1": "conv", "stage2.1": "conv"}, FEW)
    assert twin == SMALL
    assert hash(twin) == hash(SMALL)
    assert twin != WIDE
    assert pickle.loads(pickle.dumps(SMALL)) == SMALL


def test_places_that_are_not_searched_are_named_with_no_pattern() -> None:
    """So that a file of some places alone is not read as one of a whole network of another depth."""
    space = PatternSpace({"stage1.1": "conv"}, unsearched={"stage1.2": "conv", "queries": "token"})
    choices = [1] * len(space.tokens)
    patterns = space.patterns(choices)
    assert list(patterns) == ["stage1.1", "stage1.2", "queries"]
    assert not patterns["stage1.1"].is_empty
    assert patterns["stage1.2"] == ConvPattern(size=0.0)
    assert patterns["queries"] == TokenPattern(size=0)
    assert space.patterns(space.choices(patterns)) == patterns
    with pytest.raises(ConfigurationError, match=r"stage1\.2"):
        space.choices({"stage1.2": ConvPattern(0.25)})
