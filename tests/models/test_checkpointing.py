import functools
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils.checkpoint as checkpoints
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential
from torch.utils.checkpoint import checkpoint as run_again

from lightning_ydrop import ConductanceDropout, YDrop, convert_dropout
from lightning_ydrop.models.checkpointing import (
    SavedMemory,
    affordable_rows,
    checkpoint_outputs,
    may_checkpoint,
    seeing_checkpoints,
)
from lightning_ydrop.models.state import leaving_no_trace
from lightning_ydrop.torch_internals import memory_of

X, Y = torch.randn(24, 16, generator=torch.Generator().manual_seed(1)), torch.arange(24) % 3


class Peak:
    """The most bytes that are saved for a backward pass at any time, beside parameters."""

    def __init__(self, model: nn.Module) -> None:
        self.others = {memory_of(each) for each in model.parameters()}
        self.holders: dict[int, int] = {}
        self.bytes = self.peak = 0

    def of(self, call: Callable[[], object]) -> int:
        with torch.autograd.graph.saved_tensors_hooks(self.pack, lambda held: held[0]):
            result = call()
        del result
        return self.peak

    def pack(self, tensor: Tensor) -> Any:
        held = _Held([tensor])
        place, size = memory_of(tensor), tensor.untyped_storage().nbytes()
        if place in self.others:
            return held
        if self.holders.get(place, 0) == 0:
            self.bytes += size
            self.peak = max(self.peak, self.bytes)
        self.holders[place] = self.holders.get(place, 0) + 1
        weakref.finalize(held, self.release, place, size)
        return held

    def release(self, place: int, size: int) -> None:
        self.holders[place] -= 1
        if self.holders[place] == 0:
            self.bytes -= size


class _Held(list[Tensor]):
    pass


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.act, self.b = nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(self.act(self.a(x)))

    def inner(self, x: Tensor) -> Tensor:
        return x + self.b(self.act(self.a(x)))


Once = Callable[[Block, Tensor, bool], Tensor]
ONCE: dict[str, Once] = {
    "module": lambda block, x, reentrant: checkpoint(block, x, use_reentrant=reentrant),
    "forward": lambda block, x, reentrant: checkpoint(block.forward, x, use_reentrant=reentrant),
    "method": lambda block, x, reentrant: checkpoint(block.inner, x, use_reentrant=reentrant),
    "lambda": lambda block, x, reentrant: checkpoint(lambda x: block(x), x, use_reentrant=reentrant),
    "lambda of parts": lambda block, x, reentrant: checkpoint(
        lambda x: x + block.b(block.act(block.a(x))), x, use_reentrant=reentrant
    ),
    "partial": lambda block, x, reentrant: checkpoint(functools.partial(block), x, use_reentrant=reentrant),
    "class": lambda block, x, reentrant: checkpoint(
        functools.partial(Block.forward, block), x, use_reentrant=reentrant
    ),
}


class Network(nn.Module):
    """It checkpoints in training alone, in its code."""

    def __init__(self, kind: str, reentrant: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(6)])
        self.drop, self.head = ConductanceDropout(), nn.Linear(16, 3)
        self.kind, self.reentrant, self.saves = kind, reentrant, True

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.saves:
            x = x.requires_grad_() if self.reentrant and not x.requires_grad else x * 1
            if self.kind == "sequential":
                x = checkpoint_sequential(list(self.blocks), 3, x, use_reentrant=self.reentrant)
            else:
                for block in self.blocks:
                    x = checkpoint_of(self.kind, block, x, self.reentrant)
        else:
            for block in self.blocks:
                x = block(x)
        logits: Tensor = self.head(self.drop(x))
        return logits


def checkpoint_of(kind: str, block: Any, x: Tensor, reentrant: bool) -> Tensor:
    return ONCE[kind](block, x, reentrant)


class ByAttribute(Network):
    """As Transformers does it: a function in an attribute, behind a flag."""

    def __init__(self, kind: str, reentrant: bool = False) -> None:
        super().__init__(kind, reentrant)
        self.gradient_checkpointing = True
        self.run: Any = ONCE[kind]

    def forward(self, x: Tensor) -> Tensor:
        x = x.requires_grad_() if self.reentrant and self.training and not x.requires_grad else x * 1
        for block in self.blocks:
            saves = self.training and self.saves and self.gradient_checkpointing
            x = self.run(block, x, self.reentrant) if saves else block(x)
        logits: Tensor = self.head(self.drop(x))
        return logits


def loss_of(model: nn.Module) -> Tensor:
    return nn.functional.cross_entropy(model(X.clone()), Y)


