import math
from collections import Counter
from dataclasses import dataclass
from itertools import product

import numpy
import pytest
import torch
from torch import Tensor

from lightning_ydrop.functional import make_stencil, stencil_dropout
from lightning_ydrop.functional.stencils import pattern_cells

# Chance of a false alarm in each comparison, by Hoeffding's inequality.
ALARM = 1e-9
ALWAYS = torch.tensor(1.0)


def bound(count: int, comparisons: int = 1) -> float:
    """How far the share in so many independent draws is from its mean, except with chance ALARM."""
    return math.sqrt(math.log(2 * comparisons / ALARM) / (2 * count))


@dataclass(frozen=True)
class Case:
    height: int
    width: int
    size: float
    stride: float = 1 / 8
    repeat: int = 1
    rotate: float = 0.0
    shear_x: float = 0.0
    shear_y: float = 0.0

    def stencil(self) -> tuple[Tensor, Tensor]:
        return make_stencil(*vars(self).values())


CASES = [
    Case(8, 8, 1 / 4),
    Case(8, 8, 3 / 8, 1 / 8, 2),
    Case(16, 16, 1 / 8, 1 / 16, 3, 22.5),
    Case(16, 16, 1 / 4, 1 / 8, 2, 45),
    Case(16, 16, 1 / 4, 1 / 8, 2, 67.5, 0.3, -0.3),
    Case(9, 9, 1 / 2, 1 / 8, 1, 45),  # its box is larger than the map
    Case(7, 12, 3 / 8, 1 / 4, 3, 30, 0.3),
    Case(12, 7, 3 / 8, 1 / 4, 3, 30, 0.0, 0.3),
    Case(10, 10, 1 / 10, 1 / 10, 2, 0, 3.0),
    Case(6, 6, 1.0, rotate=45),
    Case(1, 9, 1 / 3),
    Case(2, 2, 1 / 8),
]


def oracle_cells(case: Case) -> set[tuple[int, int]]:
    """Cells of the pattern, from the text alone: step by step, in float64, one cell after another."""

    def pixels(share: float, side: int) -> int:
        return max(1, int(numpy.floor(share * side + 0.5)))

    h, w = pixels(case.size, case.height), pixels(case.size, case.width)
    gap_h, gap_w = pixels(case.stride, case.height), pixels(case.stride, case.width)
    for fitting in range(case.repeat, 0, -1):
        extent = numpy.array([fitting * h + (fitting - 1) * gap_h, fitting * w + (fitting - 1) * gap_w])
        if fitting == 1 or (extent <= [case.height, case.width]).all():
            break
    angle = numpy.deg2rad(case.rotate)
    rotation = numpy.array([[numpy.cos(angle), -numpy.sin(angle)], [numpy.sin(angle), numpy.cos(angle)]])
    forward = rotation @ [[1, 0], [case.shear_x, 1]] @ [[1, case.shear_y], [0, 1]]
    back = numpy.linalg.inv(forward)
    cells = set()
    # Cells far enough to all sides, with centres as the parity of the extent says.
    for i, j in product(range(-24, 25), repeat=2):
        centre = numpy.array([i + (extent[0] % 2 == 0) / 2, j + (extent[1] % 2 == 0) / 2])
        u = numpy.round(back @ centre + extent / 2, 9)
        if (u < 0).any() or (u >= extent).any():
            continue
        if u[0] % (h + gap_h) < h and u[1] % (w + gap_w) < w:
            cells.add((i, j))
    top, left = min(i for i, _ in cells), min(j for _, j in cells)
    return {(i - top, j - left) for i, j in cells}


def oracle_masks(case: Case) -> list[tuple[tuple[int, ...], ...]]:
    """Every placement of the pattern: kept cells are 1."""
    cells = oracle_cells(case)
    box = 1 + max(i for i, _ in cells), 1 + max(j for _, j in cells)
    corners = [
        range(min(0, side - length), max(0, side - length) + 1)
        for side, length in zip((case.height, case.width), box, strict=True)
    ]
    return [
        tuple(tuple(int((y - top, x - left) not in cells) for x in range(case.width)) for y in range(case.height))
        for top, left in product(*corners)
    ]


def windows(case: Case) -> tuple[Tensor, Tensor]:
    """Every window that a stencil's places name, (placements + 1, H, W), and the counts of kept cells."""
    canvas, places = case.stencil()
    cut = [canvas[i : i + case.height, j : j + case.width] for i, j in places[:2].T.tolist()]
    return torch.stack(cut), places[2]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_stencil_holds_every_placement_once_and_the_map_without_the_pattern(case: Case) -> None:
    cut, kept = windows(case)
    assert cut.shape[1:] == (case.height, case.width)
    found = [tuple(tuple(int(value) for value in row) for row in window) for window in cut.tolist()]
    assert Counter(found[:-1]) == Counter(oracle_masks(case))
    assert cut[-1].eq(1).all()
    assert torch.equal(kept, cut.sum((1, 2)).long())


