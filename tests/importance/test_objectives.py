from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_ydrop import ConfigurationError, NegativeLoss, Objective, OutputSum, PredictedLogit, TargetLogit
from lightning_ydrop.importance.arrangement import check_pairs
from lightning_ydrop.importance.objectives import check_objective

OUTPUT = torch.tensor([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]])
DENSE = torch.arange(24.0).view(2, 3, 2, 2)  # (B, C, H, W)
LABELS = torch.tensor([[[0, 1], [2, 0]], [[-100, -100], [1, 1]]])


def test_a_class_index_names_its_logit() -> None:
    assert TargetLogit()(OUTPUT, torch.tensor([2, 0])).tolist() == [3, 10]
    assert TargetLogit()(OUTPUT, torch.tensor([2, 0], dtype=torch.uint8)).tolist() == [3, 10]


def test_soft_labels_weigh_the_logits() -> None:
    assert TargetLogit()(OUTPUT, torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.1, 0.9]])).tolist() == [1.5, 29]


def test_dense_labels_name_a_logit_for_each_position() -> None:
    slow = [0.0, 0.0]
    for sample in range(2):
        for row in range(2):
            for column in range(2):
                label = int(LABELS[sample, row, column])
                slow[sample] += float(DENSE[sample, label, row, column]) if label >= 0 else 0.0
    assert TargetLogit()(DENSE, LABELS).tolist() == slow
    tokens = DENSE.flatten(2).transpose(1, 2)  # (B, T, C)
    assert TargetLogit(class_dim=-1)(tokens, LABELS.flatten(1)).tolist() == slow
    ignoring_0 = LABELS.clamp(min=0)
    assert TargetLogit(ignore_index=0)(DENSE, ignoring_0)[1] == DENSE[1, 1, 1].sum()


def test_samples_without_a_label_do_not_count() -> None:
    assert TargetLogit()(OUTPUT, torch.tensor([-100, 1])).tolist() == [0, 20]


@pytest.mark.parametrize("objective", [TargetLogit(), OutputSum()])
def test_no_target_sums_the_outputs(objective: Objective) -> None:
    assert objective(OUTPUT, None).tolist() == [6, 60]
    assert objective(OUTPUT.view(2, 3, 1, 1), None).tolist() == [6, 60]
    assert objective(OUTPUT[:, 0], None).tolist() == [1, 10]


def test_the_prediction_is_settled_once() -> None:
    objective = PredictedLogit()
    target = objective.settle(lambda: OUTPUT, None)
    assert target is not None
    assert target.tolist() == [2, 2]
    assert objective(-OUTPUT, target).tolist() == [-3, -30]
    dense = PredictedLogit().settle(lambda: DENSE, None)
    assert dense is not None
    assert dense.shape == (2, 2, 2)
    assert PredictedLogit()(DENSE, dense).tolist() == [DENSE[0, 2].sum(), DENSE[1, 2].sum()]


def test_a_loss_counts_with_its_sign_turned() -> None:
    target = torch.tensor([2, 0])
    loss = nn.functional.cross_entropy(OUTPUT, target, reduction="none")
    assert NegativeLoss(nn.CrossEntropyLoss(reduction="none"))(OUTPUT, target).equal(-loss)
    squares = NegativeLoss(nn.MSELoss(reduction="none"))(OUTPUT, OUTPUT + 2)
    assert squares.tolist() == [-12, -12]


@pytest.mark.parametrize("objective", [TargetLogit(), PredictedLogit(-1), OutputSum(), NegativeLoss(nn.MSELoss())])
def test_objectives_show_themselves(objective: Objective) -> None:
    assert repr(objective).startswith(type(objective).__name__ + "(")


@pytest.mark.parametrize(
    ("objective", "output", "target"),
    [
        (TargetLogit(), OUTPUT, torch.tensor([0, 2])),
        (TargetLogit(), OUTPUT, torch.rand(2, 3)),
        (TargetLogit(), OUTPUT, None),
        (TargetLogit(), OUTPUT[:, 0], None),
        (TargetLogit(), DENSE, None),
        (TargetLogit(), DENSE, LABELS),
        (TargetLogit(-1), OUTPUT.unsqueeze(1), torch.tensor([[0], [2]])),
        (TargetLogit(), OUTPUT, torch.tensor([], dtype=torch.long)),
        (TargetLogit(), OUTPUT, torch.tensor([-100, -100])),
        (PredictedLogit(), OUTPUT, None),
        (OutputSum(), OUTPUT[:, 0], None),
        (NegativeLoss(nn.CrossEntropyLoss(reduction="none")), OUTPUT, torch.tensor([0, 2])),
    ],
)
def test_what_fits_passes(objective: Objective, output: Tensor, target: Any) -> None:
    objective.check(output, target)


