"""Small spaces, all of whose candidates can be listed, and a policy's distribution by enumeration."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_ydrop.search.controller import ReinforcePolicy, TablePolicy, TransformerPolicy
from lightning_ydrop.search.space import ConvValues, PatternSpace

# 2 places x (3 x 2 x 2) = 144 candidates of 6 tokens.
FEW = ConvValues(
    size=(0, 1 / 4, 1 / 2),
    stride=(1 / 8,),
    repeat=(1, 2),
    rotate=(0,),
    shear_x=(0,),
    shear_y=(0,),
    share_c=(False, True),
    residual=(False,),
)
SMALL = PatternSpace({"stage1.1": "conv", "stage2.1": "conv"}, FEW)
WIDE = PatternSpace({f"stage1.{number}": "conv" for number in range(1, 5)})
MIXED = PatternSpace({"stage1.1": "conv", "queries": "token"}, FEW)


def candidates(space: PatternSpace) -> list[list[int]]:
    return [list(choices) for choices in itertools.product(*(range(len(token.values)) for token in space.tokens))]


def policies(space: PatternSpace) -> list[ReinforcePolicy]:
    return [TablePolicy(space), TransformerPolicy(space, width=8, feedforward=16)]


def weights_of(policy: ReinforcePolicy) -> list[torch.nn.Parameter]:
    weights: list[torch.nn.Parameter] = policy._optimizer.param_groups[0]["params"]
    return weights


def moved(policy: ReinforcePolicy, scale: float = 0.5) -> ReinforcePolicy:
    """Move a policy away from the uniform one."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in weights_of(policy):
            weight.add_(scale * torch.randn(weight.shape, generator=generator, dtype=weight.dtype))
    return policy


def log_probs(policy: ReinforcePolicy, space: PatternSpace) -> Tensor:
    """log pi of all candidates, differentiable."""
    return policy._terms(torch.tensor(candidates(space)))[0].sum(1)


def reward_of(choices: list[int]) -> float:
    """A reward with main effects and an interaction."""
    return choices[0] - 0.7 * choices[1] * choices[3] + 0.3 * choices[5]


MAKERS: list[Callable[..., ReinforcePolicy]] = [
    TablePolicy,
    lambda space, **kwargs: TransformerPolicy(space, width=8, feedforward=16, **kwargs),
]
both = pytest.mark.parametrize("make", MAKERS, ids=["table", "transformer"])
