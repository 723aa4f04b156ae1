import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from lightning_ydrop import ConductanceDropout, ConfigurationError, convert_dropout
from lightning_ydrop.layers.conductance_dropout import update_layers
from tests.counting import Operators
from tests.oracles import running_mean


def driven(drop_prob: torch.Tensor, **kwargs: float) -> ConductanceDropout:
    layer = ConductanceDropout()
    layer.update(drop_prob, elasticity=kwargs.get("elasticity", 1.0), initial_drop_prob=kwargs.get("initial", 0.35))
    return layer


def test_it_starts_as_torchs_dropout() -> None:
    layer, x = ConductanceDropout(0.4), torch.randn(30, 20)
    assert layer.drop_prob.shape == layer.mean_drop_prob.shape == (0,)
    assert not layer.active
    torch.manual_seed(5)
    expected = nn.Dropout(0.4)(x)
    torch.manual_seed(5)
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("active", [False, True])
def test_evaluation_returns_the_very_input(active: bool) -> None:
    layer = driven(torch.full((20,), 0.5)) if active else ConductanceDropout()
    x = torch.randn(30, 20)
    assert layer.eval()(x) is x


def test_driven_it_drops_by_drop_prob_and_rescales_by_the_mean() -> None:
    layer = driven(torch.tensor([0.0, 0.5]), elasticity=0.0, initial=0.35)
    y = layer(torch.ones(1000, 2))
    assert layer.active
    assert torch.allclose(y[:, 0], torch.full((1000,), 1 / 0.65))
    assert 300 < (y[:, 1] == 0).sum() < 700


@pytest.mark.parametrize("elasticity", [0.0, 1e-5, 1e-3, 0.1, 0.7, 1.0])
def test_running_mean_is_that_of_equation_6(elasticity: float) -> None:
    steps = 2000
    rates = torch.rand(steps, 3, dtype=torch.float32) * 0.9
    layer = ConductanceDropout()
    for rate in rates:
        layer.update(rate, elasticity=elasticity, initial_drop_prob=0.35)
    expected = [running_mean(rates[:, unit].tolist(), 0.35, elasticity) for unit in range(3)]
    # Each step rounds a number below 1 a few times in float32, and forgets the share `elasticity` of older errors.
    bound = 4 * 2**-24 * min(steps, 1 / elasticity if elasticity else 1)
    assert (layer.mean_drop_prob.double() - torch.tensor(expected, dtype=torch.float64)).abs().max() <= bound


def test_without_elasticity_the_mean_stays_where_it_started() -> None:
    layer = ConductanceDropout()
    for _ in range(100):
        layer.update(torch.rand(8), elasticity=0.0, initial_drop_prob=0.35)
    assert torch.equal(layer.mean_drop_prob, torch.full((8,), 0.35))


def test_updates_happen_in_place() -> None:
    layer = driven(torch.rand(8))
    before = (layer.drop_prob.data_ptr(), layer.mean_drop_prob.data_ptr())
    layer.update(torch.rand(8), elasticity=0.5, initial_drop_prob=0.35)
    assert (layer.drop_prob.data_ptr(), layer.mean_drop_prob.data_ptr()) == before


def test_an_update_does_not_keep_the_callers_tensor() -> None:
    drop_prob = torch.full((4,), 0.5)
    layer = driven(drop_prob)
    drop_prob.zero_()
    assert torch.equal(layer.drop_prob, torch.full((4,), 0.5))


