import pickle
import warnings
from typing import Any

import captum.attr
import pytest
import torch
from torch import Tensor, nn

from lightning_ydrop import (
    CaptumMeasure,
    Conductance,
    ConductanceDropout,
    ConfigurationError,
    Inverted,
    Measure,
    NoEffectWarning,
    OutputSum,
    RandomImportance,
    Request,
    Shuffled,
    YDrop,
    layer_conductance,
)
from lightning_ydrop.importance.arrangement import arrange
from lightning_ydrop.importance.path import PathSettings
from lightning_ydrop.importance.request import bare_request, completed
from lightning_ydrop.importance.subject import subject_of
from tests.networks import NETWORKS, network_and_batch, perceptron

CAPTUMS = [
    "InternalInfluence",
    "LayerActivation",
    "LayerConductance",
    "LayerDeepLift",
    "LayerDeepLiftShap",
    "LayerFeatureAblation",
    "LayerFeaturePermutation",
    "LayerGradCam",
    "LayerGradientShap",
    "LayerGradientXActivation",
    "LayerIntegratedGradients",
]
MEASURES: list[Measure] = [
    Conductance(),
    RandomImportance(),
    Inverted(Conductance()),
    Shuffled(Conductance()),
    *(CaptumMeasure(name) for name in CAPTUMS if hasattr(captum.attr, name)),  # some came after captum 0.7
]


def request_of(model: nn.Module, x: Tensor, y: Tensor | None, seed: int = 0, **kwargs: Any) -> Request:
    layers = {name: m for name, m in model.named_modules() if isinstance(m, ConductanceDropout)}
    path = PathSettings("YDrop", **kwargs)
    subject = subject_of(model, model, layers, {name: layer.unit_dim for name, layer in layers.items()}, path.objective)
    batch = arrange(model, subject.signature, x, y if path.objective.takes_target else None, baseline=path.baseline)
    return completed(bare_request(subject, batch, path, torch.Generator().manual_seed(seed)), batch, path)


def score(measure: Measure, phase1: Request) -> dict[str, Tensor]:
    with warnings.catch_warnings():
        # Captum announces the hooks that DeepLift sets.
        warnings.filterwarnings("ignore", message="Setting forward, backward hooks")
        return measure.score(phase1)