@pytest.mark.parametrize(
    ("rotate", "shear_x", "shear_y", "count"),
    [
        *((0, 0, 0, 144), (45, 0, 0, 144), (90, 0, 0, 144), (0, 0.5, 0, 144), (0, 0, 0.5, 144)),
        *((15, 0, 0, 148), (30, 0.25, -0.25, 134)),  # rounded to whole cells
    ],
)
def test_turning_and_shearing_keep_the_area_up_to_rounding(
    rotate: float, shear_x: float, shear_y: float, count: int
) -> None:
    cells = pattern_cells(32, 32, 1 / 8, 1 / 16, 3, rotate, shear_x, shear_y)
    assert sum(map(sum, cells)) == count


@pytest.mark.parametrize(("rotate", "shear_x"), [(0, 0), (22.5, 0), (45, 0), (30, 0.3), (0, 1.0)])
def test_a_full_turn_changes_nothing(rotate: float, shear_x: float) -> None:
    for side in (7, 8, 13, 16):
        once, turned = (
            pattern_cells(side, side, 1 / 4, 1 / 8, 2, angle, shear_x, 0) for angle in (rotate, rotate + 360)
        )
        assert once == turned


def test_upright_squares_are_just_squares_with_their_gaps() -> None:
    line = [True, True, False, True, True]
    assert pattern_cells(8, 8, 1 / 4, 1 / 8, 2, 0, 0, 0) == [line, line, [False] * 5, line, line]


@pytest.mark.parametrize(("side", "repeat", "columns"), [(16, 3, 10), (16, 9, 14), (4, 3, 3), (2, 3, 1), (1, 2, 1)])
def test_a_tiling_has_as_many_squares_as_fit(side: int, repeat: int, columns: int) -> None:
    assert len(pattern_cells(side, side, 1 / 8, 1 / 8, repeat, 0, 0, 0)) == columns


def test_sides_are_rounded_half_up_to_at_least_a_pixel() -> None:
    sides = [len(pattern_cells(side, side, 1 / 4, 1 / 8, 1, 0, 0, 0)) for side in (1, 2, 4, 5, 6, 8, 10)]
    assert sides == [1, 1, 1, 1, 2, 2, 3]


def test_a_shear_moves_rows_sideways_and_columns_down() -> None:
    x = [[True, False, False], [False, True, False], [False, False, True]]
    slanted = pattern_cells(9, 9, 1 / 9, 1 / 9, 1, 0, 0, 0)
    assert slanted == [[True]]
    # A column of three cells, as on a map that is three times as high as wide, at 45 degrees.
    assert pattern_cells(9, 3, 1 / 3, 1 / 3, 1, 0, 1.0, 0) == x
    assert pattern_cells(3, 9, 1 / 3, 1 / 3, 1, 0, 0, 1.0) == x


def test_positive_angles_turn_columns_from_y_to_x() -> None:
    # R sends (y, x) = (1, 0) to (c, s): the lower end of a column moves to the right.
    turned = pattern_cells(9, 3, 1 / 3, 1 / 3, 1, 90, 0, 0)
    assert turned == [[True, True, True]]
    leaning = pattern_cells(21, 7, 1 / 3, 1 / 3, 1, 30, 0, 0)
    right_ends = [max(j for j, cell in enumerate(row) if cell) for row in leaning]
    assert right_ends[0] < right_ends[-1]


def draws(case: Case, shape: tuple[int, int], share_c: bool = False, rate: Tensor = ALWAYS) -> Tensor:
    """Masks of ones drawn for so many samples and channels."""
    y = stencil_dropout(torch.ones(*shape, case.height, case.width), *case.stencil(), rate, share_c)
    return (y != 0).int()


@pytest.mark.parametrize(
    "case", [Case(8, 8, 3 / 8), Case(5, 6, 1 / 4, 1 / 8, 2, 30), Case(5, 5, 3 / 5, rotate=45)], ids=str
)
def test_every_placement_is_as_likely(case: Case) -> None:
    counted = Counter(tuple(map(tuple, mask)) for mask in draws(case, (400, 50)).flatten(0, 1).tolist())
    expected = Counter(oracle_masks(case))
    assert set(counted) <= set(expected)
    placements = sum(expected.values())
    for mask, times in expected.items():
        assert abs(counted[mask] / 20_000 - times / placements) < bound(20_000, len(expected))


