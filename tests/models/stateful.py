"""Modules of every kind whose forward pass changes what they hold, as people write them."""

import argparse
import collections
import functools
import io
import random
import warnings
from collections import OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from lightning_ydrop import ConductanceDropout

STATEFUL: dict[str, Callable[[], nn.Module]] = {}


class Net(nn.Module):
    """A part, (B, 6) to (B, 6), in a network with a dropout layer."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part, self.inner = part, nn.Linear(6, 6)
        self.drop, self.head = ConductanceDropout(), nn.Linear(6, 3)
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.drop(self.inner(self.part(x))))
        logits: Tensor = self.head(hidden + self.part(hidden))  # once without gradients, once with
        if self.fails:
            raise RuntimeError("out of order")
        return logits


def stateful(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Add a kind, named like its builder."""
    STATEFUL[build.__name__] = build
    return build


def build(kind: str) -> Net:
    """Build a network around a stateful part, from a fixed seed."""
    torch.manual_seed(7)
    return Net(STATEFUL[kind]()).train()


# Buffers, and the attributes beside them.


@stateful
class RotaryTableThatFills(nn.Module):  # rotary-embedding-torch
    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros(16, 6), persistent=False)
        self.filled = 0

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > self.filled:
            self.filled = min(16, len(x))
            self.table[: self.filled] = torch.sin(torch.arange(self.filled))[:, None]
        return x + self.table[: self.filled].mean(0)


@stateful
class RotaryTableThatGrows(nn.Module):
    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros(0, 6), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if len(self.table) < len(x):
            self.register_buffer("table", torch.ones(len(x), 6), persistent=False)
        return x + self.table[: len(x)]


@stateful
class DynamicRope(nn.Module):  # Transformers' dynamic scaling
    inv_freq: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("inv_freq", torch.ones(6), persistent=False)
        self.original_inv_freq = self.inv_freq
        self.max_seq_len_cached = 4

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > self.max_seq_len_cached:
            self.register_buffer("inv_freq", torch.ones(6) / len(x), persistent=False)
            self.max_seq_len_cached = len(x)
        return x * self.inv_freq


class Normaliser(nn.Module):
    mean: Tensor
    is_fitted: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("is_fitted", torch.tensor(False))
        self.flag = False

    def forward(self, x: Tensor) -> Tensor:
        self.write(x.detach().mean(0))
        self.is_fitted.fill_(True)
        self.flag = True
        return x - self.mean

    def write(self, mean: Tensor) -> None:
        raise NotImplementedError


@stateful
class NormaliserByCopy(Normaliser):
    def write(self, mean: Tensor) -> None:
        if not self.flag:
            self.mean.copy_(mean)


@stateful
class NormaliserByData(Normaliser):
    def write(self, mean: Tensor) -> None:
        self.mean.data.mul_(0.9).add_(mean)


@stateful
class NormaliserByDataReplaced(Normaliser):
    def write(self, mean: Tensor) -> None:
        self.mean.data = mean


@stateful
class NormaliserByLerp(Normaliser):
    def write(self, mean: Tensor) -> None:
        self.mean.lerp_(mean, 0.1)


@stateful
class NormaliserByReplacement(Normaliser):
    def write(self, mean: Tensor) -> None:
        self.mean = self.mean * 0.9 + mean


@stateful
class NormaliserByForeach(Normaliser):
    def write(self, mean: Tensor) -> None:
        torch._foreach_add_([self.mean], 1.0)


@stateful
class NormaliserThroughView(Normaliser):
    def write(self, mean: Tensor) -> None:
        self.mean.view(2, 3)[0] = 1.0


@stateful
class NormaliserThroughNumpy(Normaliser):
    def write(self, mean: Tensor) -> None:
        self.mean.numpy()[:] += 1.0


@stateful
class NormaliserOutOfNumpy(Normaliser):
    def __init__(self) -> None:
        super().__init__()
        self.mean = torch.from_numpy(np.zeros(6, dtype=np.float32))

    def write(self, mean: Tensor) -> None:
        self.mean += mean


