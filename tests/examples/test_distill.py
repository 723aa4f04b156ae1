"""From a network trained with dropout to its student, by the programs of examples/."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from examples import distill
from examples.data import Digits
from examples.networks import Classifier
from examples.paper import distillation as paper
from lightning_ydrop import ConfigurationError, DropoutDistillation
from tests.examples.programs import EXAMPLES, said
from tests.examples.test_data import drawn, write_mnist
from tests.examples.test_report import leave

SMALL = ["--trainer.max_epochs=1", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]


@pytest.mark.parametrize("data", ["digits", "mnist_fc_1"])
@pytest.mark.parametrize("dropout", ["vanilla", "conductance"])
def test_a_teacher_is_trained_and_distilled(data: str, dropout: str, cli: Callable[..., Any], tmp_path: Path) -> None:
    write_mnist(tmp_path, drawn((1, 28, 28), 100, 10, 0), drawn((1, 28, 28), 20, 10, 1))
    where = [] if data == "digits" else [f"--data.root={tmp_path}", "--data.download=false"]
    quiet = [*SMALL, f"--trainer.logger.save_dir={tmp_path / 'runs'}", "--trainer.log_every_n_steps=1", *where]
    arm = {"vanilla": "dropout", "conductance": "ydrop"}[dropout]
    trained = cli(
        [
            *("fit", f"--config={EXAMPLES / 'configs/base.yaml'}", f"--config={EXAMPLES / f'paper/rows/{data}.yaml'}"),
            *(f"--config={EXAMPLES / f'configs/{arm}.yaml'}", "--model.hidden=[16,8]", *quiet),
            *(["--trainer.callbacks.annealing_epochs=0"] if arm == "ydrop" else []),
        ]
    )
    checkpoint = trained.trainer.checkpoint_callback.best_model_path
    arguments = [
        *("fit", f"--config={EXAMPLES / 'distillation/digits.yaml'}"),
        *([] if data == "digits" else [f"--config={EXAMPLES / f'distillation/{data}.yaml'}"]),
        *(f"--model.checkpoint={checkpoint}", "--model.teacher.hidden=[16,8]", *quiet),
    ]
    with pytest.raises(
        ConfigurationError, match=f"it was trained with dropout='{dropout}', and now has dropout='none'"
    ):
        distill.main([*arguments, "--model.teacher.dropout=none"])
    distilled = distill.main([*arguments, f"--model.teacher.dropout={dropout}"])
    best = distilled.trainer.checkpoint_callback
    assert isinstance(best, ModelCheckpoint)
    kept = best.best_model_path
    student = Classifier.load_from_checkpoint(kept)
    state = torch.load(kept, weights_only=True)["state_dict"]
    assert all(torch.equal(value, state[name]) for name, value in student.state_dict().items())
    teacher = trained.model.state_dict()
    assert any(not torch.equal(state[name], teacher[name]) for name in teacher)
    assert all(torch.equal(value, teacher[name]) for name, value in distilled.model.teacher.state_dict().items())
    assert float(distilled.trainer.callback_metrics["val_loss"]) > 0


def test_predictors_are_measured_against_the_average(tmp_path: Path) -> None:
    data = Digits()
    torch.manual_seed(0)
    teacher = Classifier(data.shape, hidden=[32], dropout="vanilla")
    for parameter in teacher.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # far from linear: one pass is not the average
    found = paper.measured(
        {
            "one pass": teacher,
            "2 masks": partial(paper.averaged, teacher, 2),
            "300": partial(paper.averaged, teacher, 300),
        },
        teacher,
        data,
        samples=300,
    )
    divergence = {name: each["divergence"] for name, each in found.items()}
    assert 0 < divergence["300"] < 0.1 * divergence["2 masks"]
    assert divergence["300"] < 0.5 * divergence["one pass"]
    data.setup("test")
    x, y = data.test.normalise(data.test.inputs), data.test.labels
    logits = teacher.eval()(x)
    assert found["one pass"]["accuracy"] == pytest.approx(float((logits.argmax(1) == y).float().mean()))
    slow = torch.nn.functional.cross_entropy(logits, y).item()
    assert found["one pass"]["negative log-likelihood"] == pytest.approx(slow, rel=1e-5)
    lines = paper.table({"dropout": [found, found]}).splitlines()
    assert lines[2].startswith(f"| dropout | one pass | {1000 * divergence['one pass']:.2f} ± 0.00 |")
    assert len(lines) == 2 + 3


def test_only_what_was_measured_of_this_teacher_with_these_settings_counts(tmp_path: Path) -> None:
    result = leave(tmp_path, "digits", "dropout", 0, 0.9)
    checkpoint = result.parent / "checkpoints/epoch=1-step=34.ckpt"
    checkpoint.parent.mkdir()
    checkpoint.write_text("one")
    (checkpoint.parent / "last.ckpt").write_text("of a grid that was ended before it removed it")
    settings = {"samples": 20, "max_epochs": 3}
    assert paper.measured_before(result, settings) is None
    measured = settings | {"teacher": paper.identity_of(result), "measured": {"one pass": {}}}
    result.with_name("distilled.json").write_text(json.dumps(measured))
    assert paper.measured_before(result, settings) == {"one pass": {}}
    for other in settings:
        assert paper.measured_before(result, settings | {other: 30}) is None
    checkpoint.write_text("another")
    assert paper.measured_before(result, settings) is None


def taught(folder: Path, max_epochs: int) -> dict[str, torch.Tensor]:
    seed_everything(0, verbose=False)
    data = Digits(train_fraction=0.05, batch_size=16)
    teacher = Classifier(data.shape, hidden=[8], dropout="vanilla")
    distillation = DropoutDistillation(teacher, optimizer=partial(torch.optim.SGD, lr=0.5))
    student: torch.nn.Module = paper.taught(distillation, data, folder, max_epochs)
    return student.state_dict()


def test_a_student_is_trained_for_so_many_epochs_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    epochs = []
    monkeypatch.setattr(DropoutDistillation, "on_train_epoch_start", lambda module: epochs.append(module.current_epoch))
    taught(tmp_path, 2)
    assert epochs == [0, 1]


@pytest.mark.skipif(lightning.__version__ < "2.5.3", reason="there batches come in another order")
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_student_goes_on_as_if_it_had_not_been_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(module: DropoutDistillation) -> None:
        if module.current_epoch == 3:
            raise InterruptedError

    whole = taught(tmp_path / "whole", 200)
    monkeypatch.setattr(DropoutDistillation, "on_train_epoch_start", stopped)
    with pytest.raises(InterruptedError):
        taught(tmp_path / "parts", 200)
    epochs = []
    monkeypatch.setattr(DropoutDistillation, "on_train_epoch_start", lambda module: epochs.append(module.current_epoch))
    for _ in range(2):  # the second time there is nothing left to do
        parts = taught(tmp_path / "parts", 200)
        assert all(torch.equal(value, parts[name]) for name, value in whole.items())
    assert epochs == list(range(3, len(epochs) + 3))


@pytest.mark.slow
def test_the_networks_of_a_grid_are_distilled(tmp_path: Path) -> None:
    grid = ["--rows", "digits", "--arms", "dropout", "ydrop", "--seeds", "0", "--jobs", "2", "--keep-checkpoints"]
    settings = ["model.hidden=[16]", "trainer.max_epochs=3", "ydrop.annealing_epochs=1", "data.train_fraction=0.05"]

    said("paper.run", *grid, "--set", *settings, "--out", "runs/teachers", cwd=tmp_path)
    arguments = ("--samples", "20", "--max-epochs", "30")
    table = said("paper.distillation", *arguments, "--jobs", "2", cwd=tmp_path)
    assert table.count("| dropout |") == table.count("| ydrop |") == 6  # one pass, two students, three averages
    assert "examples.paper.run --rows digits --arms dropout ydrop --seeds 0 --set data.train_fraction=0.05" in table
    files = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("distilled.json")}
    assert len(files) == 2
    assert said("paper.distillation", *arguments, cwd=tmp_path) == table
    assert {file: file.stat().st_mtime_ns for file in files} == files

    record = (tmp_path / "runs/teachers/distilled.jsonl").rename(tmp_path / "kept.jsonl")
    assert str(tmp_path) not in record.read_text()
    of_record = said("paper.distillation", *arguments, "--runs", "kept.jsonl", cwd=tmp_path)
    assert of_record.replace("kept.jsonl", "runs/teachers") == table
    for other in ("--samples", "--max-epochs"):
        with pytest.raises(SystemExit, match=f"with other arguments than .*{other} 40"):
            paper.main([*arguments, other, "40", "--runs", str(record)])