def test_state_dict_is_that_of_nn_dropout() -> None:
    plain, ours = (
        nn.Sequential(nn.Linear(4, 8), dropout, nn.Linear(8, 2)) for dropout in (nn.Dropout(), driven(torch.rand(8)))
    )
    assert list(ours.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(plain.state_dict(), strict=True)
    assert not list(ours[1].parameters())
    assert not list(ours[1].buffers())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_state_stays_float32_in_any_model_dtype(dtype: torch.dtype) -> None:
    layer = driven(torch.rand(8)).to(dtype)
    assert layer.drop_prob.dtype == layer.mean_drop_prob.dtype == torch.float32
    assert layer(torch.randn(3, 8, dtype=dtype)).dtype == dtype


def test_state_follows_the_model_to_its_device() -> None:
    layer = nn.Sequential(driven(torch.rand(8))).to("meta")[0]
    assert isinstance(layer, ConductanceDropout)
    assert layer.drop_prob.device.type == layer.mean_drop_prob.device.type == "meta"


def test_it_survives_copying_and_pickling() -> None:
    layer = driven(torch.rand(8))
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for twin in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert torch.equal(twin.drop_prob, layer.drop_prob)
        assert twin.drop_prob is not layer.drop_prob
        assert twin.active


def test_repr_shows_the_arguments() -> None:
    assert repr(ConductanceDropout(0.2, -1, True)) == "ConductanceDropout(p=0.2, unit_dim=-1, elementwise=True)"


def test_a_change_of_width_is_refused() -> None:
    layer = driven(torch.rand(8))
    with pytest.raises(ConfigurationError, match="8 units was given probabilities for 9"):
        layer.update(torch.rand(9), elasticity=0.5, initial_drop_prob=0.35)


def test_compiled_it_stays_one_graph_while_probabilities_change() -> None:
    layer = driven(torch.rand(8))
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: object) -> object:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(layer, backend=count, fullgraph=True)
    for _ in range(4):
        layer.update(torch.rand(8), elasticity=0.5, initial_drop_prob=0.35)
        compiled(torch.randn(5, 8))
    assert len(graphs) == 1


SHAPES: dict[str, tuple[nn.Module, ConductanceDropout, tuple[int, ...]]] = {
    "features": (nn.Dropout(0.4), ConductanceDropout(0.4), (6, 8)),
    "positions and features": (nn.Dropout(0.4), ConductanceDropout(0.4, -1, elementwise=True), (6, 5, 8)),
    "elements of images": (nn.Dropout(0.4), ConductanceDropout(0.4, 1, elementwise=True), (6, 8, 3, 3)),
    "channels of signals": (nn.Dropout1d(0.4), ConductanceDropout(0.4), (6, 8, 7)),
    "channels of images": (nn.Dropout2d(0.4), ConductanceDropout(0.4), (6, 8, 3, 3)),
    "channels of volumes": (nn.Dropout3d(0.4), ConductanceDropout(0.4), (6, 8, 2, 2, 2)),
}


@pytest.mark.parametrize("kind", list(SHAPES))
def test_undriven_it_is_torchs_dropout_of_the_same_granularity(kind: str) -> None:
    torchs, ours, shape = SHAPES[kind]
    x = torch.randn(shape)
    torch.manual_seed(5)
    expected = torchs(x)
    torch.manual_seed(5)
    assert torch.equal(ours(x), expected)


def test_undriven_features_behind_positions_are_dropped_as_channels_are() -> None:
    x = torch.randn(6, 5, 8)
    torch.manual_seed(5)
    expected = nn.Dropout1d(0.4)(x.transpose(1, 2)).transpose(1, 2)
    torch.manual_seed(5)
    assert torch.equal(ConductanceDropout(0.4, -1)(x), expected)


@pytest.mark.parametrize(("unit_dim", "shape"), [(1, (6, 4, 5, 3)), (-1, (6, 5, 3, 4)), (2, (6, 5, 4)), (1, (6, 4))])
@pytest.mark.parametrize("elementwise", [False, True])
def test_driven_units_lie_where_they_are_told_to(unit_dim: int, shape: tuple[int, ...], elementwise: bool) -> None:
    layer = ConductanceDropout(0.5, unit_dim, elementwise)
    rates = torch.tensor([0.0, 0.3, 0.6, 0.9])
    layer.update(rates, elasticity=1.0, initial_drop_prob=0.35)
    kept = torch.stack([layer(torch.ones(shape)).movedim(unit_dim, 1) != 0 for _ in range(500)])  # (500, B, U, *)
    # Without `elementwise` all elements of a sample's unit share one draw: 3000 draws, five standard deviations.
    shares = 1 - kept.float().flatten(3).mean((0, 1, 3)) if kept.ndim > 3 else 1 - kept.float().mean((0, 1))
    assert (shares - rates).abs().max() < 0.05
    if kept.ndim > 3:
        alike = kept.flatten(3).float().std(3) == 0
        assert bool(alike.all()) is not elementwise
    assert not torch.equal(kept[:, 0], kept[:, 1])  # two samples of a batch get masks of their own


