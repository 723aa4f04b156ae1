from typing import Any

import pytest
import torch

from lightning_ydrop import ConfigurationError
from lightning_ydrop.phase1.objectives import check_pairs, check_target, target_output

OUTPUT = torch.tensor([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]])


def test_a_class_index_names_its_logit() -> None:
    assert target_output(OUTPUT, torch.tensor([2, 0])).tolist() == [3, 10]
    assert target_output(OUTPUT, torch.tensor([2, 0], dtype=torch.uint8)).tolist() == [3, 10]


def test_soft_labels_weigh_the_logits() -> None:
    assert target_output(OUTPUT, torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.1, 0.9]])).tolist() == [1.5, 29]


def test_no_target_sums_the_outputs() -> None:
    assert target_output(OUTPUT, None).tolist() == [6, 60]
    assert target_output(OUTPUT.view(2, 3, 1, 1), None).tolist() == [6, 60]
    assert target_output(OUTPUT[:, 0], None).tolist() == [1, 10]


@pytest.mark.parametrize(
    ("output", "target"),
    [
        (OUTPUT, torch.tensor([0, 2])),
        (OUTPUT, torch.rand(2, 3)),
        (OUTPUT, None),
        (OUTPUT[:, 0], None),
        (OUTPUT.view(2, 3, 1, 1), None),
        (OUTPUT, torch.tensor([], dtype=torch.long)),
    ],
)
def test_what_fits_passes(output: Any, target: Any) -> None:
    check_target(output, target)


@pytest.mark.parametrize(
    ("output", "target", "message"),
    [
        ({"logits": OUTPUT}, None, r"forward returned dict\('logits': Tensor"),
        ((OUTPUT, OUTPUT), torch.tensor([0, 1]), "forward returned tuple"),
        (None, None, "forward returned None"),
        (OUTPUT.long(), None, "dtype=torch.int64"),
        (OUTPUT.sum(), None, r"shape=\(\)"),
        (OUTPUT.unsqueeze(2), torch.tensor([0, 1]), r"the output has the shape \(B, C\)"),
        (OUTPUT, torch.rand(2), "For class indices convert it with target.long"),
        (OUTPUT, torch.rand(2, 4), "soft labels"),
        (OUTPUT, torch.tensor([[0], [1]]), "Reshape it with target.flatten"),
        (OUTPUT, torch.tensor([True, False]), "one class index"),
        (OUTPUT, torch.tensor([0, 3]), "classes from 0 to 3 for an output of 3 classes"),
        (OUTPUT, torch.tensor([-100, 0]), "classes from -100 to 0"),
    ],
)
def test_what_does_not_fit_is_refused(output: Any, target: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        check_target(output, target)


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
