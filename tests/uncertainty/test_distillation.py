import copy
import math
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import SumMetric

from lightning_ydrop import (
    ConductanceDropout,
    ConfigurationError,
    DropoutDistillation,
    Jumpout,
    KeyAdapter,
    YDropCallback,
)
from lightning_ydrop.analysis import prune_units
from lightning_ydrop.models.adapters import AutomaticAdapter
from lightning_ydrop.uncertainty import MonteCarloDivergence, monte_carlo
from tests.containers import ListConfig
from tests.sameness import assert_same
from tests.uncertainty.networks import Points, Small


def loader(labels: bool = True) -> DataLoader[Any]:
    return Points(labels).train_dataloader()


def trainer_of(folder: Path, **settings: Any) -> Trainer:
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(default_root_dir=folder, accelerator="cpu", **{"max_epochs": 2, **quiet, **settings})


def loss_of(distillation: DropoutDistillation, batch: Any) -> Tensor:
    """What a training step gives, without a Trainer to log it."""
    with patch.object(distillation, "log"):
        return distillation.training_step(batch, 0)


@pytest.fixture
def teacher() -> Small:
    torch.manual_seed(0)
    teacher = Small()
    for parameter in teacher.parameters():
        nn.init.normal_(parameter, std=2.0)  # far from linear: the average is not the prediction of one pass
    return teacher


def test_the_loss_is_the_cross_entropy_to_what_the_teacher_says_with_fresh_masks(teacher: Small) -> None:
    x, masks = torch.randn(5, 4), 3
    distillation = DropoutDistillation(teacher, num_masks=masks, temperature=2.0)
    torch.manual_seed(8)
    loss = loss_of(distillation, [x])
    torch.manual_seed(8)
    teacher.eval()
    hidden = teacher.net[2](teacher.net[1](teacher.net[0](x))).repeat(masks, 1)
    kept = nn.functional.dropout(hidden, 0.5)
    taught = (teacher.net[4](kept) / 2).softmax(1).view(masks, 5, 3)
    distillation.student.get_submodule("net.3").eval()
    said = (distillation.student(x) / 2).log_softmax(1)
    slow = torch.stack([-(taught[mask] * said).sum(1).mean() for mask in range(masks)]).mean()
    assert torch.allclose(loss, 4 * slow)
    loss.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_a_student_that_can_say_anything_says_the_average_over_masks(teacher: Small) -> None:
    x = torch.randn(4, 4)

    class Table(nn.Module):
        """Logits for each of the four samples, known by their first number."""

        def __init__(self) -> None:
            super().__init__()
            self.logits = nn.Parameter(torch.zeros(4, 3))

        def forward(self, rows: Tensor) -> Tensor:
            return self.logits[(rows[:, :1] == x[:, 0]).int().argmax(1)]

    student = Table()
    distillation = DropoutDistillation(teacher, student=student, num_masks=2000)
    optimizer = torch.optim.LBFGS(student.parameters(), max_iter=100)

    def closure() -> Tensor:
        torch.manual_seed(1)
        optimizer.zero_grad()
        loss = loss_of(distillation, x)
        loss.backward()
        return loss

    optimizer.step(closure)
    average = monte_carlo(teacher, x, 50_000)
    divergence = {name: MonteCarloDivergence() for name in ("student", "one pass")}
    divergence["student"].update(student(x).detach(), average)
    divergence["one pass"].update(teacher.eval()(x), average)
    assert float(divergence["student"].compute()) < 1e-3
    assert float(divergence["student"].compute()) < 0.2 * float(divergence["one pass"].compute())


@pytest.mark.parametrize("batches", ["labels", "no labels", "tensors"])
def test_it_is_fitted_by_a_trainer_and_the_teacher_stays_what_it_was(
    batches: str, teacher: Small, tmp_path: Path
) -> None:
    before = copy.deepcopy(teacher.state_dict())
    data: Any = loader(batches == "labels")
    if batches == "tensors":
        data = DataLoader(data.dataset.tensors[0], 16)
    seen: set[tuple[bool, ...]] = set()
    teacher.net.register_forward_pre_hook(lambda module, args: seen.add(tuple(each.training for each in module)))
    distillation = DropoutDistillation(teacher)
    students: set[tuple[bool, ...]] = set()
    assert isinstance(distillation.student, Small)
    distillation.student.net._forward_pre_hooks.clear()
    distillation.student.net.register_forward_pre_hook(
        lambda module, args: students.add(tuple(each.training for each in module))
    )
    trainer = trainer_of(tmp_path, enable_checkpointing=False)
    trainer.fit(distillation, data, data)
    assert_same(dict(teacher.state_dict()), dict(before))
    assert seen == {(False, False, False, True, False)}
    assert students == {(True, True, True, False, True), (False,) * 5}
    assert not torch.equal(distillation.student.state_dict()["net.0.weight"], before["net.0.weight"])
    assert {"train_loss", "val_loss"} <= trainer.callback_metrics.keys()