@pytest.fixture(params=[torch.bfloat16, torch.float64], ids=str)
def _default_dtype(request: pytest.FixtureRequest) -> Iterator[None]:
    torch.set_default_dtype(request.param)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("_default_dtype")
def test_masks_do_not_depend_on_the_default_dtype() -> None:
    layer = driven(torch.full((4,), 0.501, dtype=torch.float32))
    torch.manual_seed(5)
    kept = layer(torch.ones(100_000, 4)) != 0
    torch.manual_seed(5)
    assert torch.equal(kept, torch.rand(100_000, 4, dtype=torch.float32) >= 0.501)


def test_a_model_can_be_built_without_memory_and_given_some() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 8), ConductanceDropout(), nn.Linear(8, 2))
    model.to_empty(device="cpu")
    layer = model[1]
    assert isinstance(layer, ConductanceDropout)
    layer.update(torch.rand(8), elasticity=0.5, initial_drop_prob=0.35)
    assert model(torch.ones(3, 4)).shape == (3, 2)


def test_a_share_lies_between_vanilla_dropout_and_the_probabilities() -> None:
    layer, rates = ConductanceDropout(0.5), torch.tensor([0.0, 0.8])
    layer.update(rates, elasticity=1.0, initial_drop_prob=0.35, progress=0.25)
    assert torch.equal(layer.drop_prob, rates)
    y = layer(torch.ones(20_000, 2))
    assert ((y == 0).float().mean(0) - torch.tensor([0.375, 0.575])).abs().max() < 0.02
    assert torch.allclose(y.max(0).values, 1 / (1 - torch.tensor([0.375, 0.575])))
    layer.activate()
    assert layer(torch.ones(100, 2))[:, 0].eq(1).all()


def test_probabilities_that_are_not_accepted_change_nothing() -> None:
    layer = driven(torch.rand(8), elasticity=0.5)
    before = (layer.drop_prob.clone(), layer.mean_drop_prob.clone())
    layer.update(torch.rand(8), elasticity=0.5, initial_drop_prob=0.35, accept=torch.tensor(False))
    assert torch.equal(layer.drop_prob, before[0])
    assert torch.equal(layer.mean_drop_prob, before[1])
    accepted = torch.rand(8)
    layer.update(accepted, elasticity=0.5, initial_drop_prob=0.35, accept=torch.tensor(True))
    assert torch.equal(layer.drop_prob, accepted)
    assert torch.allclose(layer.mean_drop_prob, (before[1] + accepted) / 2)


def test_a_first_update_that_is_not_accepted_leaves_the_initial_probability() -> None:
    layer = ConductanceDropout()
    layer.update(torch.rand(8), elasticity=0.5, initial_drop_prob=0.35, accept=torch.tensor(False))
    assert torch.equal(layer.drop_prob, torch.full((8,), 0.35))
    assert torch.equal(layer.mean_drop_prob, torch.full((8,), 0.35))


def test_updates_in_inference_mode_do_not_spoil_training() -> None:
    layer = ConductanceDropout()
    with torch.inference_mode():
        layer.update(torch.rand(8), elasticity=0.5, initial_drop_prob=0.35)
    layer(torch.randn(3, 8, requires_grad=True)).sum().backward()
    layer.update(torch.rand(8), elasticity=0.5, initial_drop_prob=0.35)


def test_it_can_be_reset_and_restored() -> None:
    layer, twin = driven(torch.rand(8)), ConductanceDropout()
    twin.restore(layer.drop_prob, layer.mean_drop_prob)
    assert torch.equal(twin.drop_prob, layer.drop_prob)
    assert torch.equal(twin.mean_drop_prob, layer.mean_drop_prob)
    assert not twin.active
    twin.reset()
    assert len(twin.drop_prob) == 0
    twin.update(torch.rand(3), elasticity=0.5, initial_drop_prob=0.35)  # of another width


