"""Pictures show what is there."""

from pathlib import Path

import pytest
import torch

from lightning_ydrop import ConvPattern, TokenPattern
from lightning_ydrop.layers.patterns import Pattern
from lightning_ydrop.search.plots import draw_patterns, draw_rewards, masks_of, summary


def test_masks_are_those_of_the_pattern() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    masks = masks_of(ConvPattern(size=0.25, share_c=True))
    assert torch.equal(torch.get_rng_state(), before)
    assert [mask.shape for mask in masks] == [(32, 32)] * 3
    assert [int((~mask).sum()) for mask in masks] == [64] * 3
    assert not torch.equal(masks[0], masks[1])
    assert all(mask.all() for mask in masks_of(ConvPattern(size=0)))
    runs = masks_of(TokenPattern(size=4, stride=4, share_c=True, share_t=True, rate=0.9))
    assert [mask.shape for mask in runs] == [(12, 32)] * 3
    assert all(torch.equal(mask, mask[:1].expand_as(mask)) for mask in runs)


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        (ConvPattern(size=0), "no pattern"),
        (ConvPattern(size=0.25, share_c=True, residual=True), "all channels alike, shortcut too"),
        (ConvPattern.dropblock(0.25, rate=0.1), "each channel its own at 0.1"),
        (TokenPattern(size=2, stride=2, rate=0.2, share_c=True), "2 of 4 tokens at 0.2\nshared by channels"),
        (TokenPattern(size="all", share_t=True, share_c=True), "all tokens at 0.1\nshared by tokens and channels"),
    ],
)
def test_a_pattern_in_a_few_words(pattern: Pattern, said: str) -> None:
    assert summary(pattern) == said


def test_any_number_of_places_and_trials() -> None:
    draw_patterns({f"stage{index}.1": ConvPattern(size=0.25) for index in range(5)}, Path("five.png"))
    draw_patterns({"queries": TokenPattern(size=2)}, Path("one.png"))
    draw_rewards({"random": [0.1], "table": [float(index % 7) for index in range(60)]}, Path("rewards.png"))
    assert all(Path(name).stat().st_size > 1000 for name in ("five.png", "one.png", "rewards.png"))
