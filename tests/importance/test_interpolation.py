import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_ydrop import ConfigurationError
from lightning_ydrop.importance.arrangement import Batch, arrange
from lightning_ydrop.importance.interpolation import find_module, noting_what_ran, outputs_of, putting_out

IDS = torch.randint(0, 9, (6, 4))


class Tokens(nn.Module):
    def __init__(self, batch_dim: int = 0) -> None:
        super().__init__()
        self.embedding, self.head, self.batch_dim = nn.Embedding(9, 3), nn.Linear(3, 5), batch_dim

    def forward(self, ids: Tensor) -> Any:
        return self.head(self.embedding(ids).mean(1 - self.batch_dim))


def batch_of(model: nn.Module, ids: Tensor, batch_dim: int = 0) -> Batch:
    return arrange(model, inspect.signature(model.forward), ids, interpolate=False, batch_dim=batch_dim)


@pytest.mark.parametrize("rows", [6, 1])
@pytest.mark.parametrize("batch_dim", [0, 1])
def test_the_outputs_for_the_samples_are_found(rows: int, batch_dim: int) -> None:
    model = Tokens(batch_dim)
    ids = IDS[:rows]
    module, output = outputs_of(
        model, "embedding", batch_of(model, ids if batch_dim == 0 else ids.T, batch_dim), batch_dim
    )
    assert module is model.embedding
    assert torch.equal(output, model.embedding(ids))
    assert not output.requires_grad
    assert not model.embedding._forward_hooks


def test_a_module_puts_out_what_it_is_told_to() -> None:
    model = Tokens()
    other = torch.randn(6, 4, 3)
    with putting_out(model.embedding, other):
        assert torch.equal(model(IDS), model.head(other.mean(1)))
    with pytest.raises(RuntimeError, match="out of order"), putting_out(model.embedding, other):
        raise RuntimeError("out of order")
    assert torch.equal(model(IDS), model.head(model.embedding(IDS).mean(1)))


def test_hooks_go_when_the_model_raises() -> None:
    model = Tokens()
    with pytest.raises(IndexError):
        outputs_of(model, "embedding", batch_of(model, IDS + 9), 0)
    assert not model.embedding._forward_hooks


@pytest.mark.parametrize("name", ["", "embeddings", "head.weight"])
def test_a_name_that_is_no_modules_is_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^layer_conductance\(interpolate_at=.*: embedding, head\."):
        find_module("layer_conductance", Tokens(), name)


def test_a_compiled_part_keeps_its_name() -> None:
    compiled: Any = torch.compile(Tokens(), backend="eager")
    model = nn.Sequential(compiled)
    assert find_module("YDrop", model, "0.embedding") is compiled.embedding


def test_of_many_modules_embeddings_come_first_and_the_rest_is_counted() -> None:
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(40)), nn.Embedding(3, 2))
    with pytest.raises(ConfigurationError, match=r"Sequential: 40, 0, 1, .*, 28 and 11 more\. Pass the full name"):
        find_module("YDrop", model, "embedding")


def test_what_has_run_before_a_module_is_noted() -> None:
    model, ran = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), []
    for name, module in model.named_children():
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    with noting_what_ran(model, "1", ran) as noted:
        model(torch.ones(1, 2))
    assert noted == {"0", "1"}
    model(torch.ones(1, 2))
    assert noted == {"0", "1"}
    with noting_what_ran(model, None, ran) as noted:
        model(torch.ones(1, 2))
    assert noted == set()