@pytest.mark.parametrize("progress", [1.0, 0.25])
def test_layers_updated_together_are_updated_each_by_itself(progress: float) -> None:
    rates, starts = [0.3, 0.4, 0.5], [0.2, 0.35, 0.4]
    together, alone = [ConductanceDropout(p) for p in rates], [ConductanceDropout(p) for p in rates]
    for _ in range(3):
        drop_prob, accept = torch.rand(3, 8), torch.tensor([[True], [False], [True]])
        weights = torch.tensor([[[1.0]], [[0.3]]]) * accept
        update_layers(together, drop_prob, weights=weights, initial_drop_prob=starts, progress=progress)
        for layer, row, accepted, start in zip(alone, drop_prob, accept, starts, strict=True):
            layer.update(row, elasticity=0.3, initial_drop_prob=start, progress=progress, accept=accepted)
    for one, other in zip(together, alone, strict=True):
        assert torch.equal(one.drop_prob, other.drop_prob)
        assert torch.equal(one.mean_drop_prob, other.mean_drop_prob)
        x = torch.ones(50, 8)
        torch.manual_seed(1)
        expected = other(x)
        torch.manual_seed(1)
        assert torch.equal(one(x), expected)
        assert one.active
    assert len({layer.mean_drop_prob[0].item() for layer in together}) == 3


def moved_to_meta_and_back(layer: ConductanceDropout) -> ConductanceDropout:
    held = layer.drop_prob.clone(), layer.mean_drop_prob.clone()
    layer.to("meta").to_empty(device="cpu")
    layer.restore(*held)
    return layer


@pytest.mark.parametrize(
    "changed",
    [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer)), moved_to_meta_and_back],
    ids=["copied", "pickled", "moved"],
)
def test_layers_that_share_a_tensor_can_part(changed: Callable[[ConductanceDropout], ConductanceDropout]) -> None:
    layers, alone = ([ConductanceDropout(), ConductanceDropout()] for _ in range(2))
    weights = torch.tensor([[[1.0]], [[0.3]]])

    def update(chosen: list[int]) -> None:
        drop_prob = torch.rand(len(chosen), 8)
        starts = [0.35] * len(chosen)
        update_layers([layers[each] for each in chosen], drop_prob, weights=weights, initial_drop_prob=starts)
        for each, row in zip(chosen, drop_prob, strict=True):
            alone[each].update(row, elasticity=0.3, initial_drop_prob=0.35)

    update([0, 1])
    other = copy.deepcopy(layers[0])
    before = other.drop_prob.clone(), other.mean_drop_prob.clone()
    layers[0] = changed(layers[0])
    for chosen in ([0, 1], [1, 0], [1], [0, 1], [0], [0, 1], [0, 1]):
        update(chosen)
        for layer, expected in zip(layers, alone, strict=True):
            assert torch.equal(layer.drop_prob, expected.drop_prob)
            assert torch.equal(layer.mean_drop_prob, expected.mean_drop_prob)
    assert torch.equal(other.drop_prob, before[0])
    assert torch.equal(other.mean_drop_prob, before[1])


def test_layers_updated_together_stay_in_one_tensor() -> None:
    layers = [ConductanceDropout(), ConductanceDropout(), ConductanceDropout()]
    weights, starts = torch.tensor([[[1.0]], [[0.3]]]), [0.35] * 3
    update_layers(layers, torch.rand(3, 8), weights=weights, initial_drop_prob=starts)
    rates = torch.rand(3, 8)
    with Operators() as operators:
        update_layers(layers, rates, weights=weights, initial_drop_prob=starts)
    assert operators.names == ["lerp_", "_foreach_copy_"]
    assert len({layer.drop_prob.untyped_storage().data_ptr() for layer in layers}) == 1


def compiled_with(layer: nn.Module) -> tuple[Any, CompileCounter]:
    torch._dynamo.reset()
    counter = CompileCounter()
    return torch.compile(layer, backend=counter, fullgraph=True), counter


def shares(layer: Any, p_of_each_step: list[float], setting: Any) -> list[float]:
    found = []
    for p in p_of_each_step:
        setting.p = p
        found.append(float((layer(torch.ones(500, 64)) == 0).float().mean()))
    return found


