import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_ydrop.functional.masking import channel_dropout, is_unbatched, unit_dropout, vanilla_dropout

# Chance of a false alarm in each comparison, by Hoeffding's inequality.
ALARM = 1e-9


@pytest.mark.parametrize(
    ("shape", "elementwise", "torchs_own"),
    [
        ((64, 10), False, nn.Dropout(0.3)),
        ((64, 10, 4, 4), True, nn.Dropout(0.3)),
        ((64, 10, 4), False, nn.Dropout1d(0.3)),
        ((64, 10, 4, 4), False, nn.Dropout2d(0.3)),
        ((64, 10, 4, 4, 4), False, nn.Dropout3d(0.3)),
    ],
)
def test_vanilla_is_torchs_own_dropout_to_the_bit(
    shape: tuple[int, ...], elementwise: bool, torchs_own: Callable[[Tensor], Tensor]
) -> None:
    x = torch.randn(shape)
    torch.manual_seed(7)
    expected = torchs_own(x)
    torch.manual_seed(7)
    assert torch.equal(vanilla_dropout(x, 0.3, elementwise=elementwise), expected)


def test_vanilla_drops_features_of_a_sequence_for_the_whole_sequence() -> None:
    dropped = vanilla_dropout(torch.ones(50, 6, 20), 0.5, unit_dim=-1)
    assert torch.equal(dropped, dropped[:, :1].expand_as(dropped))
    assert 0.3 < (dropped == 0).float().mean() < 0.7


def test_each_unit_is_dropped_at_its_own_rate_and_the_mean_is_kept() -> None:
    samples, drop_prob = 40_000, torch.linspace(0, 0.9, 13)
    y = unit_dropout(torch.ones(samples, 13), drop_prob, drop_prob)
    # Hoeffding: the share of dropped samples is off by more than this with chance ALARM.
    bound = math.sqrt(math.log(2 / ALARM) / (2 * samples))
    share = (y == 0).float().mean(0)
    assert (share - drop_prob).abs().max() < bound
    # An output is 0 or 1 / (1 - p), so its mean may be off by the same share times that value.
    assert ((y.mean(0) - 1).abs() < bound / (1 - drop_prob) + 1e-5).all()


def test_kept_values_are_rescaled_by_the_running_mean_not_the_rate() -> None:
    x = torch.randn(200, 3)
    y = unit_dropout(x, torch.tensor([0.0, 0.5, 0.9]), torch.tensor([0.5, 0.2, 0.35]))
    kept = y != 0
    assert kept[:, 0].all()
    expected = x / (1 - torch.tensor([0.5, 0.2, 0.35]))
    assert torch.allclose(y[kept], expected[kept])


def test_samples_get_different_masks() -> None:
    y = unit_dropout(torch.ones(2, 1000), torch.full((1000,), 0.5), torch.zeros(1000))
    assert not torch.equal(y[0], y[1])


@pytest.mark.parametrize("unit_dim", [1, -1])
def test_one_draw_for_each_sample_and_unit(unit_dim: int) -> None:
    x = torch.ones(40, 8, 8, 8)
    y = unit_dropout(x, torch.full((8,), 0.5), torch.zeros(8), unit_dim).movedim(unit_dim, 1).flatten(2)
    assert torch.equal(y, y[:, :, :1].expand_as(y))
    assert 0 < y[:, :, 0].mean() < 1


def test_elementwise_draws_for_each_element_at_its_units_rate() -> None:
    y = unit_dropout(torch.ones(50, 2, 40, 40), torch.tensor([0.1, 0.7]), torch.zeros(2), elementwise=True)
    assert len(y[0, 1].unique()) == 2
    bound = math.sqrt(math.log(2 / ALARM) / (2 * 50 * 1600))
    assert ((y == 0).float().mean((0, 2, 3)) - torch.tensor([0.1, 0.7])).abs().max() < bound


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_is_kept_and_rates_are_exact_in_it(dtype: torch.dtype) -> None:
    # 0.999 is 1 in bfloat16: drawn in that precision, nothing would ever be kept.
    y = unit_dropout(torch.ones(200_000, 1, dtype=dtype), torch.tensor([0.999]), torch.tensor([0.5]))
    assert y.dtype == dtype
    bound = math.sqrt(math.log(2 / ALARM) / (2 * 200_000))
    assert abs((y != 0).double().mean().item() - 0.001) < bound
    assert (y != 0).any()


def test_gradient_passes_where_a_unit_was_kept() -> None:
    x = torch.randn(50, 4, requires_grad=True)
    mean = torch.tensor([0.0, 0.2, 0.5, 0.75])
    y = unit_dropout(x, torch.full((4,), 0.5), mean)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.allclose(gradient, (y != 0) / (1 - mean))


@pytest.mark.parametrize(("unit_dim", "batch_dim"), [(-1, 1), (0, 1), (1, 0), (0, -1), (2, -2)])
@pytest.mark.parametrize("elementwise", [False, True])
def test_masks_do_not_depend_on_which_dimension_holds_samples_and_units(
    unit_dim: int, batch_dim: int, elementwise: bool
) -> None:
    x = torch.ones(9, 9, 9)
    rates = torch.linspace(0, 0.9, 9)
    for y in (
        vanilla_dropout(x, 0.5, unit_dim, elementwise, batch_dim),
        unit_dropout(x, rates, torch.zeros(9), unit_dim, elementwise, batch_dim),
    ):
        y = y.movedim((batch_dim, unit_dim), (0, 1))
        assert torch.equal(y, y[:, :, :1].expand_as(y)) is not elementwise
        assert not torch.equal(y[0], y[1])
    assert y[:, 0].eq(1).all()


@pytest.mark.parametrize("shape", [(20, 6), (20, 6, 5), (20, 6, 5, 4), (6,)])
def test_samples_first_is_the_default(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    for dropout in (
        lambda *batch_dim: vanilla_dropout(x, 0.5, 1, False, *batch_dim),
        lambda *batch_dim: unit_dropout(x, torch.full((6,), 0.5), torch.zeros(6), 1, False, *batch_dim),
    ):
        torch.manual_seed(1)
        expected = dropout()
        torch.manual_seed(1)
        assert torch.equal(dropout(0), expected)


@pytest.mark.filterwarnings("ignore:dropout[23]d. Received a")
@pytest.mark.parametrize(
    ("num_spatial_dims", "kind", "ndim", "unbatched"),
    [
        *((1, nn.Dropout1d, ndim, ndim == 2) for ndim in (2, 3)),
        *((2, nn.Dropout2d, ndim, False) for ndim in (2, 3, 4, 5)),
        *((3, nn.Dropout3d, ndim, ndim != 5) for ndim in (2, 3, 4, 5, 6)),
    ],
)
def test_an_input_is_unbatched_if_torch_draws_for_dimension_0_alone(
    num_spatial_dims: int, kind: Callable[[float], nn.Module], ndim: int, unbatched: bool
) -> None:
    x = torch.ones(8, 64, *[2] * (ndim - 2))
    torch.manual_seed(1)
    y = channel_dropout(x, 0.5, num_spatial_dims)
    torch.manual_seed(1)
    assert torch.equal(y, kind(0.5)(x))
    whole = y.flatten(1)
    assert bool((whole.amax(1) == whole.amin(1)).all()) is unbatched
    assert is_unbatched(ndim, num_spatial_dims) is unbatched
