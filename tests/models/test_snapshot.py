import functools
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_ydrop import ConductanceDropout, YDrop, layer_conductance, monte_carlo
from lightning_ydrop.analysis import removal_curve
from lightning_ydrop.importance.objectives import NegativeLoss
from lightning_ydrop.models.observations import Observations
from lightning_ydrop.models.snapshot import Snapshot
from lightning_ydrop.torch_internals import is_untouched
from tests.counting import recorder

X, Y = torch.randn(10, 6, generator=torch.Generator().manual_seed(1)), torch.arange(10) % 3
LARGE = 10 * 2**20  # numbers, of 4 bytes: 40 MB


class Copies(TorchDispatchMode):
    """Counts the bytes that are copied, and the tensors that share their memory with a copy."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.lazy = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        if name == "aten::_lazy_clone":
            self.lazy += 1
        elif isinstance(result, Tensor) and name in (
            "aten::clone",
            "aten::copy_",
            "aten::_to_copy",
            "aten::empty_like",
        ):
            self.bytes += result.numel() * result.element_size()
        return result


class Bank(nn.Module):
    bank: Tensor

    def __init__(self, size: int = LARGE, writes: bool = False) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), ConductanceDropout(), nn.ReLU(), nn.Linear(8, 3))
        self.register_buffer("bank", torch.ones(size))
        self.plain = torch.ones(size)
        self.norm = nn.BatchNorm1d(6)
        self.frozen = nn.Linear(1024, size // 1024)
        self.writes = writes

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x) + self.bank[:6] + self.plain[:6]
        if self.writes:
            self.bank[0] += 1
        logits: Tensor = self.net(x)
        return logits


def copied(call: Callable[[], object]) -> int:
    with Copies() as copies:
        call()
    return copies.bytes


def test_what_is_not_written_is_not_copied_in_any_pass() -> None:
    model = Bank()
    ydrop = YDrop(model)
    for call in (
        lambda: ydrop.step(X, Y),
        lambda: ydrop.step(X, Y),
        lambda: layer_conductance(model, X, Y, n_steps=3),
    ):
        assert copied(call) < 2**20


@pytest.mark.filterwarnings("ignore:monte_carlo was given")
def test_nor_in_monte_carlo_passes() -> None:
    model = Bank()
    assert copied(lambda: monte_carlo(model, X, 3)) < 2**20


def test_memory_is_not_shared_any_more_afterwards() -> None:
    model = Bank(2**12)
    places = [tensor.data_ptr() for tensor in (model.bank, model.plain, *model.parameters())]
    ydrop = YDrop(model)
    ydrop.step(X, Y)
    ydrop.step(X, Y)
    tensors = [model.bank, model.plain, *model.parameters()]
    assert not any(map(is_untouched, tensors))
    assert [tensor.data_ptr() for tensor in tensors] == places
    model.bank.resize_(2**14).fill_(1)  # what torch can't do to memory that is shared
    assert model.bank.sum() == 2**14


def test_later_steps_share_users_own_tensors_alone() -> None:
    model = Bank(2**12)
    ydrop = YDrop(model)
    ydrop.step(X, Y)
    with Copies() as copies:
        ydrop.step(X, Y)
    assert copies.lazy <= 2  # `bank` and `plain`, and neither parameters nor BatchNorm's statistics


def test_what_was_seen_written_is_copied_in_later_steps_and_stays_where_it_is() -> None:
    model = Bank(2**12, writes=True)
    ydrop = YDrop(model)
    ydrop.step(X, Y)
    place = model.bank.data_ptr()
    before = model.bank.clone()
    ydrop.step(X, Y)
    assert torch.equal(model.bank, before)
    assert model.bank.data_ptr() == place
    assert ydrop.unguarded == []


def test_a_first_write_in_a_later_step_is_told() -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(6, 8), ConductanceDropout(), nn.ReLU(), nn.Linear(8, 3))
            self.writes = False

        def forward(self, x: Tensor) -> Tensor:
            if self.writes:
                with torch.no_grad():
                    next(self.net.parameters()).mul_(1.0)
            logits: Tensor = self.net(x)
            return logits

    model = Late()
    ydrop = YDrop(model)
    ydrop.step(X, Y)
    model.writes = True
    ydrop.step(X, Y)
    assert ydrop.unguarded == ["Linear.weight"]
    before = next(model.net.parameters()).clone()
    ydrop.step(X, Y)  # it is guarded from now on
    assert torch.equal(next(model.net.parameters()), before)
    assert len(ydrop.unguarded) == 1


def test_nothing_is_kept_alive() -> None:
    class Keeping(nn.Module):
        tell: Any

        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(6, 8), ConductanceDropout(), nn.ReLU(), nn.Linear(8, 3))
            self.seen: list[Tensor] = []
            self.tell = recorder()

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.net(x)
            self.seen.append(logits)
            self.tell(weakref.ref(logits))
            return logits

    model = Keeping()
    ydrop = YDrop(model)
    ydrop.step(X, Y)
    ydrop.step(X, Y)
    gc.collect()
    assert len(model.tell.seen) > 2
    assert all(each() is None for each in model.tell.seen)


# What runs besides the model.


class Criterion(nn.Module):
    """A loss with state, in training mode, that another network computes."""

    total: Tensor
    tell: Any

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(()))
        self.norm = nn.BatchNorm1d(3)
        self.seen: list[bool] = []
        self.tell = recorder()

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        self.total += 1
        self.seen.append(self.training)
        self.tell(self.training)
        return nn.functional.cross_entropy(self.norm(logits), target, reduction="none")


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), ConductanceDropout(), nn.ReLU(), nn.Linear(8, 3))


def state_of(module: nn.Module) -> list[Any]:
    return [*(each.clone() for each in module.state_dict().values()), [each.training for each in module.modules()]]


def assert_unchanged(module: nn.Module, before: list[Any]) -> None:
    after = state_of(module)
    assert all(torch.equal(one, other) for one, other in zip(after[:-1], before[:-1], strict=True))
    assert after[-1] == before[-1]


def by_masks(model: nn.Module, **kwargs: Any) -> None:
    monte_carlo(model, X, 3, **kwargs)


def by_removal(model: nn.Module, **kwargs: Any) -> None:
    removal_curve(model, [(X, Y)], fractions=(0, 0.5), repeats=1, **kwargs)


def by_step(model: nn.Module, **kwargs: Any) -> None:
    ydrop = YDrop(model, **kwargs)
    ydrop.step(X, Y)
    ydrop.step(X, Y)


def by_function(model: nn.Module, **kwargs: Any) -> None:
    layer_conductance(model, X, Y, n_steps=3, **kwargs)


WAYS: dict[str, Callable[..., None]] = {"step": by_step, "function": by_function}


@pytest.mark.parametrize("way", list(WAYS))
def test_the_module_of_a_loss_is_borrowed_too(way: str) -> None:
    criterion = Criterion().train()
    before = state_of(criterion)
    WAYS[way](network(), objective=NegativeLoss(criterion))
    assert_unchanged(criterion, before)
    assert criterion.seen == []
    assert criterion.tell.seen
    assert not any(criterion.tell.seen)  # it was in evaluation mode


class Outside(nn.Module):
    """A module beside the model, which a forward of the user's runs before it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)
        self.seen: list[int] = []
        self.model: list[nn.Module] = []

    def run(self, x: Tensor) -> Tensor:
        self.seen.append(len(x))
        logits: Tensor = self.model[0](self.norm(x))
        return logits