def test_the_teacher_is_a_copy_and_the_student_is_trained_as_the_original_was(teacher: Small) -> None:
    nn.Module.requires_grad_(teacher.net[0], False)
    for _ in range(2):
        distillation = DropoutDistillation(teacher)
        assert [parameter.requires_grad for parameter in distillation.student.parameters()] == [False] * 2 + [True] * 4
        assert not any(parameter.requires_grad for parameter in distillation.teacher.parameters())
        assert [parameter.requires_grad for parameter in teacher.parameters()] == [False] * 2 + [True] * 4
    # As inference leaves it: a student is trained all the same.
    teacher.freeze()
    student = DropoutDistillation(teacher).student
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert all(module.training for module in student.modules())


def test_a_network_can_be_its_own_student(teacher: Small, tmp_path: Path) -> None:
    before = copy.deepcopy(teacher.state_dict())
    distillation = DropoutDistillation(teacher, student=teacher)
    trainer_of(tmp_path, max_epochs=1, enable_checkpointing=False).fit(distillation, loader(), loader())
    assert_same(dict(distillation.teacher.state_dict()), dict(before))
    assert distillation.student is teacher
    assert not torch.equal(teacher.state_dict()["net.0.weight"], before["net.0.weight"])


def test_a_pruned_teacher_is_copied(teacher: Small) -> None:
    prune_units(teacher, {"net.0": torch.rand(16)}, 0.5)
    teacher(torch.randn(4, 4))  # computes the pruned weights, with a gradient
    distillation = DropoutDistillation(teacher)
    loss_of(distillation, [torch.randn(4, 4)]).backward()
    assert teacher.net[0].weight_orig.grad is None
    assert distillation.student.get_submodule("net.0").weight_orig.grad is not None


def test_nothing_drops_in_a_student_of_the_teachers_architecture_while_it_is_trained() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(4, 8, num_layers=2, dropout=0.9, batch_first=True)
            self.attention = nn.MultiheadAttention(8, 2, dropout=0.9, batch_first=True)
            self.head = nn.Sequential(nn.Dropout(0.9), nn.Linear(8, 3))
            self.seen: list[bool] = []

        def forward(self, x: Tensor) -> Tensor:
            self.seen.append(self.lstm.training)
            x = self.lstm(x)[0]
            logits: Tensor = self.head(self.attention(x, x, x)[0][:, -1])
            return logits

    distillation = DropoutDistillation(Recurrent())
    said: list[Tensor] = []
    distillation.student.get_submodule("head").register_forward_hook(lambda module, args, output: said.append(output))
    x = torch.randn(5, 6, 4)
    for _ in range(2):
        loss_of(distillation, x)
    assert torch.equal(*said)
    student = distillation.student
    assert isinstance(student, Recurrent)
    assert student.seen == [True, True]  # cuDNN differentiates no other
    assert student.lstm.dropout == 0.9
    assert all(module.training for module in student.modules())


def test_metrics_and_logs_of_the_forward_pass_of_either_are_left_alone(tmp_path: Path) -> None:
    class Counting(Small):
        def __init__(self) -> None:
            super().__init__()
            self.counted = SumMetric()

        def forward(self, x: Tensor) -> Any:
            self.counted.update(len(x))
            self.log("rows", len(x))
            return super().forward(x)

    distillation = DropoutDistillation(Counting())
    trainer = trainer_of(tmp_path, max_epochs=1, enable_checkpointing=False)
    trainer.fit(distillation, loader(), loader())
    counted = distillation.teacher.get_submodule("counted")
    assert isinstance(counted, SumMetric)
    assert not counted.update_called
    assert "rows" not in trainer.callback_metrics


def test_validation_is_the_same_every_time_and_costs_training_no_random_number(teacher: Small, tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, enable_checkpointing=False)
    distillation = DropoutDistillation(teacher)
    first, second = (trainer.validate(distillation, loader(), verbose=False)[0]["val_loss"] for _ in range(2))
    assert first == second
    seen: list[Tensor] = []
    distillation.teacher.register_forward_hook(lambda module, args, output: seen.append(output))
    same: Any = torch.ones(2, 4, 4)
    trainer.validate(distillation, DataLoader(same, None), verbose=False)
    assert (seen[0] != seen[1]).any()  # each batch has masks of its own
    stream = torch.get_rng_state()
    with patch.object(distillation, "log"):
        distillation.validation_step(torch.randn(4, 4, generator=torch.Generator()), 0)
    assert torch.equal(torch.get_rng_state(), stream)


