"""Trained models go where the same models with nn.Dropout go."""

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ydrop import ConductanceDropout, YDropCallback, restore_dropout
from tests.callbacks.test_ydrop import X, Y, trainer_of
from tests.networks import perceptron

DATA = DataLoader(TensorDataset(X, Y), batch_size=16)


class Ours(LightningModule):
    """A perceptron with our layers."""

    dropout: type[nn.Module] = ConductanceDropout

    def __init__(self) -> None:
        super().__init__()
        self.body = perceptron(dropout=self.dropout)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.body(x)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    test_step = validation_step

    def val_dataloader(self) -> DataLoader[Any]:
        return DATA

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Plain(Ours):
    """The same with torch's."""

    dropout = nn.Dropout


WAYS: dict[str, tuple[type[Ours], dict[str, Any]]] = {"written": (Ours, {}), "converted": (Plain, {"convert": True})}


@pytest.fixture(params=list(WAYS))
def trained(request: pytest.FixtureRequest) -> tuple[Ours, Any]:
    kind, settings = WAYS[request.param]
    net, trainer = kind(), trainer_of(YDropCallback(annealing_epochs=0, **settings), max_epochs=2)
    trainer.fit(net, DATA)
    assert any(isinstance(module, ConductanceDropout) for module in net.modules())
    return net, trainer


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_checkpoints_swap_both_ways(trained: tuple[Ours, Any], tmp_path: Path) -> None:
    net, trainer = trained
    file = str(tmp_path / "ours.ckpt")
    trainer.save_checkpoint(file)
    plain = Plain.load_from_checkpoint(file)
    assert not any(isinstance(module, ConductanceDropout) for module in plain.modules())
    assert torch.equal(plain.eval()(X), net.eval()(X))
    (ours,) = trainer.test(net, DATA, verbose=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Please add the following callbacks")
        (tested,) = trainer_of().test(Plain(), DATA, ckpt_path=file, verbose=False)
        (validated,) = trainer_of().validate(Plain(), ckpt_path=file, verbose=False)
        trainer_of(max_epochs=3).fit(Plain(), DATA, ckpt_path=file)
    assert tested["loss"] == validated["loss"] == ours["loss"]
    first = trainer_of(max_epochs=1)
    first.fit(plain.train(), DATA)
    first.save_checkpoint(tmp_path / "plain.ckpt")
    assert torch.equal(Ours.load_from_checkpoint(tmp_path / "plain.ckpt").eval()(X), plain.eval()(X))
    net.load_state_dict(plain.state_dict(), strict=True)
    plain.load_state_dict(net.state_dict(), strict=True)


def test_exported_programs_bear_no_trace(trained: tuple[Ours, Any]) -> None:
    body = trained[0].body.eval()
    program = torch.export.export(body, (X,))
    assert torch.allclose(program.module()(X), body(X))
    assert "drop" not in str(program.graph)
    assert sorted(program.state_dict) == sorted(perceptron(dropout=nn.Dropout).state_dict())
    assert not program.constants
    assert not list(program.buffers())


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)  # the exporter's
def test_onnx_models_bear_no_trace(trained: tuple[Ours, Any], tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    import onnx
    from onnx.reference import ReferenceEvaluator

    body, file = trained[0].body.eval(), str(tmp_path / "body.onnx")
    torch.onnx.export(body, (X,), file, dynamo=True, external_data=False)
    model = onnx.load(file)
    assert not any("Dropout" in node.op_type for node in model.graph.node)
    (name,) = (each.name for each in model.graph.input)
    (output,) = ReferenceEvaluator(model).run(None, {name: X.numpy()})
    assert torch.allclose(torch.as_tensor(output), body(X), atol=1e-5)


def test_a_converted_model_is_restored_to_what_it_was() -> None:
    net = Plain()
    before = [type(module) for module in net.modules()]
    trainer_of(YDropCallback(annealing_epochs=0, convert=True), max_epochs=1).fit(net, DATA)
    expected = net.eval()(X)
    restore_dropout(net)
    assert [type(module) for module in net.modules()] == before
    assert torch.equal(net(X), expected)


def test_models_and_callbacks_can_be_copied(trained: tuple[Ours, Any]) -> None:
    net, trainer = trained
    net.trainer = None  # which nobody can pickle
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(twin.eval()(X), net.eval()(X))
    callback = trainer.callbacks[0]
    twin = pickle.loads(pickle.dumps(callback))
    assert twin.state_dict()["steps_taken"] == callback.state_dict()["steps_taken"] == 8