RATES = [0.1, 0.4, 0.8, 0.0, 0.6]


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("compiles", [False, True])
def test_a_scheduled_rate_is_followed(compiles: bool, prepared: bool) -> None:
    layer = ConductanceDropout(0.3)
    if prepared:
        layer.prepare(64, torch.device("cpu"))
    called, counter = compiled_with(layer) if compiles else (layer, None)
    assert shares(called, RATES, layer) == pytest.approx(RATES, abs=0.02)  # over five standard deviations
    if counter is not None:
        drop = nn.Dropout(0.3)
        torchs, torchs_counter = compiled_with(drop)
        shares(torchs, RATES, drop)
        assert counter.frame_count <= (1 if prepared else torchs_counter.frame_count)


@pytest.mark.skipif(torch.__version__ < "2.8", reason="older releases lose what compiled code sets by a property")
@pytest.mark.parametrize("prepared", [False, True])
def test_a_compiled_forward_can_set_the_rate(prepared: bool) -> None:
    class Setting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop = ConductanceDropout(0.1)

        def forward(self, x: Tensor) -> Tensor:
            self.drop.p = 0.8
            y: Tensor = self.drop(x)
            return y

    model = Setting()
    if prepared:
        model.drop.prepare(64, torch.device("cpu"))
    compiled, _ = compiled_with(model)
    assert float((compiled(torch.ones(500, 64)) == 0).float().mean()) == pytest.approx(0.8, abs=0.02)
    assert model.drop.p == 0.8


@pytest.mark.parametrize("p", [-0.1, 1.0, 1, float("nan"), "half", None, True])
def test_a_rate_out_of_range_is_refused_whenever_it_is_set(p: Any) -> None:
    layer = ConductanceDropout(0.3)
    with pytest.raises(ConfigurationError, match=r"ConductanceDropout\(p="):
        layer.p = p
    assert layer.p == 0.3


def test_a_rate_set_while_active_serves_when_the_layer_returns_to_it() -> None:
    layer = driven(torch.zeros(64))
    layer.p = 0.8
    assert layer(torch.ones(500, 64)).ne(0).all()
    layer.deactivate()
    for called in (layer, compiled_with(layer)[0]):
        assert float((called(torch.ones(500, 64)) == 0).float().mean()) == pytest.approx(0.8, abs=0.02)
    layer.activate(0.5)
    assert float((layer(torch.ones(500, 64)) == 0).float().mean()) == pytest.approx(0.4, abs=0.02)


def test_a_rate_set_while_dropping_at_the_mean_serves_afterwards() -> None:
    layer = driven(torch.zeros(64))
    layer.deactivate()
    with layer.dropping_at_mean():
        layer.p = 0.8
        assert layer(torch.ones(500, 64)).ne(0).all()
    compiled, _ = compiled_with(layer)
    assert float((compiled(torch.ones(500, 64)) == 0).float().mean()) == pytest.approx(0.8, abs=0.02)


def test_copies_have_rates_of_their_own() -> None:
    layer = ConductanceDropout(0.2, -1)
    layer.prepare(8, torch.device("cpu"))
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        twin.p = 0.6
        assert (twin.p, layer.p) == (0.6, 0.2)
        assert repr(twin) == "ConductanceDropout(p=0.6, unit_dim=-1, elementwise=False)"
        assert twin._applied_drop_prob.unique().tolist() == pytest.approx([0.6])
        assert layer._applied_drop_prob.unique().tolist() == pytest.approx([0.2])


def test_a_rate_is_shown_as_torch_shows_it() -> None:
    assert repr(ConductanceDropout(0)).startswith("ConductanceDropout(p=0,")
    assert repr(ConductanceDropout(numpy.float64(0.25))).startswith("ConductanceDropout(p=0.25,")
    assert type(ConductanceDropout(numpy.float64(0.25)).p) is float


def replacing(drop: nn.Module) -> ConductanceDropout:
    model = nn.Sequential(drop)
    convert_dropout(model)
    assert isinstance(model[0], ConductanceDropout)
    return model[0]