@pytest.mark.parametrize(
    ("objective", "output", "target", "message"),
    [
        (TargetLogit(), OUTPUT.unsqueeze(2), torch.tensor([0, 1]), r"its shape is \(B, 1\)"),
        (TargetLogit(), OUTPUT[:, 0], torch.tensor([0, 1]), "a logit for each class"),
        (TargetLogit(2), OUTPUT, torch.tensor([0, 1]), r"TargetLogit\(class_dim=2, ignore_index=-100\) was given"),
        (TargetLogit(), OUTPUT, torch.rand(2), "For class indices convert it with target.long"),
        (TargetLogit(), OUTPUT, torch.rand(2, 4), "soft labels"),
        (TargetLogit(), OUTPUT, -torch.rand(2, 3), "not negative"),
        (TargetLogit(), OUTPUT[:, :1], torch.rand(2, 1), "for a regression choose objective=OutputSum"),
        (TargetLogit(), OUTPUT, torch.tensor([[0], [1]]), "Reshape it with target.flatten"),
        (TargetLogit(), OUTPUT, torch.tensor([True, False]), "one class index"),
        (TargetLogit(), OUTPUT, torch.tensor([0, 3]), "classes from 0 to 3 for an output of 3 classes"),
        (TargetLogit(), OUTPUT, torch.tensor([-1, 0]), "classes from -1 to 0"),
        (TargetLogit(), DENSE, LABELS.clamp(min=0) + 253, "ignore_index"),
        (TargetLogit(), DENSE, LABELS[:, :1], r"its shape is \(B, 2, 2\)"),
        (PredictedLogit(), OUTPUT[:, :1], None, "two logits or more"),
        (PredictedLogit(2), OUTPUT, None, r"PredictedLogit\(class_dim=2\)"),
        (
            NegativeLoss(lambda output, target: (output - target).square()),
            OUTPUT[:, :1],
            torch.rand(2),
            "of the shape of the output",
        ),
        (
            NegativeLoss(nn.BCEWithLogitsLoss(reduction="none")),
            OUTPUT[:, :1],
            torch.tensor([0, 1]),
            "raised ValueError",
        ),
        (NegativeLoss(nn.BCEWithLogitsLoss(reduction="none")), OUTPUT[:, 0], torch.tensor([0, 1]), r"y\.float\(\)"),
        (NegativeLoss(nn.CrossEntropyLoss()), OUTPUT, torch.tensor([0, 1]), 'reduction="none"'),
        (NegativeLoss(lambda output, target: 0.5), OUTPUT, torch.tensor([0, 1]), "the loss of 2 samples is 0.5"),  # type: ignore[arg-type, return-value]
        (NegativeLoss(nn.CrossEntropyLoss(reduction="none")), OUTPUT, None, "A loss needs a target"),
    ],
)
def test_what_does_not_fit_is_refused(objective: Objective, output: Tensor, target: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        objective.check(output, target)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TargetLogit(class_dim=0), r"TargetLogit\(class_dim=0\)"),
        (lambda: PredictedLogit(class_dim="last"), r"PredictedLogit\(class_dim='last'\)"),  # type: ignore[arg-type]
        (lambda: NegativeLoss("mse"), r"NegativeLoss\(loss='mse'\)"),  # type: ignore[arg-type]
        (lambda: check_objective("YDrop", "sum"), r"YDrop\(objective='sum'\)"),
    ],
)
def test_what_is_no_objective_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make()


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ([0, 1], r"The target is list\(0, 1\)"),
        (1.0, "The target is 1.0"),
        (torch.tensor(1), r"shape=\(\).* for 2 samples"),
        (torch.tensor([0, 1, 2]), r"shape=\(3,\).* for 2 samples"),
    ],
)
def test_what_is_no_target_for_the_samples_is_refused(target: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        check_pairs(target, 2)
    check_pairs(None, 2)
