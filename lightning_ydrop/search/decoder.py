"""The network of the TransformerPolicy: torch's encoder with a causal mask, and the same one token at a time."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_ydrop.search.space import PatternSpace

# The network is so small that its cost is that of calling operators: float64 costs nothing, and the log-probability of
# hundreds of tokens keeps its digits.
DTYPE = torch.float64


class Decoder(nn.Module):
    """Logits of each token's values, given the choices before it.

    The input at a token is the embedding of the choice before it (a learned start at the first), plus a vector for the
    place and one for the kind of token. Tokens of one kind share an output head, which is zero at the start: the first
    policy is uniform.

    Args:
        space: What is chosen.
        width: Width of the embeddings.
        num_blocks: How many encoder layers.
        num_heads: Attention heads of each.
        feedforward: Width of their hidden layers.
        seed: Seed of the initial weights. torch's global random stream is not touched.

    """

    # (T,), (T,), (T,), (T, N), (T, N), (T, T)
    place_of: Tensor
    kind_of: Tensor
    first_slot: Tensor
    slots: Tensor
    exists: Tensor
    future: Tensor

    def __init__(
        self, space: PatternSpace, width: int, num_blocks: int, num_heads: int, feedforward: int, seed: int
    ) -> None:
        super().__init__()
        places = {place: number for number, place in enumerate(dict.fromkeys(token.place for token in space.tokens))}
        kinds: dict[tuple[str, str], tuple[int, int]] = {}  # number, first slot
        num_slots = 0
        for token in space.tokens:
            if (token.kind, token.field) not in kinds:
                kinds[token.kind, token.field] = len(kinds), num_slots
                num_slots += len(token.values)
        of_tokens = [kinds[token.kind, token.field] for token in space.tokens]
        first_slot = whole([first for _, first in of_tokens])
        exists = values_that_exist(space)
        slots = (first_slot.unsqueeze(1) + whole(range(exists.shape[1]))).where(exists, 0)
        buffers = {
            "place_of": whole([places[token.place] for token in space.tokens]),
            "kind_of": whole([number for number, _ in of_tokens]),
            "first_slot": first_slot,
            "slots": slots,
            "exists": exists,
            "future": torch.full((len(slots), len(slots)), -math.inf, dtype=DTYPE, device="cpu").triu(1),
        }
        # On the meta device no random number is drawn; all weights are set below.
        where = torch.device("meta")
        self.start = nn.Parameter(torch.empty(width, dtype=DTYPE, device=where))
        self.values = nn.Parameter(torch.empty(num_slots, width, dtype=DTYPE, device=where))
        self.places = nn.Parameter(torch.empty(len(places), width, dtype=DTYPE, device=where))
        self.kinds = nn.Parameter(torch.empty(len(kinds), width, dtype=DTYPE, device=where))
        block = nn.TransformerEncoderLayer(
            width, num_heads, feedforward, dropout=0.0, batch_first=True, norm_first=True, device=where, dtype=DTYPE
        )
        norm = nn.LayerNorm(width, device=where, dtype=DTYPE)
        self.encoder = nn.TransformerEncoder(block, num_blocks, enable_nested_tensor=False)
        self.norm = norm
        self.heads = nn.Linear(width, num_slots, device=where, dtype=DTYPE)
        self.to_empty(device="cpu")
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer, persistent=False)
        self.num_heads = num_heads
        self._set_weights(torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def _set_weights(self, generator: torch.Generator) -> None:
        """Give all weights their first values."""
        for parameter in (self.start, self.values, self.places, self.kinds):
            parameter.normal_(generator=generator)
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.fill_(1.0)
                module.bias.fill_(0.0)
        for name, parameter in self.encoder.named_parameters():
            if parameter.dim() == 2:
                nn.init.xavier_uniform_(parameter, generator=generator)
            elif "norm" not in name:
                parameter.fill_(0.0)
        self.heads.weight.fill_(0.0)
        self.heads.bias.fill_(0.0)

    def forward(self, choices: Tensor) -> Tensor:
        """Compute logits of all tokens at once.

        Args:
            choices: (B, T). The last of them changes nothing.

        Returns:
            (B, T, N): logits of up to N values, minus infinity where a token has fewer.

        """
        before = self.values[choices[:, :-1] + self.first_slot[:-1]]  # (B, T-1, width)
        before = torch.cat([self.start.expand(len(choices), 1, -1), before], dim=1)
        inputs = before + self.places[self.place_of] + self.kinds[self.kind_of]
        logits = self.heads(self.norm(self.encoder(inputs, mask=self.future, is_causal=True)))  # (B, T, slots)
        values: Tensor = logits.gather(2, self.slots.expand(len(choices), -1, -1))
        return values.masked_fill(~self.exists, -math.inf)

    @torch.no_grad()
    def generate(self, choose: Callable[[int, list[float]], int]) -> list[int]:
        """Choose one token after another, each from the probabilities that the choices before it leave.

        Keys and values of earlier tokens are kept, so that a token costs one pass of its own.

        Args:
            choose: Takes the position of a token and the probabilities of its values, and returns the choice.

        Returns:
            The choices.

        """
        blocks = list(self.encoder.layers)
        count, width = len(self.slots), len(self.start)
        past = torch.empty(len(blocks), 2, self.num_heads, count, width // self.num_heads, dtype=DTYPE, device="cpu")
        surroundings = self.places[self.place_of] + self.kinds[self.kind_of]
        before: Tensor = self.start
        choices: list[int] = []
        for position in range(count):
            x = before + surroundings[position]
            for block, kept in zip(blocks, past, strict=True):
                x = _step(block, x, kept[:, :, : position + 1])
            slots = self.slots[position][self.exists[position]]
            logits = F.linear(self.norm(x), self.heads.weight[slots], self.heads.bias[slots])
            choices.append(choose(position, logits.softmax(0).tolist()))
            before = self.values[slots[choices[-1]]]
        return choices


def _step(block: Any, x: Tensor, past: Tensor) -> Tensor:
    """Pass the last token through an encoder layer, as the layer itself does with `norm_first`.

    Args:
        block: A nn.TransformerEncoderLayer.
        x: (width,).
        past: (2, heads, tokens so far, width of a head). Keys and values; those of the last token are written here.

    """
    attention = block.self_attn
    packed = F.linear(block.norm1(x), attention.in_proj_weight, attention.in_proj_bias)
    query, key, value = packed.view(3, past.shape[1], 1, -1)  # (heads, 1, width of a head) each
    past[0, :, -1:], past[1, :, -1:] = key, value
    mixed = F.scaled_dot_product_attention(query[None], past[None, 0], past[None, 1])
    x = x + attention.out_proj(mixed.reshape(-1))
    out: Tensor = x + block.linear2(block.activation(block.linear1(block.norm2(x))))
    return out


def whole(numbers: object) -> Tensor:
    """Make a tensor of whole numbers on the CPU, whatever the default device is."""
    return torch.tensor(list(numbers), dtype=torch.long, device="cpu")  # type: ignore[call-overload]


def values_that_exist(space: PatternSpace) -> Tensor:
    """Say which of N values each token has: (T, N), N the most values of a token."""
    counts = whole([len(token.values) for token in space.tokens])
    return whole(range(int(counts.max()))) < counts.unsqueeze(1)
