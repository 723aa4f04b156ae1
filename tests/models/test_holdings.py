import functools
import threading
from collections import deque, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_ydrop import ConfigurationError, NegativeLoss, Objective, OutputSum, PredictedLogit, TargetLogit
from lightning_ydrop.models.holdings import MOST_ENTRIES, _reachable, modules_held

META = torch.device("meta")
CPU = torch.device("cpu")
CRITERION = nn.CrossEntropyLoss(reduction="none")
Pair = namedtuple("Pair", ["first", "second"])


class Own(Objective):
    """A user's objective that holds whatever it is told."""

    def __init__(self, **held: Any) -> None:
        vars(self).update(held)

    def __call__(self, output: Tensor, target: Any) -> Tensor:
        return output.sum(1)


class Callee:
    def __init__(self, loss: Any) -> None:
        self.loss = loss

    def __call__(self, output: Tensor, target: Tensor) -> Any:
        return self.loss(output, target)

    def method(self, output: Tensor, target: Tensor) -> Any:
        return self.loss(output, target)


class OnItsClass(Objective):
    criterion = CRITERION

    def __call__(self, output: Tensor, target: Any) -> Tensor:
        return -self.criterion(output, target)


class NamesAGlobal(Objective):
    def __call__(self, output: Tensor, target: Any) -> Tensor:
        return -CRITERION(output, target)


class OfAClass:
    criterion = CRITERION

    @classmethod
    def loss(cls, output: Tensor, target: Tensor) -> Any:
        return cls.criterion(output, target)


class ByOthers(Objective):
    @property
    def chosen(self) -> nn.Module:
        return CRITERION

    def __call__(self, output: Tensor, target: Any) -> Tensor:
        return -self.chosen(output, target)


class ByAStaticMethod(Objective):
    @staticmethod
    def static(output: Tensor, target: Tensor) -> Any:
        return CRITERION(output, target)

    def __call__(self, output: Tensor, target: Any) -> Tensor:
        return -self.static(output, target)


@dataclass
class Record:
    loss: nn.Module


def uses_a_global(output: Tensor, target: Tensor) -> Any:
    return CRITERION(output, target)


def calls_another(output: Tensor, target: Tensor) -> Any:
    return uses_a_global(output, target)


def inside_a_comprehension(output: Tensor, target: Tensor) -> Any:
    return [CRITERION(row[None], label[None]) for row, label in zip(output, target, strict=True)]


def with_defaults(output: Tensor, target: Tensor, first: Any = CRITERION, *, second: Any = None) -> Any:
    return first(output, target)


def with_keyword_default(output: Tensor, target: Tensor, *, second: Any = CRITERION) -> Any:
    return second(output, target)