@stateful
class NormaliserOfHalf(Normaliser):
    def __init__(self) -> None:
        super().__init__()
        self.mean = self.mean.half()

    def write(self, mean: Tensor) -> None:
        self.mean += mean.half()


@stateful
class NormaliserWithNan(Normaliser):
    def __init__(self) -> None:
        super().__init__()
        self.mean.fill_(torch.nan)

    def write(self, mean: Tensor) -> None:
        self.mean.nan_to_num_().add_(mean)


@stateful
class NormaliserOutOfFile(Normaliser):
    def __init__(self) -> None:
        super().__init__()
        file = io.BytesIO()
        torch.save(torch.zeros(6), file)
        file.seek(0)
        self.mean = torch.load(file)

    def write(self, mean: Tensor) -> None:
        self.mean += mean


@stateful
class NormaliserShownByNumpy(Normaliser):
    def __init__(self) -> None:
        super().__init__()
        self.shown = self.mean.numpy()

    def write(self, mean: Tensor) -> None:
        self.mean += 1
        self.shown += 1
        assert (self.mean.numpy() == self.shown).all()


@stateful
class ResizedBuffer(Normaliser):
    def write(self, mean: Tensor) -> None:
        self.bank.resize_(20).fill_(1.0)  # type: ignore[operator]

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bank", torch.zeros(2))


@stateful
class BufferSetToOther(Normaliser):
    def write(self, mean: Tensor) -> None:
        self.mean.set_(torch.ones(6))  # type: ignore[call-overload]


@stateful
class BufferWithGraph(nn.Module):
    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6))
        self.register_buffer("total", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        self.total.detach_()
        self.total += (x * self.weight).mean(0)
        return x + self.total


@stateful
class WeightsSwappedForAverages(nn.Module):
    """An average of weights takes their place in evaluation, by `.data`, and stays a tensor of its own."""

    average: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6))
        self.register_buffer("average", torch.randn(6))

    def train(self, mode: bool = True) -> "WeightsSwappedForAverages":
        if mode != self.training:
            self.weight.data, self.average.data = self.average.data, self.weight.data
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


