import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lightning_ydrop import Buckets, ConductanceDropout, ConfigurationError, HalfNormalRate, YDrop, YDropCallback
from lightning_ydrop.errors import describe, listed
from lightning_ydrop.layers.kinds import dropout_like_modules
from tests.containers import DictConfig, ListConfig
from tests.networks import perceptron

RATE = {"mean": 0.1, "std": 0.05, "max": 0.5}


@pytest.mark.parametrize(
    ("make", "arguments", "shown"),
    [
        *((ConductanceDropout, {"p": p}, f"ConductanceDropout(p={p!r})") for p in (-0.1, 1.0, 1.5, float("nan"), True)),
        (ConductanceDropout, {"p": "half"}, "ConductanceDropout(p='half')"),
        (ConductanceDropout, {"unit_dim": 0}, "ConductanceDropout(unit_dim=0)"),
        (ConductanceDropout, {"unit_dim": 1.0}, "ConductanceDropout(unit_dim=1.0)"),
        *((HalfNormalRate, RATE | {"mean": mean}, f"HalfNormalRate(mean={mean})") for mean in (-0.1, 1.0)),
        (HalfNormalRate, RATE | {"max": 1.0}, "HalfNormalRate(max=1.0)"),
        (HalfNormalRate, RATE | {"max": 0.05}, "HalfNormalRate(mean=0.1, max=0.05)"),
        *((HalfNormalRate, RATE | {"std": std}, f"HalfNormalRate(std={std})") for std in (-1.0, float("inf"))),
        (Buckets, {"low": 0.1}, "Buckets(low=0.1)"),
        (Buckets, {"low": HalfNormalRate(0.7, 0.05, 0.8)}, "Buckets(low=HalfNormalRate(mean=0.7"),
        (Buckets, {"low": HalfNormalRate(0.1, 0.05, 0.95)}, "max=0.95"),
        *((Buckets, {"strong_fraction": share}, f"Buckets(strong_fraction={share})") for share in (-0.1, 1.1)),
    ],
)
def test_settings_out_of_range_are_refused_when_made(make: Any, arguments: dict[str, Any], shown: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        make(**arguments)
    assert shown in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        *(({"elasticity": value}, f"elasticity={value!r}") for value in (-1e-3, 1.1, "fast", None)),
        *(({"n_steps": value}, f"n_steps={value!r}") for value in (0, -1, 2.5, True)),
        *(({"num_samples": value}, f"num_samples={value!r}") for value in (0, -3, 1.5)),
        *(({"initial_drop_prob": value}, f"initial_drop_prob={value!r}") for value in (-0.1, 1.0)),
        ({"baseline": "black"}, "baseline='black'"),
        ({"quadrature": "middle"}, "quadrature='middle'"),
        ({"measure": "conductance"}, "measure='conductance'"),
        ({"buckets": (0.1, 0.6)}, "buckets=tuple(0.1, 0.6)"),
        *(({"seed": value}, f"seed={value!r}") for value in (-1, 0.5)),
    ],
)
@pytest.mark.parametrize("owner", ["YDrop", "YDropCallback"])
def test_engine_and_callback_refuse_the_same_settings(owner: str, arguments: dict[str, Any], shown: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        YDrop(perceptron(), **arguments) if owner == "YDrop" else YDropCallback(**arguments)
    assert str(caught.value).startswith(f"{owner}({shown}) was given.")


@pytest.mark.parametrize("value", [-1, 1.5, True])
def test_annealing_takes_whole_epochs(value: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"YDropCallback\(annealing_epochs="):
        YDropCallback(annealing_epochs=value)


@pytest.mark.parametrize("edge", [{"elasticity": 0}, {"elasticity": 1.0}, {"initial_drop_prob": 0.0}, {"n_steps": 1}])
def test_the_ends_of_the_ranges_are_allowed(edge: dict[str, Any]) -> None:
    YDrop(perceptron(), **edge).step(torch.randn(8, 12), torch.zeros(8, dtype=torch.long))


def test_a_message_is_three_sentences() -> None:
    with pytest.raises(ConfigurationError) as caught:
        YDropCallback(elasticity=1.5)
    assert str(caught.value) == (
        "YDropCallback(elasticity=1.5) was given. `elasticity` is a number in [0, 1]. "
        "Pass, for example, elasticity=0.01."
    )


def test_a_model_without_layers_is_shown_what_drops_in_it() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(), nn.Sequential(nn.AlphaDropout()), nn.Linear(8, 2))
    with pytest.raises(ConfigurationError) as caught:
        YDrop(model)
    assert str(caught.value) == (
        "Sequential holds no ConductanceDropout; dropout-like modules in it: 1 (Dropout), 2.0 (AlphaDropout). "
        "Y-Drop drives ConductanceDropout layers. "
        "To convert 1, pass convert=True to YDropCallback or call convert_dropout(model). "
        "Or place ConductanceDropout(p) yourself, where nn.Dropout(p) stands."
    )
    assert dropout_like_modules(nn.Linear(2, 2)) == []