# Every number of dimensions that torch accepts, some with a warning.
ACCEPTED = [
    *((nn.Dropout1d, shape) for shape in ((5, 8), (5, 8, 7))),
    *((nn.Dropout2d, shape) for shape in ((5, 8), (5, 8, 7), (5, 8, 3, 3), (5, 8, 2, 2, 2))),
    *((nn.Dropout3d, shape) for shape in ((5,), (5, 8), (5, 8, 7), (5, 8, 3, 3), (5, 8, 2, 2, 2), (5, 8, 2, 2, 2, 2))),
    *((nn.Dropout, shape) for shape in ((), (5,), (5, 8), (5, 8, 7), (5, 8, 3, 3))),
]
UNBATCHED = [(kind, shape) for kind, shape in ACCEPTED if (kind, len(shape)) in {(nn.Dropout1d, 2), (nn.Dropout3d, 4)}]


@pytest.mark.filterwarnings("ignore:dropout[23]d. Received a")
@pytest.mark.parametrize("compiles", [False, True])
@pytest.mark.parametrize(("kind", "shape"), ACCEPTED)
def test_a_layer_draws_as_the_one_that_it_replaced_on_every_shape(
    kind: type[nn.Module], shape: tuple[int, ...], compiles: bool
) -> None:
    torchs: Any = kind(0.4)
    ours: Any = replacing(torchs)
    if compiles:
        torch._dynamo.reset()
        torchs, ours = (torch.compile(layer, backend="eager", fullgraph=True) for layer in (torchs, ours))
    x = torch.randn(shape)
    for seed in range(5):
        torch.manual_seed(seed)
        expected = torchs(x)
        torch.manual_seed(seed)
        assert torch.equal(ours(x), expected)


@pytest.mark.filterwarnings("ignore:dropout2d. Received a 1-D input")
@pytest.mark.parametrize(("kind", "shape"), [(nn.Dropout1d, (5, 8, 2, 2)), (nn.Dropout1d, (5,)), (nn.Dropout2d, (5,))])
def test_a_layer_refuses_the_shapes_that_the_one_it_replaced_refuses(
    kind: type[nn.Module], shape: tuple[int, ...]
) -> None:
    for layer in (kind(), replacing(kind())):
        with pytest.raises(RuntimeError):
            layer(torch.randn(shape))


@pytest.mark.parametrize("compiles", [False, True])
@pytest.mark.parametrize(("kind", "shape"), UNBATCHED)
def test_a_driven_layer_drops_entries_of_dimension_0_where_torch_sees_no_batch(
    kind: type[nn.Module], shape: tuple[int, ...], compiles: bool
) -> None:
    layer, torchs, x = replacing(kind(0.4)), kind(0.4), torch.ones(shape)
    layer.update(torch.full((8,), 0.9), elasticity=1.0, initial_drop_prob=0.35)
    called = compiled_with(layer)[0] if compiles else layer
    assert layer.is_unbatched(x)
    torch.manual_seed(3)
    expected = torchs(x)
    torch.manual_seed(3)
    assert torch.equal(called(x), expected)
    with layer.dropping_at_mean():
        torch.manual_seed(3)
        assert torch.equal(layer(x), expected)
    batched = torch.ones(1000, 8, *shape[2:], *((3,) if len(shape) == 2 else (2,)))
    assert not layer.is_unbatched(batched)
    assert float((called(batched) == 0).float().mean()) == pytest.approx(0.9, abs=0.02)


def test_a_layer_that_replaced_nothing_knows_no_unbatched_inputs() -> None:
    for layer in (ConductanceDropout(), replacing(nn.Dropout()), replacing(nn.Dropout2d())):
        assert not any(layer.is_unbatched(torch.ones([2] * ndim)) for ndim in range(1, 6))


TIME_FIRST = [
    ((7, 50, 8), -1, 1),
    ((7, 50, 8), 2, -2),
    ((8, 50, 7), 0, 1),
    ((8, 7, 50), 0, -1),
    ((3, 8, 50, 4), 1, 2),
]


