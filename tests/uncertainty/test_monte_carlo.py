import itertools
import math
import random
import sys
import warnings
from collections import UserDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import pyplot
from matplotlib.figure import Figure
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from lightning_ydrop import (
    ConductanceDropout,
    ConfigurationError,
    ConvPattern,
    Jumpout,
    PatternDropout,
    TokenPattern,
    monte_carlo,
)
from lightning_ydrop.uncertainty import MonteCarlo, MonteCarloDivergence
from lightning_ydrop.uncertainty.masks import dropout_off
from tests.counting import recorder
from tests.sameness import assert_same

# Chance of a false alarm in each comparison, by Hoeffding's inequality.
ALARM = 1e-9


def network(width: int = 4, p: float = 0.3) -> nn.Sequential:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Dropout(p), nn.Linear(width, 3))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=2.0)  # far from linear, so that the average is not the prediction of one pass
    return model


def exact(model: nn.Sequential, x: Tensor, p: float) -> Tensor:
    """The average over all masks, one after the other, each with its probability."""
    hidden = model[:2](x)
    average = torch.zeros(len(x), 3)
    for mask in itertools.product((0.0, 1.0), repeat=hidden.shape[1]):
        kept = int(sum(mask))
        chance = (1 - p) ** kept * p ** (len(mask) - kept)
        average += chance * model[3](hidden * torch.tensor(mask) / (1 - p)).softmax(1)
    return average


def test_it_is_the_average_over_all_masks() -> None:
    model, x, num_samples = network(), torch.randn(5, 3), 20_000
    found = monte_carlo(model, x, num_samples)
    assert found.num_samples == num_samples
    bound = math.sqrt(math.log(2 * 15 / ALARM) / (2 * num_samples))
    assert (found.probabilities - exact(model, x, 0.3)).abs().max() < bound
    # In evaluation mode the network gives something else.
    assert (model.eval()(x).softmax(1) - exact(model, x, 0.3)).abs().max() > 3 * bound


@pytest.mark.usefixtures("rows_known_apart")
def test_a_sample_has_masks_of_its_own_in_a_pass_of_many() -> None:
    model, passes = network(16), []
    model[0].register_forward_hook(lambda module, args, output: passes.append(len(output)))
    x = torch.ones(2, 3)
    found = monte_carlo(model, x, 3).probabilities
    assert passes == [2, 4]  # the first mask by itself
    assert not torch.equal(found[0], found[1])


def test_what_a_forward_counts_is_kept() -> None:
    class Counting(nn.Module):
        rows: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.body = network()
            self.register_buffer("rows", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.rows += len(x)
            logits: Tensor = self.body(x)
            return logits

    model = Counting()
    model(torch.ones(2, 3))
    monte_carlo(model, torch.ones(4, 3), 7)
    assert model.rows == 2


@pytest.mark.usefixtures("rows_known_apart")
def test_in_the_callers_autocast_the_weights_still_train() -> None:
    model, x, cached = network(), torch.ones(2, 3), []
    model.register_forward_pre_hook(lambda *_: cached.append(torch.is_autocast_cache_enabled()))
    with torch.autocast("cpu", torch.bfloat16):
        monte_carlo(model, x, 3)
        loss = model(x).sum()
    assert cached == [False, False, True]
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.usefixtures("rows_known_apart")
def test_rows_are_split_where_memory_does_not_allow_them() -> None:
    model, passes = network(), []
    model[0].register_forward_hook(lambda module, args, output: passes.append(len(output)))
    monte_carlo(model, torch.ones(4, 3), 7, max_rows=13)
    monte_carlo(model, torch.ones(4, 3), 2, max_rows=1)
    assert passes == [4, 12, 12, 4, 4]


@pytest.mark.usefixtures("rows_known_apart")
def test_half_as_many_masks_pass_at_once_where_a_gpu_has_no_memory() -> None:
    model, passes, room = network(), [], 20

    def allocate(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        passes.append(len(args[0]))
        if len(args[0]) > room:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    model.register_forward_pre_hook(allocate)
    x, num_samples = torch.randn(4, 3), 20_000
    found = monte_carlo(model, x, num_samples, max_rows=80)
    assert passes == [4, 80, 40] + [20] * 3_999 + [16]
    bound = math.sqrt(math.log(2 * 12 / ALARM) / (2 * num_samples))
    assert (found.probabilities - exact(model, x, 0.3)).abs().max() < bound
    room = 3
    with pytest.raises(torch.OutOfMemoryError):
        monte_carlo(model, x, 2)
    assert passes[-2:] == [16, 4]
    assert all(module.training for module in model)


class WeightDrop(nn.Linear):
    """Drops weights, the same for all samples of a batch."""

    def __init__(self) -> None:
        super().__init__(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, nn.functional.dropout(self.weight, 0.5, self.training))


@pytest.mark.usefixtures("rows_known_apart")
@pytest.mark.parametrize("layer", [Jumpout(), StochasticDepth(0.5, "batch"), WeightDrop()])
def test_what_draws_once_for_a_batch_takes_a_pass_for_each_mask(layer: nn.Module) -> None:
    model, passes = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), layer, nn.Linear(8, 2)), []
    model[0].register_forward_hook(lambda module, args, output: passes.append(len(output)))
    monte_carlo(model, torch.ones(4, 3), 3)
    assert passes == [4, 4, 4]