GLOBAL = Outside()


def forward_of_globals(x: Tensor) -> Tensor:
    return GLOBAL.run(x)


class Runner:
    """An object, and no module."""

    def __init__(self, outside: Outside) -> None:
        self.outside = outside
        self.count = 0
        self.seen: list[int] = []

    def predict(self, x: Tensor) -> Tensor:
        self.count += 1
        self.seen.append(len(x))
        return self.outside.run(x)


def run_with(outside: Outside, x: Tensor) -> Tensor:
    return outside.run(x)


FORWARDS: dict[str, Callable[[Outside], Callable[[Tensor], Tensor]]] = {
    "method": lambda outside: outside.run,
    "lambda": lambda outside: lambda x: outside.run(x),
    "partial": lambda outside: functools.partial(run_with, outside),
    "keyword": lambda outside: functools.partial(lambda x, outside: outside.run(x), outside=outside),
    "global": lambda outside: forward_of_globals,
    "object": lambda outside: Runner(outside).predict,
}


@pytest.mark.filterwarnings("ignore:monte_carlo was given")
@pytest.mark.parametrize("way", [*WAYS, "masks", "removal"])
@pytest.mark.parametrize("kind", list(FORWARDS))
def test_a_forward_outside_of_the_model_is_borrowed_too(kind: str, way: str) -> None:
    outside = GLOBAL if kind == "global" else Outside()
    model = network()
    outside.model = [model]
    outside.seen.clear()
    outside.norm(X)
    outside.train()
    before = state_of(outside)
    (WAYS | {"masks": by_masks, "removal": by_removal})[way](model, forward=FORWARDS[kind](outside))
    assert_unchanged(outside, before)
    assert outside.seen == []