@pytest.mark.parametrize("active", [False, True])
@pytest.mark.parametrize(("shape", "unit_dim", "batch_dim"), TIME_FIRST)
def test_masks_are_drawn_for_each_sample_and_unit_wherever_the_samples_are(
    shape: tuple[int, ...], unit_dim: int, batch_dim: int, active: bool
) -> None:
    layer = ConductanceDropout(0.5, unit_dim, batch_dim=batch_dim)
    rates = torch.linspace(0.2, 0.8, 8)
    if active:
        layer.update(rates, elasticity=1.0, initial_drop_prob=0.35)
    y = torch.stack([layer(torch.ones(shape)).movedim((batch_dim, unit_dim), (0, 1)) for _ in range(40)])
    kept = y.ne(0).flatten(3)  # (40, B, U, *)
    assert torch.equal(kept.any(3), kept.all(3))
    expected = rates if active else torch.full((8,), 0.5)
    assert ((~kept).float().mean((0, 1, 3)) - expected).abs().max() < 0.06  # over five standard deviations of 2000
    assert torch.allclose(y.amax((0, 1, 3) if y.ndim == 4 else (0, 1, 3, 4)), 1 / (1 - expected))
    if not active:
        first = torch.randn(shape).movedim((batch_dim, unit_dim), (0, 1)).contiguous()
        torch.manual_seed(6)
        channels = nn.Dropout1d(0.5)(first) if first.ndim == 3 else nn.Dropout2d(0.5)(first)
        torch.manual_seed(6)
        assert torch.equal(
            layer(first.movedim((0, 1), (batch_dim, unit_dim))), channels.movedim((0, 1), (batch_dim, unit_dim))
        )


def test_with_samples_first_nothing_depends_on_how_that_is_said() -> None:
    x = torch.randn(6, 5, 8)
    drawn = []
    for batch_dim in (0, -3):
        layer = ConductanceDropout(0.4, -1, batch_dim=batch_dim)
        for _ in range(2):
            torch.manual_seed(5)
            drawn.append(layer(x))
            layer.update(torch.linspace(0, 0.9, 8), elasticity=1.0, initial_drop_prob=0.35)
    assert torch.equal(drawn[0], drawn[2])
    assert torch.equal(drawn[1], drawn[3])


def test_elements_are_drawn_wherever_the_samples_are() -> None:
    x = torch.randn(7, 6, 8)
    layer = ConductanceDropout(0.4, -1, True, batch_dim=1)
    torch.manual_seed(5)
    expected = nn.Dropout(0.4)(x)
    torch.manual_seed(5)
    assert torch.equal(layer(x), expected)


def test_repr_shows_where_samples_are_if_not_first() -> None:
    assert (
        repr(ConductanceDropout(0.2, -1, batch_dim=1))
        == "ConductanceDropout(p=0.2, unit_dim=-1, elementwise=False, batch_dim=1)"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"unit_dim": 1, "batch_dim": 1},
            "ConductanceDropout(unit_dim=1, batch_dim=1) was given. "
            "`unit_dim` and `batch_dim` are different dimensions. "
            "Pass, for example, unit_dim=-1, batch_dim=1 for (T, B, U).",
        ),
        (
            {"batch_dim": 0.5},
            "ConductanceDropout(batch_dim=0.5) was given. `batch_dim` is the dimension of the samples, a whole number. "
            "Pass 0 for (B, U), or 1 for (T, B, U).",
        ),
        ({"batch_dim": True, "unit_dim": 2}, "ConductanceDropout(batch_dim=True)"),
        ({"batch_dim": "time"}, "ConductanceDropout(batch_dim='time')"),
        ({"unit_dim": -1, "batch_dim": -1}, "ConductanceDropout(unit_dim=-1, batch_dim=-1)"),
        ({"unit_dim": 0, "batch_dim": 0}, "ConductanceDropout(unit_dim=0)"),
        ({"unit_dim": False, "batch_dim": 1}, "ConductanceDropout(unit_dim=False)"),
        ({"unit_dim": 0.0, "batch_dim": 1}, "ConductanceDropout(unit_dim=0.0)"),
    ],
)
def test_dimensions_that_cannot_be_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        ConductanceDropout(**arguments)
    assert str(caught.value).startswith(message)


def test_units_may_be_first_where_samples_are_not_and_dimensions_numpys() -> None:
    layer = ConductanceDropout(0.5, numpy.int64(0), batch_dim=numpy.int32(1))  # type: ignore[arg-type]
    assert [(type(dim), dim) for dim in (layer.unit_dim, layer.batch_dim)] == [(int, 0), (int, 1)]