@pytest.mark.usefixtures("rows_known_apart")
@pytest.mark.parametrize(
    ("pattern", "shape"),
    [
        (ConvPattern(0.5), (4, 3, 6, 6)),
        (ConvPattern.stochastic_depth(0.5), (4, 3, 6, 6)),
        (TokenPattern(2, share_t=True, rate=0.5), (4, 3, 36)),
    ],
    ids=str,
)
def test_patterns_are_drawn_for_each_row_so_masks_share_a_pass(pattern: Any, shape: tuple[int, ...]) -> None:
    model, passes = nn.Sequential(PatternDropout(pattern), nn.Flatten(), nn.Linear(108, 2)), []
    model[0].register_forward_hook(lambda module, args, output: passes.append(len(output)))
    average = monte_carlo(model, torch.ones(shape), 20)
    assert passes == [4, 76]
    assert not torch.equal(average.probabilities[0], average.probabilities[1])


class DropConnect(nn.Module):
    """Drops weights by a layer, the same for all samples of a batch."""

    def __init__(self, num_inputs: int, num_outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_outputs, num_inputs))
        self.drop = nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.drop(self.weight))


class Dropping(nn.Module):
    """Calls a dropout layer on the input, or on something else that has no samples in it."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shared = nn.Parameter(torch.ones(shape))
        self.drop = nn.Dropout()
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        dropped = self.drop(self.shared)
        logits: Tensor = self.head(
            x * dropped if dropped.shape != (2, 3) else nn.functional.linear(x, dropped) @ dropped
        )
        return logits


@pytest.mark.usefixtures("rows_known_apart")
@pytest.mark.parametrize("shape", [(), (1, 3), (2, 3)])
def test_where_a_layer_drops_what_no_sample_has_to_itself_each_mask_takes_a_pass(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model, passes, x = Dropping(shape), [], torch.randn(4, 3)
    nn.init.normal_(model.head.weight, std=3.0)
    model.head.register_forward_hook(lambda module, args, output: passes.append(len(output)))
    slow = torch.stack([monte_carlo(model, x, 1).probabilities for _ in range(400)]).mean(0)
    del passes[:]
    found = monte_carlo(model, x, 400).probabilities
    assert passes == [4, 1596, *[4] * 399]
    assert (found - slow).abs().max() < 2 * math.sqrt(math.log(2 * 8 / ALARM) / (2 * 400))


@pytest.mark.usefixtures("rows_known_apart")
def test_several_rows_of_a_sample_or_the_batch_in_second_place_are_rows_of_their_own() -> None:
    class TimeFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout()

        def forward(self, x: Tensor) -> Tensor:
            windows: Tensor = self.drop(x.repeat_interleave(3, 0)).reshape(len(x), 3, 5, 2)
            return self.drop(windows.mean(1).transpose(0, 1)).mean(0)

    model, passes = TimeFirst(), []
    model.register_forward_hook(lambda module, args, output: passes.append(len(output)))
    monte_carlo(model, torch.randn(4, 5, 2), 3)
    assert passes == [4, 8]


def compiled_inside(model: nn.Sequential, backend: Any) -> None:
    part: Any = torch.compile(model[0], backend=backend)
    model[0] = part


def compiled_in_place(model: nn.Sequential, backend: Any) -> None:
    model[0].compile(backend=backend)


def compiled_function(model: nn.Sequential, backend: Any) -> None:
    part: Any = model[0]
    part.forward = torch.compile(part.forward, backend=backend, fullgraph=True)


COMPILED = [compiled_inside, compiled_in_place, compiled_function]


@pytest.mark.usefixtures("rows_known_apart")
@pytest.mark.parametrize("compile_part", COMPILED)
@pytest.mark.parametrize("is_shared", [True, False])
def test_compiled_parts_are_compared_too_and_compiled_without_hooks(
    compile_part: Callable[[nn.Sequential, Any], None], is_shared: bool
) -> None:
    torch._dynamo.reset()
    hooks: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        hooks.append(sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()))
        return graph.forward

    first: nn.Module = DropConnect(3, 8) if is_shared else nn.Sequential(nn.Linear(3, 8), nn.Dropout())
    model = nn.Sequential(first, nn.Linear(8, 2))
    compile_part(model, backend)
    passes: list[int] = []

    def forward(x: Tensor) -> Any:
        passes.append(len(x))
        return model(x)

    x = torch.randn(4, 3)
    monte_carlo(model, x, 4, max_rows=8, forward=forward)
    assert passes == ([4, 8, 4, 4, 4] if is_shared else [4, 8, 4])
    assert hooks == [0]  # compiled once, by the passes after the two that are compared


@pytest.mark.usefixtures("rows_known_apart")
def test_what_draws_for_each_sample_takes_one_pass_after_the_first_mask() -> None:
    model, passes = nn.Sequential(nn.Linear(3, 8), nn.AlphaDropout(), StochasticDepth(0.5, "row"), nn.Linear(8, 2)), []
    model[0].register_forward_hook(lambda module, args, output: passes.append(len(output)))
    monte_carlo(model, torch.ones(4, 3), 3)
    assert passes == [4, 8]


@pytest.mark.usefixtures("rows_known_apart")
def test_only_what_drops_is_in_training_mode_and_the_model_is_given_back() -> None:
    driven = ConductanceDropout()
    driven.update(torch.linspace(0, 0.9, 8), elasticity=0.5, initial_drop_prob=0.2)
    model = nn.Sequential(
        nn.Linear(3, 8), nn.BatchNorm1d(8).eval(), nn.Dropout(), driven, nn.Dropout(0.1).eval(), nn.Linear(8, 2)
    )
    before, flags = [value.clone() for value in model.state_dict().values()], [each.training for each in model]
    applied = [driven.active, driven._applied_drop_prob.clone(), driven._applied_mean.clone()]
    seen: list[tuple[bool, ...]] = []
    model[5].register_forward_pre_hook(lambda module, args: seen.append(tuple(each.training for each in model)))
    found = monte_carlo(model, torch.randn(6, 3), 2)
    assert seen == [(False, False, True, True, True, False)] * 2
    assert [each.training for each in model] == flags
    assert_same(list(model.state_dict().values()), before)
    assert_same([driven.active, driven._applied_drop_prob, driven._applied_mean], applied)
    assert not found.probabilities.requires_grad


def test_a_driven_layer_drops_at_its_running_mean() -> None:
    layer, linear = ConductanceDropout(0.1), nn.Linear(2, 2, bias=False)
    layer.update(torch.tensor([0.0, 0.8]), elasticity=0.5, initial_drop_prob=0.2)  # now 0.1 and 0.5
    layer.deactivate()
    linear.weight.data = torch.tensor([[0.0, 0.0], [0.0, 50.0]])
    found = monte_carlo(nn.Sequential(layer, linear), torch.ones(1, 2), 20_000).probabilities[0]
    # Where the second unit is dropped both classes are as likely, otherwise the second is certain.
    assert abs(float(found[0]) - 0.25) < math.sqrt(math.log(2 / ALARM) / (2 * 20_000)) / 2


def test_attention_and_recurrence_drop_too() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.4, batch_first=True)
    for model in (layer, nn.Sequential(layer)):
        found = monte_carlo(model, torch.ones(2, 5, 8), 2).probabilities  # classes in dimension 1
        assert found.shape == (2, 5, 8)
        assert not torch.equal(found[0], found[1])

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(3, 4, num_layers=2, dropout=0.5, batch_first=True)

        def forward(self, x: Tensor, scale: Tensor) -> dict[str, Tensor]:
            return {"logits": self.lstm(x)[0][:, -1] * scale}

    found = monte_carlo(Recurrent(), {"x": torch.ones(2, 5, 3), "scale": torch.tensor(100.0)}, 1).probabilities
    assert not torch.equal(found[0], found[1])


class Batch(UserDict[str, Tensor]):
    """As a tokenizer of Hugging Face's returns it."""


