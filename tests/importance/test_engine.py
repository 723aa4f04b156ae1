import copy
import io
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_ydrop import (
    Buckets,
    Conductance,
    ConductanceDropout,
    ConfigurationError,
    HalfNormalRate,
    Measure,
    NegativeLoss,
    NoEffectWarning,
    Objective,
    OutputSum,
    PredictedLogit,
    RandomImportance,
    Request,
    TargetLogit,
    YDrop,
    layer_conductance,
)
from lightning_ydrop.functional.attribution import Quadrature
from lightning_ydrop.functional.rates import draw_rates
from tests.counting import Counting, Operators
from tests.networks import network_and_batch, perceptron
from tests.oracles import running_mean
from tests.sameness import assert_same


def batch_of(size: int = 64) -> tuple[Tensor, Tensor]:
    return torch.randn(size, 12), torch.randint(0, 5, (size,))


def buckets_of(low: float, high: float, strong_fraction: float = 0.5) -> Buckets:
    """Rates without spread."""
    return Buckets(HalfNormalRate(low, 0.0, low), HalfNormalRate(high, 0.0, high), strong_fraction)


class Watching(Measure):
    """Keeps what it is given, and scores units by their index."""

    def __init__(self) -> None:
        self.seen: list[Request] = []

    def score(self, phase1: Request) -> dict[str, Tensor]:
        """Score by index."""
        self.seen.append(phase1)
        units = {"1": 16, "4": 10}
        return {name: torch.arange(float(units[name])).expand(3, -1) for name in phase1.layers}


def test_a_step_drives_every_layer_by_its_scores() -> None:
    model, (x, y) = perceptron(), batch_of()
    engine = YDrop(model, buckets=buckets_of(0.1, 0.6, 0.3), num_samples=64, elasticity=0.5)
    engine.step(x, y)
    for name, all_scores in layer_conductance(model, x, y, n_steps=5).items():
        layer, scores = engine.layers[name], all_scores.mean(0)
        assert torch.allclose(engine.scores[name], scores, atol=1e-6)
        strong = set(scores.argsort(descending=True)[: math.ceil(0.3 * len(scores))].tolist())
        expected = torch.tensor([0.6 if unit in strong else 0.1 for unit in range(len(scores))])
        assert torch.allclose(layer.drop_prob, expected)
        assert torch.allclose(layer.mean_drop_prob, (0.35 + expected) / 2)
        assert layer.active