def check_memory_and_scores(model: Any) -> None:
    model.saves = True
    ydrop = YDrop(model)
    ydrop.step(X, Y)
    in_training = Peak(model).of(lambda: loss_of(model))
    model.saves = False
    without = Peak(model).of(lambda: loss_of(model))
    model.saves = True
    at_a_time = without // 6
    peak = Peak(model).of(lambda: ydrop.step(X, Y))
    # In training, too, one block after the other keeps everything in the backward pass.
    assert peak <= in_training + at_a_time
    assert peak < without / 2
    scores = ydrop.scores["drop"].clone()
    model.saves = False
    torch.manual_seed(0)
    twin = YDrop(model)
    twin.step(X, Y)
    twin.step(X, Y)
    assert torch.allclose(scores, twin.scores["drop"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", [*ONCE, "sequential"])
def test_checkpoints_in_code_stay_on(kind: str, reentrant: bool) -> None:
    check_memory_and_scores(Network(kind, reentrant))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", list(ONCE))
def test_checkpoints_behind_an_attribute_stay_on(kind: str, reentrant: bool) -> None:
    check_memory_and_scores(ByAttribute(kind, reentrant))


def test_transformers_checkpoints_stay_on() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=6,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=20,
        num_labels=3,
    )
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config).train()
    ids, labels = torch.randint(1, 50, (24, 16)), torch.randint(3, (24,))
    convert_dropout(model)

    def engine() -> YDrop:
        return YDrop(
            model,
            interpolate_at="bert.embeddings.word_embeddings",
            forward=lambda input_ids: model(input_ids=input_ids).logits,
        )

    plain = engine()
    plain.step(ids, labels)
    expected = {name: scores.clone() for name, scores in plain.scores.items()}
    without = Peak(model).of(lambda: model(input_ids=ids, labels=labels).loss)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # later releases have another name for it
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    in_training = Peak(model).of(lambda: model(input_ids=ids, labels=labels).loss)
    saving = engine()
    saving.step(ids, labels)
    for name, scores in saving.scores.items():
        assert torch.allclose(scores, expected[name], rtol=1e-3, atol=1e-5)
    peak = Peak(model).of(lambda: saving.step(ids, labels))
    assert peak <= in_training + without // 6
    assert all(not hasattr(layer, "__wrapped__") and "forward" not in layer.__dict__ for layer in model.modules())


@pytest.mark.parametrize("kind", list(ONCE))
def test_models_that_may_checkpoint_are_recognised(kind: str) -> None:
    assert may_checkpoint(Network(kind))
    assert may_checkpoint(ByAttribute(kind))
    assert not may_checkpoint(nn.Sequential(nn.Linear(2, 2), nn.TransformerEncoderLayer(4, 2)))


class Renamed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return run_again(torch.relu, x, use_reentrant=False)


class InHelper(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return self.helper(x)

    def helper(self, x: Tensor) -> Tensor:
        return checkpoints.checkpoint(torch.relu, x, use_reentrant=False)


class Nested(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        def inner(x: Tensor) -> Tensor:
            return checkpoint(torch.relu, x, use_reentrant=False)

        return inner(x)


def outside(x: Tensor) -> Tensor:
    return run_again(torch.relu, x, use_reentrant=False)


class InFunction(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return outside(x)


@pytest.mark.parametrize("cls", [Renamed, InHelper, Nested, InFunction])
def test_so_are_those_that_call_it_by_another_name_or_elsewhere(cls: type[nn.Module]) -> None:
    assert may_checkpoint(nn.Sequential(cls()))


class Saving(nn.Module):
    """Speaks of checkpoints in files."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["on_save_checkpoint"] = self.load_checkpoint

    def load_checkpoint(self, checkpoint: str) -> Any:
        return torch.load(checkpoint)


def test_checkpoints_in_files_are_others() -> None:
    assert not may_checkpoint(Saving())


def test_checkpointed_modules_are_seen() -> None:
    for kind in ("module", "forward", "lambda", "partial", "class"):
        model = Network(kind)
        with seeing_checkpoints(model) as inside:
            model(X)
        assert inside == list(model.blocks)
    with seeing_checkpoints(model.eval()) as inside:
        model(X)
    assert inside == []
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_checkpointed_outputs_keep_inputs_alone_until_they_are_given_back() -> None:
    model = Network("module").eval()
    with leaving_no_trace([model]):
        plain = Peak(model).of(lambda: model(X))
        checkpoint_outputs(model.blocks)
        assert Peak(model).of(lambda: model(X)) < plain / 4
    assert Peak(model).of(lambda: model(X)) == plain


def test_saved_memory_is_counted_once_and_without_parameters() -> None:
    linear, x = nn.Linear(16, 4), X.clone()
    memory = SavedMemory(linear)
    with memory.counted():
        kept = [linear(x), linear(x), linear(x[:2])]
    assert len(kept) == 3
    assert memory.size == X.numel() * 4


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((100, 100, 100, 10, 0), 1.0),  # training saves nothing
        ((50, 100, 100, 0, 0), 0.5),
        ((50, 80, 80, 10, 0), 0.5),
        ((50, 100, 50, 0, 10), 1.0),
        ((50, 100, 50, 30, 10), 2 / 3),
        ((50, 100, 110, 0, 10), 0.5),  # checkpoints of parts keep more than those of training
        ((50, 40, 50, 20, 0, 4), 65 / 75),  # in evaluation mode too
        ((50, 40, 50, 5, 0, 4), 1.0),
    ],
)
def test_rows_are_as_many_as_the_memory_of_training_takes(arguments: Any, expected: float) -> None:
    assert affordable_rows(*arguments) == pytest.approx(expected)
