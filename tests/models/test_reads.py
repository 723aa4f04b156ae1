from typing import Any

import torch
from torch import Tensor, nn

from lightning_ydrop.models.reads import Values, changed_since, described, seeing_reads, values_read


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
    with seeing_reads(net.modules()) as reads:
        net(torch.ones(1, 2))
    return values_read(reads)


def test_attributes_that_forward_reads_are_compared() -> None:
    net = Net()
    values = read(net)
    assert {name for _, name in values} == {"factor", "listed", "settings"}
    assert changed_since(values) is None
    net.never = 2
    assert changed_since(values) is None
    net.factor = 3.0
    assert changed_since(values) == "Net.factor"
    net.factor = 2
    assert changed_since(values) == "Net.factor"  # another type
    net.factor = 2.0
    net.listed.append(3)
    assert changed_since(values) == "Net.listed"
    net.listed.pop()
    net.settings.rate = 0.1
    assert changed_since(values) == "Net.settings"
    net.settings = Settings()
    assert changed_since(values) == "Net.settings"  # another object


def test_classes_are_given_back_as_they_were() -> None:
    own = Own.__dict__["__getattribute__"]
    for net in (Net(), Own()):
        read(net)
    assert "__getattribute__" not in Net.__dict__
    assert Own.__dict__["__getattribute__"] is own
    assert {name for _, name in read(Own())} == {"factor", "listed", "settings"}


def test_values_of_tensors_are_not_looked_at() -> None:
    tensor = torch.zeros(2)
    before = described([tensor, {"a": tensor}])
    assert described((tensor, {})) != before
    tensor.add_(1)
    one, other = described(tensor), described(torch.ones(2))
    assert one == described(tensor)
    assert one != other