class OwnAttention(nn.Module):
    """As many networks have it: attention drops at the rate of a layer beside it, when it is itself in training."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 12)
        self.attn_drop = nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        p = self.attn_drop.p if self.training else 0.0
        return nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=p).mean(1)


@pytest.mark.usefixtures("rows_known_apart")
def test_attention_drops_that_reads_the_rate_of_a_layer_beside_it() -> None:
    model, x = nn.Sequential(OwnAttention(0.5), nn.Linear(4, 2)), torch.randn(3, 6, 4)
    found = monte_carlo(model, x, 2).probabilities
    assert not torch.equal(found, monte_carlo(model, x, 2).probabilities)
    assert model[0].training
    with dropout_off(model):
        assert torch.equal(model(x), model(x))
    assert not torch.equal(model(x), model(x))
    quiet = nn.Sequential(OwnAttention(0.0), nn.Dropout(), nn.Linear(4, 2)).eval()
    flags: list[bool] = []
    quiet.register_forward_hook(lambda module, args, output: flags.append(quiet[0].training))
    monte_carlo(quiet, x, 2)
    assert flags == [False, False]


@pytest.mark.usefixtures("rows_known_apart")
def test_all_masks_pass_at_once_without_a_limit() -> None:
    model, passes = network(), []
    model[0].register_forward_hook(lambda module, args, output: passes.append(len(output)))
    monte_carlo(model, torch.ones(4, 3), 5_000, max_rows=None)
    assert passes == [4, 19_996]


@pytest.mark.parametrize("driven", [True, False])
def test_it_warns_where_probabilities_of_ydrop_may_have_been_left_behind(driven: bool) -> None:
    model = nn.Sequential(nn.Linear(3, 4), ConductanceDropout(), nn.Linear(4, 2))
    layer = model[1]
    assert isinstance(layer, ConductanceDropout)
    if driven:
        layer.update(torch.full((4,), 0.5), elasticity=0.5, initial_drop_prob=0.2)
    else:
        message = "monte_carlo was given Sequential, in which each ConductanceDropout drops at its p. .* checkpoint=.*"
        with pytest.warns(UserWarning, match=message):
            monte_carlo(model, torch.ones(1, 3), 2)
        warnings.simplefilter("ignore", UserWarning)
    assert monte_carlo(model, torch.ones(1, 3), 2).probabilities.sum() == pytest.approx(1.0)


@pytest.mark.usefixtures("rows_known_apart")
def test_inputs_may_be_nested_and_another_method_called() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(0.5)
            self.tell = recorder()

        def predict(self, batch: Batch, options: list[Tensor]) -> Tensor:
            self.tell((len(batch["x"]), len(options[0])))
            return self.drop(batch["x"]) + options[0].sum()

    model, batch = Model(), Batch(x=torch.ones(4, 3))
    shared = torch.ones(7)  # of no sample
    found = monte_carlo(model, (batch, [shared]), 5, forward=model.predict)
    assert model.tell.seen == [(4, 7), (16, 7)]
    assert found.probabilities.shape == (4, 3)
    assert not torch.equal(found.probabilities[0], found.probabilities[1])


def test_classes_lie_where_class_dim_says() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 2))
    x = torch.randn(4, 5, 3)
    torch.manual_seed(1)
    found = monte_carlo(model, x, 50, class_dim=-1)
    torch.manual_seed(1)
    logits = model.eval()[3](nn.functional.dropout(model[1](model[0](x)).repeat(50, 1, 1)))
    slow = logits.softmax(2).view(50, 4, 5, 2).mean(0)
    assert torch.allclose(found.probabilities, slow.movedim(2, 1), atol=1e-6)
    assert found.entropy.shape == (4, 5)


def test_settings_of_numpy_are_kept_as_plain_ones() -> None:
    settings: dict[str, Any] = {"class_dim": np.int64(-1), "max_rows": np.int64(8)}
    average = monte_carlo(network(), torch.ones(4, 3), np.int64(5), **settings)  # type: ignore[call-overload]
    assert type(average.num_samples) is int
    assert average.probabilities.shape == (4, 3)


def test_in_half_precision_probabilities_are_exact() -> None:
    model, x = network(16, 0.3), torch.randn(64, 3)
    found = monte_carlo(model.bfloat16(), x.bfloat16(), 20).probabilities
    assert found.dtype == torch.float32
    assert (found.sum(1) - 1).abs().max() < 1e-5
    divergence = MonteCarloDivergence()
    divergence.update(found.log().bfloat16(), MonteCarlo(found, 20))
    assert 0 < divergence.compute() < 1e-4  # what rounding the logits makes of 0; in bfloat16 steps would be 4e-3


def test_entropy_is_that_of_the_average() -> None:
    found = MonteCarlo(torch.tensor([[0.5, 0.5], [1.0, 0.0]]), 1)
    assert torch.allclose(found.entropy, torch.tensor([math.log(2), 0.0]))


@pytest.mark.parametrize("shape", [(6, 4), (2, 4, 3, 5)])
def test_divergence_is_kullbacks_and_leiblers(shape: tuple[int, ...]) -> None:
    average, logits = MonteCarlo(torch.randn(shape).softmax(1), 9), torch.randn(shape)
    divergence = MonteCarloDivergence()
    for half in (slice(0, 1), slice(1, None)):
        divergence.update(logits[half], MonteCarlo(average.probabilities[half], 9))
    p, q = (each.movedim(1, -1).reshape(-1, 4) for each in (average.probabilities, logits.softmax(1)))
    slow = sum(
        sum(a * math.log(a / b) for a, b in zip(*rows, strict=True))
        for rows in zip(p.tolist(), q.tolist(), strict=True)
    )
    assert float(divergence.compute()) == pytest.approx(slow / len(p), rel=1e-4)


def test_divergence_is_drawn_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    divergence = MonteCarloDivergence()
    divergence.update(torch.tensor([[0.0, 1.0]]), MonteCarlo(torch.tensor([[0.5, 0.5]]), 1))
    figure, axes = divergence.plot()
    assert isinstance(figure, Figure)
    assert axes.figure is figure
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("evaluation", "KL(average || prediction), nats")
    point, average = axes.get_lines()
    assert list(point.get_ydata()) == [pytest.approx(float(divergence.compute()))]  # type: ignore[arg-type]
    assert (point.get_label(), average.get_label()) == ("prediction, at last 0.12", "the average itself")
    again = Figure().add_subplot()
    assert divergence.plot([torch.tensor(0.3), torch.tensor(0.2)], again) == (again.figure, again)
    assert list(again.get_lines()[0].get_xdata()) == [1, 2]  # type: ignore[arg-type]
    assert not pyplot.get_fignums()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigurationError, match=r"MonteCarloDivergence\.plot\(\) .* \"lightning-ydrop\[plots\]\""):
        divergence.plot()


def test_a_class_that_no_mask_has_seen_makes_no_nan() -> None:
    divergence = MonteCarloDivergence()
    for impossible in (-200.0, -math.inf):
        divergence.update(torch.tensor([[0.0, impossible]]), MonteCarlo(torch.tensor([[1.0, 0.0]]), 1))
    assert float(divergence.compute()) == pytest.approx(0, abs=1e-6)


def test_predictions_of_another_shape_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"\(5, 3\) were given for averages of \(1, 3\)"):
        MonteCarloDivergence().update(torch.randn(5, 3), MonteCarlo(torch.ones(1, 3) / 3, 1))


class DropNet(nn.Module):
    """Called after dropout, and has none."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)


