"""What all rows share is never taken for rows, wherever it is drawn and however many rows it has."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.utils import parametrize
from torchvision.ops import StochasticDepth

from lightning_ydrop import ConductanceDropout, monte_carlo
from lightning_ydrop.uncertainty.averaging import mean_probabilities
from lightning_ydrop.uncertainty.draws import Draw, MaskSharing
from tests.counting import recorder

# Chance of a false alarm in each comparison, by Hoeffding's inequality.
ALARM = 1e-9
BATCH_SIZE, NUM_MASKS = 4, 5
# After the first mask four pass at once: 16 rows, as many as the shared tensors below have, or a multiple.
ROWS = BATCH_SIZE * (NUM_MASKS - 1)
Forward = Callable[[Any, Any], Any]


class Net(nn.Module):
    """A head on whatever a function of the model and of x (B, T, D) = (4, 16, 3) gives."""

    def __init__(self, body: Forward, **parts: Any) -> None:
        super().__init__()
        self.body = body
        for name, part in parts.items():
            setattr(self, name, part)
        self.head = nn.Linear(3, 2)
        self.tell = recorder()

    @property
    def passes(self) -> list[int]:
        seen: list[int] = self.tell.seen
        return seen

    def forward(self, x: Tensor) -> Tensor:
        self.tell(len(x))
        logits: Tensor = self.head(self.body(self, x).mean(1))
        return logits


def driven() -> ConductanceDropout:
    """A layer of three units with probabilities, one draw for each sample and unit."""
    layer = ConductanceDropout(unit_dim=-1)
    layer.update(torch.tensor([0.3, 0.5, 0.7]), elasticity=0.5, initial_drop_prob=0.5)
    return layer


class WeightMask(nn.Module):
    """A parametrization that drops weights by a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout()

    def forward(self, weight: Tensor) -> Any:
        return self.drop(weight)


class FunctionalMask(WeightMask):
    """A parametrization that holds a layer for its rate and its mode, and never calls it."""

    def forward(self, weight: Tensor) -> Any:
        return nn.functional.dropout(weight, self.drop.p, self.drop.training)


def masked_weights(mask: nn.Module) -> nn.Linear:
    """A layer of 16 x 16 weights."""
    layer = nn.Linear(ROWS, ROWS)
    parametrize.register_parametrization(layer, "weight", mask)
    return layer


def along_time(net: Any, x: Tensor) -> Any:
    return net.layer(x.transpose(1, 2)).transpose(1, 2)


def by_sample(net: Any, x: Tensor) -> Tensor:
    return torch.stack([net.drop(sample) for sample in x])


def unfolded(net: Any, x: Tensor) -> Any:
    return net.drop(x.repeat_interleave(3, 0)).reshape(len(x), 3, 16, 3).mean(1)


def attention_among(table: Tensor, net: Any) -> Any:
    return net.attention(table, table, table)[0]


def generated(net: Any, x: Tensor) -> Any:
    """Weights that depend on the whole batch."""
    weights = net.generator(x.mean((0, 1))).view(ROWS, ROWS)
    return (x.transpose(1, 2) @ net.drop(weights)).transpose(1, 2)


SHARED: dict[str, Callable[[], Net]] = {
    "parametrization with a layer": lambda: Net(along_time, layer=masked_weights(WeightMask())),
    "parametrization with a function": lambda: Net(along_time, layer=masked_weights(FunctionalMask())),
    "a parametrization that is a layer": lambda: Net(along_time, layer=masked_weights(nn.Dropout())),
    "table of parameters": lambda: Net(
        lambda net, x: x + net.drop(net.table), drop=nn.Dropout(), table=nn.Parameter(torch.randn(16, 3))
    ),
    "table of several times the rows": lambda: Net(
        lambda net, x: x + net.drop(net.table)[:16], drop=nn.Dropout(), table=nn.Parameter(torch.randn(3 * ROWS, 3))
    ),
    "table that depends on nothing": lambda: Net(
        lambda net, x: x + net.drop(torch.arange(16.0).unsqueeze(1)), drop=nn.Dropout()
    ),
    "table of units": lambda: Net(lambda net, x: x + net.drop(torch.ones(16, 3)), drop=driven()),
    "the second call of a layer": lambda: Net(
        lambda net, x: net.drop(x) + net.drop(torch.ones(16, 3)), drop=nn.Dropout()
    ),
    "weights of the whole batch": lambda: Net(generated, drop=nn.Dropout(), generator=nn.Linear(3, ROWS**2)),
    "attention among prototypes": lambda: Net(
        lambda net, x: x + attention_among(torch.ones(16, 3), net), attention=nn.MultiheadAttention(3, 1, 0.5)
    ),
    "units of all samples, time first": lambda: Net(
        lambda net, x: net.drop(x.transpose(0, 1)).transpose(0, 1), drop=driven()
    ),
    "channels of all samples, rows in the third place": lambda: Net(
        lambda net, x: net.drop(x.movedim(0, -1).unsqueeze(-1))[..., 0].movedim(-1, 0), drop=nn.Dropout2d()
    ),
    "noise beside the dropout": lambda: Net(lambda net, x: net.drop(x) + torch.randn(16, 3), drop=nn.Dropout()),
}


