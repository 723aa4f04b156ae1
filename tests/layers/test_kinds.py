from typing import Any

import pytest
from torch import nn
from torchvision.ops import StochasticDepth

from lightning_ydrop import ConductanceDropout, ConvPattern, Jumpout, PatternDropout, TokenPattern
from lightning_ydrop.layers import kinds
from lightning_ydrop.layers.kinds import draws_for_each_sample, dropout_like_modules, drops, is_dropout_like


class Thinning(Jumpout):
    """A subclass of ours whose name does not say that it drops."""


class Sparse(ConductanceDropout):
    """Another."""


class DropPath(nn.Module):
    """Of another library."""


class DropNet(nn.Sequential):
    """A network, not a layer."""


@pytest.mark.parametrize(
    ("module", "like_dropout", "dropping", "for_each_sample"),
    [
        (nn.Dropout(), True, True, True),
        (nn.Dropout(0.0), True, False, True),
        (nn.Dropout3d(), True, True, True),
        (nn.FeatureAlphaDropout(0.0), True, False, True),
        (ConductanceDropout(), True, True, True),
        (ConductanceDropout(0.0), True, True, True),  # Y-Drop may have set other rates
        (Sparse(), True, True, True),
        (Jumpout(), True, True, False),
        (Thinning(), True, True, False),
        (PatternDropout(ConvPattern(0.5)), True, True, True),
        (PatternDropout(TokenPattern(2)), True, True, True),
        (PatternDropout(ConvPattern(0)), True, False, True),
        (DropPath(), True, True, False),
        (DropNet(nn.Linear(2, 2)), False, False, False),
        (StochasticDepth(0.1, "row"), True, True, True),
        (StochasticDepth(0.1, "batch"), True, True, False),
        (nn.MultiheadAttention(4, 2), False, False, True),
        (nn.MultiheadAttention(4, 2, dropout=0.1), False, True, True),
        (nn.LSTM(4, 4, num_layers=2, dropout=0.1), False, True, True),
        (nn.LSTM(4, 4, num_layers=2), False, False, True),
        (nn.Linear(2, 2), False, False, False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_what_counts_as_dropout(module: nn.Module, like_dropout: bool, dropping: bool, for_each_sample: bool) -> None:
    assert is_dropout_like(module) is like_dropout
    assert drops(module) is dropping
    assert draws_for_each_sample(module) is for_each_sample


@pytest.mark.filterwarnings("ignore:dropout option adds dropout after all but last")
def test_a_single_recurrent_layer_drops_nothing() -> None:
    assert not drops(nn.GRU(4, 4, num_layers=1, dropout=0.5))


def test_dropout_layers_are_listed_by_name() -> None:
    model: Any = nn.Sequential(nn.Linear(2, 2), Thinning(), nn.Sequential(nn.Dropout(0.0)))
    assert dropout_like_modules(model) == ["1 (Thinning)", "2.0 (Dropout)"]


def test_one_place_lists_all_kinds() -> None:
    assert set(kinds.CONVERTED) < set(kinds.TORCH_DROPOUTS) < set(kinds.ELEMENTWISE)
    assert set(kinds.CHANNEL_DROPOUTS) < set(kinds.CONVERTED)
    assert (ConductanceDropout, Jumpout, PatternDropout) == kinds.OUR_DROPOUTS
