"""What is refused as a target, and that the message shows the shapes that the user has and what to pass."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_ydrop import ConductanceDropout, ConfigurationError, NegativeLoss, TargetLogit, YDrop, layer_conductance
from lightning_ydrop.importance.targets import check_pairs, check_target
from tests.test_bad_input import check_sentences

B, T, CLASSES = 16, 7, 5


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


@pytest.mark.parametrize(
    ("sizes", "batch_dim", "hint"),
    [
        ((7, 16, 8), 0, "Dimension 1 of the inputs has 16 entries: for models of (T, B, F) pass batch_dim=1, here and"),
        ((16, 7, 8), 1, "Dimension 0 of the inputs has 16 entries: for models of (B, T, F) pass batch_dim=0, here and"),
        ((7, 8, 16), 0, "first dimension. Pass inputs and targets of the same batch."),
        ((7,), 0, "first dimension. Pass inputs and targets of the same batch."),
    ],
)
def test_another_dimension_of_as_many_entries_is_proposed(sizes: tuple[int, ...], batch_dim: int, hint: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        check_pairs(torch.zeros(16), 7, batch_dim, sizes)
    assert hint in str(caught.value)
    check_sentences(caught.value)


class Sequences(nn.Module):
    """An LSTM of either layout, which classifies the last state or each step."""

    def __init__(self, batch_first: bool, last: bool) -> None:
        super().__init__()
        self.batch_first, self.last = batch_first, last
        self.lstm = nn.LSTM(8, 6, batch_first=batch_first)
        self.drop = ConductanceDropout(unit_dim=-1, batch_dim=int(not batch_first))
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Any:
        hidden = self.drop(self.lstm(x)[0])
        if self.last:
            hidden = hidden[:, -1] if self.batch_first else hidden[-1]
        return self.head(hidden)


def test_a_forgotten_batch_dim_is_named() -> None:
    model, x, y = Sequences(False, True), torch.randn(T, B, 8), torch.arange(B) % CLASSES
    hint = r"for 7 samples.* for models of \(T, B, F\) pass batch_dim=1, here and to the layers"
    with pytest.raises(ConfigurationError, match=hint):
        YDrop(model).step(x, y)
    with pytest.raises(ConfigurationError, match=hint):
        layer_conductance(model, x, y)
    YDrop(model, batch_dim=1).step(x, y)


@pytest.mark.parametrize("batch_first", [True, False])
def test_classes_in_the_last_dimension_are_recognised(batch_first: bool) -> None:
    model = Sequences(batch_first, False)
    shape = (B, T) if batch_first else (T, B)
    x, y, batch_dim = torch.randn(*shape, 8), torch.zeros(shape, dtype=torch.long), int(not batch_first)
    for call in (
        YDrop(model, batch_dim=batch_dim).step,
        lambda x, y: layer_conductance(model, x, y, batch_dim=batch_dim),
    ):
        with pytest.raises(ConfigurationError) as caught:
            call(x, y)
        given, _, remedy = caught.value.args
        assert remedy == "The classes seem to be the last dimension: pass objective=TargetLogit(class_dim=-1)."
        assert f"Tensor(shape={(*shape, CLASSES)}," in given
        assert ("Here the batch comes first" in given) == (not batch_first)
        check_sentences(caught.value)
    YDrop(model, objective=TargetLogit(class_dim=-1), batch_dim=batch_dim).step(x, y)


@pytest.mark.parametrize(
    ("objective", "shape", "target"),
    [
        (TargetLogit(), (4, 5, 3), torch.zeros(4, 2, dtype=torch.long)),
        (TargetLogit(class_dim=-1), (4, 5, 3), torch.zeros(4, 5, dtype=torch.bool)),
        (TargetLogit(), (4, 5), torch.zeros(4, 1, dtype=torch.long)),
        (NegativeLoss(nn.CrossEntropyLoss(reduction="none")), (4, 5, 3), torch.zeros(4, 5, dtype=torch.long)),
    ],
)
def test_other_shapes_are_not_taken_for_that(objective: Any, shape: tuple[int, ...], target: Tensor) -> None:
    with pytest.raises(ConfigurationError) as caught:
        check_target(objective, torch.randn(shape), target)
    assert "seem to be" not in str(caught.value)
    check_target(TargetLogit(class_dim=-1), torch.randn(4, 5, 3), torch.zeros(4, 5, dtype=torch.long))