def test_checkpoints_are_the_students_own(teacher: Small, tmp_path: Path) -> None:
    student = Small(width=8)
    keeping = ModelCheckpoint(tmp_path / "kept", save_last=True)
    trainer_of(tmp_path, callbacks=[keeping]).fit(DropoutDistillation(teacher, student=student), loader(), loader())
    loaded = Small.load_from_checkpoint(tmp_path / "kept/last.ckpt")
    assert loaded.hparams["width"] == 8
    assert_same(dict(loaded.state_dict()), dict(student.state_dict()))


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_resumed_distillation_is_the_uninterrupted_one(teacher: Small, tmp_path: Path) -> None:
    def run(epochs: int, folder: str, **settings: Any) -> dict[str, Any]:
        torch.manual_seed(4)
        distillation = DropoutDistillation(copy.deepcopy(teacher).requires_grad_(True))
        keeping = ModelCheckpoint(tmp_path / folder, save_last=True)
        trainer = trainer_of(tmp_path, callbacks=[keeping, Reseeding()], max_epochs=epochs, limit_val_batches=0)
        trainer.fit(distillation, loader(), loader(), **settings)
        return dict(distillation.student.state_dict())

    whole = run(4, "whole")
    run(2, "half")
    assert_same(run(4, "rest", ckpt_path=tmp_path / "half/last.ckpt"), whole)


def test_a_compiled_teacher_and_student_leave_checkpoints_of_their_class(teacher: Small, tmp_path: Path) -> None:
    torch.manual_seed(1)
    compiled: Any = torch.compile(teacher, backend="eager")
    plain, distillation = DropoutDistillation(teacher), DropoutDistillation(compiled)
    for each, folder in ((plain, "plain"), (distillation, "compiled")):
        keeping = ModelCheckpoint(tmp_path / folder, save_last=True)
        trainer_of(tmp_path, max_epochs=1, callbacks=[keeping, Reseeding()]).fit(each, loader(), loader())
    kept = tmp_path / "compiled/last.ckpt"
    loaded = Small.load_from_checkpoint(kept)
    assert_same(dict(loaded.state_dict()), dict(plain.student.state_dict()))
    student: Any = torch.compile(Small(width=8), backend="eager")
    taken = DropoutDistillation(compiled, checkpoint=str(kept), student=student)
    assert_same(list(taken.teacher.state_dict().values()), list(loaded.state_dict().values()))
    resumed = DropoutDistillation(compiled)
    trainer_of(tmp_path, callbacks=[ModelCheckpoint(kept.parent)]).validate(
        resumed, loader(), ckpt_path=kept, verbose=False
    )
    assert_same(list(resumed.student.state_dict().values()), list(loaded.state_dict().values()))


class Reseeding(Callback):
    """Gives each step a random stream of its own: torch's is no part of a checkpoint."""

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        torch.manual_seed(trainer.global_step)


class Driven(Small):
    def __init__(self) -> None:
        super().__init__()
        self.net[3] = ConductanceDropout()


