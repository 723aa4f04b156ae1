import dataclasses
from typing import Any

import numpy as np
import pytest

from lightning_ydrop import (
    Buckets,
    Conductance,
    ConfigurationError,
    Inverted,
    Measure,
    RandomImportance,
    YDrop,
    YDropCallback,
)
from lightning_ydrop.importance.path import PathSettings
from lightning_ydrop.importance.settings import EngineSettings
from tests.networks import perceptron
from tests.oracles import running_mean

WRONG: list[tuple[str, Any]] = [
    *(("elasticity", value) for value in (-1e-3, 1.1, "fast", None, True, float("nan"))),
    *(("initial_drop_prob", value) for value in (-0.1, 1.0, "half", True)),
    *(("buckets", value) for value in (0.5, (0.1, 0.6), {"strong_fraction": 0.5}, Buckets)),
    *(("measure", value) for value in ("Conductance", RandomImportance, None)),
    *(("seed", value) for value in (-1, 0.5, "0", None)),
    *(("every_n_batches", value) for value in (0, -1, 1.5, "1", None, True)),
    *(("compile_phase1", value) for value in (1, "yes", None)),
]


@pytest.mark.parametrize(("name", "value"), WRONG)
@pytest.mark.parametrize("owner", ["YDrop", "YDropCallback"])
def test_engine_and_callback_refuse_what_the_settings_refuse(owner: str, name: str, value: Any) -> None:
    with pytest.raises(ConfigurationError) as direct:
        EngineSettings(PathSettings(owner), **{name: value})
    with pytest.raises(ConfigurationError) as caught:
        YDrop(perceptron(), **{name: value}) if owner == "YDrop" else YDropCallback(**{name: value})
    assert str(caught.value) == str(direct.value)
    assert str(caught.value).startswith(f"{owner}({name}=")


def test_values_are_kept_as_plain_ones() -> None:
    settings = EngineSettings(
        PathSettings("YDrop"),
        elasticity=np.float32(0.5),  # type: ignore[arg-type]
        initial_drop_prob=0,
        seed=np.int64(3),  # type: ignore[arg-type]
        every_n_batches=np.int16(2),  # type: ignore[arg-type]
    )
    for name, kind in (("elasticity", float), ("initial_drop_prob", float), ("seed", int), ("every_n_batches", int)):
        assert type(getattr(settings, name)) is kind
    assert (settings.elasticity, settings.initial_drop_prob, settings.seed, settings.every_n_batches) == (0.5, 0, 3, 2)


def test_they_cannot_be_changed_and_compare_by_value() -> None:
    measure: Measure = Inverted(Conductance())
    settings = EngineSettings(PathSettings("YDrop"), 0.5, Buckets(strong_fraction=0.25), 0.25, measure, 3, 2)
    for field in dataclasses.fields(settings):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(settings, field.name, 1)
    same = EngineSettings(settings.path, 0.5, Buckets(strong_fraction=0.25), 0.25, measure, 3, 2)
    assert settings == same
    changes: dict[str, Any] = {
        "path": PathSettings("YDrop", 9),
        "elasticity": 0.25,
        "buckets": Buckets(),
        "initial_drop_prob": 0.5,
        "measure": RandomImportance(),
        "seed": 4,
        "every_n_batches": 1,
        "compile_phase1": True,
    }
    assert {field.name for field in dataclasses.fields(settings)} == changes.keys()
    for name, value in changes.items():
        assert dataclasses.replace(settings, **{name: value}) != settings


@pytest.mark.parametrize("n", [1, 2, 7])
@pytest.mark.parametrize("elasticity", [0.0, 0.1, 1.0])
def test_one_update_stands_for_as_many_as_batches(n: int, elasticity: float) -> None:
    settings = EngineSettings(PathSettings("YDrop"), elasticity, every_n_batches=n)
    moved = 0.3 + settings.elasticity_of_an_update * (0.7 - 0.3)
    assert moved == pytest.approx(running_mean([0.7] * n, 0.3, elasticity))


def test_the_engine_takes_them_as_they_are() -> None:
    settings = EngineSettings(PathSettings("YDropCallback", 3), 0.5)
    engine = YDrop.from_settings(perceptron(), settings)
    assert engine.settings is settings
    with pytest.raises(ConfigurationError, match=r"YDropCallback\(forward=3\)"):
        YDrop.from_settings(perceptron(), settings, 3)  # type: ignore[arg-type]


def test_rates_follow_each_layer_unless_they_are_given() -> None:
    settings = EngineSettings(PathSettings("YDrop"))
    assert settings.buckets_of(0.1) == Buckets.around(0.1)
    assert settings.initial_drop_prob_of(0.5) == 0.35
    assert settings.initial_drop_prob_of(0.1) == pytest.approx(0.07)
    given = EngineSettings(PathSettings("YDrop"), buckets=Buckets())
    assert given.buckets_of(0.1) == Buckets()
    assert given.initial_drop_prob_of(0.1) == 0.35
    assert EngineSettings(PathSettings("YDrop"), initial_drop_prob=0.2).initial_drop_prob_of(0.1) == 0.2
