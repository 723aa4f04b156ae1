"""The settings of a path, and that all who take them refuse the same."""

import dataclasses
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from lightning_ydrop import (
    ConductanceMonitor,
    ConfigurationError,
    NegativeLoss,
    OutputSum,
    YDrop,
    YDropCallback,
    layer_conductance,
)
from lightning_ydrop.importance.path import PathSettings
from tests.containers import ListConfig
from tests.networks import perceptron

NAN = float("nan")
WRONG: list[tuple[str, Any]] = [
    *(("n_steps", value) for value in (0, -1, 2.5, "5", True, None, NAN)),
    *(("baseline", value) for value in ("black", NAN, float("inf"), True, [], [0.0, "black"], ListConfig(["a"]))),
    *(("quadrature", value) for value in ("middle", 1, None)),
    *(("objective", value) for value in (OutputSum, torch.nn.MSELoss())),
    *(("interpolate_at", value) for value in (1, "", torch.nn.Linear(2, 2))),
    *(("batch_dim", value) for value in (-1, 0.5, "1", True, None)),
]
OWNERS: dict[str, Callable[..., Any]] = {
    "YDrop": lambda **settings: YDrop(perceptron(), **settings),
    "YDropCallback": YDropCallback,
    "ConductanceMonitor": lambda **settings: ConductanceMonitor(figures=False, **settings),
    "layer_conductance": lambda **settings: layer_conductance(perceptron(), torch.randn(4, 12), **settings),
}


@pytest.mark.parametrize(("name", "value"), WRONG)
@pytest.mark.parametrize("owner", list(OWNERS))
def test_what_the_settings_refuse_is_refused_by_all_who_take_them(owner: str, name: str, value: Any) -> None:
    with pytest.raises(ConfigurationError) as direct:
        PathSettings(owner, **{name: value})
    with pytest.raises(ConfigurationError) as caught:
        OWNERS[owner](**{name: value})
    assert str(caught.value) == str(direct.value)
    assert str(caught.value).startswith(f"{owner}({name}=")
    assert len(caught.value.args) == 3


@pytest.mark.parametrize("value", [0, -3, 1.5, "most", True])
def test_a_number_of_samples_is_whole_or_all(value: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"YDrop\(num_samples="):
        PathSettings("YDrop", num_samples=value)


def test_values_are_kept_as_plain_ones() -> None:
    given: Any = {"n_steps": np.int64(3), "num_samples": np.int32(7), "baseline": [np.float32(0.5), None]}
    settings = PathSettings("YDrop", **given, batch_dim=np.int8(1))  # type: ignore[arg-type]
    assert settings == PathSettings("YDrop", 3, 7, [0.5, None], batch_dim=1)
    for value, kind in ((settings.n_steps, int), (settings.num_samples, int), (settings.batch_dim, int)):
        assert type(value) is kind
    assert PathSettings("YDrop", baseline=np.float64(0.25)).baseline == 0.25
    assert type(PathSettings("YDrop", baseline=1).baseline) is float


@pytest.mark.parametrize("listed", [list, tuple, ListConfig])
def test_baselines_come_in_any_sequence(listed: Callable[[list[Any]], Any]) -> None:
    baseline: Any = PathSettings("YDrop", baseline=listed([0.5, None, 1])).baseline
    assert list(baseline) == [0.5, None, 1.0]
    assert isinstance(baseline, (list, tuple))


def test_they_cannot_be_changed() -> None:
    settings = PathSettings("YDrop")
    for field in dataclasses.fields(settings):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(settings, field.name, 1)


def test_they_compare_by_value_whoever_was_called() -> None:
    objective = OutputSum()
    settings = PathSettings("YDrop", 7, "all", 0.5, "left", objective, "0", 1)
    assert settings == PathSettings("YDropCallback", 7, "all", 0.5, "left", objective, "0", 1)
    others = {
        "n_steps": 8,
        "num_samples": 3,
        "baseline": 0.6,
        "quadrature": "right",
        "objective": NegativeLoss(torch.nn.MSELoss()),
        "interpolate_at": None,
        "batch_dim": 0,
        "task_is_named": False,
    }
    for name, value in others.items():
        assert dataclasses.replace(settings, **{name: value}) != settings  # type: ignore[arg-type]
    assert {field.name for field in dataclasses.fields(settings)} == {"owner", *others}
    assert "owner" not in repr(settings)


def test_a_change_is_checked_too() -> None:
    with pytest.raises(ConfigurationError, match=r"YDrop\(n_steps=0\)"):
        dataclasses.replace(PathSettings("YDrop"), n_steps=0)


def test_they_cross_processes() -> None:
    settings = PathSettings("YDrop", 7, 3, [0.5, None], "left", batch_dim=1)
    there = pickle.loads(pickle.dumps(settings))
    assert (there.owner, there.n_steps, there.baseline, there.batch_dim) == ("YDrop", 7, [0.5, None], 1)


def test_defaults_are_the_same_everywhere() -> None:
    settings = PathSettings("YDrop")
    engine, callback = YDrop(perceptron()).settings.path, YDropCallback().settings.path
    for name in ("n_steps", "num_samples", "baseline", "quadrature", "interpolate_at", "batch_dim"):
        assert getattr(engine, name) == getattr(callback, name) == getattr(settings, name)