@pytest.mark.usefixtures("rows_known_apart")
@pytest.mark.parametrize("is_inference", [False, True])
@pytest.mark.parametrize("kind", SHARED)
def test_one_mask_passes_at_a_time_where_rows_share_a_draw(kind: str, is_inference: bool) -> None:
    net = SHARED[kind]()
    with torch.inference_mode(is_inference):
        monte_carlo(net, torch.randn(BATCH_SIZE, 16, 3), NUM_MASKS)
    assert net.passes == [BATCH_SIZE, ROWS, *[BATCH_SIZE] * (NUM_MASKS - 1)]


@pytest.mark.parametrize("rows", [15 * BATCH_SIZE, 16 * BATCH_SIZE, 32 * BATCH_SIZE])
def test_the_average_is_over_as_many_masks_whatever_rows_the_weights_have(rows: int) -> None:
    class DropConnect(nn.Linear):
        def __init__(self) -> None:
            super().__init__(3, rows)
            self.mask = nn.Dropout()

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.mask(self.weight))

    model, x = nn.Sequential(DropConnect(), nn.ReLU(), nn.Linear(rows, 2)), 3 * torch.randn(BATCH_SIZE, 3)
    with torch.no_grad():
        one_by_one = torch.stack([model(x).softmax(1) for _ in range(1600)])
    averages = torch.stack([monte_carlo(model, x, 16).probabilities for _ in range(100)])
    # Were it one mask in each average, their variance would be that of a single mask.
    assert averages.var(0).mean() < one_by_one.var(0).mean() / 8
    assert (averages.mean(0) - one_by_one.mean(0)).abs().max() < 2 * math.sqrt(math.log(2 * 8 / ALARM) / (2 * 1600))


OF_EACH_ROW: dict[str, Callable[[], Net]] = {
    "rows": lambda: Net(lambda net, x: net.drop(x), drop=nn.Dropout()),
    "two calls": lambda: Net(lambda net, x: net.drop(x + net.drop(x)), drop=nn.Dropout()),
    "time first": lambda: Net(lambda net, x: net.drop(x.transpose(0, 1)).transpose(0, 1), drop=nn.Dropout()),
    "rows in the last place": lambda: Net(lambda net, x: net.drop(x.movedim(0, -1)).movedim(-1, 0), drop=nn.Dropout()),
    "several rows of a sample": lambda: Net(unfolded, drop=nn.Dropout()),
    "pairs of rows": lambda: Net(
        lambda net, x: x * net.drop(torch.ones(len(x), len(x))).mean(1)[:, None, None], drop=nn.Dropout()
    ),
    "a table for each row": lambda: Net(
        lambda net, x: x + net.drop(torch.ones(16, 3).expand(len(x), 16, 3)), drop=nn.Dropout()
    ),
    "selected rows": lambda: Net(lambda net, x: x + net.drop(x[x[:, 0, 0] > 0]).mean(), drop=nn.Dropout()),
    "channels": lambda: Net(lambda net, x: net.drop(x), drop=nn.Dropout1d()),
    "features": lambda: Net(lambda net, x: net.drop(x), drop=nn.FeatureAlphaDropout()),
    "units": lambda: Net(lambda net, x: net.drop(x), drop=driven()),
    "branches": lambda: Net(lambda net, x: net.drop(x), drop=StochasticDepth(0.5, "row")),
    "attention": lambda: Net(
        lambda net, x: net.attention(x, x, x)[0], attention=nn.MultiheadAttention(3, 1, 0.5, batch_first=True)
    ),
    "recurrence": lambda: Net(
        lambda net, x: net.lstm(x)[0], lstm=nn.LSTM(3, 3, num_layers=2, dropout=0.5, batch_first=True)
    ),
    "a table beside it in evaluation mode": lambda: Net(
        lambda net, x: net.drop(x) + nn.functional.dropout(torch.ones(16, 3), 0.5, training=False), drop=nn.Dropout()
    ),
    "a table beside it at rate 0": lambda: Net(
        lambda net, x: net.drop(x) + nn.functional.dropout(torch.ones(16, 3), 0.0), drop=nn.Dropout()
    ),
}