class Mixed(Small):
    """One layer of ours, and one of torch's for the callback to convert."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), ConductanceDropout(), nn.ReLU(), nn.Dropout(), nn.Linear(8, 3))


class OwnCallback(YDropCallback):
    pass


@pytest.mark.parametrize("callback", [YDropCallback, OwnCallback])
@pytest.mark.parametrize("kind", [Driven, Small, Mixed])
def test_a_teacher_comes_from_its_checkpoint_with_what_ydrop_has_left(
    kind: type[Small], callback: type[YDropCallback], tmp_path: Path
) -> None:
    trained, ydrop = kind(), callback(annealing_epochs=0, elasticity=0.5, convert=kind is not Driven)
    keeping = ModelCheckpoint(tmp_path / "kept", save_last=True)
    trainer_of(tmp_path, callbacks=[ydrop, keeping]).fit(trained, loader())
    teacher = DropoutDistillation(kind(), checkpoint=str(tmp_path / "kept/last.ckpt")).teacher
    assert_same(dict(teacher.state_dict()), dict(trained.state_dict()))
    layer, other = teacher.get_submodule("net.3"), trained.net[3]
    assert isinstance(layer, ConductanceDropout)
    assert isinstance(other, ConductanceDropout)
    assert len(other.mean_drop_prob.unique()) > 2
    assert torch.equal(layer.mean_drop_prob, other.mean_drop_prob)


def test_a_teacher_whose_probabilities_may_have_been_left_behind_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="DropoutDistillation was given Driven, in which each ConductanceDropout"):
        DropoutDistillation(Driven())


def test_a_checkpoint_of_other_layers_of_ydrops_is_refused(tmp_path: Path) -> None:
    keeping = ModelCheckpoint(tmp_path / "kept", save_last=True)
    trainer_of(tmp_path, callbacks=[YDropCallback(annealing_epochs=0), keeping]).fit(Driven(), loader())
    other = nn.Sequential(nn.Linear(4, 16), nn.Dropout(), nn.Linear(16, 3))
    with pytest.raises(
        ConfigurationError, match=r"last.ckpt'\) was given for Sequential: .*'net.3'.* YDrop\(teacher\)"
    ):
        DropoutDistillation(other, checkpoint=str(tmp_path / "kept/last.ckpt"))


def test_a_teacher_that_is_made_late_or_reads_its_checkpoint_does_so(tmp_path: Path) -> None:
    class Late(Small):
        def __init__(self) -> None:
            super().__init__()
            self.head: nn.Module | None = None

        def configure_model(self) -> None:
            self.head = self.head or nn.Sequential(nn.Dropout(), nn.Linear(3, 3))

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["said"] = 7

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            self.said = checkpoint["said"]

    trained = Late()
    keeping = ModelCheckpoint(tmp_path / "kept", save_last=True)
    trainer_of(tmp_path, max_epochs=1, callbacks=[keeping]).fit(trained, loader())
    teacher = DropoutDistillation(Late(), checkpoint=str(tmp_path / "kept/last.ckpt")).teacher
    assert isinstance(teacher, Late)
    assert teacher.said == 7
    assert_same(dict(teacher.state_dict()), dict(trained.state_dict()))
    assert isinstance(DropoutDistillation(Late()).teacher.head, nn.Sequential)
    assert isinstance(DropoutDistillation(Small(), student=Late()).student.head, nn.Sequential)


@pytest.mark.usefixtures("rows_known_apart")
@pytest.mark.parametrize(
    "layer",
    [nn.Dropout(0.3), nn.Dropout1d(0.3), nn.AlphaDropout(0.3), nn.FeatureAlphaDropout(0.3), Jumpout(0.3)],
    ids=lambda layer: type(layer).__name__,
)
def test_it_serves_every_layer_that_drops(layer: nn.Module, tmp_path: Path) -> None:
    torch.manual_seed(0)
    teacher = Small()
    teacher.net[3] = nn.Sequential(nn.Unflatten(1, (4, 4)), layer, nn.Flatten())
    said: list[Tensor] = []
    distillation = DropoutDistillation(teacher, num_masks=2)
    distillation.teacher.register_forward_hook(lambda module, args, output: said.extend(output.split(16)))
    trainer = trainer_of(tmp_path, max_epochs=1, limit_train_batches=1, limit_val_batches=0, enable_checkpointing=False)
    trainer.fit(distillation, loader(), loader())
    first, second = said
    assert (first != second).any()
    assert math.isfinite(trainer.callback_metrics["train_loss"])


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_it_is_fitted_in_every_precision(precision: str, teacher: Small, tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, precision=precision, enable_checkpointing=False)
    distillation = DropoutDistillation(teacher, num_masks=2)
    with patch.object(distillation, "log", wraps=distillation.log) as log:
        trainer.fit(distillation, loader(), loader())
    losses = [call.args[1] for call in log.call_args_list if call.args[0].endswith("_loss")]
    assert losses
    # In bfloat16 a cross-entropy has two digits, and training would stand still.
    assert {loss.dtype for loss in losses} == {torch.float64 if precision == "64-true" else torch.float32}
    assert all(loss.isfinite() for loss in losses)


def test_inputs_are_found_as_the_callback_finds_them(tmp_path: Path) -> None:
    class Own(Small):
        def ydrop_inputs(self, batch: Any) -> tuple[Any, Any]:
            return (batch["views"][1], batch["sign"]), None

        def ydrop_forward(self, x: Tensor, sign: Tensor) -> Any:
            return self.net(x) * sign

        def forward(self, *args: Any) -> Any:
            raise AssertionError

    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Small().net

        def forward(self, second: Tensor) -> Any:
            return self.net(second)

    batch: dict[str, Any] = {
        "views": [torch.zeros(6, 4), torch.randn(6, 4)],
        "sign": torch.tensor(-3.0),
        "second": torch.randn(6, 4),
    }
    for teacher, adapter, said in (
        (Own(), AutomaticAdapter(), lambda student: -3 * student.net(batch["views"][1])),
        (Adapted(), KeyAdapter(inputs="second", target=None), lambda student: student.net(batch["second"])),
    ):
        distillation = DropoutDistillation(teacher.eval(), adapter=adapter, num_masks=2)
        distillation.student.eval()
        assert torch.equal(distillation.predict_step(batch, 0), said(distillation.student))
        assert loss_of(distillation, batch).isfinite()


def test_a_subclass_may_find_the_inputs(teacher: Small) -> None:
    class Own(DropoutDistillation):
        def ydrop_inputs(self, batch: Any) -> tuple[Any, Any]:
            return batch["points"]["x"], None

    assert loss_of(Own(teacher), {"points": {"x": torch.randn(5, 4)}}).isfinite()


class Scaling(Small):
    """Does to batches what its steps rely on."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [each + 1 for each in batch]

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return [each * 10 for each in super().transfer_batch_to_device(batch, device, dataloader_idx)]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [each + 2 for each in batch] if self.trainer.training else batch