@pytest.mark.filterwarnings("ignore:monte_carlo was given")
@pytest.mark.parametrize("way", [*WAYS, "masks", "removal"])
def test_so_is_the_object_whose_method_a_forward_is(way: str) -> None:
    outside = Outside()
    model = network()
    outside.model = [model]
    runner = Runner(outside)
    (WAYS | {"masks": by_masks, "removal": by_removal})[way](model, forward=runner.predict)
    assert (runner.count, runner.seen) == (0, [])


# Arguments that a forward changes.


class Cache:
    """As Transformers' caches of keys and values."""

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.length = 0

    def update(self, key: Tensor) -> None:
        self.keys.append(key)
        self.length += len(key)


@pytest.mark.parametrize("way", list(WAYS))
def test_an_object_among_the_inputs_is_as_it_was(way: str) -> None:
    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, x: Tensor, cache: Cache, table: dict[str, Any]) -> Tensor:
            cache.update(x)
            table["seen"] = x
            table["numbers"].add_(1)
            logits: Tensor = self.net(x)
            return logits

    cache, table = Cache(), {"numbers": torch.zeros(2, dtype=torch.int64)}
    inputs = {"x": X, "cache": cache, "table": table}
    model = Decoder()
    if way == "step":
        YDrop(model).step(inputs, Y)
    else:
        layer_conductance(model, inputs, Y, n_steps=3)
    assert (cache.keys, cache.length) == ([], 0)
    assert list(table) == ["numbers"]
    assert table["numbers"].tolist() == [0, 0]


class WritesToItsInput(nn.Module):
    tell: Any

    def __init__(self) -> None:
        super().__init__()
        self.net = network()
        self.tell = recorder()

    def forward(self, x: Tensor) -> Tensor:
        self.tell(float(x[0, 0]))
        logits: Tensor = self.net(x.mul_(2))
        return logits


@pytest.mark.filterwarnings("ignore:monte_carlo was given")
def test_every_pass_sees_inputs_as_they_were_given() -> None:
    model, x = WritesToItsInput(), X.clone()
    monte_carlo(model, x, 5, max_rows=1)
    removal_curve(model, [(x, Y)], fractions=(0, 0.5), repeats=2)
    assert set(model.tell.seen) == {float(X[0, 0])}
    assert torch.equal(x, X)


# A snapshot by itself.


def test_a_snapshot_learns_what_a_pass_writes() -> None:
    linear, norm = nn.Linear(2, 2), nn.BatchNorm1d(2)
    module = nn.Sequential(linear, norm)
    module.register_buffer("own", torch.zeros(2))
    observations = Observations()
    snapshot = Snapshot([module], observations, learning=True)
    snapshot.take()
    module(torch.randn(4, 2))
    linear.weight.data.mul_(2)
    snapshot.put_back()
    statistics = [norm.running_mean, norm.running_var, norm.num_batches_tracked, linear.weight]
    assert observations.written == {id(each) for each in statistics}
    assert observations.unguarded == []
    assert not observations.parameters


def test_cycles_end() -> None:
    module = nn.Linear(2, 2)
    module.itself = [module]  # type: ignore[assignment]
    module.itself.append(module.itself)  # type: ignore[union-attr, operator]
    snapshot = Snapshot([module])
    snapshot.take()
    module.itself.append(1)  # type: ignore[union-attr, operator]
    snapshot.put_back()
    assert len(module.itself) == 2  # type: ignore[arg-type]
