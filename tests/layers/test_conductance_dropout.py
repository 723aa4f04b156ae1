import copy
import io

import pytest
import torch
from torch import nn

from lightning_ydrop import ConductanceDropout, ConfigurationError
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