class Zeros(Points):
    """Data that are changed by their own hook, which comes first."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [each * 0 for each in batch]


@pytest.mark.parametrize("by_data", [False, True])
def test_batches_are_what_the_teacher_makes_of_them(by_data: bool, tmp_path: Path) -> None:
    seen: list[Tensor] = []
    data = Zeros(labels=False)
    distillation = copy.deepcopy(DropoutDistillation(Small() if by_data else Scaling()))
    for each in (distillation.teacher, distillation.student):
        each.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    trainer = trainer_of(tmp_path, max_epochs=1, limit_train_batches=1, limit_val_batches=0, enable_checkpointing=False)
    if by_data:
        trainer.fit(distillation, data)
    else:
        trainer.fit(distillation, data.train_dataloader(), data.val_dataloader())
    first = data.data.tensors[0][:16]
    expected = first * 0 if by_data else (first + 1) * 10 + 2
    assert_same(seen, [expected, expected])


def test_a_class_that_is_impossible_adds_nothing(teacher: Small) -> None:
    class Masked(nn.Module):
        def __init__(self, inner: nn.Module, value: float) -> None:
            super().__init__()
            self.inner = inner
            self.register_buffer("possible", torch.tensor([0.0, value, 0.0]))

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.inner(x) + self.possible
            return logits

    x, losses = torch.randn(5, 4), []
    for value in (-math.inf, -1e4):  # -1e4 is as impossible, but a number
        torch.manual_seed(0)
        distillation = DropoutDistillation(Masked(teacher, value), num_masks=3)
        losses.append(loss_of(distillation, [x]))
        losses[-1].backward()
        assert all(each.grad is not None and each.grad.isfinite().all() for each in distillation.student.parameters())
    assert torch.equal(*losses)


def test_a_teacher_that_keeps_what_it_has_put_out_is_copied(teacher: Small) -> None:
    vars(teacher)["kept"] = {"last": [teacher(torch.randn(5, 4))]}
    assert loss_of(DropoutDistillation(teacher), [torch.randn(5, 4)]).isfinite()


def test_classes_lie_where_class_dim_says() -> None:
    torch.manual_seed(0)
    tokens = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 3))
    x, losses = torch.randn(5, 7, 4), []
    for model, class_dim in ((tokens, -1), (nn.Sequential(tokens, Transposed()), 1)):
        distillation = DropoutDistillation(model, num_masks=2, class_dim=class_dim)
        torch.manual_seed(1)
        losses.append(loss_of(distillation, x))
    assert torch.allclose(losses[0], losses[1])
    assert 0 < losses[0] < 3


class Transposed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


@pytest.mark.usefixtures("rows_known_apart")
def test_whether_masks_are_shared_is_found_out_in_the_first_step(teacher: Small) -> None:
    class DropConnect(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.drop = nn.Parameter(torch.randn(3, 4)), nn.Dropout()

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.drop(self.weight))

    for network, num_masks, passes in (
        (teacher, 3, [6, 12, 18, 18]),
        (DropConnect(), 3, [6, 12, *[6] * 8]),
        (teacher, 2, [6] * 6),
        (DropConnect(), 2, [6] * 6),
    ):
        distillation = DropoutDistillation(network, num_masks=num_masks)
        rows: list[int] = []
        distillation.teacher.register_forward_pre_hook(lambda module, args, rows=rows: rows.append(len(args[0])))
        for _ in range(3):
            loss_of(distillation, torch.randn(6, 4))
        assert rows == passes


def test_one_mask_takes_one_pass_and_nothing_is_compared(teacher: Small) -> None:
    distillation = DropoutDistillation(teacher)
    rows: list[int] = []
    distillation.teacher.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    with patch("lightning_ydrop.uncertainty.passes.noting_draws", side_effect=AssertionError):
        loss_of(distillation, torch.randn(6, 4))
    assert rows == [6]


def test_settings_of_numpy_are_kept_as_plain_ones(teacher: Small) -> None:
    settings: dict[str, Any] = {
        "num_masks": np.int64(2),
        "temperature": np.float32(2.0),
        "class_dim": np.int64(1),
        "max_rows": np.int32(64),
    }
    distillation = DropoutDistillation(teacher, **settings)
    plain = {name: getattr(distillation, name) for name in settings}
    assert repr(plain) == "{'num_masks': 2, 'temperature': 2.0, 'class_dim': 1, 'max_rows': 64}"
    loss_of(distillation, torch.randn(5, 4)).backward()


@pytest.mark.usefixtures("rows_known_apart")
def test_no_more_rows_than_allowed_pass_the_teacher_at_once(teacher: Small) -> None:
    distillation = DropoutDistillation(teacher, num_masks=5, max_rows=13)
    rows: list[int] = []
    distillation.teacher.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    loss_of(distillation, torch.randn(6, 4))
    assert rows == [6, 12, 12]  # the first mask by itself


def test_it_is_tested_and_predicts_from_batches_with_labels(teacher: Small, tmp_path: Path) -> None:
    trainer, distillation = trainer_of(tmp_path, enable_checkpointing=False), DropoutDistillation(teacher)
    (tested,) = trainer.test(distillation, loader(), verbose=False)
    (validated,) = trainer.validate(distillation, loader(), verbose=False)
    assert tested["test_loss"] == validated["val_loss"]
    predicted: Any = trainer.predict(distillation, loader())
    assert torch.equal(torch.cat(predicted), distillation.student.eval()(Points().data.tensors[0]))


def test_agreement_with_the_teacher_and_accuracy_are_logged_where_there_are_labels(
    teacher: Small, tmp_path: Path
) -> None:
    x = torch.randn(20, 4)
    student = nn.Linear(4, 3)
    labels = torch.randint(3, (20,))
    labels[:4] = -100  # which name no class
    kept = student(x).argmax(1) == labels
    for batches, accuracy in (
        ([(x[:14], labels[:14]), (x[14:], labels[14:])], kept[4:].float().mean().item()),
        ([(x[:14],), (x[14:],)], None),
        ([(x[:14], torch.randn(14)), (x[14:], torch.randn(6))], None),
    ):
        distillation = DropoutDistillation(teacher, student=student, num_masks=4000)
        trainer = trainer_of(tmp_path, enable_checkpointing=False)
        (found,) = trainer.validate(distillation, DataLoader(batches, None), verbose=False)  # type: ignore[arg-type]
        taught = monte_carlo(teacher, x, 4000).probabilities.argmax(1)
        assert found["val_agreement"] == pytest.approx(
            (student(x).argmax(1) == taught).float().mean().item(), abs=0.051
        )
        assert found.get("val_acc") == pytest.approx(accuracy)
    trainer = trainer_of(tmp_path, enable_checkpointing=False)
    trainer.fit(DropoutDistillation(teacher), loader(), loader())
    assert trainer.callback_metrics.keys() == {
        f"{stage}_{name}" for stage in ("train", "val") for name in ("loss", "agreement", "acc")
    }


@pytest.mark.filterwarnings("ignore:Found 1 module.s. in eval mode")
def test_a_student_is_ready_for_use_after_a_fit_and_trained_again_by_the_next(teacher: Small, tmp_path: Path) -> None:
    student = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 3))
    student[1].eval()  # frozen by its owner
    distillation = DropoutDistillation(teacher, student=student)
    seen: list[list[bool]] = []
    student.register_forward_hook(lambda module, *_: seen.append([each.training for each in module.modules()]))
    for _ in range(2):
        seen.clear()
        trainer_of(tmp_path, enable_checkpointing=False, max_epochs=1, num_sanity_val_steps=0).fit(
            distillation, loader(), loader()
        )
        assert not any(module.training for module in student.modules())
        assert set(map(tuple, seen)) == {(True, True, False, True, True), (False,) * 5}  # trained, validated


def test_batches_are_weighed_by_their_samples(teacher: Small, tmp_path: Path) -> None:
    x = torch.randn(20, 4)
    batches: Any = [{"lengths": torch.ones(3), "x": part} for part in x.split([14, 6])]
    distillation = DropoutDistillation(teacher, student=nn.Linear(4, 3), num_masks=4000)
    trainer = trainer_of(tmp_path, enable_checkpointing=False)
    (found,) = trainer.validate(distillation, DataLoader(batches, None), verbose=False)
    taught = monte_carlo(teacher, x, 4000).probabilities
    whole = float(nn.functional.cross_entropy(distillation.student(x).detach(), taught))
    assert found["val_loss"] == pytest.approx(whole, rel=0.01)


def program(folder: Path, *args: str, subclass: bool = False) -> LightningCLI:
    """A LightningCLI program, with distillation as its one model, or with any model."""
    return LightningCLI(
        None if subclass else DropoutDistillation,
        Points,
        subclass_mode_model=subclass,
        seed_everything_default=4,
        args=[*args, f"--trainer.default_root_dir={folder}"],
        save_config_callback=None,
        trainer_defaults={
            "accelerator": "cpu",
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [ModelCheckpoint(folder, save_last=True, enable_version_counter=False), Reseeding()],
        },
    )


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("subclass", [False, True])
def test_a_program_goes_on_from_its_checkpoint(
    subclass: bool, teacher: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning calls it by an older name
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # where Lightning leaves it for other tests
    monkeypatch.setattr("sys.argv", ["program"])
    trainer_of(tmp_path, max_epochs=1, callbacks=[ModelCheckpoint(tmp_path, save_last=True)]).fit(teacher, loader())
    inner = ".init_args" if subclass else ""
    arguments = [
        *(["--model=lightning_ydrop.DropoutDistillation"] if subclass else []),
        f"--model{inner}.teacher=tests.uncertainty.networks.Small",
        f"--model{inner}.checkpoint={tmp_path / 'last.ckpt'}",
        f"--model{inner}.num_masks=2",
    ]
    whole = program(tmp_path / "whole", "fit", *arguments, "--trainer.max_epochs=4", subclass=subclass).model
    program(tmp_path / "half", "fit", *arguments, "--trainer.max_epochs=2", subclass=subclass)
    further = [f"--ckpt_path={tmp_path / 'half/last.ckpt'}", "--trainer.max_epochs=4"]
    resumed = program(tmp_path / "rest", "fit", *arguments, *further, subclass=subclass).model
    assert isinstance(resumed, DropoutDistillation)
    assert_same(dict(resumed.state_dict()), dict(whole.state_dict()))
    student = Small.load_from_checkpoint(tmp_path / "rest/last.ckpt")
    assert_same(dict(student.state_dict()), dict(resumed.student.state_dict()))


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_student_writes_and_reads_what_it_has_besides_its_weights(teacher: Small, tmp_path: Path) -> None:
    class Telling(Small):
        told = 0

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["told"] = 7
            assert "net.0.weight" in checkpoint["state_dict"]

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            self.told = checkpoint["told"]
            assert "net.0.weight" in checkpoint["state_dict"]

    keeping = ModelCheckpoint(tmp_path / "kept", save_last=True)
    distillation = DropoutDistillation(teacher, student=Telling())
    trainer_of(tmp_path, callbacks=[keeping], max_epochs=1).fit(distillation, loader(), loader())
    held = torch.load(tmp_path / "kept/last.ckpt", weights_only=True)
    assert held["told"] == 7
    assert held["state_dict"].keys() == distillation.student.state_dict().keys()
    assert Telling.load_from_checkpoint(tmp_path / "kept/last.ckpt").told == 7
    other = DropoutDistillation(teacher, student=Telling())
    trainer_of(tmp_path, callbacks=[keeping]).validate(
        other, loader(), ckpt_path=tmp_path / "kept/last.ckpt", verbose=False
    )
    assert isinstance(other.student, Telling)
    assert other.student.told == 7
    assert_same(dict(other.state_dict()), dict(distillation.state_dict()))


def test_it_is_made_by_yaml(teacher: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning calls it by an older name
    monkeypatch.setattr("sys.argv", ["program"])
    trainer_of(tmp_path, max_epochs=1, callbacks=[ModelCheckpoint(tmp_path, save_last=True)]).fit(teacher, loader())
    (tmp_path / "distill.yaml").write_text(f"""