def test_corners_are_dropped_less_often_than_the_centre() -> None:
    share = 1 - draws(Case(8, 8, 3 / 8), (400, 50)).float().mean((0, 1))
    assert abs(share[0, 0] - 1 / 36) < bound(20_000, 2)
    assert abs(share[4, 4] - 1 / 4) < bound(20_000, 2)


def test_each_channel_has_a_placement_of_its_own_unless_it_is_shared() -> None:
    case = Case(8, 8, 1 / 8)
    alone, shared = draws(case, (200, 20)), draws(case, (200, 20), share_c=True)
    assert torch.equal(shared, shared[:, :1].expand_as(shared))
    # Two channels, or two samples, have one of 64 placements in common with chance 1/64.
    for first, second in ((alone[:, 0::2], alone[:, 1::2]), (shared[0::2, :1], shared[1::2, :1])):
        same = (first == second).all(-1).all(-1).float()
        assert abs(same.mean() - 1 / 64) < bound(same.numel())


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.95, 1.0])
@pytest.mark.parametrize("share_c", [True, False])
@pytest.mark.parametrize("size", [1 / 4, 1.0])
def test_the_rate_is_the_share_of_maps_with_the_pattern(size: float, share_c: bool, rate: float) -> None:
    mask = draws(Case(4, 6, size), (3000, 4), share_c, torch.tensor(rate))
    has_pattern = mask.eq(0).flatten(2).any(2)[:, : 1 if share_c else 4].float()
    assert abs(has_pattern.mean() - rate) < bound(has_pattern.numel())
    dropped = 24 if size == 1 else 2  # of 4 x 6 cells
    assert set(mask.eq(0).sum((2, 3)).unique().tolist()) <= {0, dropped}


@pytest.mark.parametrize("share_c", [True, False])
@pytest.mark.parametrize(
    "case", [Case(6, 5, 1 / 3, 1 / 8, 2, 30), Case(4, 4, 1.0), Case(3, 3, 1.0, rotate=45)], ids=str
)
def test_what_is_kept_is_rescaled_by_elements_over_kept_elements(case: Case, share_c: bool) -> None:
    x = torch.randn(7, 3, case.height, case.width, dtype=torch.float64)
    y = stencil_dropout(x, *case.stencil(), torch.tensor(0.7), share_c)
    kept = 0
    for value in y.flatten().tolist():
        kept += value != 0
    assert 0 < kept < x.numel()
    assert torch.allclose(y, (y != 0) * x * (x.numel() / kept), rtol=1e-14)


def test_nothing_kept_is_a_zero_output_and_all_kept_is_the_input() -> None:
    x = torch.randn(7, 7, 7, 7)
    stencil = make_stencil(7, 7, 1.0)
    assert torch.equal(stencil_dropout(x, *stencil, ALWAYS), torch.zeros_like(x))
    assert torch.equal(stencil_dropout(x, *stencil, torch.tensor(0.0)), x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("share_c", [True, False])
@pytest.mark.parametrize("case", [Case(32, 32, 1 / 4), Case(32, 32, 1.0)], ids=str)
def test_counts_are_right_in_every_precision(case: Case, share_c: bool, dtype: torch.dtype) -> None:
    # More than 65,504 elements are kept, and a sum in bfloat16 would stop at 256.
    x = torch.ones(16, 16, 32, 32, dtype=dtype, requires_grad=True)
    y = stencil_dropout(x, *case.stencil(), torch.tensor(0.5), share_c)
    assert y.dtype == dtype
    kept = int((y != 0).sum())
    assert kept > 65_504
    assert torch.equal(y.detach().unique(), torch.tensor([0, x.numel() / kept], dtype=dtype))
    y.backward(torch.ones_like(y))
    assert x.grad is not None
    assert torch.equal(x.grad, y.detach())


def test_a_map_that_is_dropped_as_a_whole_takes_a_mask_of_one_cell() -> None:
    x = torch.randn(4, 3, 5, 6, requires_grad=True)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        stencil_dropout(x, *make_stencil(5, 6, 1.0), torch.tensor(0.5))
    assert [tuple(tensor.shape) for tensor in kept] == [(4, 3, 1, 1)]


def test_channels_last_stays_so() -> None:
    x = torch.randn(4, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    y = stencil_dropout(x, *make_stencil(8, 8, 1 / 4), ALWAYS)
    assert y.is_contiguous(memory_format=torch.channels_last)
