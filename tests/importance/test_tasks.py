"""Each task's objective against a loop, and batches of one task that nobody has named."""

import re

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from lightning_ydrop import (
    ConductanceDropout,
    ConfigurationError,
    IndexAdapter,
    NegativeSquaredError,
    Reconstruction,
    SignedLogit,
    TargetLogit,
    YDrop,
    YDropCallback,
    layer_conductance,
)
from lightning_ydrop.importance.tasks import objective_of


def test_a_signed_logit_counts_labels_for_and_against() -> None:
    output, target = torch.randn(5, 3), torch.randint(0, 2, (5, 3))
    expected = [
        sum(float(z) if y == 1 else -float(z) for z, y in zip(zs, ys, strict=True))
        for zs, ys in zip(output, target, strict=True)
    ]
    assert SignedLogit()(output, target).tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("output", "target"), [((4, 1), (4,)), ((4,), (4, 1)), ((4, 1, 2, 3), (4, 2, 3)), ((4, 2, 3), (4, 2, 3))]
)
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32])
def test_dimensions_of_size_1_may_be_missing(
    output: tuple[int, ...], target: tuple[int, ...], dtype: torch.dtype
) -> None:
    z, y = torch.randn(output), torch.randint(0, 2, target).to(dtype)
    SignedLogit().check(z, y)
    signs = 2 * y.flatten(1).double() - 1 if y.ndim > 1 else 2 * y.double()[:, None] - 1
    expected = (z.reshape(4, -1).double() * signs.reshape(4, -1)).sum(1)
    torch.testing.assert_close(SignedLogit()(z, y).double(), expected)


def test_a_squared_error_is_that_of_torch() -> None:
    output, target = torch.randn(5, 1), torch.randn(5, dtype=torch.float64)
    expected = -nn.functional.mse_loss(output[:, 0].double(), target, reduction="none")
    torch.testing.assert_close(NegativeSquaredError()(output, target).double(), expected)


def test_names_stand_for_objectives() -> None:
    kinds = {"multiclass": TargetLogit, "binary": SignedLogit, "multilabel": SignedLogit}
    for name, kind in (kinds | {"regression": NegativeSquaredError, "reconstruction": Reconstruction}).items():
        assert type(objective_of("YDrop", name)) is kind  # type: ignore[arg-type]
    assert type(objective_of("YDrop", None)) is TargetLogit


def test_an_unknown_name_lists_the_tasks() -> None:
    with pytest.raises(ConfigurationError) as caught:
        YDropCallback(objective="classification")  # type: ignore[arg-type]
    assert str(caught.value) == (
        "YDropCallback(objective='classification') was given. "
        "The tasks are 'multiclass', 'binary', 'multilabel', 'regression', 'reconstruction'. "
        'Name one of them: a segmentation is "multiclass", an autoencoder "reconstruction". '
        "Or pass an objective such as TargetLogit(class_dim=-1)."
    )


def test_a_reconstruction_is_compared_with_its_input() -> None:
    """The conductance of a linear autoencoder with one unit, by hand."""
    model = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Identity(), nn.Linear(1, 2, bias=False))
    x = torch.tensor([[1.0, 2.0]])
    scores = layer_conductance(model, x, layers="1", objective="reconstruction", n_steps=2000, quadrature="trapezoid")
    # One unit carries all of it: F at the input less F at the baseline.
    expected = (x.square().sum() - (model(x) - x).square().sum()).item()
    assert float(scores["1"]) == pytest.approx(expected, rel=1e-4)


class Net(L.LightningModule):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.body(x)
        return output

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        return self(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def dense(num_inputs: int, num_outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(num_inputs, 16), ConductanceDropout(), nn.ReLU(), nn.Linear(16, num_outputs))


def first_fit(body: nn.Module, *batch: Tensor, **arguments: object) -> YDropCallback:
    callback = YDropCallback(annealing_epochs=0, **arguments)  # type: ignore[arg-type]
    trainer = L.Trainer(
        max_steps=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback],
    )
    trainer.fit(
        Net(body), torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*batch), batch_size=len(batch[0]))
    )
    return callback


X = torch.randn(8, 20)
BITS = torch.tensor([[0, 1, 1], [1, 1, 0], [0, 0, 1], [1, 0, 0]] * 2)
SEGMENTS = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), ConductanceDropout(), nn.ReLU(), nn.Conv2d(4, 1, 1))
# What trained by a meaningless objective, or was refused without the name of the one that fits.
TASKS = {
    "autoencoder with labels": (dense(20, 20), (X, torch.arange(8)), "reconstruction"),
    "keypoints in [0, 1]": (dense(20, 6), (X, torch.rand(8, 6)), "regression"),
    "multi-label": (dense(20, 3), (X, BITS.float()), "multilabel"),
    "multi-label, integers": (dense(20, 3), (X, BITS), "multilabel"),
    "binary": (dense(20, 1), (X, BITS[:, 0]), "binary"),
    "binary, floating": (dense(20, 1), (X, BITS[:, 0].float()), "binary"),
    "one number": (dense(20, 1), (X, torch.randn(8)), "regression"),
    "binary segmentation": (SEGMENTS, (torch.randn(8, 1, 5, 5), torch.randint(0, 2, (8, 5, 5))), "binary"),
}