@stateful
class WeightsThatBorrowAverages(nn.Module):
    average: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6))
        self.register_buffer("average", torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data = self.average.data
        return x * self.weight


@stateful
class BatchNormThatTrains(nn.Module):  # statistics in evaluation too
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        self.norm.training = True
        x = self.norm(x)
        self.norm.training = False
        return x


@stateful
class BatchNormInList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = [nn.BatchNorm1d(6)]

    def forward(self, x: Tensor) -> Tensor:
        return self.hidden[0](x)


@stateful
def buffer_by_users_hook() -> nn.Module:
    norm = nn.LayerNorm(6)
    norm.register_buffer("seen", torch.zeros(()))

    def see(module: nn.Module, args: Any, output: Any) -> None:
        module.seen.add_(1)  # type: ignore[operator]

    norm.register_forward_hook(see)
    return norm


@stateful
class BufferOfTorchModuleByOuter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.norm.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.norm.seen += 1  # type: ignore[assignment, operator]
        return self.norm(x)


@stateful
class BufferThatAppears(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if "late" not in self._buffers:
            self.register_buffer("late", torch.ones(6))
        return x + self.late  # type: ignore[operator]


@stateful
class BufferThatDisappears(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("early", torch.ones(6), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if "early" in self._buffers:
            del self.early
        return x * 2


@stateful
class ParameterAndModuleThatAppear(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "scale"):
            self.scale = nn.Parameter(torch.ones(6))
            self.late = nn.Linear(6, 6)
        return self.late(x * self.scale)


@stateful
class ModuleListThatGrows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([nn.Linear(6, 6)])
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(6))])

    def forward(self, x: Tensor) -> Tensor:
        self.parts.append(nn.Identity())
        self.scales.append(nn.Parameter(torch.ones(6)))
        return self.parts[0](x) * self.scales[0]


@stateful
class Quantiser(nn.Module):  # vector-quantize-pytorch
    initted: Tensor
    codes: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("initted", torch.tensor([False]))
        self.register_buffer("codes", torch.zeros(4, 6))
        self.weight = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        if not self.initted:
            self.codes.data.copy_(torch.randn(4, 6))
            self.initted.data.copy_(torch.tensor([True]))
        nearest = self.codes[torch.cdist(x.detach(), self.codes).argmin(1)]
        return x * self.weight + (nearest - x).detach()


@stateful
class ActNorm(nn.Module):
    is_initialised: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.loc, self.scale = nn.Parameter(torch.zeros(6)), nn.Parameter(torch.ones(6))
        self.register_buffer("is_initialised", torch.tensor(0, dtype=torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        if self.is_initialised.item() == 0:
            with torch.no_grad():
                self.loc.data.copy_(-x.mean(0))
                self.scale.copy_(1 / (x.std(0) + 1e-6))
            self.is_initialised.fill_(1)
        return self.scale * (x + self.loc)


@stateful
def spectral_norm_old() -> nn.Module:
    return nn.utils.spectral_norm(nn.Linear(6, 6))


@stateful
def spectral_norm_new() -> nn.Module:
    return parametrizations.spectral_norm(nn.Linear(6, 6))


@stateful
def weight_norm_old() -> nn.Module:
    return _quietly(lambda: nn.utils.weight_norm(nn.Linear(6, 6)))


@stateful
def weight_norm_new() -> nn.Module:
    return parametrizations.weight_norm(nn.Linear(6, 6))


@stateful
class ParametrizationThatAppears(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        if not parametrize.is_parametrized(self.linear):
            parametrizations.orthogonal(self.linear)
        return self.linear(x)


@stateful
class ParametrizedAndCached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = parametrizations.weight_norm(nn.Linear(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        with parametrize.cached():
            return self.linear(self.linear(x))


# Objects in attributes.


@stateful
class ListThatGrows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.detach())
        return x


@stateful
class ListThatIsFilled(ListThatGrows):
    def __init__(self) -> None:
        super().__init__()
        self.seen = [0, [torch.zeros(6), {"inner": [1]}]]

    def forward(self, x: Tensor) -> Tensor:
        self.seen[0] += 1
        self.seen[1][0] += 1
        self.seen[1][1]["inner"].append(self.seen)
        self.seen.reverse()
        self.seen.reverse()
        return x


@stateful
class LargeContainers(nn.Module):
    """A memory of fixed length: what comes pushes out what was first."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = deque(range(3000), maxlen=3000)
        self.row = list(range(3000))
        self.table = {each: each for each in range(3000)}
        self.members = set(range(3000))

    def forward(self, x: Tensor) -> Tensor:
        self.memory.append(-1)
        self.row[5] += 1
        self.table[7] += 1
        self.members.discard(9)
        self.members.add(-9)
        return x


@stateful
class Dictionaries(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.plain = {"a": 1, "b": torch.zeros(2)}
        self.ordered: OrderedDict[str, int] = OrderedDict(a=1, b=2, c=3)
        self.default: defaultdict[str, list[int]] = defaultdict(list)
        self.counter = collections.Counter("ab")
        self.user = collections.UserDict(a=1)

    def forward(self, x: Tensor) -> Tensor:
        self.plain["b"].add_(1)  # type: ignore[attr-defined]
        self.plain["c"] = len(x)
        self.ordered.move_to_end("a")
        self.ordered["d"] = 4
        self.ordered.pop("b", None)
        self.default["x"].append(1)
        self.counter["a"] += 1
        self.user["b"] = 2
        return x


@stateful
class SetsAndQueues(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.members = {1, 2}
        self.queue: deque[Any] = deque([torch.zeros(2)], maxlen=2)
        self.bytes = bytearray(b"ab")

    def forward(self, x: Tensor) -> Tensor:
        self.members.add(len(self.members))
        self.queue.append(x.mean().detach())
        self.queue[0].add_(1)
        self.bytes.append(3)
        self.bytes[0] = 9
        return x


class Plain:
    kind = "class"

    def __init__(self) -> None:
        self.count, self.tensor, self.list = 0, torch.zeros(2), [1]
        self.__private = 1

    def update(self) -> None:
        self.count += 1
        self.tensor += 1
        self.list.append(2)
        self.__private += 1
        self.late = 1


@dataclass
class Data:
    count: int = 0
    history: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Slotted:
    count: int = 0
    history: list[int] = field(default_factory=list)
    tensor: Tensor = field(default_factory=lambda: torch.zeros(2))


class Slots:
    __slots__ = ("late", "seen")

    def __init__(self) -> None:
        self.seen = 0


class PrivateSlots:
    __slots__ = ("__count",)

    def __init__(self) -> None:
        self.__count = 0

    def update(self) -> None:
        self.__count += 1

    def value(self) -> int:
        return self.__count


@dataclass(frozen=True)
class Frozen:
    history: list[int] = field(default_factory=list)
    count: int = 0


Pair = namedtuple("Pair", ["numbers", "tensor"])


@stateful
class Objects(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.plain, self.data, self.slotted, self.frozen = Plain(), Data(), Slotted(), Frozen()
        self.slots, self.private = Slots(), PrivateSlots()
        self.pair = Pair([1], torch.zeros(2))
        self.space, self.arguments = SimpleNamespace(count=0, inner=[1]), argparse.Namespace(count=0)

    def forward(self, x: Tensor) -> Tensor:
        self.plain.update()
        self.data.count += 1
        self.data.history.append(1)
        self.slotted.count += 1
        self.slotted.history.append(1)
        self.slotted.tensor += 1
        self.frozen.history.append(1)
        object.__setattr__(self.frozen, "count", self.frozen.count + 1)
        self.slots.seen += 1
        self.slots.late = 1  # type: ignore[attr-defined]
        self.private.update()
        self.pair.numbers.append(1)
        self.pair.tensor.add_(1)
        self.space.count += 1
        self.space.inner.append(2)
        self.arguments.count += 1
        return x


@stateful
class PartialsAndMethods(nn.Module):
    """Held by what a forward calls."""

    def __init__(self) -> None:
        super().__init__()
        self.update = Plain().update
        self.add = functools.partial(self._add, [0])

    @staticmethod
    def _add(numbers: list[int]) -> None:
        numbers.append(1)

    def forward(self, x: Tensor) -> Tensor:
        self.update()
        self.add()
        return x


@stateful
class Arrays(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.counts = np.zeros(4)
        self.large = np.zeros(5000)
        self.held = [np.zeros((2, 2), dtype=np.int64)]

    def forward(self, x: Tensor) -> Tensor:
        self.counts += 1
        self.large[3] += 1
        self.held[0][1] += 1
        return x


@stateful
class PlainTensors(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = torch.zeros(6)
        self.empty = torch.empty(0)
        self.replaced = torch.zeros(6)
        self.sparse = torch.eye(6).to_sparse()
        self.integers = torch.zeros(3, dtype=torch.int64)

    def forward(self, x: Tensor) -> Tensor:
        self.hidden.mul_(0.5).add_(x.detach().mean(0))
        self.replaced = x.detach()
        self.integers += 1
        self.empty.resize_(2).fill_(1)
        return x + self.hidden


@stateful
class SparseBuffers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("adjacency", torch.eye(6).to_sparse())
        self.register_buffer("rows", _quietly(lambda: torch.eye(6).to_sparse_csr()))
        self.register_buffer("written", torch.eye(6).to_sparse())

    def forward(self, x: Tensor) -> Tensor:
        self.written.mul_(2)  # type: ignore[operator]
        return torch.sparse.mm(self.adjacency, x.T).T


@stateful
class InferenceTensors(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.inference_mode():
            self.register_buffer("table", torch.zeros(6))
            self.register_buffer("kept", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        with torch.inference_mode():
            self.table += 1  # type: ignore[assignment, operator]
        return x + self.kept.clone()  # type: ignore[operator]


@stateful
class KeysAndValues(nn.Module):
    """A cache as decoders keep it."""

    def __init__(self) -> None:
        super().__init__()
        self.cache: dict[int, tuple[Tensor, Tensor]] = {}
        self.key = nn.Linear(6, 6)
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        key = self.key(x)
        if 0 in self.cache:
            key = key + self.cache[0][0].mean(0)
        self.cache[0] = (key, x)
        self.last = key
        return key


@stateful
class FlagsOfParameters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.learns, self.frozen = nn.Parameter(torch.ones(6)), nn.Parameter(torch.ones(6), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        self.learns.requires_grad_(False)
        self.frozen.requires_grad_(True)
        return x * self.learns * self.frozen


@stateful
class GradientsInside(nn.Module):
    """Adapts a parameter within the pass, as test-time training does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.other = nn.Parameter(torch.ones(6)), nn.Parameter(torch.ones(6))
        self.other.grad = torch.ones(6)

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            self.weight.requires_grad_(True)
            self.other.requires_grad_(True)
            (x.detach() * self.weight * self.other).sum().backward()
        return x * self.weight.detach()


# Modes, attributes, registries.


@stateful
class Minding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.norm = nn.BatchNorm1d(6)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return self.norm(x)


@stateful
class Expanded(nn.Module):  # escnn.nn.R2Conv
    filter: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6))

    def train(self, mode: bool = True) -> "Expanded":
        if mode:
            self.__dict__.pop("filter", None)
        elif self.training:
            self.filter = self.weight.detach() * 2
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * 2 if self.training else self.filter)


@stateful
class EmptiesItsCache(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6))
        self.filter: Tensor | None = None

    def train(self, mode: bool = True) -> "EmptiesItsCache":
        self.filter = None
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return nn.functional.linear(x, self.weight * 2)
        if self.filter is None:
            self.filter = self.weight.detach() * 2
        return nn.functional.linear(x, self.filter)


@stateful
class FrozenNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.other = nn.BatchNorm1d(6), nn.BatchNorm1d(6)
        self.norm.eval()
        self.calls = 0

    def train(self, mode: bool = True) -> "FrozenNorm":
        super().train(mode)
        self.norm.eval()
        self.calls += 1
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.norm(x))


