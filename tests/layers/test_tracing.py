"""Our layers in graphs: of torch.fx, torchvision and quantization, and of TorchScript."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from lightning_ydrop import (
    ConductanceDropout,
    ConvPattern,
    Jumpout,
    PatternDropout,
    TokenPattern,
    YDrop,
    convert_dropout,
    restore_dropout,
)

Make = Callable[[], nn.Module]
OURS: list[Make] = [
    ConductanceDropout,
    Jumpout,
    lambda: ConductanceDropout(0.5, -1),
    lambda: Jumpout(granularity="channel"),
]
X, Y = torch.randn(40, 12), torch.arange(40) % 5


def network(layer: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), layer, nn.Linear(16, 5))


def seeded(model: Callable[[Tensor], Any], x: Tensor = X) -> Any:
    torch.manual_seed(4)
    return model(x)


def calls(traced: fx.GraphModule) -> list[str]:
    return [str(node.target) for node in traced.graph.nodes if node.op == "call_module"]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("make", OURS)
def test_fx_traces_a_layer_as_one_call_in_any_mode(make: Make, training: bool) -> None:
    model = network(make()).train(training)
    traced = fx.symbolic_trace(model)
    assert calls(traced) == ["0", "1", "2", "3"]
    for mode in (True, False):
        model.train(mode)
        traced.train(mode)
        assert torch.equal(seeded(traced), seeded(model))
    traced.train()
    assert not torch.equal(traced(X), traced(X))
    traced(X).sum().backward()


def test_a_traced_model_can_be_driven_and_copied() -> None:
    traced = fx.symbolic_trace(network(ConductanceDropout()))
    engine = YDrop(traced)
    engine.step(X, Y)
    assert engine.scores["2"].shape == (16,)
    assert engine.layers["2"].active
    for twin in (copy.deepcopy(traced), pickle.loads(pickle.dumps(traced))):
        assert torch.equal(seeded(twin), seeded(traced))


def test_a_converted_model_can_be_traced_and_a_traced_model_converted() -> None:
    converted = network(nn.Dropout())
    convert_dropout(converted)
    traced = fx.symbolic_trace(network(nn.Dropout()))
    assert list(convert_dropout(traced).converted) == ["2"]
    assert calls(fx.symbolic_trace(converted)) == calls(traced)
    assert isinstance(traced.get_submodule("2"), ConductanceDropout)
    assert list(restore_dropout(traced).converted) == ["2"]


class Reused(nn.Module):
    """Calls a layer twice, once by the name of its argument."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"drop": layer})

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner["drop"](self.inner["drop"](x=x))
        return y


@pytest.mark.parametrize("make", OURS)
def test_every_call_of_a_layer_is_one_in_the_graph(make: Make) -> None:
    model = Reused(make())
    traced = fx.symbolic_trace(model)
    assert calls(traced) == ["inner.drop", "inner.drop"]
    assert torch.equal(seeded(traced), seeded(model))


class Doubled(ConductanceDropout):
    """Has a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class DoubledJumpout(Jumpout):
    """Another."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


@pytest.mark.parametrize("layer", [Doubled(), DoubledJumpout()], ids=lambda layer: type(layer).__name__)
def test_the_forward_of_a_subclass_is_applied_once(layer: nn.Module) -> None:
    model = network(layer).eval()
    traced = fx.symbolic_trace(model)
    assert torch.equal(traced(X), model(X))


NO_TRACED_DEVICE = pytest.mark.skipif(torch.__version__ < "2.8", reason="older releases draw on no traced device")


@pytest.mark.parametrize(
    "layer", [ConductanceDropout().eval(), Jumpout().eval(), pytest.param(Jumpout(), marks=NO_TRACED_DEVICE)]
)
def test_a_layer_traced_by_itself_does_not_call_itself(layer: nn.Module) -> None:
    assert torch.equal(seeded(fx.symbolic_trace(layer)), seeded(layer))


@pytest.mark.parametrize("make", OURS)
def test_torchvision_extracts_features(make: Make) -> None:
    model = network(make())
    assert get_graph_node_names(model)[0] == get_graph_node_names(network(nn.Dropout()))[0]
    extractor = create_feature_extractor(model, ["1", "2"])
    features = seeded(extractor.train())
    assert (features["2"] == 0).sum() > (features["1"] == 0).sum()
    features = extractor.eval()(X)
    assert torch.equal(features["2"], features["1"])


