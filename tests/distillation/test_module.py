import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ydrop import ConductanceDropout, ConfigurationError, DropoutDistillation, Jumpout, YDropCallback
from lightning_ydrop.distillation import MonteCarloDivergence, monte_carlo
from tests.distillation.networks import Small
from tests.sameness import assert_same


def loader(labels: bool = True, rows: int = 64) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(rows, 4, generator=generator)
    y = (x.sum(1) > 0).long() + (x[:, 0] > 1).long()
    return DataLoader(TensorDataset(x, y) if labels else TensorDataset(x), 16)


def trainer_of(folder: Path, **settings: Any) -> Trainer:
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(default_root_dir=folder, accelerator="cpu", **{"max_epochs": 2, **quiet, **settings})


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
    distillation.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    torch.manual_seed(8)
    loss = distillation.training_step([x], 0)
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
    distillation.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    optimizer = torch.optim.LBFGS(student.parameters(), max_iter=100)

    def closure() -> Tensor:
        torch.manual_seed(1)
        optimizer.zero_grad()
        loss = distillation.training_step(x, 0)
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


def test_a_teacher_teaches_more_than_once(teacher: Small) -> None:
    for _ in range(2):
        distillation = DropoutDistillation(teacher)
        assert all(parameter.requires_grad for parameter in distillation.student.parameters())
        assert not any(parameter.requires_grad for parameter in teacher.parameters())
    nn.Module.requires_grad_(teacher.net[0], True)
    frozen = [parameter.requires_grad for parameter in DropoutDistillation(teacher).student.parameters()]
    assert frozen == [True, True, False, False, False, False]


def test_validation_is_the_same_every_time_and_costs_training_no_random_number(teacher: Small, tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, enable_checkpointing=False)
    distillation = DropoutDistillation(teacher)
    first, second = (trainer.validate(distillation, loader(), verbose=False)[0]["val_loss"] for _ in range(2))
    assert first == second
    distillation.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    stream = torch.get_rng_state()
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


class Reseeding(Callback):
    """Gives each step a random stream of its own: torch's is no part of a checkpoint."""

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        torch.manual_seed(trainer.global_step)


class Driven(Small):
    def __init__(self) -> None:
        super().__init__()
        self.net[3] = ConductanceDropout()


def test_a_teacher_comes_from_its_checkpoint_with_what_ydrop_has_left(tmp_path: Path) -> None:
    trained, ydrop = Driven(), YDropCallback(annealing_epochs=0, elasticity=0.5)
    keeping = ModelCheckpoint(tmp_path / "kept", save_last=True)
    trainer_of(tmp_path, callbacks=[ydrop, keeping]).fit(trained, loader())
    teacher = Driven()
    DropoutDistillation(teacher, checkpoint=str(tmp_path / "kept/last.ckpt"))
    assert_same(dict(teacher.state_dict()), dict(trained.state_dict()))
    layer, other = teacher.net[3], trained.net[3]
    assert isinstance(layer, ConductanceDropout)
    assert isinstance(other, ConductanceDropout)
    assert len(other.mean_drop_prob.unique()) > 2
    assert torch.equal(layer.mean_drop_prob, other.mean_drop_prob)


@pytest.mark.parametrize("layer", [nn.Dropout(0.3), nn.Dropout1d(0.3), nn.AlphaDropout(0.3), Jumpout()])
def test_it_serves_every_layer_that_drops(layer: nn.Module, tmp_path: Path) -> None:
    teacher = Small()
    teacher.net[3] = layer
    trainer = trainer_of(tmp_path, max_epochs=1, enable_checkpointing=False)
    trainer.fit(DropoutDistillation(teacher, num_masks=2), loader(), loader())
    assert math.isfinite(trainer.callback_metrics["train_loss"])


def test_it_is_made_by_yaml(teacher: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning calls it by an older name
    monkeypatch.setattr("sys.argv", ["program"])
    trainer_of(tmp_path, max_epochs=1, callbacks=[ModelCheckpoint(tmp_path, save_last=True)]).fit(teacher, loader())
    (tmp_path / "distill.yaml").write_text(f"""
model:
  class_path: lightning_ydrop.DropoutDistillation
  init_args:
    teacher:
      class_path: tests.distillation.networks.Small
    checkpoint: {tmp_path / "last.ckpt"}
    student:
      class_path: tests.distillation.networks.Small
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
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str, teacher: Small) -> None:
    with pytest.raises(ConfigurationError, match=message):
        DropoutDistillation(**{"teacher": teacher, **settings})


def test_a_checkpoint_of_another_network_is_refused(teacher: Small, tmp_path: Path) -> None:
    torch.save({"state_dict": Small(width=3).state_dict()}, tmp_path / "other.ckpt")
    torch.save([1], tmp_path / "none.ckpt")
    for file in ("other.ckpt", "none.ckpt"):
        with pytest.raises(ConfigurationError, match=rf"{file}.*was given for Small"):
            DropoutDistillation(teacher, checkpoint=str(tmp_path / file))


def test_a_student_with_other_outputs_is_refused(teacher: Small) -> None:
    distillation = DropoutDistillation(teacher, student=nn.Linear(4, 2))
    with pytest.raises(ConfigurationError, match=r"\(5, 3\), the student's \(5, 2\)"):
        distillation.training_step(torch.randn(5, 4), 0)