@pytest.mark.usefixtures("rows_known_apart")
@pytest.mark.parametrize("is_inference", [False, True])
@pytest.mark.parametrize("kind", OF_EACH_ROW)
def test_many_masks_pass_at_once_where_each_row_has_draws_of_its_own(kind: str, is_inference: bool) -> None:
    net = OF_EACH_ROW[kind]()
    with torch.inference_mode(is_inference):
        monte_carlo(net, torch.randn(BATCH_SIZE, 16, 3), 9, max_rows=ROWS)
    assert net.passes == [BATCH_SIZE, ROWS, ROWS]


@pytest.mark.usefixtures("rows_known_apart")
def test_where_calls_do_not_pair_up_one_mask_passes_at_a_time() -> None:
    net = Net(by_sample, drop=nn.Dropout())
    monte_carlo(net, torch.randn(BATCH_SIZE, 16, 3), NUM_MASKS)
    assert net.passes == [BATCH_SIZE, ROWS, *[BATCH_SIZE] * (NUM_MASKS - 1)]


@pytest.mark.usefixtures("rows_known_apart")
@pytest.mark.parametrize(("num_masks", "passes"), [(1, [4]), (2, [4, 4]), (3, [4, 8])])
def test_few_masks_take_no_pass_that_is_not_averaged(num_masks: int, passes: list[int]) -> None:
    net = OF_EACH_ROW["rows"]()
    monte_carlo(net, torch.randn(BATCH_SIZE, 16, 3), num_masks)
    assert net.passes == passes


@pytest.mark.usefixtures("rows_known_apart")
@pytest.mark.parametrize("num_masks", [2, 3, 5])
def test_what_was_learned_is_not_learned_again(num_masks: int) -> None:
    for kinds, is_shared in ((OF_EACH_ROW, False), (SHARED, True)):
        net = next(iter(kinds.values()))()
        sharing = MaskSharing(is_known=True, is_shared=is_shared)
        mean_probabilities(net, torch.randn(BATCH_SIZE, 16, 3), num_masks, sharing=sharing)
        assert net.passes == ([BATCH_SIZE] * num_masks if is_shared else [num_masks * BATCH_SIZE])


@pytest.mark.usefixtures("rows_known_apart")
def test_a_function_that_compiles_itself_is_no_obstacle() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop, self.head = nn.Dropout(), nn.Linear(16, 2)
            self.tell = recorder()

        def forward(self, x: Tensor) -> Any:
            self.tell(len(x))
            heads = self.drop(x)[:, None]
            return self.head(flex_attention(heads, heads, heads)[:, 0].mean(1))

    model = Attention()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that this function should be compiled
        monte_carlo(model, torch.randn(BATCH_SIZE, 8, 16), 5)
    assert model.tell.seen == [BATCH_SIZE, ROWS]


@pytest.mark.parametrize(
    ("one_mask", "many_masks", "is_shared"),
    [
        ([("a", (4, 3))], [("a", (12, 3))], False),
        ([("a", (3, 4))], [("a", (3, 12))], False),
        ([("a", (4, 3))], [("a", (4, 3))], True),
        ([("a", (4, 3))], [("a", (8, 3))], True),
        ([("a", (4, 3))], [("b", (12, 3))], True),
        ([("a", (4, 3))], [("a", (12, 3)), ("a", (12, 3))], True),
        ([("a", (4, 3)), ("a", (3,))], [("a", (12, 3)), ("a", (3,))], True),
        ([("a", ())], [("a", ())], True),
        ([("a", (4, 3))], [("a", (12,))], True),
        ([], [], True),
    ],
)
def test_a_draw_has_rows_where_it_grows_as_they_do(one_mask: Any, many_masks: Any, is_shared: bool) -> None:
    sharing = MaskSharing()
    assert not sharing.is_known
    sharing.compare([Draw(*each) for each in one_mask], [Draw(*each) for each in many_masks], num_masks=3)
    assert sharing == MaskSharing(is_known=True, is_shared=is_shared)
