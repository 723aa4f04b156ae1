"""Jumpout against its slow description, and against what its numbers should be on average."""

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from lightning_ydrop import ConfigurationError, Jumpout
from lightning_ydrop.functional import jumpout
from lightning_ydrop.functional.masking import MAX_JUMPOUT_RATE

# Chance of a false alarm in each comparison, by Hoeffding's inequality.
ALARM = 1e-9


def activations(share: float, shape: tuple[int, ...] = (4, 50)) -> Tensor:
    """Positive numbers in a share of the places, and zeros."""
    size = math.prod(shape)
    x = torch.zeros(size)
    x[torch.randperm(size)[: round(share * size)]] = torch.rand(round(share * size)) + 0.5
    return x.view(shape)


def drawn_rate(seed: int, p_min: float, sigma: float, p_max: float) -> float:
    """The first number of the random stream makes the rate."""
    normal = torch.randn((), generator=torch.Generator().manual_seed(seed)).item()
    return min(p_min + sigma * abs(normal), p_max)


@pytest.mark.parametrize("granularity", ["element", "channel"])
@pytest.mark.parametrize("shape", [(6, 20), (4, 5, 3, 2)])
def test_it_does_what_is_described_element_by_element(shape: tuple[int, ...], granularity: str) -> None:
    x = activations(0.4, shape)
    for seed in range(20):
        torch.manual_seed(seed)
        y = jumpout(x, 0.05, 0.2, 0.3, granularity, 0.75)  # type: ignore[arg-type]
        active = sum(value > 0 for value in x.flatten().tolist()) / x.numel()
        rate = min(drawn_rate(seed, 0.05, 0.2, 0.3) / active, 0.95)
        generator = torch.Generator().manual_seed(seed)
        torch.randn((), generator=generator)
        elementwise = granularity == "element" or len(shape) == 2
        uniform = torch.rand(shape if elementwise else (*shape[:2], 1, 1), generator=generator)
        expected = [
            0.0 if number < rate else value * (1 - rate) ** -0.75
            for value, number in zip(x.flatten().tolist(), uniform.expand(shape).flatten().tolist(), strict=True)
        ]
        assert torch.allclose(y.flatten(), torch.tensor(expected), rtol=1e-5)


def test_rates_are_half_normal_up_to_the_cap() -> None:
    rates = []
    for _ in range(5000):
        kept = jumpout(torch.ones(40), 0.05, 0.1, 0.25, scale_exponent=1.0).max()
        rates.append(1 - 1 / kept.item())
    capped = [rate for rate in rates if rate > 0.25 - 1e-6]
    below = [rate for rate in rates if rate <= 0.25 - 1e-6]
    chance = 2 * stats.norm.sf(2)  # of more than two standard deviations
    assert abs(len(capped) / len(rates) - chance) < math.sqrt(math.log(2 / ALARM) / (2 * len(rates)))
    spread = stats.truncnorm(0, 2, loc=0.05, scale=0.1)
    assert stats.kstest(below, spread.cdf).pvalue > 1e-3


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_share_of_units_that_are_dropped_while_active_is_the_drawn_rate(share: float) -> None:
    draws, x = 1_000, activations(share)
    is_active = x > 0
    dropped, expected = 0, 0.0
    # At most 0.06 of all units, so that the cap on the rate of active ones is out of reach.
    for seed in range(draws):
        torch.manual_seed(seed)
        dropped += int((jumpout(x, 0.0, 0.02, 0.06)[is_active] == 0).sum())
        expected += drawn_rate(seed, 0.0, 0.02, 0.06)
    of_active = draws * int(is_active.sum())
    # Each active unit is dropped or not, independently: Hoeffding bounds how far the share of them goes astray.
    bound = math.sqrt(math.log(2 / ALARM) / (2 * of_active))
    assert abs(dropped / of_active - expected / draws / share) < bound


@pytest.mark.parametrize(("exponent", "power"), [(1.0, 1), (0.5, 2)])
def test_the_exponent_says_which_moment_is_kept(exponent: float, power: int) -> None:
    draws, rate = 10_000, 0.3 / 0.6
    x = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0])
    moments = torch.stack([jumpout(x, 0.3, 0.0, 0.3, scale_exponent=exponent) ** power for _ in range(draws)])
    # What is averaged is 0 or 1 / (1 - rate).
    bound = math.sqrt(math.log(2 / ALARM) / (2 * draws * 3)) / (1 - rate)
    assert abs(float(moments[:, :3].mean()) - 1) < bound


