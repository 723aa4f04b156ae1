"""Patterns of token sequences: runs of affected tokens, and dropout inside them."""

import torch
from torch import Tensor

# Written in what TorchScript compiles, which reads no numbers of a module: below 0 stands for WHOLE there.
# The size of a run that is the whole sequence.
WHOLE = -1


def token_dropout(
    x: Tensor,
    size: int,
    stride: int,
    rate: Tensor,
    share_t: bool = False,
    share_c: bool = False,
    padding_mask: Tensor | None = None,
) -> Tensor:
    """Drop values in runs of tokens (sec. "Methods", arXiv 2101.01761).

    Runs of `size` tokens, with `stride` tokens between them, are affected. Each sample draws where they begin. Padded
    tokens are kept, and do not count. In attention weights, tokens are keys, channels are heads, and each query draws
    its own noise.

    Args:
        x: Tokens (B, T, C), or attention weights (B, heads, queries, T).
        size: Tokens in a run. -1: all tokens are one run.
        stride: Tokens between two runs.
        rate: Probability that an affected value is dropped, a number: shape (), float32.
        share_t: All tokens of a run share a draw.
        share_c: All channels share a draw.
        padding_mask: True for tokens that are padding, shape (B, T).

    Returns:
        `x * m * numel(m) / max(sum(m), 1)` with a mask `m` of the shape of `x`, with its dtype and device.

    Example:
        >>> token_dropout(torch.ones(1, 6, 1), 2, 1, rate=torch.tensor(1.0)).count_nonzero()
        tensor(2)

    """
    of_attention = x.ndim == 4
    token_dim = 3 if of_attention else 1
    num_samples, num_tokens = x.shape[0], x.shape[token_dim]
    along_tokens = [num_samples, 1, 1, num_tokens] if of_attention else [num_samples, num_tokens, 1]
    is_whole = size < 0
    period = size + stride
    num_draws = num_tokens
    if share_t:  # a run may begin before the first token
        num_draws = 1 if is_whole else (num_tokens - 1) // period + 2
    if of_attention:
        shape = [num_samples, 1 if share_c else x.shape[1], x.shape[2], num_draws]
    else:
        shape = [num_samples, num_draws, 1 if share_c else x.shape[2]]
    if is_whole:
        keep = torch.rand(shape, dtype=torch.float32, device=x.device) >= rate
    else:
        position = torch.arange(num_tokens, device=x.device) - torch.randint(period, [num_samples, 1], device=x.device)
        if padding_mask is not None:  # count from the first token that is none
            position = position - padding_mask.long().argmin(1, keepdim=True)
        keep = torch.rand(shape, dtype=torch.float32, device=x.device) >= rate
        if share_t:
            run = (torch.div(position, period, rounding_mode="floor") + 1).clamp(min=0).view(along_tokens)
            shape[token_dim] = num_tokens
            keep = keep.gather(token_dim, run.expand(shape))
        keep = keep | (position.remainder(period) >= size).view(along_tokens)
    # Counts are whole numbers, and their ratio is float32 or more: float16 ends at 65,504.
    precision = torch.float64 if x.dtype == torch.float64 else torch.float32
    if padding_mask is None:
        share_kept = torch.count_nonzero(keep).clamp(min=1).to(precision) / max(keep.numel(), 1)
    else:
        is_padding = padding_mask.view(along_tokens)
        counted = torch.count_nonzero(keep & ~is_padding).clamp(min=1).to(precision)
        per_token = shape[1] * shape[2] if of_attention else shape[2]
        share_kept = counted / (torch.count_nonzero(~is_padding) * per_token).clamp(min=1)
        keep = keep | is_padding
    scale = share_kept.reciprocal().to(x.dtype)
    # The backward pass keeps a mask of the size of `x` as bytes. A smaller mask is multiplied with the scale first, so
    # that `x` is read once.
    is_small = share_c or (share_t and is_whole)
    return x * (keep * scale) if is_small else x * keep * scale