@pytest.mark.filterwarnings("ignore")  # torch's own: this quantization is deprecated
@pytest.mark.parametrize("make", OURS)
def test_quantization_prepares_a_model(make: Make) -> None:
    from torch.ao.quantization import get_default_qat_qconfig_mapping, quantize_fx

    model = network(make()).train()
    prepared: Any = quantize_fx.prepare_qat_fx(model, get_default_qat_qconfig_mapping(), (X,))
    assert "2" in calls(prepared)
    prepared(X).sum().backward()
    assert not torch.equal(prepared(X), prepared(X))


def converted(drop: nn.Module) -> nn.Module:
    model = nn.Sequential(drop)
    convert_dropout(model)
    return model[0]


@pytest.mark.parametrize("shape", [(40, 12), (40, 12, 3)])
@pytest.mark.parametrize(
    "make",
    [
        *OURS,
        lambda: ConductanceDropout(0),
        lambda: ConductanceDropout(0.5, 1, True),
        lambda: ConductanceDropout(0.5, -1, batch_dim=1),
        lambda: converted(nn.Dropout1d()),
    ],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_torchscript_drops_in_training_and_returns_its_input_in_evaluation(make: Make, shape: tuple[int, ...]) -> None:
    layer, x = make(), torch.randn(shape)
    model = nn.Sequential(nn.ReLU(), layer)
    file = io.BytesIO()
    scripted = torch.jit.script(model)
    torch.jit.save(scripted, file)
    file.seek(0)
    for twin in (scripted, torch.jit.load(file)):
        assert torch.equal(seeded(twin, x), seeded(model, x))
        assert torch.equal(twin.eval()(x), x.relu())


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_torchscript_takes_the_probabilities_of_a_driven_layer() -> None:
    layer = ConductanceDropout()
    layer.update(torch.linspace(0, 0.9, 12), elasticity=1.0, initial_drop_prob=0.35)
    scripted = torch.jit.script(nn.Sequential(layer))
    assert torch.equal(seeded(scripted), seeded(layer))


def patterned() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3),
        PatternDropout(ConvPattern(0.25, repeat=2, rotate=30)),
        nn.Flatten(2),
        PatternDropout(TokenPattern(2, 3, share_t=True, rate=0.5)),
    )


MAPS = torch.randn(20, 2, 10, 9)


@pytest.mark.parametrize("training", [True, False])
def test_fx_traces_dropout_of_a_pattern_as_one_call(training: bool) -> None:
    model = patterned().train(training)
    traced = fx.symbolic_trace(model)
    assert calls(traced) == ["0", "1", "2", "3"]
    for mode in (True, False):
        model.train(mode)
        traced.train(mode)
        assert torch.equal(seeded(traced, MAPS), seeded(model, MAPS))


def test_fx_passes_a_padding_mask_on() -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop = PatternDropout(TokenPattern(2, 2, rate=1.0))

        def forward(self, x: Tensor, padding_mask: Tensor) -> Tensor:
            return self.drop(x, padding_mask)

    model, padding_mask = Padded(), torch.arange(8).expand(5, 8) < 3
    traced = fx.symbolic_trace(model)
    assert calls(traced) == ["drop"]
    given = torch.randn(5, 8, 2), padding_mask
    assert torch.equal(seeded(lambda _: traced(*given)), seeded(lambda _: model(*given)))


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize(
    ("pattern", "shape"),
    [
        (ConvPattern(0.25, 0.2, 2, 22.5, 0.3, -0.3, rate=0.7), (6, 3, 9, 8)),
        (ConvPattern.stochastic_depth(0.5), (6, 3, 9, 8)),
        (ConvPattern(0), (6, 3, 9, 8)),
        (TokenPattern(2, 3, share_t=True, rate=0.6), (6, 9, 5)),
        (TokenPattern(2, 3, share_t=True, rate=0.6), (6, 3, 9, 9)),
        (TokenPattern.word_dropout(0.5), (6, 9, 5)),
    ],
)
def test_torchscript_drops_a_pattern(pattern: Any, shape: tuple[int, ...]) -> None:
    model, x, file = nn.Sequential(nn.Tanh(), PatternDropout(pattern)), torch.randn(shape), io.BytesIO()
    scripted = torch.jit.script(model)
    torch.jit.save(scripted, file)
    file.seek(0)
    for twin in (scripted, torch.jit.load(file)):
        assert torch.equal(seeded(twin, x), seeded(model, x))
        assert torch.equal(twin.eval()(x), x.tanh())
