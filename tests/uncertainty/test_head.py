"""A student's uncertainty: what its last output means, how it learns that, and what it costs the rest: nothing."""

import copy
import math
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from lightning_ydrop import ConfigurationError, DropoutDistillation, monte_carlo
from lightning_ydrop.functional import monte_carlo_divergence, predictive_entropy
from lightning_ydrop.uncertainty import MonteCarloDivergence, StudentWithUncertainty
from lightning_ydrop.uncertainty.head import division_loss, widen
from tests.sameness import assert_same
from tests.uncertainty.networks import Points, Small


def trainer_of(folder: Path, **settings: Any) -> Trainer:
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(default_root_dir=folder, accelerator="cpu", **{"max_epochs": 1, **quiet, **settings})


def logged(distillation: DropoutDistillation, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """What a training step gives and logs, without a Trainer."""
    with patch.object(distillation, "log") as log:
        loss = distillation.training_step(batch, 0)
    return loss, {call.args[0]: call.args[1] for call in log.call_args_list}


@pytest.fixture
def teacher() -> Small:
    torch.manual_seed(0)
    teacher = Small()
    for parameter in teacher.parameters():
        nn.init.normal_(parameter, std=2.0)  # far from linear: masks disagree
    return teacher


class Given(nn.Module):
    """Returns its input."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_the_last_output_divides_the_entropy() -> None:
    student = StudentWithUncertainty(Given())
    output = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, math.log(3)], [5.0, 1.0, -100.0], [-math.inf, 1.0, 2.0]])
    logits, aleatoric, epistemic = student(output)
    assert torch.equal(logits, output[:, :2])
    half = math.log(2)
    assert torch.allclose(aleatoric[:2], torch.tensor([half / 2, 3 * half / 4]))
    assert torch.allclose(epistemic[:2], torch.tensor([half / 2, half / 4]))
    assert torch.allclose(aleatoric + epistemic, predictive_entropy(logits.softmax(1)))
    assert aleatoric[2] == aleatoric[3] == epistemic[3] == 0


def test_classes_lie_where_class_dim_says() -> None:
    output = torch.randn(2, 4, 5, 6)
    logits, *parts = StudentWithUncertainty(Given())(output)
    other_logits, *other_parts = StudentWithUncertainty(Given(), class_dim=-1)(output.movedim(1, -1))
    assert logits.shape == (2, 3, 5, 6)
    assert torch.equal(other_logits.movedim(-1, 1), logits)
    for part, other in zip(parts, other_parts, strict=True):
        assert part.shape == (2, 5, 6)
        assert torch.allclose(other, part)


def test_uncertainty_is_precise_where_logits_are_not() -> None:
    logits, *parts = StudentWithUncertainty(Given())(torch.randn(2, 4).bfloat16())
    assert logits.dtype == torch.bfloat16
    assert [part.dtype for part in parts] == [torch.float32] * 2
    assert [part.dtype for part in StudentWithUncertainty(Given())(torch.randn(2, 4).double())] == [torch.float64] * 3


def test_it_passes_on_what_it_is_called_with() -> None:
    class Pair(nn.Module):
        def forward(self, inputs: Tensor, other: Tensor, *, inverted: bool) -> dict[str, Tensor]:
            return {"hidden": torch.zeros(1), "logits": -(inputs + other) if inverted else inputs + other}

    x = torch.randn(2, 4)
    said = StudentWithUncertainty(Pair())(x, x, inverted=True)
    assert torch.equal(said[0], -2 * x[:, :3])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StudentWithUncertainty("best.ckpt"), r"StudentWithUncertainty\(.*instance of torch.nn.Module"),  # type: ignore[arg-type]
        (lambda: StudentWithUncertainty(Given(), class_dim=0), r"StudentWithUncertainty\(class_dim=0\)"),
        (lambda: StudentWithUncertainty(Given())(torch.randn(5, 2)), r"one output more than there are classes"),
        (lambda: StudentWithUncertainty(Given(), class_dim=2)(torch.randn(5, 4)), r"class_dim=2.*\(5, 4\)"),
    ],
)
def test_bad_students_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make()


def test_the_loss_is_the_cross_entropy_of_every_mask_in_its_two_parts() -> None:
    torch.manual_seed(0)
    masks, logits, share = torch.randn(7, 5, 3).softmax(-1), torch.randn(5, 3), torch.randn(5)
    slow = 0.0
    for mask in masks:
        for row in range(5):
            aleatoric = -sum(float(p) * math.log(p) for p in mask[row])
            said = logits[row].log_softmax(0)
            divergence = sum(float(p) * (math.log(p) - float(q)) for p, q in zip(mask[row], said, strict=True))
            z = float(share[row])
            slow -= aleatoric * math.log(1 / (1 + math.exp(-z))) + divergence * math.log(1 / (1 + math.exp(z)))
    entropies = torch.stack([predictive_entropy(mask) for mask in masks])
    together = division_loss(share, logits, masks.mean(0), entropies.mean(0))
    assert float(together) == pytest.approx(slow / 35, rel=1e-5)
    # So one mask in each step has the same optimum as many.
    alone = [division_loss(share, logits, mask, entropy) for mask, entropy in zip(masks, entropies, strict=True)]
    assert torch.allclose(torch.stack(alone).mean(), together)


def test_the_loss_is_least_at_the_share_of_the_average() -> None:
    torch.manual_seed(0)
    masks = (3 * torch.randn(50, 4, 3)).softmax(-1)
    average, entropy = masks.mean(0), torch.stack([predictive_entropy(mask) for mask in masks]).mean(0)
    share = torch.zeros(4, requires_grad=True)
    logits = average.log().requires_grad_()
    optimizer = torch.optim.LBFGS([share], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = division_loss(share, logits, average, entropy)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert torch.allclose(share.sigmoid(), entropy / predictive_entropy(average), atol=1e-3)
    assert logits.grad is None


def test_a_student_that_can_say_anything_says_what_many_masks_say(teacher: Small) -> None:
    x = torch.randn(4, 4)

    class Table(nn.Module):
        """Outputs for each of the four samples, known by their first number."""

        def __init__(self) -> None:
            super().__init__()
            self.outputs = nn.Parameter(torch.zeros(4, 4))

        def forward(self, rows: Tensor) -> Tensor:
            return self.outputs[(rows[:, :1] == x[:, 0]).int().argmax(1)]

    distillation = DropoutDistillation(teacher, student=Table(), num_masks=2000, uncertainty_head=True)
    optimizer = torch.optim.LBFGS(distillation.student.parameters(), max_iter=200)

    def closure() -> Tensor:
        torch.manual_seed(1)
        optimizer.zero_grad()
        loss, _ = logged(distillation, x)
        loss.backward()
        return loss

    optimizer.step(closure)
    average = monte_carlo(teacher, x, 20_000)
    logits, aleatoric, epistemic = (each.detach() for each in distillation(x))
    assert float(monte_carlo_divergence(logits, average.probabilities)) < 1e-3
    assert torch.allclose(aleatoric, average.expected_entropy, atol=0.03)
    assert torch.allclose(epistemic, average.mutual_information, atol=0.03)
    assert float((average.mutual_information - average.expected_entropy).abs().max()) > 0.1  # not half each


def test_a_copy_says_what_the_teacher_says_before_it_learns(teacher: Small) -> None:
    x = torch.randn(5, 4)
    distillation = DropoutDistillation(teacher, num_masks=3, uncertainty_head=True)
    distillation.student.eval()
    logits, aleatoric, epistemic = distillation(x)
    assert torch.allclose(logits, teacher.eval()(x), atol=1e-6)
    assert torch.equal(aleatoric, epistemic)
    assert teacher.net[4].out_features == 3
    # Nothing else changes: neither the masks nor the loss that is logged.
    losses, found = [], []
    for head in (False, True):
        torch.manual_seed(3)
        loss, values = logged(DropoutDistillation(teacher, num_masks=3, uncertainty_head=head), x)
        losses.append(loss.detach())
        found.append({name: value.detach() for name, value in values.items()})
    division = found[1].pop("train_division_loss")
    assert found[0].keys() == found[1].keys() == {"train_loss", "train_agreement"}
    assert torch.allclose(found[0]["train_loss"], found[1]["train_loss"])
    assert torch.allclose(losses[1], losses[0] + division)


def test_it_is_fitted_by_a_trainer_and_resumes_from_the_students_checkpoint(teacher: Small, tmp_path: Path) -> None:
    before, data = copy.deepcopy(teacher.state_dict()), Points().train_dataloader()
    distillation = DropoutDistillation(teacher, num_masks=2, uncertainty_head=True)
    trainer = trainer_of(tmp_path, max_epochs=3, enable_checkpointing=False)
    trainer.fit(distillation, data, data)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert {"train_division_loss", "val_division_loss"} <= trainer.callback_metrics.keys()
    assert_same(dict(teacher.state_dict()), dict(before))
    assert not any(module.training for module in distillation.student.modules())
    x = torch.randn(6, 4)
    _, aleatoric, epistemic = distillation(x)
    assert not torch.allclose(aleatoric, epistemic)
    again = DropoutDistillation(teacher, num_masks=2, uncertainty_head=True)
    results = trainer_of(tmp_path).validate(again, data, ckpt_path=tmp_path / "last.ckpt", verbose=False)
    assert results[0]["val_division_loss"] == pytest.approx(float(trainer.callback_metrics["val_division_loss"]))
    assert_same(list(again.eval()(x)), list(distillation(x)))
    predicted = trainer_of(tmp_path).predict(distillation, Points(labels=False).predict_dataloader())
    assert predicted is not None
    assert_same(list(predicted[0]), list(distillation(Points().data.tensors[0][:16])))


@pytest.mark.parametrize("compiled", [False, True])
def test_checkpoints_load_into_the_class_of_the_student(compiled: bool, teacher: Small, tmp_path: Path) -> None:
    class Wider(Small):
        def __init__(self, outputs: int = 4) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.net[4] = nn.Linear(16, outputs)

    student: Any = torch.compile(Wider(), backend="eager") if compiled else Wider()
    data = Points().train_dataloader()
    distillation = DropoutDistillation(teacher, student=student, uncertainty_head=True)
    trainer_of(tmp_path, callbacks=[ModelCheckpoint(tmp_path / "kept", save_last=True)]).fit(distillation, data, data)
    loaded = StudentWithUncertainty(Wider.load_from_checkpoint(tmp_path / "kept/last.ckpt").eval())
    x = torch.randn(6, 4)
    assert_same(list(loaded(x)), list(distillation(x)))


def test_a_student_reads_inputs_as_the_callback_does_and_its_logits_are_its_output(teacher: Small) -> None:
    class Own(Small):
        def ydrop_inputs(self, batch: Any) -> tuple[Any, Any]:
            return (batch["x"], batch["sign"]), None

        def ydrop_forward(self, x: Tensor, sign: Tensor) -> Any:
            return self.net(x) * sign

        def forward(self, *args: Any) -> Any:
            raise AssertionError

    batch = {"x": torch.randn(6, 4), "sign": torch.tensor(-3.0)}
    distillation = DropoutDistillation(Own(), uncertainty_head=True)
    assert logged(distillation, batch)[0].isfinite()
    distillation.student.eval()
    network = distillation.student.get_submodule("network.net")
    assert torch.equal(distillation.predict_step(batch, 0)[0], -3 * network(batch["x"])[:, :3])
    other = DropoutDistillation(teacher, uncertainty_head=True).eval()
    divergence = MonteCarloDivergence()
    divergence.update(other(batch["x"]), monte_carlo(teacher, batch["x"], 3))
    assert divergence.compute().isfinite()


def test_tokens_and_pictures_learn_it_too() -> None:
    torch.manual_seed(0)
    tokens = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 3))
    x = torch.randn(5, 7, 4)
    found = {}
    for dim, wrap in ((-1, lambda model: model), (1, lambda model: nn.Sequential(model, Transposed()))):
        distillation = DropoutDistillation(wrap(tokens), num_masks=2, class_dim=dim, uncertainty_head=True)
        torch.manual_seed(1)
        loss, values = logged(distillation, (x, torch.randint(3, (5, 7), generator=torch.Generator().manual_seed(0))))
        found[dim] = [loss.detach(), values["train_division_loss"].detach(), values["train_agreement"]]
        loss.backward()
        assert distillation.student(x)[1].shape == (5, 7)
    assert torch.allclose(torch.stack(found[1]), torch.stack(found[-1]))
    pictures = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Dropout2d(), nn.Conv2d(4, 3, 1))
    distillation = DropoutDistillation(pictures, uncertainty_head=True)
    logits, aleatoric, _ = distillation(torch.randn(2, 1, 6, 6))
    assert (logits.shape, aleatoric.shape) == ((2, 3, 4, 4), (2, 4, 4))
    assert logged(distillation, torch.randn(2, 1, 6, 6))[0].isfinite()


class Transposed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


@pytest.mark.parametrize("bias", [True, False])
def test_widening_adds_an_output_of_zero_and_changes_no_other(bias: bool) -> None:
    for layer, x in (
        (nn.Linear(4, 3, bias=bias), torch.randn(5, 4)),
        (nn.Conv1d(4, 3, 2, bias=bias), torch.randn(5, 4, 6)),
        (nn.Conv2d(4, 3, 2, bias=bias), torch.randn(5, 4, 6, 6)),
    ):
        before = layer(x)
        widen(nn.Sequential(layer, nn.Identity()))
        after = layer(x)
        assert torch.allclose(after[:, :3], before, atol=1e-6)
        assert torch.equal(after[:, 3:], torch.zeros_like(after[:, 3:]))
        assert repr(layer).count("4,") == 2  # 4 inputs, and now 4 outputs
        assert all(parameter.requires_grad for parameter in layer.parameters())


def pruned() -> nn.Module:
    layer = nn.Linear(4, 3)
    prune.l1_unstructured(layer, "weight", 0.5)
    return layer


@pytest.mark.parametrize(
    "last",
    [
        pruned,
        lambda: parametrizations.weight_norm(nn.Linear(4, 3)),
        lambda: nn.Linear(4, 3).requires_grad_(False),
        lambda: nn.Conv1d(4, 4, 1, groups=2),
    ],
    ids=["pruned", "parametrized", "frozen", "groups"],
)
def test_a_last_layer_that_cannot_be_widened_is_refused(last: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(), last())
    with pytest.raises(ConfigurationError, match=r"uncertainty_head=True.*Pass student=\.\.\., a network with one"):
        DropoutDistillation(model, uncertainty_head=True)


def test_a_network_without_a_layer_of_weights_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="whose last layer is None"):
        DropoutDistillation(nn.Sequential(nn.PReLU(), nn.Dropout()), uncertainty_head=True)


@pytest.mark.parametrize("outputs", [3, 5])
def test_a_student_without_one_output_more_is_refused(outputs: int, teacher: Small) -> None:
    distillation = DropoutDistillation(teacher, student=nn.Linear(4, outputs), uncertainty_head=True)
    with pytest.raises(ConfigurationError, match=rf"\(5, {outputs}\).*one output more with uncertainty_head=True"):
        logged(distillation, torch.randn(5, 4))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"uncertainty_head": "yes"}, r"DropoutDistillation\(uncertainty_head='yes'\)"),
        ({"uncertainty_head": True, "temperature": 2.0}, r"temperature=2\.0, uncertainty_head=True"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str, teacher: Small) -> None:
    with pytest.raises(ConfigurationError, match=message):
        DropoutDistillation(teacher, **settings)