@pytest.mark.parametrize(
    "x", [torch.zeros(8, 4), torch.full((8, 4), -1.0), torch.zeros(0, 4), torch.eye(1, 1000)], ids=lambda x: x.shape
)
def test_few_active_units_or_none_make_no_nan(x: Tensor) -> None:
    x = x.clone().requires_grad_()
    for rates in ((0.0, 0.0, 0.0), (0.0, 0.1, 0.5), (0.5, 0.1, 0.9)):
        y = jumpout(x, *rates)
        y.sum().backward()
        assert y.isfinite().all()
        assert x.grad is not None
        assert x.grad.isfinite().all()


@pytest.mark.parametrize(
    "given", [{"p_min": 1.0}, {"p_max": -0.1}, {"sigma": math.inf}, {"scale_exponent": -1.0}, {"granularity": "unit"}]
)
def test_what_is_no_setting_is_refused_as_the_layer_refuses_it(given: dict[str, Any]) -> None:
    ((name, value),) = given.items()
    for owner, refuse in (
        ("jumpout", lambda: jumpout(torch.rand(2, 3), **given)),
        ("Jumpout", lambda: Jumpout(**given)),
    ):
        with pytest.raises(ConfigurationError, match=re.escape(f"{owner}({name}={value!r})")):
            refuse()


def test_the_rate_of_active_units_is_capped() -> None:
    x, draws = torch.eye(1, 100), 2000  # one of them is active
    kept = [float(jumpout(x, 0.3, 0.0, 0.3, scale_exponent=1.0)[0, 0]) for _ in range(draws)]
    assert sorted({round(value, 3) for value in kept}) == [0.0, 20.0]
    bound = math.sqrt(math.log(2 / ALARM) / (2 * draws))
    assert abs(sum(value == 0 for value in kept) / draws - MAX_JUMPOUT_RATE) < bound


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_dtype_stays_and_gradients_are_the_mask_times_the_scale(dtype: torch.dtype) -> None:
    x = activations(0.5).to(dtype).requires_grad_()
    y = jumpout(x, 0.2, 0.0, 0.2)
    assert y.dtype == dtype
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal((x * x.grad).detach(), y.detach())
    assert len(x.grad.unique()) == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_small_rates_are_exact_in_half_precision(dtype: torch.dtype) -> None:
    rate, size = 0.001, 1000  # which no uniform number of bfloat16 comes near, except 0
    dropped = float((jumpout(torch.ones(size, size, dtype=dtype), rate, 0.0, rate) == 0).float().mean())
    # Bernstein's inequality, for draws that are 1 so seldom.
    chance = math.log(2 / ALARM) / size**2
    assert abs(dropped - rate) < math.sqrt(2 * rate * chance) + chance


def test_nothing_is_dropped_at_a_rate_of_0() -> None:
    x = activations(0.5)
    assert torch.equal(jumpout(x, 0.0, 0.0, 0.0), x)


def test_a_channel_is_dropped_as_a_whole_in_each_sample() -> None:
    y = jumpout(torch.rand(50, 6, 5, 5) + 0.1, 0.4, 0.0, 0.4, granularity="channel") == 0
    assert torch.equal(y.any(3).any(2), y.all(3).all(2))
    assert 0 < y[:, :, 0, 0].float().mean() < 1
    assert (y[:, :, 0, 0] != y[0, :, 0, 0]).any()


@pytest.mark.filterwarnings("ignore:Skipping serialization of skipfiles")  # an older torch to itself
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_it_is_one_graph_for_any_batch(backend: str) -> None:
    torch.compiler.reset()
    graphs = CompileCounterWithBackend(backend)
    step: Callable[..., Tensor] = torch.compile(jumpout, backend=graphs, fullgraph=True, dynamic=True)
    counts = []
    for rows in (200, 300, 7000):
        y = step(torch.ones(rows, 50), 0.3, 0.0, 0.3)
        assert abs(float((y == 0).float().mean()) - 0.3) < math.sqrt(math.log(2 / ALARM) / (2 * y.numel()))
        counts.append(graphs.frame_count)
    assert len(set(counts)) == 1  # no batch compiles it once more
