"""Patterns of feature maps: squares on a canvas, every placement of them, and dropout with a placement drawn at random.

A stencil is a canvas that is larger than the map, with the pattern in it. Each window of the map's size that is cut
from it is one placement of the pattern, so a step draws numbers of windows and makes no pattern.
"""

import math

import torch
from torch import Tensor

# All of this is written in what TorchScript compiles. A stencil is made of Python's numbers, not of tensors: so it is
# made alike under torch.compile, on fake tensors and with any default device.
Canvas = list[list[float]]
Places = list[list[int]]
# The shape of a canvas if every placement drops the whole map: one cell for the map, one for a map without the pattern.
COVERING = (2, 1)


def make_stencil(
    height: int,
    width: int,
    size: float,
    stride: float = 1 / 8,
    repeat: int = 1,
    rotate: float = 0.0,
    shear_x: float = 0.0,
    shear_y: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Make the stencil of a pattern for maps of one size (sec. "Methods", arXiv 2101.01761).

    `repeat` x `repeat` rectangles are sheared along y, then along x, then turned, all about their common centre. A cell
    belongs to the pattern if its centre, taken back through these steps, lies in a rectangle. The smallest box that
    holds all cells is placed wholly inside the map, or if it is larger than the map, so that it covers the map. The
    paper leaves open sizes, order of the steps and placement: these are ours.

    Args:
        height: H, rows of the map.
        width: W, columns of the map.
        size: Side of a rectangle over the side of the map, rounded to whole pixels, at least one. Above 0, at most 1.
        stride: Gap between rectangles over the side of the map, likewise.
        repeat: Rectangles in each direction. If they don't fit the map, the stencil has fewer.
        rotate: Degrees.
        shear_x: Columns that each row moves for each row from the centre.
        shear_y: Rows that each column moves for each column from the centre.

    Returns:
        A canvas, float32, two dimensions, 1 for cells that are kept and 0 for others, and places, int64, shape
        (3, placements + 1), both on the CPU: row and column of a placement's window in the canvas, and the number of
        cells that it keeps. The last placement is the map without the pattern. If every placement drops the whole map,
        windows have a single cell.

    Example:
        >>> canvas, places = make_stencil(4, 4, size=0.5)
        >>> canvas.shape, places.shape
        (torch.Size([10, 6]), torch.Size([3, 10]))
        >>> places[2]
        tensor([12, 12, 12, 12, 12, 12, 12, 12, 12, 16])

    """
    canvas, places = list_stencil(height, width, size, stride, repeat, rotate, shear_x, shear_y)
    return torch.tensor(canvas, dtype=torch.float32, device="cpu"), torch.tensor(
        places, dtype=torch.int64, device="cpu"
    )


def stencil_dropout(x: Tensor, canvas: Tensor, places: Tensor, rate: Tensor, share_c: bool = False) -> Tensor:
    """Drop a pattern from feature maps at random places (sec. "Methods", arXiv 2101.01761).

    Args:
        x: Feature maps, shape (B, C, H, W).
        canvas: Of `make_stencil` for H x W, on the device of `x`.
        places: Likewise.
        rate: Probability that a sample, or a channel of a sample, takes the pattern, a number: shape (), float32.
        share_c: One placement for all channels of a sample. Otherwise each channel has one of its own.

    Returns:
        `x * m * numel(m) / max(sum(m), 1)` with a mask `m` of the shape of `x`, with its dtype and device.

    Example:
        >>> y = stencil_dropout(torch.ones(2, 3, 4, 4), *make_stencil(4, 4, 0.5), rate=torch.tensor(1.0))
        >>> (y == 0).sum((2, 3))
        tensor([[4, 4, 4],
                [4, 4, 4]])

    """
    num_maps = x.shape[0] if share_c else x.shape[0] * x.shape[1]
    # A map that is dropped as a whole has windows of a single cell.
    height, width = min(x.shape[2], canvas.shape[0] // 2), min(x.shape[3], canvas.shape[1])
    no_pattern = places.shape[1] - 1
    place = torch.randint(no_pattern, [num_maps], device=x.device)
    takes = torch.rand([num_maps], dtype=torch.float32, device=x.device) < rate
    drawn = places[:, torch.where(takes, place, no_pattern)]
    # Counts are whole numbers, and their ratio is float32 or more: float16 ends at 65,504.
    precision = torch.float64 if x.dtype == torch.float64 else torch.float32
    share_kept = drawn[2].sum().clamp(min=1).to(precision) / (num_maps * x.shape[2] * x.shape[3])
    # Scaling the canvas instead of the maps leaves one pass over `x`.
    scaled = (canvas.to(precision) * share_kept.reciprocal()).to(x.dtype)
    windows = scaled.unfold(0, height, 1).unfold(1, width, 1)  # every placement: a view
    mask = windows[drawn[0], drawn[1]]
    return x * mask.view(x.shape[0], 1 if share_c else x.shape[1], height, width)


def list_stencil(
    height: int,
    width: int,
    size: float,
    stride: float,
    repeat: int,
    rotate: float,
    shear_x: float,
    shear_y: float,
) -> tuple[Canvas, Places]:
    """Make the lists that `make_stencil` turns into tensors."""
    cells = pattern_cells(height, width, size, stride, repeat, rotate, shear_x, shear_y)
    num_rows, num_columns = abs(height - len(cells)) + 1, abs(width - len(cells[0])) + 1
    canvas_height, canvas_width = height + num_rows - 1, width + num_columns - 1
    # Below the canvas there is a map without the pattern.
    canvas = [[1.0] * canvas_width for _ in range(canvas_height + height)]
    top, left = max(0, height - len(cells)), max(0, width - len(cells[0]))
    for row in range(len(cells)):
        for column in range(len(cells[0])):
            if cells[row][column]:
                canvas[top + row][left + column] = 0.0
    # above[i][j]: cells kept in the first i rows and j columns.
    above = [[0] * (canvas_width + 1)]
    for values in canvas:
        before, total = above[-1], 0
        sums = [0]
        for column in range(canvas_width):
            total += int(values[column])
            sums.append(before[column + 1] + total)
        above.append(sums)
    rows: list[int] = []
    columns: list[int] = []
    kept: list[int] = []
    for row in range(num_rows):
        for column in range(num_columns):
            rows.append(row)
            columns.append(column)
            below, right = row + height, column + width
            kept.append(above[below][right] - above[row][right] - above[below][column] + above[row][column])
    if max(kept) == 0:
        return [[0.0], [1.0]], [[0, 1], [0, 0], [0, height * width]]
    rows.append(canvas_height)
    columns.append(0)
    kept.append(height * width)
    return canvas, [rows, columns, kept]


def pattern_cells(
    height: int,
    width: int,
    size: float,
    stride: float,
    repeat: int,
    rotate: float,
    shear_x: float,
    shear_y: float,
) -> list[list[bool]]:
    """Say which cells of a pattern's box belong to the pattern. The arguments are those of `make_stencil`."""
    side_y, side_x = _pixels(size, height), _pixels(size, width)
    period_y, period_x = side_y + _pixels(stride, height), side_x + _pixels(stride, width)
    while repeat > 1 and ((repeat - 1) * period_y + side_y > height or (repeat - 1) * period_x + side_x > width):
        repeat -= 1
    extent_y, extent_x = (repeat - 1) * period_y + side_y, (repeat - 1) * period_x + side_x
    # (y, x) goes to (yy y + yx x, xy y + xx x). The determinant is 1.
    cos, sin = math.cos(math.radians(rotate)), math.sin(math.radians(rotate))
    yy, yx = cos - sin * shear_x, cos * shear_y - sin * (1 + shear_x * shear_y)
    xy, xx = sin + cos * shear_x, sin * shear_y + cos * (1 + shear_x * shear_y)
    box_height = _box_side(abs(yy) * extent_y + abs(yx) * extent_x, extent_y)
    box_width = _box_side(abs(xy) * extent_y + abs(xx) * extent_x, extent_x)
    cells: list[list[bool]] = []
    for row in range(box_height):
        y = row + 0.5 - box_height / 2
        line: list[bool] = []
        for column in range(box_width):
            x = column + 0.5 - box_width / 2
            in_row = _is_within(xx * y - yx * x + extent_y / 2, extent_y, period_y, side_y)
            line.append(in_row and _is_within(yy * x - xy * y + extent_x / 2, extent_x, period_x, side_x))
        cells.append(line)
    return _trimmed(cells)


def _pixels(share: float, side: int) -> int:
    """Round half up, to at least one pixel."""
    return max(1, math.floor(share * side + 0.5))


def _box_side(length: float, extent: int) -> int:
    """Give the side of a box around `length`, odd where the extent is odd: then upright cells keep their places."""
    side = math.ceil(_rounded(length))
    return side + (side - extent) % 2


def _is_within(position: float, extent: int, period: int, side: int) -> bool:
    """Tell whether a position on one axis lies in one of the rectangles."""
    position = _rounded(position)
    return position >= 0 and position < extent and position % period < side


def _rounded(position: float) -> float:
    # To parts of a pixel: the errors of sines and cosines decide nothing then. TorchScript reads no number of a module.
    return math.floor(position * 1e9 + 0.5) / 1e9


def _trimmed(cells: list[list[bool]]) -> list[list[bool]]:
    """Cut rows and columns without cells off the borders, if there are any cells."""
    rows: list[int] = []
    columns: list[int] = []
    for row in range(len(cells)):
        for column in range(len(cells[0])):
            if cells[row][column]:
                rows.append(row)
                columns.append(column)
    if len(rows) == 0:
        return cells
    return [line[min(columns) : max(columns) + 1] for line in cells[min(rows) : max(rows) + 1]]
