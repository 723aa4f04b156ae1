import math
from collections import Counter

import pytest
import torch
from torch import Tensor

from lightning_ydrop.functional.runs import WHOLE, token_dropout

# Chance of a false alarm in each comparison, by Hoeffding's inequality.
ALARM = 1e-9
ALWAYS = torch.tensor(1.0)


def bound(count: int, comparisons: int = 1) -> float:
    """How far the share in so many independent draws is from its mean, except with chance ALARM."""
    return math.sqrt(math.log(2 * comparisons / ALARM) / (2 * count))


def affected(num_tokens: int, size: int, stride: int, offset: int) -> tuple[int, ...]:
    """Affected tokens, written as a walk along the sequence."""
    flags, token = [0] * num_tokens, offset - size - stride
    while token < num_tokens:
        for place in range(token, token + size):
            if 0 <= place < num_tokens:
                flags[place] = 1
        token += size + stride
    return tuple(flags)


@pytest.mark.parametrize(("num_tokens", "size", "stride"), [(10, 1, 1), (10, 2, 3), (7, 4, 2), (3, 8, 2), (1, 1, 2)])
def test_runs_begin_anywhere_with_the_same_chance(num_tokens: int, size: int, stride: int) -> None:
    samples = 20_000
    y = token_dropout(torch.ones(samples, num_tokens, 2), size, stride, ALWAYS)
    dropped = y.eq(0)
    assert torch.equal(dropped[..., 0], dropped[..., 1])
    counted = Counter(map(tuple, dropped[..., 0].int().tolist()))
    period = size + stride
    expected = Counter(affected(num_tokens, size, stride, offset) for offset in range(period))
    assert set(counted) <= set(expected)
    for flags, times in expected.items():
        assert abs(counted[flags] / samples - times / period) < bound(samples, len(expected))


@pytest.mark.parametrize("size", [3, WHOLE])
@pytest.mark.parametrize("share_t", [False, True])
@pytest.mark.parametrize("share_c", [False, True])
@pytest.mark.parametrize("of_attention", [False, True])
def test_affected_values_are_dropped_at_the_rate_and_share_their_draws(
    size: int, share_t: bool, share_c: bool, of_attention: bool
) -> None:
    num_samples, num_tokens, channels, queries, rate, stride = 3000, 11, 5, 4, 0.3, 2
    shape = (num_samples, channels, queries, num_tokens) if of_attention else (num_samples, num_tokens, channels)
    y = token_dropout(torch.ones(shape), size, stride, torch.tensor(rate), share_t, share_c)
    # (B, T, C) or (B, heads, queries, T) -> (B, queries, T, C)
    dropped = y.eq(0).permute(0, 2, 3, 1) if of_attention else y.eq(0).unsqueeze(1)
    for sample in dropped.transpose(1, 2).flatten(2)[:400].tolist() if size == 3 else ():
        # Whatever the offset is, it explains the dropped tokens.
        tokens = [any(values) for values in sample]
        fitting = [
            offset
            for offset in range(size + stride)
            if all(f >= t for f, t in zip(affected(num_tokens, size, stride, offset), tokens, strict=True))
        ]
        assert fitting
    if share_c:
        assert torch.equal(dropped, dropped[..., :1].expand_as(dropped))
        dropped = dropped[..., :1]
    else:
        assert not torch.equal(dropped[..., 0], dropped[..., 1])
    if of_attention:
        assert not torch.equal(dropped[:, 0], dropped[:, 1])  # queries draw for themselves
    if size == WHOLE:
        if share_t:
            assert torch.equal(dropped, dropped[:, :, :1].expand_as(dropped))
            dropped = dropped[:, :, :1]
        else:
            assert not torch.equal(dropped[:, :, 0], dropped[:, :, 1])
        assert abs(dropped.float().mean() - rate) < bound(num_samples)
    else:
        # The offset makes draws of a sample depend on each other, so that samples are counted.
        share = size / (size + stride) * rate
        assert abs(dropped.float().mean() - share) < bound(num_samples)
        together = dropped[:, :, 4] & dropped[:, :, 5]
        alone = dropped[:, :, 4] ^ dropped[:, :, 5]
        # Tokens 4 and 5 lie in one run for 2 of 5 offsets.
        expected = 2 / 5 * (rate if share_t else rate**2)
        assert abs(together.float().mean() - expected) < bound(num_samples)
        assert abs(alone.float().mean() - (2 * share - 2 * expected)) < bound(num_samples)