class OneLayer(nn.Module):
    """Torch lets it have a dropout, which would be between layers."""

    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            self.lstm = nn.LSTM(3, 2, dropout=0.5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.lstm(x)
        last: Tensor = states[:, -1]
        return last


@pytest.mark.parametrize(
    ("model", "inputs", "settings", "message"),
    [
        (nn.Linear(3, 2), torch.ones(1, 3), {}, "has no layer that drops"),
        (network(), torch.ones(1, 3), {"num_samples": 0}, "num_samples=0"),
        (network(), torch.ones(1, 3), {"max_rows": 0}, "max_rows=0"),
        (lambda x: x, torch.ones(1, 3), {}, r"monte_carlo\(function\) was given"),
        (OneLayer(), torch.ones(1, 5, 3), {}, "has no layer that drops"),
        (DropNet(), torch.ones(1, 3), {}, "has no layer that drops"),
        (nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.0)), torch.ones(1, 3), {}, "has no layer that drops"),
        (network(), {}, {}, "at least one tensor"),
        (network(), torch.ones(0, 3), {}, "at least one sample"),
        (nn.Sequential(nn.Dropout(), nn.Linear(3, 1)), torch.ones(2, 3), {}, "two classes or more"),
        (nn.Sequential(nn.Dropout(), nn.Flatten(0)), torch.ones(2, 3), {}, r"shape=\(6,\).*for 2 rows"),
        *((network(), torch.ones(1, 3), {"class_dim": dim}, f"class_dim={dim!r}") for dim in (0, 1.5, "last")),
        (network(), (torch.ones(1, 3), torch.ones(1, 3)), {}, "forward takes"),
    ],
)
def test_what_cannot_be_averaged_is_refused(
    model: nn.Module, inputs: object, settings: dict[str, int], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        monte_carlo(model, inputs, **settings)  # type: ignore[call-overload]


# Masks that another library draws.

MASKS: list[bytes] = []


class WordDropout(nn.Dropout):
    """Drops columns, as NumPy or Python draw them."""

    def __init__(self, source: str) -> None:
        super().__init__(0.5)
        self.source = source

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        draws = np.random.rand(16) if self.source == "numpy" else [random.random() for _ in range(16)]  # noqa: NPY002
        kept = np.array(draws) > self.p
        MASKS.append(kept.tobytes())
        return x * torch.from_numpy(kept).float() / (1 - self.p)


@pytest.mark.parametrize("max_rows", [1, None])
@pytest.mark.parametrize("source", ["numpy", "python"])
def test_masks_of_numpy_and_python_differ_and_follow_from_torchs_seed(source: str, max_rows: int | None) -> None:
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), WordDropout(source), nn.Linear(16, 3))
    x = torch.randn(4, 6)
    around = random.getstate(), str(np.random.get_state())  # noqa: NPY002

    def masks() -> list[bytes]:
        MASKS.clear()
        monte_carlo(model, x, 10, max_rows=max_rows)
        return MASKS.copy()

    torch.manual_seed(1)
    first, second = masks(), masks()
    assert len(set(first)) == len(first) >= 10
    assert not set(first) & set(second)
    torch.manual_seed(1)
    assert masks() == first
    assert (random.getstate(), str(np.random.get_state())) == around  # noqa: NPY002