def wrapped(loss: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(loss)
    def call(*args: Any) -> Any:
        return loss(*args)

    return call


def in_a_closure(criterion: Any) -> Callable[..., Any]:
    return lambda output, target: criterion(output, target)


def with_an_attribute() -> Callable[..., Any]:
    def loss(output: Tensor, target: Tensor) -> Any:
        return getattr(loss, "of")(output, target)  # noqa: B009

    loss.of = CRITERION  # type: ignore[attr-defined]
    return loss


HOLDERS: dict[str, Callable[[], Objective]] = {
    "itself": lambda: NegativeLoss(CRITERION),
    "bound method of the module": lambda: NegativeLoss(CRITERION.forward),
    "bound method of an object": lambda: NegativeLoss(Callee(CRITERION).method),
    "method of a class": lambda: NegativeLoss(OfAClass.loss),
    "callable object": lambda: NegativeLoss(Callee(Callee(CRITERION))),
    "partial": lambda: NegativeLoss(functools.partial(CRITERION)),
    "argument of a partial": lambda: NegativeLoss(functools.partial(lambda loss, o, t: loss(o, t), CRITERION)),
    "keyword of a partial": lambda: NegativeLoss(functools.partial(with_keyword_default, second=CRITERION)),
    "closure": lambda: NegativeLoss(in_a_closure(CRITERION)),
    "closure of a closure": lambda: NegativeLoss(wrapped(wrapped(in_a_closure(CRITERION)))),
    "closure over an object": lambda: NegativeLoss(in_a_closure(Callee(CRITERION))),
    "global": lambda: NegativeLoss(uses_a_global),
    "global of a function": lambda: NegativeLoss(calls_another),
    "comprehension": lambda: NegativeLoss(inside_a_comprehension),
    "default": lambda: NegativeLoss(with_defaults),
    "keyword default": lambda: NegativeLoss(with_keyword_default),
    "attribute of a function": lambda: NegativeLoss(with_an_attribute()),
    "attribute": lambda: Own(loss=CRITERION),
    "list": lambda: Own(losses=[0.5, CRITERION]),
    "dictionary": lambda: Own(losses={"main": (0.5, CRITERION)}),
    "key": lambda: Own(weights={CRITERION: 0.5}),
    "set": lambda: Own(losses={CRITERION}),
    "deque": lambda: Own(losses=deque([CRITERION])),
    "named tuple": lambda: Own(losses=Pair(None, [CRITERION])),
    "dataclass": lambda: Own(settings=Record(CRITERION)),
    "namespace": lambda: Own(settings=SimpleNamespace(loss=CRITERION)),
    "object": lambda: Own(settings=Callee(CRITERION)),
    "objective": lambda: Own(inner=NegativeLoss(CRITERION)),
    "class attribute": OnItsClass,
    "global of a method": NamesAGlobal,
    "property": ByOthers,
    "static method": ByAStaticMethod,
    "twice": lambda: Own(first=CRITERION, second=[CRITERION]),
}


@pytest.mark.parametrize("name", list(HOLDERS))
def test_a_module_is_found_wherever_it_is_held(name: str) -> None:
    found = HOLDERS[name]().modules()
    assert len(found) == 1
    assert found[0] is CRITERION


def test_all_modules_are_found_in_order_and_without_their_children() -> None:
    first, second, third = nn.Sequential(nn.Linear(2, 2)), nn.MSELoss(), nn.L1Loss()
    found = Own(a=first, b={"x": [second]}, c=in_a_closure(third)).modules()
    assert [id(module) for module in found] == [id(first), id(second), id(third)]


@pytest.mark.parametrize(
    "objective",
    [
        *(TargetLogit(), PredictedLogit(), OutputSum(), NegativeLoss(F.cross_entropy)),
        *(NegativeLoss(lambda output, target: F.mse_loss(output, target, reduction="none")), Own(name="x", n=3)),
    ],
)
def test_where_no_module_is_held_none_is_found(objective: Objective) -> None:
    assert objective.modules() == []
    assert objective.on(META) is objective


class NamesAnother(nn.Module):
    def loss(self, output: Tensor, target: Tensor) -> Any:
        return CRITERION(output, target)


def test_a_method_of_a_module_is_searched_too() -> None:
    module = NamesAnother()
    assert NegativeLoss(module.loss).modules() == [module, CRITERION]


def test_functions_of_other_files_are_searched_but_those_of_frameworks_are_not() -> None:
    other: dict[str, Any] = {"criterion": CRITERION, "__name__": "losses"}
    exec("def loss(output, target): return criterion(output, target)", other)
    assert NegativeLoss(in_a_closure(other["loss"])).modules() == [CRITERION]
    other["loss"].__module__ = "torch.nn.losses"
    assert NegativeLoss(in_a_closure(other["loss"])).modules() == []


@pytest.mark.parametrize("objective", [TargetLogit(), OutputSum(), NegativeLoss(F.cross_entropy), OnItsClass()])
def test_the_search_is_short(objective: Objective) -> None:
    assert len(list(_reachable(objective, into_code=True))) < 20


class Lazy(ModuleType):
    pass


class Meta(type):
    pass


class WithWeights(metaclass=Meta):
    alpha = torch.ones(3)


def test_files_and_classes_are_not_searched() -> None:
    lazy: Any = Lazy("library")
    lazy.criterion, lazy.alpha = CRITERION, torch.ones(3)
    objective = Own(library=lazy, kind=WithWeights)
    assert objective.modules() == []
    assert objective.on(META) is objective


def test_what_holds_itself_ends_the_search() -> None:
    objective = Own(loss=CRITERION)
    vars(objective)["again"] = [objective, {"more": objective}]
    assert objective.modules() == [CRITERION]


def test_a_variable_that_is_not_assigned_yet_holds_nothing() -> None:
    objective = NegativeLoss(lambda output, target: later(output, target))
    assert objective.modules() == []
    later = CRITERION
    assert objective.modules() == [later]


def test_frameworks_and_data_are_not_searched() -> None:
    linear = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(linear.parameters(), lr=0.1)
    optimizer.model = linear  # type: ignore[attr-defined]
    assert Own(optimizer=optimizer).modules() == []
    assert Own(data=[linear] * MOST_ENTRIES).modules() == [linear]
    assert Own(data=[linear] * (MOST_ENTRIES + 1)).modules() == []
    assert Own(data=dict.fromkeys(range(MOST_ENTRIES + 1), linear)).modules() == []
    assert modules_held(F.cross_entropy) == []


def test_a_compiled_loss_is_found() -> None:
    assert NegativeLoss(torch.compile(in_a_closure(CRITERION))).modules() == [CRITERION]


def weights() -> Tensor:
    return torch.tensor([1.0, 2.0, 3.0])


def weighted() -> nn.CrossEntropyLoss:
    return nn.CrossEntropyLoss(weight=weights(), reduction="none")


class Focal(nn.Module):
    """Keeps its weights in a plain attribute, as many a loss on the web does."""

    def __init__(self, alpha: Any) -> None:
        super().__init__()
        self.alpha = alpha

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target, weight=self.alpha, reduction="none")