@pytest.mark.parametrize("size", [2, WHOLE])
@pytest.mark.parametrize("share_t", [False, True])
@pytest.mark.parametrize("share_c", [False, True])
@pytest.mark.parametrize("shape", [(40, 9, 6), (40, 3, 4, 9)])
@pytest.mark.parametrize("padded", [False, True])
def test_what_is_kept_is_rescaled_by_elements_over_kept_elements(
    shape: tuple[int, ...], size: int, share_t: bool, share_c: bool, padded: bool
) -> None:
    lengths = [9, 4, 1, 0, 7] * 8
    padding_mask = torch.tensor([[token >= length for token in range(9)] for length in lengths]) if padded else None
    x = torch.randn(shape, dtype=torch.float64)
    y = token_dropout(x, size, 3, torch.tensor(0.5), share_t, share_c, padding_mask)
    total = kept = 0
    for sample in range(40):
        for token in range(lengths[sample] if padded else 9):
            values = y[sample, token] if len(shape) == 3 else y[sample, ..., token]
            total += values.numel()
            kept += int(values.count_nonzero())
    assert 0 < kept < total
    assert torch.allclose(y, (y != 0) * x * (total / kept), rtol=1e-14)
    if padded:
        values = y if len(shape) == 3 else y.movedim(3, 1)
        assert values[padding_mask].ne(0).all()


def test_runs_are_counted_from_the_first_token_that_is_no_padding() -> None:
    padding_mask = torch.zeros(4000, 8, dtype=torch.bool)
    padding_mask[2000:, :3] = True
    y = token_dropout(torch.ones(4000, 8, 1), 2, 6, ALWAYS, padding_mask=padding_mask)
    assert y[2000:, :3].ne(0).all()
    # Without padding token 3 is affected for 2 of 8 offsets, and so is each other token.
    share = y.eq(0).float().squeeze(2)
    assert (share[:2000].mean(0) - 1 / 4).abs().max() < bound(2000, 16)
    assert (share[2000:, 3:].mean(0) - 1 / 4).abs().max() < bound(2000, 16)


def test_left_padding_moves_runs_along(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "randint", lambda high, size, device=None: torch.ones(size, dtype=torch.int64))
    padding_mask = torch.zeros(2, 8, dtype=torch.bool)
    padding_mask[1, :3] = True
    y = token_dropout(torch.ones(2, 8, 1), 2, 2, ALWAYS, True, padding_mask=padding_mask)
    assert y.eq(0).int().squeeze(2).tolist() == [[0, 1, 1, 0, 0, 1, 1, 0], [0, 0, 0, 0, 1, 1, 0, 0]]


def test_nothing_kept_is_a_zero_output_and_all_kept_is_the_input() -> None:
    x = torch.randn(7, 7, 7)
    assert torch.equal(token_dropout(x, WHOLE, 1, ALWAYS), torch.zeros_like(x))
    assert torch.equal(token_dropout(x, 3, 1, torch.tensor(0.0)), x)
    assert torch.equal(token_dropout(x, 0, 1, ALWAYS), x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [4, WHOLE])
@pytest.mark.parametrize("share_c", [False, True])
def test_counts_are_right_in_every_precision(size: int, share_c: bool, dtype: torch.dtype) -> None:
    x = torch.ones(64, 64, 64, dtype=dtype, requires_grad=True)
    y = token_dropout(x, size, 4, torch.tensor(0.5), share_c=share_c)
    assert y.dtype == dtype
    kept = int((y != 0).sum())
    assert kept > 65_504
    assert torch.equal(y.detach().unique(), torch.tensor([0, x.numel() / kept], dtype=dtype))
    y.backward(torch.ones_like(y))
    assert x.grad is not None
    assert torch.equal(x.grad, y.detach())


@pytest.mark.parametrize(("share_c", "bytes_of_a_value"), [(False, 1), (True, 4 / 16)])
def test_the_backward_pass_keeps_a_small_mask(share_c: bool, bytes_of_a_value: float) -> None:
    x, kept = torch.randn(8, 32, 16, requires_grad=True), {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.numel() * tensor.itemsize
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        token_dropout(x, WHOLE, 1, torch.tensor(0.5), share_c=share_c)
    assert sum(kept.values()) <= bytes_of_a_value * x.numel() + 4
