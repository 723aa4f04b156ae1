import copy
import io
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from lightning_ydrop.torch_internals import (
    NO_HOOKS,
    attributes_of_script,
    base_of,
    caches_off,
    compiled_graph,
    copy_each,
    copy_on_write,
    defaults_kept,
    global_hooks_off,
    has_global_hooks,
    is_compiled,
    is_untouched,
    memory_of,
    recorded_graph,
    same_memory,
    set_attribute_of_script,
    set_attributes,
    set_class,
    set_flag,
    tensor_hooks_off,
    uncompiled,
    unshared_before_resizing,
    without_compilation,
)


def test_same_memory_is_no_view_and_passes_gradients_on() -> None:
    x = torch.ones(3, requires_grad=True)
    inner = x * 2
    outer = same_memory(inner)
    assert outer.data_ptr() == inner.data_ptr()
    assert not outer._is_view()
    outer.add_(1)  # of a view, this would change the graph of what it is a view of
    assert type(inner.grad_fn).__name__ == "MulBackward0"
    (of_outer,) = torch.autograd.grad(outer.sum(), [outer], retain_graph=True)
    (of_x,) = torch.autograd.grad(outer.sum(), [x])
    assert torch.equal(of_outer, torch.ones(3))
    assert torch.equal(of_x, torch.full((3,), 2.0))


def test_a_view_would_change_the_graph_of_its_base() -> None:
    inner = torch.ones(3, requires_grad=True) * 2
    inner.view(inner.shape).add_(1)
    assert type(inner.grad_fn).__name__ != "MulBackward0"


def test_tensors_are_copied_in_one_operation() -> None:
    targets, sources = [torch.zeros(2), torch.zeros(3)], [torch.ones(2), torch.full((3,), 2.0)]
    copy_each(targets, sources)
    assert [each.tolist() for each in targets] == [[1, 1], [2, 2, 2]]


def test_a_row_knows_its_tensor_and_a_copy_of_it_none() -> None:
    tensor = torch.zeros(2, 3, 4)
    assert base_of(tensor[1, 2]) is tensor
    for made in (
        torch.zeros(4),
        tensor[1, 2].clone(),
        copy.deepcopy(tensor)[1, 2].clone(),
        copy.deepcopy(tensor[1, 2]),
    ):
        assert base_of(made) is None


def test_a_copy_on_write_shares_until_one_is_written_to() -> None:
    tensor = torch.zeros(4)
    copied = copy_on_write(tensor)
    assert copied is not None
    assert memory_of(copied) != memory_of(tensor)  # two storages, one memory
    assert is_untouched(tensor)
    tensor.data.add_(1)  # past the version counter
    assert tensor._version == 0
    assert not is_untouched(tensor)
    assert tensor.tolist() == [1] * 4
    assert copied.tolist() == [0] * 4


def test_reading_leaves_memory_shared_and_asking_for_it_does_not() -> None:
    tensor = torch.zeros(4)
    copied = copy_on_write(tensor)
    assert (tensor + 1).sum() == 4
    assert is_untouched(tensor)
    tensor.data_ptr()
    assert not is_untouched(tensor)
    assert copied is not None


def test_the_last_that_shares_memory_takes_it_back_without_a_copy() -> None:
    tensor = torch.zeros(4)
    place = tensor.data_ptr()
    copied = copy_on_write(tensor)
    del copied
    assert tensor.data_ptr() == place
    assert not is_untouched(tensor)
    tensor.resize_(100).fill_(1)  # torch fails here where memory is still marked as shared
    assert tensor.sum() == 100


@pytest.mark.parametrize("share", [False, True])
def test_memory_that_torch_cannot_share_is_not_shared(share: bool) -> None:
    file = io.BytesIO()
    torch.save(torch.zeros(4), file)
    file.seek(0)
    shown = torch.zeros(4)
    shown.numpy()
    for tensor in (
        torch.load(file),  # to write to it while it is shared would crash the process
        shown,
        torch.frombuffer(bytearray(16), dtype=torch.float32),
        torch.zeros(4).share_memory_() if share else torch.empty(0),
        torch.eye(2).to_sparse(),
        torch.empty(2, device="meta"),
    ):
        assert copy_on_write(tensor) is None
        if tensor.layout == torch.strided and not tensor.is_meta and len(tensor):
            assert not tensor.untyped_storage().resizable() or tensor.is_shared()
            tensor.add_(1)