@pytest.mark.parametrize("measure", MEASURES, ids=repr)
@pytest.mark.parametrize("kind", list(NETWORKS))
def test_every_measure_scores_every_unit_and_gives_the_model_back(measure: Measure, kind: str) -> None:
    model, x, y = network_and_batch(kind)
    expected = {name: scores.shape[1] for name, scores in layer_conductance(model, x, y).items()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    scores = score(measure, request_of(model, x, y))
    assert {name: values.shape[1] for name, values in scores.items()} == expected
    assert all(values.isfinite().all() and values.std() > 0 for values in scores.values())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(random, torch.get_rng_state())


@pytest.mark.parametrize("measure", MEASURES, ids=repr)
def test_every_measure_survives_pickling_and_shows_itself(measure: Measure) -> None:
    assert repr(pickle.loads(pickle.dumps(measure))) == repr(measure)
    assert repr(measure).startswith(type(measure).__name__)


@pytest.mark.parametrize("setting", ["n_steps", "quadrature", "baseline", "objective", "target"])
def test_conductance_heeds_every_setting(setting: str) -> None:
    model, x, y = network_and_batch("perceptron")
    changed: dict[str, Any] = {"n_steps": 6, "quadrature": "left", "baseline": 1.0, "objective": OutputSum()}
    base = Conductance().score(request_of(model, x, y))
    if setting == "target":
        other = Conductance().score(request_of(model, x, (y + 1) % 5))
    else:
        other = Conductance().score(request_of(model, x, y, **{setting: changed[setting]}))
    assert not torch.allclose(base["1"], other["1"])


def test_conductance_is_layer_conductance() -> None:
    model, x, y = network_and_batch("convolutional")
    expected = layer_conductance(model, x, y, n_steps=5, quadrature="trapezoid")
    scores = Conductance().score(request_of(model, x, y, quadrature="trapezoid"))
    for name in expected:
        assert torch.equal(scores[name], expected[name])


def test_inverted_turns_the_ranking_round() -> None:
    model, x, y = network_and_batch("perceptron")
    base, inverted = (measure.score(request_of(model, x, y)) for measure in (Conductance(), Inverted(Conductance())))
    assert torch.equal(inverted["1"], -base["1"])


def test_shuffled_gives_each_score_to_the_same_wrong_unit_every_time() -> None:
    model, x, y = network_and_batch("perceptron")
    base, shuffled, other = (
        measure.score(request_of(model, x, y))["1"]
        for measure in (Conductance(), Shuffled(Conductance()), Shuffled(Conductance(), seed=1))
    )
    assert torch.equal(shuffled.sort(1).values, base.sort(1).values)
    order = (shuffled.unsqueeze(2) == base.unsqueeze(1)).all(0).int().argmax(1)  # of which unit each score is
    assert (order != torch.arange(len(order))).all()
    assert not torch.equal(shuffled, other)
    later = Conductance().score(request_of(model, x.flip(1), y))["1"]
    assert torch.equal(Shuffled(Conductance()).score(request_of(model, x.flip(1), y))["1"], later[:, order])


def test_random_importance_depends_on_the_generator_alone() -> None:
    model, x, y = network_and_batch("perceptron")
    first, again, other = (RandomImportance().score(request_of(model, x, y, seed)) for seed in (1, 1, 2))
    assert torch.equal(first["4"], again["4"])
    assert not torch.equal(first["4"], other["4"])


@pytest.mark.parametrize("kind", list(NETWORKS))
def test_captums_conductance_chooses_the_same_buckets_as_ours(kind: str) -> None:
    engines = {}
    for name, measure in (("ours", Conductance()), ("captums", CaptumMeasure("LayerConductance"))):
        model, x, y = network_and_batch(kind, torch.float64, batch=64)
        engines[name] = YDrop(model, quadrature="left", measure=measure, seed=4)
        for _ in range(5):
            engines[name].step(x, y)
    for ours, captums in zip(engines["ours"].layers.values(), engines["captums"].layers.values(), strict=True):
        assert torch.equal(ours.drop_prob, captums.drop_prob)
        assert len(ours.drop_prob.unique()) == 2


@pytest.mark.parametrize("activation", [nn.ReLU, nn.ELU, nn.SiLU])
@pytest.mark.parametrize("attribution", ["LayerConductance", "InternalInfluence", "LayerGradientXActivation"])
def test_captum_is_not_misled_by_in_place_activations(attribution: str, activation: type[nn.Module]) -> None:
    x, y = 3 * torch.randn(6, 12), torch.randint(0, 5, (6,))
    torch.manual_seed(3)
    copying, in_place = perceptron(activation), perceptron(lambda: activation(inplace=True))
    in_place.load_state_dict(copying.state_dict())
    measure = CaptumMeasure(attribution)
    expected, scores = (measure.score(request_of(model, x, y)) for model in (copying, in_place))
    for name in expected:
        assert torch.allclose(scores[name], expected[name], atol=1e-6)


@pytest.mark.parametrize("target", ["classes", "soft", "none"])
def test_captum_sees_the_same_objective(target: str) -> None:
    model, x, y = network_and_batch("perceptron", torch.float64)
    given = {"classes": y, "soft": torch.rand(6, 5, dtype=torch.float64), "none": None}[target]
    phase1 = request_of(model, x, given, baseline=1.0, quadrature="left")
    captums, ours = CaptumMeasure("LayerConductance").score(phase1), Conductance().score(phase1)
    assert torch.allclose(captums["1"], ours["1"], rtol=1e-6)


@pytest.mark.parametrize("measure", [CaptumMeasure(), RandomImportance(), Inverted(Conductance())], ids=repr)
def test_layers_that_are_not_called_have_no_score(measure: Measure) -> None:
    model = perceptron()
    model[1].spare = ConductanceDropout()  # in a layer that does not call it
    engine = YDrop(model, measure=measure)
    with pytest.warns(NoEffectWarning, match=r"no score for '1\.spare'"):
        engine.step(torch.randn(16, 12), torch.randint(0, 5, (16,)))
    assert engine.scores.keys() == {"1", "4"}


def test_captums_arguments_can_be_changed() -> None:
    model, x, y = network_and_batch("perceptron")
    base = CaptumMeasure("InternalInfluence").score(request_of(model, x, y))
    other = CaptumMeasure("InternalInfluence", {"n_steps": 50}).score(request_of(model, x, y))
    assert not torch.allclose(base["1"], other["1"])


@pytest.mark.parametrize("name", ["Nothing", "Saliency", "LayerAttribution", "layer_conductance", "LayerLRP"])
def test_captum_names_that_are_no_layer_attribution_are_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"CaptumMeasure\\(attribution='{name}'\\).*InternalInfluence"):
        CaptumMeasure(name)


def test_a_wrapped_thing_that_is_no_measure_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"Inverted\(measure='conductance'\)"):
        Inverted("conductance")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=r"Shuffled\(measure='conductance'\)"):
        Shuffled("conductance")  # type: ignore[arg-type]