@pytest.mark.parametrize("name", TASKS)
def test_a_task_that_nobody_has_named_is_refused_by_naming_it(name: str) -> None:
    body, batch, task = TASKS[name]
    with pytest.raises(ConfigurationError, match=re.escape(f'"{task}"')):
        first_fit(body, *batch)


@pytest.mark.parametrize("name", TASKS)
def test_a_task_that_is_named_trains(name: str) -> None:
    body, batch, task = TASKS[name]
    engine = first_fit(body, *batch, objective=task).engine
    assert engine is not None
    assert all(scores.abs().sum() > 0 for scores in engine.scores.values())


def test_an_autoencoder_without_labels_trains() -> None:
    engine = first_fit(dense(20, 20), X, objective="reconstruction").engine
    assert engine is not None
    assert engine.scores["body.1"].abs().sum() > 0


def test_a_classifier_with_as_many_classes_as_inputs_is_told_so() -> None:
    first_fit(dense(20, 20), X, torch.arange(8), objective="multiclass")
    first_fit(dense(20, 20), X, torch.arange(12, 20))  # labels name the later classes too


def test_shares_that_sum_to_1_are_soft_labels() -> None:
    first_fit(dense(20, 3), X, torch.rand(8, 3).softmax(1))
    first_fit(dense(20, 3), X, torch.rand(8, 3).softmax(1).bfloat16())


@pytest.mark.parametrize("mask", [torch.ones(8, 5), torch.ones(8, 5, dtype=torch.bool), torch.ones(8, 5).long()])
def test_labels_in_third_place_are_named(mask: Tensor) -> None:
    """Batches of (x, mask, y)."""
    with pytest.raises(ConfigurationError, match=re.escape("adapter=IndexAdapter(inputs=0, target=2)")):
        first_fit(dense(20, 5), X, mask, torch.arange(8) % 5)


def test_a_mask_in_the_shape_of_the_labels_is_refused() -> None:
    labels, mask = torch.arange(8) % 5, torch.tensor([0, 1] * 4)
    with pytest.raises(ConfigurationError) as caught:
        first_fit(dense(20, 5), X, mask, labels)
    assert str(caught.value) == (
        "The batch is list(Tensor(shape=(8, 20), dtype=torch.float32, device=cpu), "
        "Tensor(shape=(8,), dtype=torch.int64, device=cpu), Tensor(shape=(8,), dtype=torch.int64, device=cpu)), and "
        "Y-Drop takes the second item for the target. "
        "That holds 0 and 1 alone, as a mask does. Item 2 names more classes of the output. "
        "Pass adapter=IndexAdapter(inputs=0, target=2) if that is the target, otherwise target=1. Where forward takes "
        "the mask too, pass inputs=[0, 1]."
    )
    first_fit(dense(20, 5), X, mask, labels, adapter=IndexAdapter(inputs=0, target=2))


def test_the_engine_takes_tasks_too() -> None:
    ydrop = YDrop(dense(20, 1), objective="binary")
    ydrop.step(X, BITS[:, 0])
    assert ydrop.scores["1"].abs().sum() > 0
    assert "SignedLogit" in repr(ydrop.settings.path)


@pytest.mark.parametrize(
    ("task", "output", "target", "message"),
    [
        ("binary", (4, 2), torch.zeros(4), "one logit for each label"),
        ("multilabel", (4, 2), torch.full((4, 2), 2.0), "outside [0, 1]"),
        ("regression", (4, 2), torch.zeros(4), "a number for each output"),
        ("regression", (4, 2), None, "a number for each output"),
        ("reconstruction", (4, 2), torch.zeros(4, 3), "has the shape of the input"),
    ],
)
def test_targets_of_another_task_are_refused(
    task: str, output: tuple[int, ...], target: Tensor | None, message: str
) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        objective_of("YDrop", task).check(torch.zeros(output), target)  # type: ignore[arg-type]


def test_a_reconstruction_of_two_inputs_is_refused() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = dense(4, 4)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            output: Tensor = self.body(x + y)
            return output

    with pytest.raises(ConfigurationError, match="2 floating inputs"):
        YDrop(Two(), objective="reconstruction").step((torch.rand(4, 4), torch.rand(4, 4)))


def test_a_message_names_the_task_that_was_chosen() -> None:
    objective = objective_of("YDrop", "binary")
    with pytest.raises(ConfigurationError, match=r"^SignedLogit\(\), the objective of 'binary', was given"):
        objective.check(torch.zeros(4, 3), torch.zeros(4))
    assert repr(objective_of("YDrop", SignedLogit())) == "SignedLogit()"