@pytest.mark.parametrize("batch_size", [1, 2, 5, 6, 7, 31, 32, 64, 100])
def test_phase_1_has_no_more_rows_than_the_batch(batch_size: int) -> None:
    counting = Counting(perceptron())
    engine = YDrop(counting)
    x, y = batch_of(batch_size)
    engine.step(x, y)
    counting.forget()
    engine.step(x, y)
    samples = max(1, (batch_size - 1) // 5)
    assert counting.rows == [5 * samples + 1]
    assert counting.rows[0] <= max(batch_size, 6)
    assert counting.backwards == 1


@pytest.mark.parametrize(("batch_size", "samples"), [(64, 12), (32, 6), (1, 1), (5, 1)])
def test_the_paper_numbers_of_samples_are_the_default(batch_size: int, samples: int) -> None:
    measure = Watching()
    YDrop(perceptron(), measure=measure).step(*batch_of(batch_size))
    assert len(measure.seen[-1].inputs[0]) == samples


@pytest.mark.parametrize(("num_samples", "expected"), [(1, 1), (20, 20), (64, 64), (100, 64)])
def test_the_number_of_samples_can_be_set(num_samples: int, expected: int) -> None:
    measure = Watching()
    YDrop(perceptron(), measure=measure, num_samples=num_samples).step(*batch_of(64))
    assert len(measure.seen[-1].inputs[0]) == expected


def test_samples_are_drawn_anew_without_repeats_and_with_their_targets() -> None:
    x = torch.arange(64.0).unsqueeze(1).expand(64, 12)
    y = torch.arange(64) % 5
    measure = Watching()
    engine = YDrop(perceptron(), measure=measure)
    for _ in range(200):
        engine.step(x, y)
    drawn = [seen.inputs[0][:, 0].long() for seen in measure.seen[1:]]
    for rows, seen in zip(drawn, measure.seen[1:], strict=True):
        assert len(set(rows.tolist())) == 12
        assert seen.target is not None
        assert torch.equal(seen.target, rows % 5)
    # Each sample is drawn with chance 12 / 64; missing or taking one in all of 200 draws has chance 1e-18.
    assert set(torch.cat(drawn).tolist()) == set(range(64))
    assert max(torch.cat(drawn).bincount().tolist()) < 200


def test_baselines_of_each_sample_are_drawn_with_it() -> None:
    x, y = batch_of()
    measure = Watching()
    YDrop(perceptron(), measure=measure, baseline=x + 1).step(x, y)
    (start,), (drawn,) = measure.seen[-1].starts, measure.seen[-1].inputs
    assert torch.allclose(start, drawn + 1)


def test_settings_reach_the_measure() -> None:
    measure = Watching()
    YDrop(perceptron(), measure=measure, n_steps=3, quadrature="left", baseline=0.25).step(*batch_of())
    seen = measure.seen[-1]
    assert (seen.n_steps, seen.quadrature) == (3, "left")
    assert (seen.starts[0] == 0.25).all()


def test_rates_are_drawn_for_each_layer_and_step() -> None:
    engine = YDrop(perceptron(), measure=Watching())
    low, high = [], []
    for _ in range(400):
        engine.step(*batch_of(6))
        for layer in engine.layers.values():
            rates = layer.drop_prob.unique().tolist()
            assert len(rates) == 2
            low.append(rates[0])
            high.append(rates[1])
    assert len(set(low)) > 780  # of 800: two layers with a rate each, all of them different but for coincidence
    # The mean of |N(0, 0.05)| is 0.05 sqrt(2 / pi) = 0.0399 and its deviation 0.0301: six standard errors.
    for rates, mean in ((low, 0.1), (high, 0.6)):
        assert abs(sum(rates) / len(rates) - mean - 0.0399) < 6 * 0.0301 / math.sqrt(800)
        assert min(rates) >= mean - 1e-6


def test_the_running_mean_follows_the_rates() -> None:
    engine = YDrop(perceptron(), elasticity=0.1, initial_drop_prob=0.2)
    history = []
    for _ in range(30):
        engine.step(*batch_of())
        history.append(engine.layers["1"].drop_prob.tolist())
    for unit in range(16):
        expected = running_mean([step[unit] for step in history], 0.2, 0.1)
        assert engine.layers["1"].mean_drop_prob[unit].item() == pytest.approx(expected, abs=1e-5)


def test_equal_rates_without_spread_are_the_vanilla_rate() -> None:
    engine = YDrop(perceptron(), buckets=buckets_of(0.5, 0.5), initial_drop_prob=0.5, elasticity=0.1)
    for _ in range(3):
        engine.step(*batch_of())
    for layer in engine.layers.values():
        assert (layer.drop_prob == 0.5).all()
        assert (layer.mean_drop_prob == 0.5).all()


def test_deactivated_layers_are_vanilla_and_keep_their_mean() -> None:
    engine = YDrop(perceptron(), elasticity=0.5)
    engine.step(*batch_of())
    mean = engine.layers["1"].mean_drop_prob.clone()
    engine.deactivate()
    x = torch.randn(50, 16)
    torch.manual_seed(1)
    expected = nn.Dropout(0.5)(x)
    torch.manual_seed(1)
    assert torch.equal(engine.layers["1"](x), expected)
    engine.step(*batch_of())
    assert engine.layers["1"].active
    assert torch.allclose(engine.layers["1"].mean_drop_prob, (mean + engine.layers["1"].drop_prob) / 2)


def test_phase_1_runs_in_every_so_manyth_step() -> None:
    measure = Watching()
    engine = YDrop(perceptron(), measure=measure, every_n_batches=3)
    seen: list[int] = []
    probabilities: list[Tensor] = []
    for _ in range(8):
        assert engine.is_due is (len(seen) % 3 == 0)
        engine.step(*batch_of())
        seen.append(len(measure.seen))
        probabilities.append(engine.layers["1"].drop_prob.clone())
    assert seen == [2, 2, 2, 3, 3, 3, 4, 4]  # the first step rehearses too
    for number, values in enumerate(probabilities):
        assert torch.equal(values, probabilities[number // 3 * 3])
    assert not torch.equal(probabilities[0], probabilities[3])


def test_a_rare_phase_1_moves_the_running_mean_as_far_as_frequent_ones() -> None:
    rates = buckets_of(0.1, 0.6)
    engine = YDrop(perceptron(), elasticity=0.1, every_n_batches=4, buckets=rates, initial_drop_prob=0.2)
    engine.step(*batch_of())
    layer = engine.layers["1"]
    for drop_prob, mean in zip(layer.drop_prob.tolist(), layer.mean_drop_prob.tolist(), strict=True):
        assert mean == pytest.approx(running_mean([drop_prob] * 4, 0.2, 0.1), abs=1e-6)


def test_a_share_moves_on_where_phase_1_is_not_due() -> None:
    engine = YDrop(perceptron(), every_n_batches=4, buckets=buckets_of(0.1, 0.6, 1.0))
    engine.step(*batch_of(), progress=0.0)
    engine.step(*batch_of(), progress=0.5)
    x = torch.ones(20_000, 16)
    assert ((engine.layers["1"](x) == 0).float().mean() - 0.55).abs() < 0.01  # from 0.5 halfway to 0.6
    engine.skip()
    assert ((engine.layers["1"](x) == 0).float().mean() - 0.6).abs() < 0.01


def test_deactivated_layers_go_on_with_their_probabilities_where_phase_1_is_not_due() -> None:
    measure = Watching()
    engine = YDrop(perceptron(), measure=measure, every_n_batches=10, buckets=buckets_of(0.0, 0.6, 1.0), elasticity=1.0)
    engine.step(*batch_of())
    engine.deactivate()
    engine.step(*batch_of())
    assert engine.active
    assert len(measure.seen) == 2  # the first step, and its rehearsal
    x = torch.ones(20_000, 16)
    assert ((engine.layers["1"](x) == 0).float().mean() - 0.6).abs() < 0.02  # for 320,000 draws, far beyond chance


def test_reset_it_is_as_it_was_made() -> None:
    model, batch = perceptron(), batch_of()
    engine = YDrop(model, elasticity=0.5)
    ends = []
    for _ in range(2):
        for _ in range(3):
            engine.step(*batch)
        ends.append(engine.state_dict())
        engine.reset()
        assert not engine.active
        assert engine.findings is None
        assert_same(engine.state_dict(), YDrop(copy.deepcopy(model)).state_dict())
    assert_same(*ends)


def test_samples_whose_labels_do_not_count_change_no_probability() -> None:
    engine = YDrop(perceptron(), elasticity=0.5)
    x, y = batch_of()
    engine.step(x, y)
    before = engine.state_dict()
    engine.step(x, torch.full_like(y, -100))
    after = engine.state_dict()
    assert_same(after["layers"], before["layers"])
    assert after["nonfinite"] == 0
    assert not after["scores"]["1"].any()
    engine.step(x, y)
    assert not torch.equal(engine.layers["1"].drop_prob, before["layers"]["1"]["drop_prob"])


def test_a_batch_without_samples_is_passed_over() -> None:
    engine = YDrop(perceptron(), elasticity=0.5)
    x, y = batch_of()
    engine.step(x[:0], y[:0])
    assert engine.findings is None
    assert not engine.active
    engine.step(x, y)
    assert engine.findings is not None
    before = engine.state_dict()
    engine.deactivate()
    engine.step((x[:0],), y[:0])
    assert engine.active
    assert_same(engine.state_dict(), before | {"steps_taken": 3})


def test_layers_that_run_by_chance_are_driven() -> None:
    class Branching(nn.Module):
        calls: ClassVar[list[int]] = []  # not of the instance, which would be given back as it was

        def __init__(self) -> None:
            super().__init__()
            self.body, self.more = perceptron(), ConductanceDropout()

        def forward(self, x: Tensor) -> Tensor:
            self.calls.append(len(x))  # not in the dry run's first pass, but in its second
            logits: Tensor = self.body(self.more(x) if len(self.calls) > 1 else x)
            return logits

    engine = YDrop(Branching())
    engine.step(*batch_of())
    assert engine.layers["more"].active
    assert len(engine.scores["more"]) == 12


def test_layers_in_inference_mode_have_no_score() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.head = nn.Sequential(nn.Linear(12, 12), ConductanceDropout(), nn.ReLU()), perceptron()

        def forward(self, x: Tensor) -> Tensor:
            with torch.inference_mode():
                features = self.backbone(x)
            logits: Tensor = self.head(features.clone())
            return logits

    engine = YDrop(Frozen())
    with pytest.warns(NoEffectWarning, match=r"All units of 'backbone\.1' have the same score"):
        engine.step(*batch_of())
    assert not engine.scores["backbone.1"].any()
    assert engine.scores["head.1"].any()


@pytest.mark.parametrize("objective", [TargetLogit(), PredictedLogit()], ids=repr)
def test_in_the_callers_autocast_the_weights_still_train(objective: Objective) -> None:
    model, (x, y), cached = perceptron(), batch_of(), []
    model.register_forward_pre_hook(lambda *_: cached.append(torch.is_autocast_cache_enabled()))
    engine = YDrop(model, objective=objective)
    with torch.autocast("cpu", torch.bfloat16):
        engine.step(x, y)
        engine.step(x, y)
        assert not any(cached)  # what some releases of torch cache without gradients would serve what follows
        loss = nn.functional.cross_entropy(model(x), y)
    assert cached[-1]
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_where_another_device_is_the_default_chance_stays_on_the_cpu() -> None:
    model, batch = perceptron(), batch_of()
    seen, rates = [], []
    for default in ("cpu", "meta"):  # which stands for an accelerator
        measure = Watching()
        engine = YDrop(model, measure=measure, num_samples=5)
        engine.dry_run(*batch)
        with torch.device(default):
            engine._score(*batch)
            rates.append(draw_rates([HalfNormalRate(0.1, 0.1, 0.5)] * 3, torch.Generator().manual_seed(1)))
        seen.append([*measure.seen[-1].inputs])
    assert_same(*seen)
    assert_same(*rates)


@pytest.mark.parametrize("changed", [{"seed": 1}, {"n_steps": 4}, {"num_samples": 5}, {"baseline": 1.0}])
@pytest.mark.parametrize("quadrature", ["right"])
def test_every_setting_counts(changed: dict[str, Any], quadrature: Quadrature) -> None:
    x, y = batch_of()
    model = perceptron()
    scores = []
    for settings in ({}, {}, changed):
        engine = YDrop(model, quadrature=quadrature, **settings)
        engine.step(x, y)
        scores.append(engine.scores["1"])
    assert torch.equal(scores[0], scores[1])
    assert not torch.equal(scores[0], scores[2])


def train(engine: YDrop, model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x, y in batches:
        engine.step(x, y)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


@pytest.mark.parametrize("measure", [None, RandomImportance()], ids=repr)
def test_a_resumed_run_is_the_uninterrupted_one(measure: Measure | None) -> None:
    settings: dict[str, Any] = {"elasticity": 0.1, "seed": 3} | ({} if measure is None else {"measure": measure})
    batches = [batch_of() for _ in range(10)]
    model = perceptron()
    engine = YDrop(model, **settings)
    train(engine, model, batches[:5])
    file = io.BytesIO()
    torch.save([model.state_dict(), engine.state_dict(), torch.get_rng_state()], file)
    train(engine, model, batches[5:])

    file.seek(0)
    weights, state, random = torch.load(file, weights_only=True)
    resumed = perceptron()
    resumed.load_state_dict(weights)
    resumed_engine = YDrop(resumed, **settings)
    resumed_engine.load_state_dict(state)
    assert all(layer.active for layer in resumed_engine.layers.values())
    torch.set_rng_state(random)
    train(resumed_engine, resumed, batches[5:])

    for one, other in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)
    for name, layer in engine.layers.items():
        assert torch.equal(layer.drop_prob, resumed_engine.layers[name].drop_prob)
        assert torch.equal(layer.mean_drop_prob, resumed_engine.layers[name].mean_drop_prob)
        assert torch.equal(engine.scores[name], resumed_engine.scores[name])


def test_a_state_does_not_change_with_the_engine_that_gave_or_took_it() -> None:
    engine, other = YDrop(perceptron()), YDrop(perceptron())
    engine.step(*batch_of())
    state = engine.state_dict()
    kept = copy.deepcopy(state)
    engine.step(*batch_of())
    other.load_state_dict(state)
    other.step(*batch_of())
    assert_same_state(state, kept)


def assert_same_state(state: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    assert state["steps_taken"] == other["steps_taken"]
    for name, layer in state["layers"].items():
        for key in ("drop_prob", "mean_drop_prob", "active"):
            assert torch.equal(torch.as_tensor(layer[key]), torch.as_tensor(other["layers"][name][key]))


def test_a_state_of_another_network_is_refused() -> None:
    engine = YDrop(nn.Sequential(nn.Linear(12, 8), ConductanceDropout(), nn.Linear(8, 5)))
    with pytest.raises(ConfigurationError, match="state of the layers '1', '4' was given to a model with '1'"):
        engine.load_state_dict(YDrop(perceptron()).state_dict())


@pytest.mark.parametrize("state", [{}, {"layers": {}}, None])
def test_what_is_no_state_is_refused(state: Any) -> None:
    with pytest.raises(ConfigurationError, match="was given as a Y-Drop state"):
        YDrop(perceptron()).load_state_dict(state)


def test_compilation_does_not_show_in_the_state() -> None:
    compiled: Any = torch.compile(perceptron(), backend="eager")
    engine = YDrop(nn.Sequential(compiled))
    assert list(engine.state_dict()["layers"]) == ["0.1", "0.4"]


def test_a_layer_that_is_not_called_stays_vanilla_with_one_warning() -> None:
    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.spare = perceptron(), ConductanceDropout()

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.body(x)
            return logits

    engine = YDrop(Partly())
    with pytest.warns(NoEffectWarning, match="'spare'") as caught:
        engine.step(*batch_of())
    engine.step(*batch_of())
    assert len(caught) == 1
    assert engine.layers["body.1"].active
    assert not engine.layers["spare"].active


def test_units_of_a_convolution_are_its_channels() -> None:
    model, x, y = network_and_batch("convolutional", batch=64)
    engine = YDrop(model)
    engine.step(x, y)
    assert engine.layers["2"].drop_prob.shape == (4,)
    model(x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_scores_and_probabilities_are_float32_in_any_dtype(dtype: torch.dtype) -> None:
    model, x, y = network_and_batch("perceptron", dtype, batch=64)
    engine = YDrop(model)
    engine.step(x, y)
    layer = engine.layers["1"]
    assert {engine.scores["1"].dtype, layer.drop_prob.dtype, layer.mean_drop_prob.dtype} == {torch.float32}
    assert model(x).dtype == dtype


@pytest.mark.parametrize(
    ("inputs", "target", "message"),
    [
        (torch.randn(8, 12), torch.full((8,), 5), "classes from 5 to 5 for an output of 5 classes"),
        (torch.randn(8, 12), torch.tensor([0] * 7 + [9]), "classes from 0 to 9"),
        (torch.randn(8, 12), torch.zeros(7, dtype=torch.long), "for 8 samples"),
        (torch.zeros(8, 12, dtype=torch.long), None, "between whole numbers"),
    ],
)
def test_a_first_batch_that_does_not_fit_changes_no_layer(inputs: Tensor, target: Any, message: str) -> None:
    engine = YDrop(perceptron(), num_samples=1)
    with pytest.raises(ConfigurationError, match=message):
        engine.step(inputs, target)
    assert not any(layer.active for layer in engine.layers.values())


def test_a_model_that_works_on_batches_alone_is_rehearsed_on_the_batch() -> None:
    class Squeezing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = perceptron()

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.body(x).unsqueeze(2).squeeze()
            return logits

    YDrop(Squeezing()).step(*batch_of())


def test_positions_that_were_taken_for_units_are_told_when_their_number_changes() -> None:
    model = nn.Sequential(nn.Linear(4, 8), ConductanceDropout(unit_dim=1), nn.Tanh(), nn.AdaptiveAvgPool2d((1, 5)))
    engine = YDrop(nn.Sequential(model, nn.Flatten()))
    with pytest.warns(UserWarning, match=r"takes the 3 entries of dimension 1 for units.*unit_dim=-1"):
        engine.step(torch.randn(16, 3, 4), torch.randint(0, 5, (16,)))
    before = engine.layers["0.1"].drop_prob.clone()
    with pytest.raises(ConfigurationError, match=r"The layer '0.1' had 3 units in an earlier batch, and has 6 in this"):
        engine.step(torch.randn(16, 6, 4), torch.randint(0, 5, (16,)))
    assert torch.equal(engine.layers["0.1"].drop_prob, before)


def test_a_measure_with_scores_of_the_wrong_shape_is_told() -> None:
    class Wrong(Measure):
        def score(self, phase1: Request) -> dict[str, Tensor]:
            return {name: torch.zeros(3, 7) for name in phase1.layers}

    with pytest.raises(ConfigurationError, match=r"Wrong\(\) scored '1'.*'1' has 16 units"):
        YDrop(perceptron(), measure=Wrong()).step(*batch_of())


@pytest.mark.parametrize("elementwise", [False, True])
def test_units_behind_positions_are_driven(elementwise: bool) -> None:
    drop = ConductanceDropout(unit_dim=-1, elementwise=elementwise)
    model = nn.Sequential(nn.Linear(4, 8), drop, nn.Tanh(), nn.Flatten(), nn.Linear(24, 5))
    engine = YDrop(model)
    engine.step(torch.randn(64, 3, 4), torch.randint(0, 5, (64,)))
    assert engine.scores["1"].shape == drop.drop_prob.shape == (8,)
    alike = (model[:2](torch.randn(64, 3, 4)) == 0).float().std(1) == 0  # over the positions of a sample
    assert bool(alike.all()) is not elementwise


@pytest.mark.parametrize("quadrature", ["left", "trapezoid"])
def test_other_quadratures_have_a_start_for_each_sample(quadrature: Quadrature) -> None:
    counting = Counting(perceptron())
    YDrop(counting, quadrature=quadrature).step(*batch_of(64))
    # 10 samples with 5 steps and a start, in the dry run and in the step; before that its looks at all samples and at
    # half of them, and after it at one.
    assert counting.rows == [64, 32, 60, 6, 60]
    YDrop(counting, quadrature=quadrature, num_samples=12).step(*batch_of(64))
    assert counting.rows[-2:] == [36, 36]  # 72 rows, in two parts that the batch has rows for


def test_the_whole_batch_goes_in_parts_no_larger_than_the_batch() -> None:
    model, (x, y) = perceptron(), batch_of(64)
    counting = Counting(model)
    engine = YDrop(counting, num_samples="all")
    engine.step(x, y)
    # 64 samples in six parts, with 5 rows for each sample and one for the start.
    parts = [56, 56, 56, 56, 51, 51]
    # The dry run's look at all samples and at half of them, its phase 1, its look at one, and the step's phase 1.
    assert counting.rows == [64, 32, *parts, 6, *parts]
    for name, scores in layer_conductance(model, x, y, n_steps=5).items():
        assert torch.allclose(engine.scores[f"model.{name}"], scores.mean(0), atol=1e-6)


def test_a_new_engine_starts_anew() -> None:
    model = perceptron()
    YDrop(model, initial_drop_prob=0.1).step(*batch_of())
    YDrop(model, initial_drop_prob=0.6, elasticity=0.0).step(*batch_of())
    assert torch.equal(model[1].mean_drop_prob, torch.full((16,), 0.6))  # type: ignore[arg-type]


class Shaped(nn.Module):
    """Changes the shape of a model's output."""

    def __init__(self, change: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.body, self.change = perceptron(), change

    def forward(self, x: Tensor) -> Any:
        return self.change(self.body(x))


@pytest.mark.parametrize("change", [lambda y: y.repeat(2, 1), lambda y: y.mean(0, keepdim=True), lambda y: y[:-1]])
def test_outputs_without_a_row_for_each_sample_are_refused(change: Callable[[Tensor], Any]) -> None:
    x, y = batch_of()
    with pytest.raises(ConfigurationError, match="one row for each row of the inputs"):
        YDrop(Shaped(change)).step(x, y)
    with pytest.raises(ConfigurationError, match="one row for each row of the inputs"):
        layer_conductance(Shaped(change), x)


def test_layers_that_the_output_does_not_depend_on_are_named() -> None:
    class Aside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.aside = perceptron(), nn.Sequential(nn.Linear(12, 3), ConductanceDropout())

        def forward(self, x: Tensor) -> Tensor:
            self.aside(x)
            logits: Tensor = self.body(x)
            return logits

    with pytest.warns(NoEffectWarning, match=r"All units of 'aside\.1' have the same score"):
        YDrop(Aside()).step(*batch_of())


def test_batch_norm_without_statistics_is_named() -> None:
    model = nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8, track_running_stats=False), ConductanceDropout())
    with pytest.warns(UserWarning, match="'1' normalises by the batch at hand"):
        YDrop(model).step(torch.randn(8, 12))


def test_a_model_that_calls_no_layer_is_refused() -> None:
    model = Shaped(lambda y: y)
    model.body, model.spare = nn.Linear(12, 5), ConductanceDropout()  # type: ignore[assignment]
    with pytest.raises(ConfigurationError, match="scores none of 'spare'"):
        YDrop(model).step(*batch_of())


class Checkpointing(nn.Module):
    """Saves memory in the second half of itself, or in all."""

    def __init__(self, use_reentrant: bool, layers_inside: bool) -> None:
        super().__init__()
        body = list(perceptron())
        self.first = nn.Sequential(nn.Linear(12, 12), *([] if layers_inside else body[:-1]))
        self.second = nn.Sequential(*(body if layers_inside else body[-1:]))
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        from torch.utils.checkpoint import checkpoint

        logits: Tensor = checkpoint(self.second, self.first(x), use_reentrant=self.use_reentrant)
        return logits


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")  # torch's, where gradients are off
def test_reentrant_checkpointing_is_explained() -> None:
    with pytest.raises(ConfigurationError, match="use_reentrant=False"):
        YDrop(Checkpointing(True, layers_inside=False)).step(*batch_of())
    with pytest.warns(NoEffectWarning, match="use_reentrant=False"):
        YDrop(Checkpointing(True, layers_inside=True)).step(*batch_of())


@pytest.mark.parametrize("layers_inside", [False, True])
def test_other_checkpointing_changes_nothing(layers_inside: bool) -> None:
    model, (x, y) = Checkpointing(False, layers_inside), batch_of()
    with_checkpoints = layer_conductance(model, x, y)
    plain = layer_conductance(nn.Sequential(model.first, model.second), x, y)
    for one, other in zip(with_checkpoints.values(), plain.values(), strict=True):
        assert torch.allclose(one, other)


def test_what_is_carried_gives_each_sample_a_start_of_its_own() -> None:
    rows: list[int] = []

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = perceptron().double()

        def forward(self, x: Tensor, mask: Tensor, scale: float = 1.0) -> Tensor:
            rows.append(len(x))
            logits: Tensor = self.body(torch.where(mask, x, x.new_ones(()))) * scale
            return logits

    model, (x, y) = Masked(), batch_of()
    x, mask = x.double(), torch.rand(64, 12) < 0.5
    together = layer_conductance(model, (x, mask), y, n_steps=5)
    assert rows == [6 * 64]
    for j in range(3):
        alone = layer_conductance(model, {"x": x[[j]], "mask": mask[[j]]}, y[[j]], n_steps=5)
        for name in together:
            assert torch.allclose(together[name][[j]], alone[name])
    engine = YDrop(model)
    engine.step((x, mask, 2.0), y)
    assert rows[-1] == 6 * (64 // 6)
    engine = YDrop(model, baseline=[0.0])
    engine.step({"x": x, "mask": mask}, y)


def test_a_floating_input_may_stay_as_it_is() -> None:
    class Weighted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = perceptron()

        def forward(self, x: Tensor, weight: Tensor) -> Tensor:
            logits: Tensor = self.body(x) * weight
            return logits

    measure = Seeing()
    x, y = batch_of()
    weight = torch.rand(64, 1)
    YDrop(Weighted(), baseline=[0.0, None], measure=measure).step((x, weight), y)
    assert len(measure.seen[-1].inputs) == len(measure.seen[-1].carried) == 1


class Seeing(Measure):
    """Conductance that keeps what it is given."""

    def __init__(self) -> None:
        self.seen: list[Request] = []

    def score(self, phase1: Request) -> dict[str, Tensor]:
        self.seen.append(phase1)
        return Conductance().score(phase1)


def test_another_function_may_be_called_for_the_model() -> None:
    model, (x, y) = perceptron(), batch_of()
    by_call = YDrop(model, forward=lambda x: {"logits": model(2 * x)})
    by_call.step(x, y)
    expected = YDrop(model)
    expected.step(2 * x, y)
    assert torch.allclose(by_call.scores["1"], expected.scores["1"], atol=1e-6)


def test_the_prediction_and_the_sum_are_objectives() -> None:
    model, (x, y) = perceptron(), batch_of()
    predicted = model.eval()(x).argmax(1)
    model.train()
    scores = {}
    for name, objective, target in (
        ("predicted", PredictedLogit(), y),
        ("as target", TargetLogit(), predicted),
        ("sum", OutputSum(), y),
        ("no target", TargetLogit(), None),
        ("loss", NegativeLoss(nn.CrossEntropyLoss(reduction="none")), y),
    ):
        engine = YDrop(model, objective=objective, num_samples=64)
        engine.step(x, target)
        scores[name] = engine.scores["1"]
    assert torch.equal(scores["predicted"], scores["as target"])
    assert torch.equal(scores["sum"], scores["no target"])
    assert not torch.allclose(scores["predicted"], scores["sum"])
    assert not torch.allclose(scores["loss"], scores["as target"])


def test_a_loss_counts_as_the_paths_say() -> None:
    model, (x, y) = perceptron().double(), batch_of(8)
    x = x.double()
    loss = nn.CrossEntropyLoss(reduction="none")
    objective = NegativeLoss(loss)
    scores = layer_conductance(model, x, y, layers="0", objective=objective, quadrature="trapezoid", n_steps=800)
    model.eval()
    change = loss(model(torch.zeros_like(x)), y) - loss(model(x), y)
    assert torch.allclose(scores["0"].sum(1), change, atol=1e-3)  # the whole fall of the loss flows through the layer


class Unread(TorchDispatchMode):
    """Lets nobody look at a value: on a GPU, looking is waiting."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func._schema.name not in ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal"), func
        return func(*args, **(kwargs or {}))


def operators_of_a_step(depth: int) -> int:
    hidden = [module for _ in range(depth) for module in (nn.Linear(12, 12), ConductanceDropout(), nn.ReLU())]
    engine = YDrop(nn.Sequential(*hidden, nn.Linear(12, 5)))
    engine.step(*batch_of())
    x, y = batch_of()
    with Operators() as operators:
        engine.step(x, y)
    return len(operators.names)


def test_a_step_starts_few_operators() -> None:
    # A forward and a backward pass by themselves are 24 for two layers, and 8 for each further one.
    two = operators_of_a_step(2)
    assert two <= 71
    assert operators_of_a_step(4) - two <= 2 * 8


@pytest.mark.parametrize(
    "objective", [TargetLogit(), PredictedLogit(), OutputSum(), NegativeLoss(nn.CrossEntropyLoss(reduction="none"))]
)
@pytest.mark.parametrize("quadrature", ["right", "left"])
@pytest.mark.parametrize("bad", [False, True])
def test_a_step_looks_at_no_value(objective: Objective, quadrature: Quadrature, bad: bool) -> None:
    engine = YDrop(perceptron(), objective=objective, quadrature=quadrature)
    engine.step(*batch_of())
    x, y = batch_of()
    x = x * float("inf") if bad else x
    with Unread():
        engine.step(x, y, progress=0.5)
        engine.step(x, y)
    assert engine.nonfinite.item() == (4 if bad else 0)
    with pytest.raises(AssertionError), Unread():
        bool(x.sum() > 0)  # it would have been seen


def test_each_layer_drops_around_its_own_rate() -> None:
    """A layer of p=0.1 stays near 0.1, where the paper's rates would drop 39% of its units."""
    rates = (0.1, 0.5, 0.8, 0.0)
    layers = [layer for p in rates for layer in (nn.Linear(10, 10), ConductanceDropout(p), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Linear(10, 3))
    ydrop = YDrop(model, elasticity=1.0)
    for _ in range(20):
        ydrop.step(torch.randn(16, 10), torch.randint(0, 3, (16,)))
    for p, layer in zip(rates, ydrop.layers.values(), strict=True):
        buckets = Buckets.around(p)
        drawn = layer.drop_prob.sort().values
        assert bool((drawn[:5] >= buckets.low.mean - 1e-6).all())
        assert bool((drawn[:5] <= buckets.low.max + 1e-6).all())
        assert bool((drawn[5:] >= buckets.high.mean - 1e-6).all())
        assert bool((drawn[5:] <= buckets.high.max + 1e-6).all())
    first = YDrop(model, elasticity=0.0)
    first.step(torch.randn(16, 10), torch.randint(0, 3, (16,)))
    starts = [layer.mean_drop_prob[0].item() for layer in first.layers.values()]
    assert starts == pytest.approx([0.07, 0.35, 1 - 0.65 * 0.4, 0.0])


def test_layers_that_drop_nothing_are_warned_of() -> None:
    model = nn.Sequential(nn.Linear(10, 10), ConductanceDropout(0.0), nn.ReLU(), nn.Linear(10, 3))
    batch = torch.randn(16, 10), torch.randint(0, 3, (16,))
    with pytest.warns(NoEffectWarning) as caught:
        YDrop(model).step(*batch)
    assert str(caught[0].message) == (
        "Y-Drop drops nothing: '1' have p=0, which their rates follow. "
        "Raise p, or pass buckets=Buckets() for the paper's rates whatever p is."
    )
    YDrop(model, buckets=Buckets()).step(*batch)
    assert model[1].drop_prob.max() >= 0.6  # type: ignore[operator]
