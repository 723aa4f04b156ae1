from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_ydrop.models.reads import Values, seeing_reads


class Settings:
    def __init__(self) -> None:
        self.rate = 0.5


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.factor = 2.0
        self.listed = [1, 2]
        self.settings = Settings()
        self.never = 1

    @property
    def scale(self) -> float:
        return self.factor

    def forward(self, x: Tensor) -> Any:
        return self.inner(x) * self.scale * self.listed[0] * self.settings.rate


class Own(Net):
    def __getattribute__(self, name: str) -> Any:
        return super().__getattribute__(name)


def read(net: nn.Module) -> Values:
    with seeing_reads(list(net.modules())) as reads:
        net(torch.ones(1, 2))
    return Values(reads)


def test_attributes_that_forward_reads_are_compared() -> None:
    net = Net()
    values = read(net)
    assert values.names == {"factor", "listed", "settings"}
    assert values.changed() is None
    net.never = 2
    assert values.changed() is None
    net.factor = 3.0
    assert values.changed() == "Net.factor"
    net.factor = 2
    assert values.changed() == "Net.factor"  # another type
    net.factor = 2.0
    net.listed.append(3)
    assert values.changed() == "Net.listed"
    net.listed.pop()
    net.settings.rate = 0.1
    assert values.changed() == "Net.settings"
    net.settings = Settings()
    assert values.changed() == "Net.settings"  # another object


def test_classes_are_given_back_as_they_were() -> None:
    own = Own.__dict__["__getattribute__"]
    for net in (Net(), Own()):
        read(net)
    assert "__getattribute__" not in Net.__dict__
    assert Own.__dict__["__getattribute__"] is own
    assert read(Own()).names == {"factor", "listed", "settings"}


class Writing(Net):
    def forward(self, x: Tensor) -> Any:
        self.factor = 2 * self.inner(x)
        return self.factor * vars(self)["never"]


def test_what_forward_has_written_before_is_not_compared() -> None:
    net = Writing()
    names = read(net).names
    assert "never" in names
    assert "factor" not in names


def test_attributes_of_torchs_modules_are_compared() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.LeakyReLU())
    values = read(net)
    assert values.names == {"negative_slope", "inplace"}
    net[1].negative_slope = 2.0  # type: ignore[assignment]
    assert values.changed() == "LeakyReLU.negative_slope"


def test_a_module_may_compute_its_hash_from_its_attributes() -> None:
    class Metric(Net):
        """As torchmetrics does."""

        def __hash__(self) -> int:
            return hash((self.factor, tuple(self.listed)))

    net = Metric()
    values = read(net)
    assert values.names == {"factor", "listed", "settings"}
    net.factor = 3.0
    assert values.changed() == "Metric.factor"


class Unregistered(Net):
    """What it calls is in a plain list."""

    def __init__(self) -> None:
        super().__init__()
        self.listed = [nn.LeakyReLU(), nn.Sequential(Net(), self.inner)]  # type: ignore[list-item]

    def forward(self, x: Tensor) -> Any:
        for each in self.listed:
            x = each(x)  # type: ignore[operator]
        return x


@pytest.mark.parametrize(
    "change",
    [
        lambda net: setattr(net.listed[0], "negative_slope", 2.0),
        lambda net: setattr(net.listed[1][0], "factor", 3.0),
        lambda net: net.listed[1][0].listed.append(3),
        lambda net: setattr(net.listed[1][0].inner, "weight", None),
        lambda net: net.listed[1].append(nn.ReLU()),
        lambda net: net.listed[1].train(not net.listed[1].training),
        lambda net: net.listed[0].register_forward_hook(print),
    ],
)
def test_modules_that_are_not_registered_are_compared(change: Callable[[Any], object]) -> None:
    net = Unregistered()
    values = read(net)
    net.inner.train(not net.inner.training)  # of a registered one, what forward reads alone
    assert values.changed() is None
    change(net)
    assert values.changed() == "Unregistered.listed"


def test_classes_of_modules_that_are_not_registered_are_compared() -> None:
    class Halved(nn.Module):
        factor = 0.5

        def forward(self, x: Tensor) -> Any:
            return self.factor * x

    net = Unregistered()
    net.listed = [Halved()]  # type: ignore[list-item]
    values = read(net)
    Halved.factor = 2.0
    assert values.changed() == "Unregistered.listed"


class Config:
    rate = 0.5


def scaled(factors: dict[str, float]) -> Any:
    def scale(self: Any, x: Tensor, offset: list[float] = [0.0]) -> Any:  # noqa: B006, which is what is tried
        return factors["all"] * x + offset[0]

    return scale


FACTORS = {"all": 1.0}


@pytest.mark.parametrize(
    ("name", "value", "change"),
    [
        ("config", Config(), lambda config: setattr(config, "rate", 1.0)),
        ("config", Config(), lambda config: setattr(type(config), "rate", 1.0)),
        ("config", Config, lambda config: setattr(config, "rate", 2.0)),
        ("config", (Config(),), lambda config: setattr(config[0], "rate", 3.0)),
        ("config", np.ones(2), lambda config: config.fill(2.0)),
        ("extra", scaled(FACTORS), lambda scale: FACTORS.update(all=2.0)),
        ("extra", scaled({"all": 1.0}), lambda scale: scale.__defaults__[0].append(1.0)),
        ("extra", property(scaled(FACTORS)), lambda scale: FACTORS.update(all=3.0)),
        ("mean", torch.zeros(2), None),
    ],
)
def test_what_stands_in_the_body_of_a_class_is_compared(name: str, value: Any, change: Any) -> None:
    net = type("Made", (Net,), {name: value})()
    values = read(net)
    assert values.changed() is None
    if change is None:
        setattr(type(net), name, torch.ones(2))
    else:
        change(value)
    assert values.changed() == f"Made.{name}"


def test_a_list_that_grows_beyond_comparison_counts_as_changed() -> None:
    net = Net()
    values = read(net)
    net.listed += [1] * 20_000
    changed = values.changed()
    assert changed is not None
    assert "more than can be compared" in changed