class Learned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.inner = nn.ModuleList([weighted()])
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.plain = {"alpha": torch.ones(3)}

    def forward(self, output: Tensor, target: Tensor) -> Any:
        return self.inner[0](output * self.scale * self.plain["alpha"] * self.frozen, target)


MOVED: dict[str, tuple[Callable[[], Objective], Callable[[Any], list[Tensor]]]] = {
    "module": (lambda: NegativeLoss(weighted()), lambda held: [held.loss.weight]),
    "module with parameters": (
        lambda: NegativeLoss(Learned()),
        lambda held: [*held.loss.parameters(), *held.loss.buffers(), held.loss.plain["alpha"]],
    ),
    "module with a plain tensor": (lambda: NegativeLoss(Focal(weights())), lambda held: [held.loss.alpha]),
    "module with a partial": (
        lambda: NegativeLoss(Focal(functools.partial(torch.mul, weights()))),
        lambda held: [held.loss.alpha.args[0]],
    ),
    "bound method of a module": (
        lambda: NegativeLoss(weighted().forward),
        lambda held: [held.loss.__self__.weight],
    ),
    "bound method of an object": (
        lambda: NegativeLoss(Callee([weighted()]).method),
        lambda held: [held.loss.__self__.loss[0].weight],
    ),
    "partial": (
        lambda: NegativeLoss(functools.partial(F.cross_entropy, weight=weights(), reduction="none")),
        lambda held: [held.loss.keywords["weight"]],
    ),
    "argument of a partial": (
        lambda: NegativeLoss(functools.partial(lambda w, o, t: o @ w, weights())),
        lambda held: [held.loss.args[0]],
    ),
    "module in a partial": (
        lambda: NegativeLoss(functools.partial(weighted())),
        lambda held: [held.loss.func.weight],
    ),
    "attribute": (lambda: Own(alpha=weights()), lambda held: [held.alpha]),
    "parameter": (lambda: Own(alpha=nn.Parameter(weights())), lambda held: [held.alpha]),
    "not a leaf": (lambda: Own(alpha=nn.Parameter(weights()) * 2), lambda held: [held.alpha]),
    "containers": (
        lambda: Own(a=[{"x": (weights(),)}], b=Pair(weights(), 1), c=deque([weights()]), d={0: weighted()}),
        lambda held: [held.a[0]["x"][0], held.b.first, held.c[0], held.d[0].weight],
    ),
    "objects": (
        lambda: Own(a=Record(weighted()), b=SimpleNamespace(w=weights()), c=Callee(weights())),
        lambda held: [held.a.loss.weight, held.b.w, held.c.loss],
    ),
    "objective in an objective": (lambda: Own(inner=NegativeLoss(weighted())), lambda held: [held.inner.loss.weight]),
}


@pytest.mark.parametrize("name", list(MOVED))
def test_what_is_held_is_copied_to_the_device(name: str) -> None:
    make, tensors_of = MOVED[name]
    objective = make()
    before = tensors_of(objective)
    there = objective.on(META)
    assert type(there) is type(objective)
    assert {tensor.device for tensor in tensors_of(there)} == {META}
    assert all(a is b and a.device == CPU for a, b in zip(before, tensors_of(objective), strict=True))
    shapes = [(tensor.shape, tensor.dtype, type(tensor)) for tensor in before]
    assert [(tensor.shape, tensor.dtype, type(tensor)) for tensor in tensors_of(there)] == shapes
    assert all(tensor.is_leaf for tensor in tensors_of(there))
    assert there.on(META) is there
    assert objective.on(CPU) is objective
    assert [type(module) for module in there.modules()] == [type(module) for module in objective.modules()]
    assert not any(mine is theirs for mine, theirs in zip(there.modules(), objective.modules(), strict=True))