@stateful
class TrainReplacedOnInstance(nn.Module):  # LAVIS: `self.visual_encoder.train = disabled_train`
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)
        self.norm.train = lambda mode=True: self.norm  # type: ignore[method-assign]

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


@stateful
class LoraThatMerges(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.down, self.up = nn.Parameter(torch.randn(2, 6)), nn.Parameter(torch.randn(6, 2))
        self.merged = False

    def train(self, mode: bool = True) -> "LoraThatMerges":
        super().train(mode)
        if mode == self.merged:
            self.linear.weight.data += (1 if self.merged is False else -1) * (self.up @ self.down).data
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return x if self.merged else x + x @ self.down.T @ self.up.T


@stateful
class HooksRegisteredInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.handles: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        for register in (
            self.linear.register_forward_hook,
            self.linear.register_forward_pre_hook,
            self.linear.register_full_backward_hook,
            self.linear.register_full_backward_pre_hook,
            self.linear.register_state_dict_post_hook,
            self.linear.register_load_state_dict_post_hook,
        ):
            self.handles.append(register(_nothing))
        self.handles.append(self.linear.register_forward_hook(_nothing_too, with_kwargs=True, always_call=True))
        return self.linear(x)


def _nothing(*args: Any) -> None:
    pass


def _nothing_too(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
    pass


@stateful
class HookRemovedInside(nn.Module):
    """As lazy initialisers do: a hook of the first pass, which takes itself away."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.first = self.linear.register_forward_pre_hook(self._initialise)

    def _initialise(self, module: nn.Module, args: Any) -> None:
        with torch.no_grad():
            self.linear.weight.fill_(0.1)
        self.first.remove()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


@stateful
class ClassThatChanges(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear: nn.Module = _Raw(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        self.linear.__class__ = nn.Linear
        return self.linear(x)


class _Raw(nn.Linear):
    pass


@stateful
class ParameterHooks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        self.weight.requires_grad_(True)
        self.weight.register_hook(_nothing)
        return x * self.weight


@stateful
class AttributesOfParameters(nn.Module):  # as bitsandbytes and Megatron keep them
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6))
        self.weight.uses = [1]  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        self.weight.uses.append(1)  # type: ignore[attr-defined]
        self.weight.late = True  # type: ignore[attr-defined]
        return x * self.weight


# Metrics.


class Values(Metric):
    seen: list[Tensor]
    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("seen", [], dist_reduce_fx="cat")
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, values: Tensor) -> None:
        self.seen.append(values)
        self.total += len(values)

    def compute(self) -> Tensor:
        return self.total


@stateful
class Metrics(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.values, self.mean = Values(), MeanMetric()
        self.group = MetricCollection([MulticlassAccuracy(6), MulticlassF1Score(6)])
        self.outside = [MeanMetric()]

    def forward(self, x: Tensor) -> Tensor:
        self.values.update(x.detach())
        self.values(x.detach())
        self.mean.update(x.detach().mean())
        self.mean.compute()
        self.group.update(x.detach(), torch.zeros(len(x), dtype=torch.int64))
        self.group.compute()
        self.outside[0].update(1.0)
        return x


# Randomness, and what belongs to the process.


@stateful
class Noise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.of_torch = torch.Generator().manual_seed(1)
        self.of_python = random.Random(1)
        self.of_numpy, self.legacy = np.random.default_rng(1), np.random.RandomState(1)
        self.held = {"deep": [torch.Generator().manual_seed(2)]}

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.rand(x.shape, generator=self.of_torch) + torch.rand(6, generator=self.held["deep"][0])
        x = x + random.random() + np.random.rand() + random.gauss(0, 1)  # noqa: NPY002
        return x + self.of_python.random() + self.of_numpy.random() + self.legacy.rand()


@stateful
class Switches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("cpu")
        torch.set_grad_enabled(False)
        return x


# TorchScript.


class _Scripted(nn.Module):
    total: Tensor
    seen: list[int]

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(6, 6), nn.BatchNorm1d(6)
        self.register_buffer("total", torch.zeros(6))
        self.count = 0
        self.last = torch.zeros(6)
        self.seen = [1]

    def forward(self, x: Tensor) -> Tensor:
        self.total += x.mean(0).detach()
        self.count += 1
        self.last = x.mean(0).detach()
        self.seen.append(len(x))
        return self.norm(self.linear(x)) + self.total


class _Counted(nn.Module):
    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.register_buffer("total", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.total += 1
        return self.linear(x) + self.total


@stateful
def scripted() -> nn.Module:
    return _quietly(lambda: torch.jit.script(_Scripted()))


@stateful
def traced() -> nn.Module:
    return _quietly(lambda: torch.jit.trace(_Counted(), torch.randn(2, 6)))


@stateful
def frozen_script() -> nn.Module:
    return _quietly(lambda: torch.jit.freeze(torch.jit.script(_Counted().eval()), preserved_attrs=["total"]))


@stateful
def loaded_script() -> nn.Module:
    def load() -> nn.Module:
        file = io.BytesIO()
        torch.jit.save(torch.jit.script(_Scripted()), file)
        file.seek(0)
        return torch.jit.load(file)

    return _quietly(load)


def _quietly(build: Callable[[], Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return build()
