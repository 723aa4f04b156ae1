import warnings
from collections.abc import Iterable, Mapping
from types import MappingProxyType

import pytest
from torch import nn

from lightning_ydrop import ConductanceDropout, ConfigurationError, NoEffectWarning
from lightning_ydrop.importance.findings import Findings, check_scored, warn_of_layers_left, without_samples
from lightning_ydrop.importance.path import PathSettings
from lightning_ydrop.importance.subject import Plan
from tests.networks import perceptron

MODEL = perceptron()
LAYERS = {name: layer for name, layer in MODEL.named_modules() if isinstance(layer, ConductanceDropout)}


def findings(in_training: Iterable[str] = (), left: Mapping[str, str] = MappingProxyType({})) -> Findings:
    bare = without_samples(MODEL, MODEL, LAYERS, PathSettings("YDrop"))
    return Findings(bare.subject, bare.path, bare.plan, bare.device, left, frozenset(in_training))


def test_without_samples_nothing_is_decided() -> None:
    bare = findings()
    assert bare.plan == Plan()
    assert bare.subject.layers is LAYERS
    assert bare.subject.unit_dims == {"1": 1, "4": 1}
    assert bare.subject.observations is not None
    assert bare.device.type == "cpu"


@pytest.mark.parametrize(
    ("found", "num_units", "texts"),
    [
        (findings(), {"1": 16, "4": 10}, []),
        (findings(), {"1": 16}, ["no score for '4': the model's forward did not call it. Only layers that forward"]),
        (findings(), {}, ["no score for '1', '4': the model's forward did not call them."]),
        (findings({"1", "4"}), {}, ["no score for '1', '4': the model's forward calls them in training mode alone"]),
        (findings({"1", "4"}), {"1": 16}, ["no score for '4': the model's forward calls it in training mode alone"]),
        (
            findings({"1"}),
            {},
            ["no score for '1': the model's forward calls", "no score for '4': the model's forward did"],
        ),
        (findings(left={"4": "it is alone"}), {"1": 16}, ["does not drive '4': it is alone. It stays what it is."]),
    ],
)
def test_layers_that_are_left_are_told_once_each(found: Findings, num_units: dict[str, int], texts: list[str]) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_layers_left(found, LAYERS, num_units)
    assert len(caught) == len(texts)
    for warning, text in zip(caught, texts, strict=True):
        assert warning.category is NoEffectWarning
        assert text in str(warning.message)


def test_a_model_of_which_nothing_is_scored_is_refused() -> None:
    check_scored(MODEL, LAYERS, findings(), {"1": 16})
    model = nn.Sequential(MODEL)
    with pytest.raises(ConfigurationError, match=r"scores none of '1', '4'\. .*forward calls\. .*`ydrop_forward`"):
        check_scored(model, LAYERS, findings(), {})
    with pytest.raises(
        ConfigurationError, match=r"It calls '1' in training mode alone\. .*without `if self\.training`"
    ):
        check_scored(model, LAYERS, findings({"1"}), {})
