"""Functional dropout: seen with its place, and switched on and off."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from lightning_ydrop.models.functional_dropout import seeing_dropout_calls, switching_dropout_calls

X = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
LSTM, GRU = nn.LSTM(8, 8, 2, dropout=0.2), nn.GRU(8, 8, 2, dropout=0.2)


def attention(x: Tensor, training: bool) -> Tensor:
    weight, bias = torch.eye(8).repeat(3, 1), torch.zeros(24)
    call: Any = F.multi_head_attention_forward
    output: Tensor = call(x, x, x, 8, 2, weight, bias, None, None, False, 0.2, torch.eye(8), None, training=training)[0]
    return output


def fused(x: Tensor, training: bool) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x, dropout_p=0.2 if training else 0.0)


def lstm(x: Tensor, training: bool) -> Tensor:
    state, weights = torch.zeros(2, 3, 8), tuple(LSTM.parameters())
    return torch.lstm(x, (state, state), weights, True, 2, 0.2, training, False, False)[0]


def packed(x: Tensor, training: bool) -> Tensor:
    data, sizes, *_ = pack_padded_sequence(x, torch.tensor([2, 2, 1]))
    state = torch.zeros(2, 3, 8)
    return torch.gru(data, sizes, state, list(GRU.parameters()), True, 2, 0.2, training, False)[0]


CALLS: dict[str, Callable[[Tensor, bool], Tensor]] = {
    "F.dropout": lambda x, training: F.dropout(x, 0.2, training),
    "F.dropout1d": lambda x, training: F.dropout1d(x, p=0.2, training=training),
    "F.dropout2d": lambda x, training: F.dropout2d(x[None], 0.2, training),
    "F.dropout3d": lambda x, training: F.dropout3d(x[None, None], 0.2, training),
    "F.alpha_dropout": lambda x, training: F.alpha_dropout(x, 0.2, training),
    "F.feature_alpha_dropout": lambda x, training: F.feature_alpha_dropout(x, 0.2, training),
    "torch.dropout": lambda x, training: torch.dropout(x, 0.2, training),
    "torch.feature_dropout": lambda x, training: torch.feature_dropout(x, p=0.2, train=training),
    "F.scaled_dot_product_attention": fused,
    "F.multi_head_attention_forward": attention,
    "torch.lstm": lstm,
    "torch.gru": packed,
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_each_call_is_seen_and_switched(name: str) -> None:
    call = CALLS[name]
    expected, draws = call(X, False), name != "F.scaled_dot_product_attention"
    with seeing_dropout_calls() as calls:
        call(X, True)
        call(X, False)
    (seen,) = calls.values()
    assert (seen.function, seen.rate) == (name, 0.2)
    lines, first = inspect.getsourcelines(call)
    assert Path(seen.file).name == Path(__file__).name
    assert first <= seen.line < first + len(lines)
    assert str(seen) == f"{name} (rate 0.2, {seen.file}:{seen.line})"
    with switching_dropout_calls(False):
        assert torch.equal(call(X, True), expected)
    with switching_dropout_calls(True):
        assert torch.equal(call(X, False), expected) is not draws


def test_calls_of_layers_are_theirs() -> None:
    encoder = nn.TransformerEncoderLayer(8, 2, 8, dropout=0.5, batch_first=True).eval()
    layers = nn.ModuleList([encoder, nn.Dropout(), nn.AlphaDropout(), LSTM, GRU]).eval()
    before = [layer(X) for layer in layers]
    with switching_dropout_calls(True) as calls:
        after = [layer(X) for layer in layers]
    assert not calls
    for one, other in zip(before, after, strict=True):
        one, other = (each[0] if isinstance(each, tuple) else each for each in (one, other))
        assert torch.allclose(one, other, atol=1e-6)


class Attends(nn.Module):
    """Drops weights of attention as many do: at the rate of a layer that is never called, in training mode alone."""

    def __init__(self, rate: Any) -> None:
        super().__init__()
        self.attn_drop: Any = rate

    def forward(self, x: Tensor) -> Tensor:
        kept: Any = self.attn_drop
        rate: float = kept if isinstance(kept, float) else kept.p
        return F.scaled_dot_product_attention(x, x, x, dropout_p=rate if self.training else 0.0)


@pytest.mark.parametrize("rate", [0.3, nn.Dropout(0.3)], ids=["a number", "a layer"])
def test_an_attention_drops_at_the_rate_that_its_module_keeps(rate: Any) -> None:
    module = Attends(rate).eval()
    before = module(X)
    with switching_dropout_calls(True) as calls:
        assert not torch.equal(module(X), before)
    assert [call.rate for call in calls.values()] == [0.3]
    with switching_dropout_calls(True) as calls:
        assert torch.equal(Attends(0.0).eval()(X), Attends(0.0)(X))
    assert [call.rate for call in calls.values()] == [None]