def test_attributes_are_exchanged_past_a_modules_own_setattr() -> None:
    class Stubborn(nn.Module):
        def __setattr__(self, name: str, value: Any) -> None:
            if name != "training":
                raise AssertionError
            super().__setattr__(name, value)

    module = Stubborn.__new__(Stubborn)
    nn.Module.__init__(module)
    former = module.__dict__
    set_attributes(module, former | {"count": 1})
    assert module.count == 1
    set_attributes(module, former)
    assert module.__dict__ is former
    assert not hasattr(module, "count")
    set_class(module, nn.Module)
    assert type(module) is nn.Module


def test_a_flag_is_an_entry_of_a_modules_dictionary() -> None:
    module = nn.Linear(2, 2)
    set_flag(module, False)
    assert module.training is False
    module.train()
    assert module.__dict__["training"] is True


def test_a_registry_that_takes_no_hooks() -> None:
    module = nn.Linear(2, 2)
    calls: list[int] = []
    module.__dict__["_backward_hooks"] = NO_HOOKS
    module.__dict__["_backward_pre_hooks"] = NO_HOOKS
    handle = module.register_full_backward_hook(lambda *_: calls.append(1))
    module.register_full_backward_pre_hook(lambda *_: calls.append(1))
    module(torch.ones(1, 2, requires_grad=True)).sum().backward()
    handle.remove()
    assert not NO_HOOKS
    assert calls == []


def test_every_backward_hook_of_a_module_is_in_one_of_two_registries() -> None:
    registries = {name for name in nn.Module().__dict__ if "hooks" in name and "backward" in name}
    assert registries == {"_backward_hooks", "_backward_pre_hooks"}


def test_compiled_modules_are_known_and_found() -> None:
    plain = nn.Sequential(nn.Linear(2, 2))
    compiled: Any = torch.compile(plain, backend="eager")
    assert uncompiled(compiled) is plain
    assert uncompiled(plain) is plain
    assert is_compiled(compiled)
    assert not is_compiled(plain)
    plain.compile(backend="eager")
    assert is_compiled(plain)
    name, _ = next(iter(nn.Sequential(compiled).named_parameters()))
    assert name == "0._orig_mod.0.weight"
    assert without_compilation(name) == "0.0.weight"


class Scripted(nn.Module):
    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.register_buffer("total", torch.zeros(()))
        self.count = 3

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return self.linear(x) + self.total