def test_a_copy_computes_what_the_original_does() -> None:
    output, target = torch.randn(4, 3), torch.tensor([0, 2, 1, 1])
    for loss in (Learned(), Learned().forward, functools.partial(F.cross_entropy, weight=weights(), reduction="none")):
        on_meta = NegativeLoss(loss).on(META)
        assert on_meta(output.to(META), target.to(META)).device == META
    # From another device to the CPU, with values: what was on the CPU is taken as it is.
    mixed = Own(here=weighted(), there=torch.ones(3, device=META))
    with pytest.raises(ConfigurationError, match="Cannot copy out of meta tensor"):
        mixed.on(CPU)


def test_what_a_module_is_stays_as_it_was() -> None:
    loss = Learned().eval()
    there: Any = NegativeLoss(loss).on(META)
    assert not there.loss.training
    assert [each.requires_grad for each in there.loss.parameters()] == [True, False]
    assert [name for name, _ in there.loss.named_modules()] == [name for name, _ in loss.named_modules()]
    assert there.modules() == [there.loss]


def test_a_module_that_moves_shares_no_tensor_with_the_copy() -> None:
    loss = Learned()
    loss.scale = nn.Parameter(torch.ones(3, device=META))
    there: Any = NegativeLoss(loss).on(META)
    assert there.loss.scale.untyped_storage()._cdata != loss.scale.untyped_storage()._cdata


def test_only_what_leads_to_a_move_is_copied() -> None:
    calls: list[str] = []
    here = nn.Linear(2, 2, device=META)
    lock = threading.Lock()  # cannot be copied
    objective = Own(alpha=weights(), calls=calls, here=here, loss=in_a_closure(weights()), lock=lock, name="x")
    there: Any = objective.on(META)
    assert there.alpha.device == META
    for name in ("calls", "here", "loss", "lock", "name"):
        assert getattr(there, name) is getattr(objective, name)


def test_a_module_on_the_device_keeps_its_plain_tensors_where_they_are() -> None:
    module = nn.Linear(3, 3, device=META)
    module.example_input_array = weights()
    objective = NegativeLoss(module)
    assert objective.on(META) is objective


def test_what_is_shared_stays_shared() -> None:
    weight, loss = weights(), weighted()
    parent = nn.Sequential(loss)
    objective = Own(a=weight, b=[weight], parent=parent, child=loss)
    vars(objective)["method"] = functools.partial(Own.__call__, objective)
    there: Any = objective.on(META)
    assert there.a is there.b[0]
    assert there.parent[0] is there.child
    assert there.method.args[0] is there


@pytest.mark.skipif(torch.__version__ < "2.8", reason="older releases ask for a driver")
@pytest.mark.parametrize("name", list(MOVED))
def test_it_moves_to_a_gpu(name: str) -> None:
    make, tensors_of = MOVED[name]
    with FakeTensorMode(allow_non_fake_inputs=False):
        there = make().on(torch.device("cuda"))
        assert {str(tensor.device) for tensor in tensors_of(there)} == {"cuda:0"}
        assert there.on(torch.device("cuda")) is there  # a device without a number is any of its kind
        assert there.on(torch.device("cuda:0")) is there
        further = there.on(torch.device("cuda:1"))
        assert {str(tensor.device) for tensor in tensors_of(further)} == {"cuda:1"}


def test_what_cannot_be_copied_is_refused() -> None:
    loss: Any = weighted()
    loss.lock = threading.Lock()
    with pytest.raises(ConfigurationError, match=r"NegativeLoss\(loss=CrossEntropyLoss\(\)\) was given, which holds"):
        NegativeLoss(loss).on(META)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_a_scripted_loss_is_moved() -> None:
    traced: Any = torch.jit.trace(weighted(), (torch.randn(2, 3), torch.tensor([0, 1])))
    there: Any = NegativeLoss(traced).on(META)
    assert [tensor.device for tensor in there.loss.buffers()] == [META]
    assert [tensor.device for tensor in traced.buffers()] == [CPU]
