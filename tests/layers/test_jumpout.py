import copy
import pickle

import numpy
import pytest
import torch
from torch import nn

from lightning_ydrop import ConfigurationError, Jumpout
from lightning_ydrop.functional import jumpout


def test_it_is_its_function_in_training() -> None:
    x = torch.randn(6, 4, 3, 3).relu()
    layer = Jumpout(0.1, 0.2, 0.4, "channel", 0.5)
    torch.manual_seed(2)
    y = layer(x)
    torch.manual_seed(2)
    assert torch.equal(y, jumpout(x, 0.1, 0.2, 0.4, "channel", 0.5))
    assert not torch.equal(y, x)


def test_it_returns_its_very_input_in_evaluation() -> None:
    x = torch.randn(3, 4)
    assert Jumpout().eval()(x) is x


def test_it_has_no_state_and_shows_its_arguments() -> None:
    layer = Jumpout(0.1, 0.2, 0.3, "channel", 1.0)
    assert not layer.state_dict()
    assert not list(layer.parameters())
    assert repr(layer) == "Jumpout(p_min=0.1, sigma=0.2, p_max=0.3, granularity='channel', scale_exponent=1.0)"
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert repr(other) == repr(layer)


def test_a_cap_below_the_smallest_rate_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"Jumpout\(p_min=0\.4, p_max=0\.3\)"):
        Jumpout(0.4, 0.1, 0.3)


def test_a_network_with_it_is_one_graph_and_serves_every_precision() -> None:
    torch.compiler.reset()
    network = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), Jumpout(), nn.Linear(64, 64), nn.ReLU(), Jumpout(sigma=0.3))
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    x = torch.randn(32, 8)
    for training in (True, False):
        network.train(training)
        assert compiled(x).isfinite().all()
    network.train()
    with torch.autocast("cpu", torch.bfloat16):
        y = network(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in network.parameters())


def test_attributes_set_later_serve_and_are_checked() -> None:
    layer = Jumpout(0.0, 0.0, 0.0)
    layer.p_min = layer.p_max = 0.5
    assert (layer(torch.ones(50, 50)) == 0).any()
    layer.p_min = 0.9
    with pytest.raises(ConfigurationError, match=r"Jumpout\(p_min=0\.9, p_max=0\.5\)"):
        layer(torch.ones(2, 3))


def test_numpys_numbers_become_pythons() -> None:
    layer = Jumpout(numpy.float64(0.1), numpy.float64(0.2), numpy.float64(0.3), scale_exponent=numpy.float64(1))
    assert {type(value) for value in (layer.p_min, layer.sigma, layer.p_max, layer.scale_exponent)} == {float}
