import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_ydrop import ConfigurationError, NegativeLoss, Objective, OutputSum, PredictedLogit, TargetLogit
from lightning_ydrop.importance.objectives import check_objective

OUTPUT = torch.tensor([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]])
DENSE = torch.arange(24.0).view(2, 3, 2, 2)  # (B, C, H, W)
LABELS = torch.tensor([[[0, 1], [2, 0]], [[-100, -100], [1, 1]]])


READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero")
# What CUDA refuses under torch.use_deterministic_algorithms(True), as far as a logit could be taken by it.
REFUSED = ("aten::nll_loss2d_forward", "aten::nll_loss2d_backward", "aten::put_", "aten::kthvalue", "aten::cumsum")


class Operators(TorchDispatchMode):
    """Lists operators, and refuses looks at values and what has no deterministic kernel on CUDA."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func._schema.name not in READS + REFUSED, func
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def slow_logits(output: Tensor, target: Tensor, class_dim: int, ignore_index: int) -> Tensor:
    """Add up the labelled logits of each row, one position at a time."""
    classes_last = output.movedim(class_dim, -1)
    num_classes = classes_last.shape[-1]
    rows = []
    for logits, labels in zip(classes_last, target.tolist(), strict=True):
        total = logits.sum() * 0.0  # of the graph, also where nothing counts
        flat: Any = np.asarray(labels).ravel().tolist()
        for position, label in zip(logits.reshape(-1, num_classes), flat, strict=True):
            if 0 <= label < num_classes and label != ignore_index:
                total = total + position[label]
        rows.append(total)
    return torch.stack(rows)


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


@st.composite
def labelled_outputs(draw: st.DrawFn) -> tuple[Tensor, Tensor, int, int]:
    """Draw logits with the classes in some dimension, labels of which some are out of range, and an ignored one."""
    batch, num_classes = draw(st.integers(1, 3)), draw(st.integers(2, 5))
    positions = draw(st.lists(st.integers(1, 3), max_size=2))
    shape = [batch, *positions]
    class_dim = draw(st.integers(1, len(shape)))
    label = st.integers(-3, num_classes + 2) | st.sampled_from([-100, 255, -(2**63), 2**63 - 1])
    count = int(np.prod(shape))
    labels = torch.tensor(draw(st.lists(label, min_size=count, max_size=count))).view(shape)
    output = torch.randn(
        [*shape[:class_dim], num_classes, *shape[class_dim:]],
        generator=torch.Generator().manual_seed(draw(st.integers(0, 99))),
        dtype=torch.float64,
    )
    if draw(st.booleans()):
        class_dim -= output.ndim
    return output, labels, class_dim, draw(label)


@given(labelled_outputs())
def test_labels_name_logits_as_a_slow_loop_says(case: tuple[Tensor, Tensor, int, int]) -> None:
    output, labels, class_dim, ignore_index = case
    output.requires_grad_()
    expected = slow_logits(output, labels, class_dim, ignore_index)
    (gradient,) = torch.autograd.grad(expected.sum(), output, allow_unused=True, materialize_grads=True)
    torch.use_deterministic_algorithms(True)
    try:
        with Operators():
            value = TargetLogit(class_dim, ignore_index)(output, labels)
            (found,) = torch.autograd.grad(value, output, torch.ones_like(value))
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.allclose(value, expected, rtol=1e-12, atol=1e-12)
    assert found.equal(gradient)


@given(labelled_outputs())
def test_unusable_labels_are_counted(case: tuple[Tensor, Tensor, int, int]) -> None:
    output, labels, class_dim, ignore_index = case
    num_classes = output.shape[class_dim]
    expected = sum(not 0 <= label < num_classes and label != ignore_index for label in labels.flatten().tolist())
    with Operators() as operators:
        count = TargetLogit(class_dim, ignore_index).count_unusable(output.to("meta"), labels)
    assert count is not None
    assert (count.dtype, count.shape, count.device, count.item()) == (torch.int64, (), labels.device, expected)
    assert len([name for name in operators.names if name != "aten::_to_copy"]) <= 5


def test_what_names_nothing_is_not_counted_elsewhere() -> None:
    labels = torch.tensor([0, 7])
    assert TargetLogit().count_unusable(OUTPUT, None) is None
    assert TargetLogit().count_unusable(OUTPUT, torch.rand(2, 3)) is None
    for objective in (PredictedLogit(), OutputSum(), NegativeLoss(nn.CrossEntropyLoss(reduction="none"))):
        assert objective.count_unusable(OUTPUT, labels) is None


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool])
def test_labels_may_be_any_integers(dtype: torch.dtype) -> None:
    labels = torch.tensor([1, 0]).to(dtype)
    assert TargetLogit()(OUTPUT, labels).tolist() == [2, 10]
    assert TargetLogit(ignore_index=0)(OUTPUT, labels).tolist() == [2, 0]


def test_a_small_dtype_does_not_wrap_around() -> None:
    labels = torch.tensor([156, 2], dtype=torch.uint8)  # -100 is 156 in uint8
    assert TargetLogit()(OUTPUT, labels).tolist() == [0, 30]
    count = TargetLogit().count_unusable(OUTPUT, labels)
    assert count is not None
    assert count.item() == 1
    with pytest.raises(ConfigurationError, match="classes from 2 to 156 for an output of 3 classes"):
        TargetLogit().check(OUTPUT, labels)
    TargetLogit(ignore_index=156).check(OUTPUT, labels)


@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 2, 255])
@pytest.mark.parametrize("bad", [float("-inf"), float("nan"), float("inf")])
@pytest.mark.usefixtures("deterministic")
def test_what_does_not_count_leaks_nothing(ignore_index: int, bad: float) -> None:
    output = torch.full((4, 3), bad, dtype=torch.float64)
    output[0, 1] = 5.0
    output.requires_grad_()
    value = TargetLogit(ignore_index=ignore_index)(output, torch.tensor([1, ignore_index, -7, 3]))
    (gradient,) = torch.autograd.grad(value.sum(), output)
    assert value.tolist() == [5, 0, 0, 0]
    assert gradient.tolist() == [[0, 1, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]]


def test_labels_that_first_appear_later_count_for_nothing() -> None:
    objective = TargetLogit()
    objective.check(OUTPUT, torch.tensor([2, 0]))
    assert objective(OUTPUT, torch.tensor([-1, 1])).tolist() == [0, 20]
    assert objective(DENSE, LABELS.masked_fill(LABELS == 2, 9)).tolist() == [
        DENSE[0, 0, 0, 0] + DENSE[0, 1, 0, 1] + DENSE[0, 0, 1, 1],
        DENSE[1, 1, 1].sum(),
    ]


@pytest.mark.parametrize(("ignore_index", "most"), [(-100, 6), (-1, 6), (0, 6), (4, 6), (255, 6), (2, 8)])
def test_labels_take_few_operators(ignore_index: int, most: int) -> None:
    output, labels = torch.randn(8, 5), torch.arange(8) % 5
    with Operators() as operators:
        TargetLogit(ignore_index=ignore_index)(output, labels)
    assert len(operators.names) <= most, operators.names


@pytest.mark.parametrize(
    ("output", "labels"),
    [
        (DENSE, LABELS[:, :1]),  # fewer positions: gather alone would take them
        (DENSE, LABELS[:, 0]),
        (OUTPUT, torch.tensor([[0], [1]])),
    ],
)
def test_labels_of_another_shape_are_refused_in_later_batches(output: Tensor, labels: Tensor) -> None:
    with pytest.raises(ConfigurationError, match="An integer target holds one class index for each sample"):
        TargetLogit()(output, labels)


def test_integers_of_numpy_are_stored_as_int() -> None:
    objective = TargetLogit(class_dim=np.int64(-1), ignore_index=np.uint8(255))  # type: ignore[arg-type]
    assert repr(objective) == "TargetLogit(class_dim=-1, ignore_index=255)"
    assert type(objective.class_dim) is type(objective.ignore_index) is int
    assert type(PredictedLogit(np.int32(2)).class_dim) is int  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("output", "class_dim"),
    [(OUTPUT[:, :1], 1), (OUTPUT[:, :1], -1), (DENSE[:, :1], 1), (DENSE[..., :1], -1), (OUTPUT[:, 0], 1)],
)
@pytest.mark.parametrize("label", [0, 1, -100])
def test_a_single_logit_has_no_classes(output: Tensor, class_dim: int, label: int) -> None:
    shape = list(output.shape)
    if output.ndim > 1:
        shape.pop(class_dim)
    labels = torch.full(shape, label)
    remedy = 'objective="binary"'
    for target in (labels, labels.bool(), labels.to(torch.int32)):
        with pytest.raises(ConfigurationError, match=remedy):
            TargetLogit(class_dim).check(output, target)


def test_the_remedy_for_a_single_logit_works() -> None:
    objective = NegativeLoss(nn.BCEWithLogitsLoss(reduction="none"))
    target = torch.tensor([0, 1]).float()[:, None]
    objective.check(OUTPUT[:, :1], target)
    expected = -F.binary_cross_entropy_with_logits(OUTPUT[:, :1], target, reduction="none")[:, 0]
    assert objective(OUTPUT[:, :1], target).equal(expected)


def test_what_a_loss_raises_later_passes_through() -> None:
    def loss(output: Tensor, target: Tensor) -> Tensor:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        NegativeLoss(loss)(OUTPUT, torch.tensor([0, 1]))
    with pytest.raises(ConfigurationError, match="the loss raised KeyError: 'mine'"):
        NegativeLoss(loss).check(OUTPUT, torch.tensor([0, 1]))


@pytest.mark.parametrize("training", [True, False])
def test_a_check_leaves_the_mode_of_the_loss(training: bool) -> None:
    modes: list[bool] = []

    class Watched(nn.Module):
        def forward(self, output: Tensor, target: Tensor) -> Tensor:
            modes.append(self.training)
            return output[:, 0]

    loss = Watched().train(training)
    NegativeLoss(loss).check(OUTPUT, torch.tensor([0, 1]))
    assert modes == [training] * 2
    assert loss.training == training


@pytest.mark.skipif(torch.__version__ < "2.8", reason="older releases ask for a driver")
def test_class_weights_on_the_cpu_follow_the_model() -> None:
    with FakeTensorMode(allow_non_fake_inputs=False):
        weight = torch.ones(3)
        output, target = torch.randn(4, 3, device="cuda"), torch.zeros(4, dtype=torch.long, device="cuda")
        for loss in (
            nn.CrossEntropyLoss(weight=weight, reduction="none"),
            functools.partial(F.cross_entropy, weight=weight, reduction="none"),
        ):
            objective = NegativeLoss(loss)
            with pytest.raises(ConfigurationError, match="the loss raised"):
                objective.check(output, target)
            there = objective.on(output.device)
            there.check(output, target)
            assert there(output, target).device.type == "cuda"
        assert weight.device.type == "cpu"


def test_messages_print_no_tensor() -> None:
    loss = functools.partial(F.cross_entropy, weight=torch.ones(3), reduction="none")
    assert repr(NegativeLoss(loss)) == (
        "NegativeLoss(loss=partial(cross_entropy, weight=Tensor(shape=(3,), dtype=torch.float32, device=cpu), "
        "reduction='none'))"
    )
    assert "partial(CrossEntropyLoss)" in repr(NegativeLoss(functools.partial(nn.CrossEntropyLoss())))


def test_an_objective_of_ones_own_needs_only_a_call() -> None:
    class Weighted(Objective):
        def __init__(self) -> None:
            self.weight = torch.ones(3)

        def __call__(self, output: Tensor, target: Any) -> Tensor:
            return output @ self.weight

    objective = Weighted()
    assert (objective.modules(), objective.count_unusable(OUTPUT, None)) == ([], None)
    assert repr(objective) == "Weighted(weight=Tensor(shape=(3,), dtype=torch.float32, device=cpu))"
    assert objective.on(torch.device("meta"))(OUTPUT.to("meta"), None).device.type == "meta"
    assert objective.on(torch.device("cpu")) is objective


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
        (TargetLogit(), OUTPUT, torch.rand(2, 3).softmax(1)),
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
        (TargetLogit(), OUTPUT, torch.rand(2), "For class indices convert the target with target.long"),
        (TargetLogit(), OUTPUT, torch.rand(2, 4), "soft labels"),
        (TargetLogit(), OUTPUT, -torch.rand(2, 3), "not negative"),
        (TargetLogit(), OUTPUT[:, :1], torch.rand(2, 1), '"regression" for numbers to predict'),
        (
            TargetLogit(),
            torch.rand(2, 3, 4, 4),
            torch.zeros(2, 1, 4, 4).long(),
            r"with target.squeeze\(1\) for example",
        ),
        (TargetLogit(), torch.rand(2, 3, 4, 4), torch.zeros(2, 16).long(), r"with target.reshape\(...\) for example"),
        (TargetLogit(), OUTPUT, torch.tensor([[0], [1]]), "with target.squeeze\\(1\\) for example"),
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
        (lambda: TargetLogit(class_dim=True), r"TargetLogit\(class_dim=True\)"),
        (lambda: TargetLogit(class_dim=1.0), r"TargetLogit\(class_dim=1.0\)"),  # type: ignore[arg-type]
        (lambda: TargetLogit(ignore_index=False), r"TargetLogit\(ignore_index=False\)"),
        (lambda: TargetLogit(ignore_index=0.5), r"TargetLogit\(ignore_index=0.5\)"),  # type: ignore[arg-type]
        (lambda: PredictedLogit(class_dim="last"), r"PredictedLogit\(class_dim='last'\)"),  # type: ignore[arg-type]
        (lambda: NegativeLoss("mse"), r"NegativeLoss\(loss='mse'\)"),  # type: ignore[arg-type]
        (lambda: check_objective("YDrop", "sum"), r"YDrop\(objective='sum'\)"),
    ],
)
def test_what_is_no_objective_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make()
