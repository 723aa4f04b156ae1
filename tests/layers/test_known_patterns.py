"""Dropout methods made by hand are points of the space of patterns: given the same draws, they give the same output.

Each reference draws first. Ours is then given the same draws in the place of random numbers, and has to be equal up to
the scale: it rescales by the realised share of kept elements, most references by the nominal one.
"""

from collections.abc import Callable
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from timm.layers import drop_path  # type: ignore[attr-defined]
from torch import Tensor
from torchvision.ops import drop_block2d, stochastic_depth

from lightning_ydrop import ConvPattern, PatternDropout, TokenPattern
from lightning_ydrop.functional.stencils import make_stencil

RATE = 0.4
Draws = Callable[[Tensor | None, Tensor | None], None]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Draws:
    """Let `torch.rand` say what is dropped, and `torch.randint` where."""

    def set_draws(dropped: Tensor | None, place: Tensor | None = None) -> None:
        def rand(size: list[int], **_: object) -> Tensor:
            assert dropped is not None
            return (~dropped).float().reshape(size)  # 0 is below every rate, 1 below none

        def randint(high: int, size: list[int], **_: object) -> Tensor:
            return torch.zeros(size, dtype=torch.int64) if place is None else place.reshape(size)

        monkeypatch.setattr(torch, "rand", rand)
        monkeypatch.setattr(torch, "randint", randint)

    return set_draws


def rescaled(reference: Tensor, x: Tensor, nominal: float) -> Tensor:
    """Rescale what a reference gave by the share that it realised."""
    kept = reference != 0
    return reference * nominal * kept.numel() / kept.sum()


def assert_equal(ours: Tensor, theirs: Tensor) -> None:
    assert (theirs == 0).any()
    assert torch.equal(ours == 0, theirs == 0)
    assert torch.allclose(ours, theirs, rtol=1e-5)


def test_spatial_dropout_is_torchs_dropout2d(drawn: Draws) -> None:
    x = torch.randn(16, 8, 5, 7)
    theirs = F.dropout2d(x, RATE)
    drawn((theirs == 0).flatten(2).all(2), None)
    assert_equal(PatternDropout(ConvPattern.spatial_dropout(RATE))(x), rescaled(theirs, x, 1 - RATE))


@pytest.mark.parametrize(
    "reference",
    [lambda x: stochastic_depth(x, RATE, "row", training=True), lambda x: drop_path(x, RATE, training=True)],
    ids=["torchvision", "timm"],
)
def test_stochastic_depth_is_torchvisions_and_timms(reference: Callable[[Tensor], Tensor], drawn: Draws) -> None:
    x = torch.randn(64, 3, 4, 4)
    theirs = reference(x)
    drawn((theirs == 0).flatten(1).all(1), None)
    assert_equal(PatternDropout(ConvPattern.stochastic_depth(RATE))(x), rescaled(theirs, x, 1 - RATE))


@pytest.mark.parametrize("side", [3, 5])
def test_dropblock_is_torchvisions_where_one_seed_fell(side: int, drawn: Draws) -> None:
    # timm's is wrong from release 1.0.23 on: it drops far more than its rate.
    x = torch.ones(64, 64, 8, 8)
    dropped = drop_block2d(x, 0.1, side) == 0
    one_seed = dropped.flatten(2).sum(2) == side * side
    no_seed = ~dropped.flatten(2).any(2)
    assert one_seed.sum() > 100
    # The channels with more seeds are no such pattern. Let them have none.
    dropped = dropped & one_seed[..., None, None]
    corner = dropped.flatten(2).int().argmax(2)
    size = side / 8
    # Windows move the other way: the first placement is the lowest one.
    last = 8 - side
    place = (last - corner // 8) * (last + 1) + last - corner % 8
    drawn(one_seed, torch.where(one_seed, place, 0))
    ours = PatternDropout(ConvPattern.dropblock(size, RATE))(x)
    assert_equal(ours, (~dropped).float() * dropped.numel() / (~dropped).sum())
    assert len(place[one_seed].unique()) > 0.9 * (last + 1) ** 2
    assert no_seed.any()


def test_dropblock_of_the_whole_map_drops_channels_at_the_rate_as_torchvisions_does(drawn: Draws) -> None:
    x = torch.randn(64, 64, 7, 7)
    theirs = drop_block2d(x, 0.3, 7)
    drawn((theirs == 0).flatten(2).all(2), None)
    kept = theirs != 0
    # torchvision rescales by the realised share too.
    assert_equal(PatternDropout(ConvPattern(1, rate=0.3))(x), theirs)
    assert abs(1 - kept.float().mean() - 0.3) < 0.05


@pytest.mark.parametrize(
    ("pattern", "cells"),
    [
        (ConvPattern.cutout(0.5), [(y, x) for y in range(4) for x in range(4)]),
        # A strip: the square, sheared.
        (ConvPattern(0.25, shear_x=2.0, share_c=True), [(0, 0), (0, 1), (1, 2), (1, 3)]),
    ],
    ids=["square", "strip"],
)
def test_cutout_is_a_shape_of_zeros_in_each_image(
    pattern: ConvPattern, cells: list[tuple[int, int]], drawn: Draws
) -> None:
    images = torch.randn(25, 3, 8, 8)
    num_places = make_stencil(8, 8, pattern.size, shear_x=pattern.shear_x)[1].shape[1] - 1
    drawn(torch.ones(25, dtype=torch.bool), torch.arange(25) % num_places)
    ours = PatternDropout(pattern)(images)
    corners = list(product(range(8 - max(y for y, _ in cells)), range(8 - max(x for _, x in cells))))[::-1]
    assert len(corners) == num_places
    for number in range(25):
        top, left = corners[number % num_places]
        for channel, y, x in product(range(3), range(8), range(8)):
            expected = images[number, channel, y, x] * 64 / (64 - len(cells))
            if (y - top, x - left) in cells:
                expected = torch.tensor(0.0)
            assert torch.allclose(ours[number, channel, y, x], expected)


def test_variational_dropout_is_torchs_dropout1d_of_channels(drawn: Draws) -> None:
    x = torch.randn(32, 9, 6)
    theirs = F.dropout1d(x.transpose(1, 2), RATE).transpose(1, 2)
    drawn((theirs == 0).all(1), None)
    assert_equal(PatternDropout(TokenPattern.variational_dropout(RATE))(x), rescaled(theirs, x, 1 - RATE))


def test_word_dropout_is_torchs_dropout1d_of_tokens(drawn: Draws) -> None:
    x = torch.randn(32, 9, 6)
    theirs = F.dropout1d(x, RATE)
    drawn((theirs == 0).all(2), None)
    assert_equal(PatternDropout(TokenPattern.word_dropout(RATE))(x), rescaled(theirs, x, 1 - RATE))


@pytest.mark.parametrize("shape", [(32, 9, 6), (8, 4, 9, 9)])
def test_plain_dropout_is_torchs_dropout(shape: tuple[int, ...], drawn: Draws) -> None:
    x = torch.randn(shape)
    theirs = F.dropout(x, RATE)
    drawn(theirs == 0, None)
    assert_equal(PatternDropout(TokenPattern.dropout(RATE))(x), rescaled(theirs, x, 1 - RATE))
