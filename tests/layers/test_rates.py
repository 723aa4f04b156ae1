from typing import Any

import pytest
import torch
from torch import nn

from lightning_ydrop import ConductanceDropout, ConvPattern, Jumpout, PatternDropout, TokenPattern
from lightning_ydrop.layers.rates import RatedLayer, has_rate

SHARES: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.Dropout(0.5), (4000,)),
    (nn.Dropout1d(0.5), (1, 4000, 1)),
    (nn.Dropout2d(0.5), (1, 4000, 1, 1)),
    (nn.Dropout3d(0.5), (1, 4000, 1, 1, 1)),
    (nn.AlphaDropout(0.5), (4000,)),
    (nn.FeatureAlphaDropout(0.5), (1, 4000, 1)),
    (ConductanceDropout(0.5), (4000, 1)),
    (Jumpout(p_min=0.4, sigma=0.0, p_max=0.5), (4000, 1)),
    (PatternDropout(ConvPattern(1.0, rate=0.8)), (4000, 1, 1, 1)),
    (PatternDropout(TokenPattern("all", rate=0.8)), (4000, 1, 1)),
]


@pytest.mark.parametrize(("layer", "shape"), SHARES, ids=lambda each: type(each).__name__)
def test_layers_drop_at_the_rate_that_was_set(layer: Any, shape: tuple[int, ...]) -> None:
    assert has_rate(layer)
    rated, before = RatedLayer("name", layer), repr(layer)
    for rate in (0.0, 0.2):
        rated.set(rate)
        dropped = (layer(torch.ones(shape)) <= 0).float().mean()
        assert abs(dropped - rate) < 5 * (0.25 / 4000) ** 0.5
    rated.give_back()
    assert repr(layer) == before
    assert getattr(layer, "progress", 1.0) == 1.0


def test_attention_and_recurrent_layers_have_a_rate_if_they_drop() -> None:
    lstm, attention = nn.LSTM(2, 3, num_layers=2, dropout=0.3), nn.MultiheadAttention(4, 2, dropout=0.1)
    for layer, own in ((lstm, 0.3), (attention, 0.1)):
        rated = RatedLayer("name", layer)
        assert rated.own == own
        rated.set(0.2)
        assert layer.dropout == 0.2
        rated.give_back()
        assert layer.dropout == own
    assert not any(map(has_rate, (nn.LSTM(2, 3, 2), nn.MultiheadAttention(4, 2), nn.Linear(2, 2))))
    assert not has_rate(PatternDropout(ConvPattern(0)))


def test_a_pattern_has_a_highest_rate() -> None:
    assert RatedLayer("name", PatternDropout(ConvPattern(0.5, rate=0.3))).most == 0.3
    assert RatedLayer("name", nn.Dropout(0.3)).most == 1.0