model:
  class_path: lightning_ydrop.DropoutDistillation
  init_args:
    teacher:
      class_path: tests.uncertainty.networks.Small
    checkpoint: {tmp_path / "last.ckpt"}
    student:
      class_path: tests.uncertainty.networks.Small
      init_args:
        width: 5
    num_masks: 3
    optimizer:
      class_path: torch.optim.SGD
      init_args:
        lr: 0.25
""")
    cli = LightningCLI(
        run=False,
        seed_everything_default=False,
        args=["--config", str(tmp_path / "distill.yaml")],
        save_config_callback=None,
        trainer_defaults={"accelerator": "cpu", "max_epochs": 1, "logger": False, "enable_progress_bar": False},
    )
    made = cli.model
    assert isinstance(made, DropoutDistillation)
    assert isinstance(made.student, Small)
    assert made.student.net[0].out_features == 5
    assert_same(dict(made.teacher.state_dict()), dict(teacher.state_dict()))
    optimizer = made.configure_optimizers()
    assert isinstance(optimizer, torch.optim.SGD)
    assert optimizer.param_groups[0]["lr"] == 0.25
    cli.trainer.fit(made, loader(), loader())
    cli.trainer.save_checkpoint(tmp_path / "student.ckpt")
    loaded = Small.load_from_checkpoint(tmp_path / "student.ckpt")
    assert_same(dict(loaded.state_dict()), dict(made.student.state_dict()))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher": nn.Linear(4, 3)}, "has no layer that drops"),
        ({"teacher": "best.ckpt"}, "instance of torch.nn.Module"),
        ({"student": "half"}, "instance of torch.nn.Module"),
        ({"num_masks": 0}, "num_masks=0"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"temperature": math.inf}, "temperature=inf"),
        ({"adapter": None}, "adapter=None"),
        ({"max_rows": 0}, "max_rows=0"),
        ({"class_dim": 0}, r"DropoutDistillation\(class_dim=0\)"),
        ({"optimizer": 0.1}, "optimizer=0.1"),
        ({"optimizer": torch.optim.SGD([torch.zeros(1)])}, "optimizer=SGD"),
        ({"student": nn.Linear(4, 3).requires_grad_(False)}, "nothing is to be trained"),
        ({"teacher": nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.0))}, "has no layer that drops"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str, teacher: Small) -> None:
    with pytest.raises(ConfigurationError, match=message):
        DropoutDistillation(**{"teacher": teacher, **settings})


def test_a_checkpoint_of_another_network_is_refused(teacher: Small, tmp_path: Path) -> None:
    torch.save({"state_dict": Small(width=3).state_dict()}, tmp_path / "other.ckpt")
    torch.save([1], tmp_path / "none.ckpt")
    torch.save({"state_dict": {}, "datamodule_hyper_parameters": {"root": tmp_path}}, tmp_path / "unsafe.ckpt")
    for file in ("other.ckpt", "none.ckpt", "unsafe.ckpt"):
        with pytest.raises(ConfigurationError, match=rf"{file}.*was given for Small"):
            DropoutDistillation(teacher, checkpoint=str(tmp_path / file))


def test_a_teacher_made_with_other_arguments_than_it_was_trained_with_is_refused(tmp_path: Path) -> None:
    keeping = ModelCheckpoint(tmp_path, save_last=True)
    trainer_of(tmp_path, max_epochs=1, callbacks=[keeping]).fit(Small(p=0.1), loader())
    with pytest.raises(ConfigurationError, match=r"trained with p=0\.1, and now has p=0\.5"):
        DropoutDistillation(Small(), checkpoint=str(tmp_path / "last.ckpt"))
    DropoutDistillation(Small(p=0.1), checkpoint=str(tmp_path / "last.ckpt"))


def test_a_list_is_the_argument_that_a_tuple_was(tmp_path: Path) -> None:
    class Sized(Small):
        def __init__(self, size: Any) -> None:
            super().__init__()
            self.save_hyperparameters()

    keeping = ModelCheckpoint(tmp_path, save_last=True)
    trainer_of(tmp_path, max_epochs=1, callbacks=[keeping]).fit(Sized(size=(3, 4)), loader())
    for same in ([3, 4], ListConfig([np.int64(3), 4]), np.array([3, 4])):
        DropoutDistillation(Sized(size=same), checkpoint=str(tmp_path / "last.ckpt"))
    with pytest.raises(ConfigurationError, match=r"now has size=\[3, 5\]"):
        DropoutDistillation(Sized(size=[3, 5]), checkpoint=str(tmp_path / "last.ckpt"))


@pytest.mark.parametrize("outputs", [1, 2])
def test_outputs_that_do_not_fit_are_refused(outputs: int, teacher: Small) -> None:
    distillation = DropoutDistillation(teacher, student=nn.Linear(4, outputs))
    with pytest.raises(ConfigurationError, match=rf"\(5, {outputs}\)"):
        loss_of(distillation, torch.randn(5, 4))


def test_strategies_that_shard_are_refused(teacher: Small, tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    trainer.strategy.__class__ = type("FSDPStrategy", (SingleDeviceStrategy,), {})
    with pytest.raises(ConfigurationError, match="a Trainer with FSDPStrategy"):
        trainer.fit(DropoutDistillation(teacher), loader(), loader())