@pytest.mark.parametrize("is_frozen", [False, True])
def test_attributes_of_torchscript_lie_outside_of_its_dictionary(is_frozen: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        script: Any = torch.jit.script(Scripted().eval())
        script = torch.jit.freeze(script, preserved_attrs=["count"]) if is_frozen else script
    attributes = attributes_of_script(script)
    assert attributes["count"] == 3
    assert "total" in attributes or is_frozen
    assert "count" not in script.__dict__
    script(torch.ones(1, 2))
    assert attributes_of_script(script)["count"] == 4
    set_attribute_of_script(script, "count", 3)
    assert script.count == 3


def test_the_cache_of_autocast_keeps_nothing_of_passes_without_gradients() -> None:
    linear = nn.Linear(2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        with caches_off(), torch.no_grad():
            assert not torch.is_autocast_cache_enabled()
            linear(torch.ones(1, 2))
        assert torch.is_autocast_cache_enabled()
        linear(torch.ones(1, 2)).sum().backward()
    assert linear.weight.grad is not None


def test_the_cache_of_parametrizations_is_away_and_comes_back() -> None:
    linear = parametrizations.weight_norm(nn.Linear(2, 2))
    with parametrize.cached():
        kept = linear.weight
        with caches_off():
            assert linear.weight is not kept
            with parametrize.cached():
                assert linear.weight is not kept
        assert linear.weight is kept
    assert linear.weight is not kept


def test_hooks_of_all_modules_are_off_and_come_back() -> None:
    calls: list[int] = []
    handles = [
        nn.modules.module.register_module_full_backward_hook(lambda *_: calls.append(1)),
        nn.modules.module.register_module_full_backward_pre_hook(lambda *_: calls.append(1)),
    ]
    try:
        assert has_global_hooks()
        with global_hooks_off():
            assert not has_global_hooks()
            nn.Linear(2, 2)(torch.ones(1, 2, requires_grad=True)).sum().backward()
        assert calls == []
        nn.Linear(2, 2)(torch.ones(1, 2, requires_grad=True)).sum().backward()
        assert calls == [1, 1]
    finally:
        for handle in handles:
            handle.remove()
    assert not has_global_hooks()


def by_tensor(tensor: Tensor, tell: Callable[..., None]) -> Any:
    return tensor.register_hook(tell)


def by_several(tensor: Tensor, tell: Callable[..., None]) -> Any:
    return torch.autograd.graph.register_multi_grad_hook((tensor,), tell)


def by_any(tensor: Tensor, tell: Callable[..., None]) -> Any:
    return torch.autograd.graph.register_multi_grad_hook((tensor,), tell, mode="any")


def by_leaf(tensor: Tensor, tell: Callable[..., None]) -> Any:
    leaf = tensor.detach().requires_grad_()
    handle = leaf.register_post_accumulate_grad_hook(tell)
    (leaf * 1).sum().backward()
    return handle


@pytest.mark.parametrize("register", [by_tensor, by_several, by_any, by_leaf])
def test_hooks_on_tensors_are_not_registered(register: Callable[[Tensor, Callable[..., None]], Any]) -> None:
    calls: list[int] = []

    def tell(*args: Any) -> None:
        calls.append(1)

    for is_off, expected in ((True, 0), (False, 1)):
        inner = torch.ones(2, requires_grad=True) * 2
        if is_off:
            with tensor_hooks_off() as callers:
                handle = register(inner, tell)
            assert callers == [__name__]
        else:
            handle = register(inner, tell)
        inner.sum().backward()
        handle.remove()
        assert len(calls) == expected


def test_gradients_are_not_retained() -> None:
    inner = torch.ones(2, requires_grad=True) * 2
    with tensor_hooks_off():
        inner.retain_grad()
    assert not inner.retains_grad


def test_methods_of_tensors_are_what_they_were() -> None:
    names = ("register_hook", "register_post_accumulate_grad_hook", "retain_grad", "resize_", "resize_as_")
    before = {name: (getattr(Tensor, name), name in Tensor.__dict__) for name in names}

    def fail() -> None:
        with tensor_hooks_off(), unshared_before_resizing():
            assert all(getattr(Tensor, name) != before[name][0] for name in names)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert {name: (getattr(Tensor, name), name in Tensor.__dict__) for name in names} == before


def test_shared_memory_may_be_resized() -> None:
    tensor = torch.zeros(2)
    copied = copy_on_write(tensor)
    with unshared_before_resizing():
        tensor.resize_(50).fill_(1)
    assert tensor.sum() == 50
    assert copied is not None
    assert copied.tolist() == [0, 0]


def test_defaults_come_back() -> None:
    with defaults_kept():
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
    assert torch.get_default_dtype() == torch.float32
    assert torch.zeros(1).device.type == "cpu"
    assert getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None) is None
    torch.set_default_device("meta")
    try:
        with defaults_kept():
            torch.set_default_device(None)
        assert torch.zeros(1).is_meta
    finally:
        torch.set_default_device(None)
        del torch._GLOBAL_DEVICE_CONTEXT.device_context  # as if it had never been set


def test_a_recorded_graph_takes_the_tensors_that_the_function_reads_and_differentiates() -> None:
    weight, x = nn.Parameter(torch.tensor([2.0, 3.0])), torch.ones(2)

    def slope(_: Any, x: Tensor) -> list[Tensor]:
        x = x.detach().requires_grad_()
        return list(torch.autograd.grad((weight * x**2).sum(), x))

    graph = recorded_graph(slope, [weight], x)
    (result,) = graph(torch.tensor([1.0, 10.0]), torch.tensor([1.0, 2.0]))
    assert result.tolist() == [2.0, 40.0]


@pytest.mark.slow
def test_a_compiled_graph_takes_parameters_that_change_and_are_frozen() -> None:
    weight = nn.Parameter(torch.tensor([2.0, 3.0]))
    graph = recorded_graph(lambda weight, x: [weight * x], weight, torch.ones(2))
    with torch.no_grad():
        run = compiled_graph(graph, [weight, torch.ones(2)])
        weight.add_(1)
        weight.requires_grad = False
        assert run(weight, torch.ones(2))[0].tolist() == [3.0, 4.0]