def test_errors_cross_processes() -> None:
    error = ConfigurationError("a was given.", "b is allowed.", "Pass b.")
    assert str(pickle.loads(pickle.dumps(error))) == str(error) == "a was given. b is allowed. Pass b."


def test_containers_of_any_library_are_described_by_what_they_hold() -> None:
    assert describe(ListConfig([1, "a"])) == "ListConfig(1, 'a')"
    assert describe(DictConfig({"a": ListConfig([])})) == "DictConfig('a': ListConfig())"
    assert describe(range(0, 9, 3)) == "range(0, 9, 3)"
    assert describe(np.float64(0.5)) == repr(np.float64(0.5))
    assert describe(np.True_) == repr(np.True_)
    assert describe(np.zeros((2, 3))) == "ndarray(shape=(2, 3), dtype=float64)"
    assert describe(b"abc") == "bytes"


def test_no_more_than_the_first_items_are_read_for_a_message() -> None:
    class Batches(ListConfig):
        def __getitem__(self, index: Any) -> Any:
            assert index < 8
            return super().__getitem__(index)

    assert describe(Batches(list(range(100)))) == "Batches(0, 1, 2, 3, 4, 5, 6, 7, ... 92 more)"
    assert describe(list(range(9))) == "list(0, 1, 2, 3, 4, 5, 6, 7, ... 1 more)"
    assert describe(list(range(8))) == "list(0, 1, 2, 3, 4, 5, 6, 7)"


def test_settings_of_numpy_are_kept_as_plain_numbers() -> None:
    rate = HalfNormalRate(np.float32(0.25), np.int64(0), np.float64(0.5))  # type: ignore[arg-type]
    assert repr(rate) == "HalfNormalRate(mean=0.25, std=0, max=0.5)"
    buckets = Buckets(rate, HalfNormalRate(0.5, 0.0, 0.5), np.float32(0.5))  # type: ignore[arg-type]
    assert repr(buckets.strong_fraction) == "0.5"
    assert pickle.loads(pickle.dumps(buckets)) == buckets


def test_values_are_described_without_their_numbers() -> None:
    tensor = torch.full((2, 3), 7.0)
    assert describe(tensor) == "Tensor(shape=(2, 3), dtype=torch.float32, device=cpu)"
    assert (
        describe({"x": [tensor, None], "y": nn.Linear(1, 1)})
        == f"dict('x': list({describe(tensor)}, None), 'y': Linear)"
    )


@pytest.mark.parametrize(
    ("items", "expected"), [([], ""), (["a"], "a"), (["a", "b"], "a, b"), (["a", "b", "c", "d"], "a, b and 2 more")]
)
def test_long_rows_are_cut(items: list[str], expected: str) -> None:
    assert listed(iter(items), 2) == expected
