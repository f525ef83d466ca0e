"""OpenCV's filled polygons, cell for cell, on any device and without OpenCV.

``cv2.fillPoly`` draws each edge with Bresenham's algorithm and fills what lies between, by the
even-odd rule. An edge that leaves the picture is first cut to it, at whole cells, which bends it a
little (``clipLine``); the filling follows the bent one.
"""

import torch
from torch import Tensor


def fill_polygons(corners: Tensor, shape: tuple[int, int]) -> Tensor:
    """What ``cv2.fillPoly`` fills of each of M polygons: bool (M, rows, columns).

    ``corners`` are int64 (M, P, 2), (row, column), of which any may lie outside of the picture of
    ``shape`` (rows, columns). They go round either way; edges may cross.
    """
    device = corners.device
    row, column = (torch.arange(n, device=device) for n in shape)
    row = row[:, None]
    inside = torch.zeros(len(corners), *shape, dtype=torch.bool, device=device)
    border = torch.zeros_like(inside)
    for begin, end in zip(corners.roll(1, 1).unbind(1), corners.unbind(1), strict=True):
        rows = begin[:, 0, None, None], end[:, 0, None, None]
        spans = (rows[0] <= row) != (rows[1] <= row)
        begin, end, in_view = _clip(begin, end, shape)
        (r0, c0), (r1, c1) = (p[:, :, None, None].unbind(1) for p in (begin, end))
        border |= _line(row, column, (r0, c0), (r1, c1)) & in_view[:, None, None]
        # An edge that was cut to a single row is filled to as if it were upright.
        is_cut = r0 == r1
        r0, r1 = torch.where(is_cut, rows[0], r0), torch.where(is_cut, rows[1], r1)
        beyond = ((column - c0) * (r1 - r0) - (row - r0) * (c1 - c0)) * (r1 - r0).sign()
        inside ^= spans & (beyond >= 0)
        border |= spans & (beyond == 0)
    return inside | border


def _clip(begin: Tensor, end: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Ends (M, 2) of edges as ``cv2.clipLine`` leaves them, and which edges (M,) are then in the
    picture: at the rows first, the end of an edge with the begin already cut."""
    ends = begin.clone(), end.clone()
    size = torch.tensor(shape, device=begin.device)
    for axis in (0, 1):
        before = (ends[0] < 0) & (ends[1] < 0)
        after = (ends[0] >= size) & (ends[1] >= size)
        meets = ~(before | after).any(dim=1)
        for point in ends:
            along = ends[1] - ends[0]
            step = (point[:, axis].clamp(0, shape[axis] - 1) - point[:, axis]) * meets
            slope = along[:, 1 - axis], torch.where(step != 0, along[:, axis], 1)
            point[:, axis] += step
            point[:, 1 - axis] += torch.div(step * slope[0], slope[1], rounding_mode="trunc")
    in_view = torch.stack([(p >= 0) & (p < size) for p in ends]).all(dim=0).all(dim=1)
    return *ends, in_view


def _line(
    row: Tensor, column: Tensor, begin: tuple[Tensor, Tensor], end: tuple[Tensor, Tensor]
) -> Tensor:
    """Cells of Bresenham's lines from the left end to the right one, bool (M, rows, columns): those
    within half a cell of the line along its minor axis, half way that nearer to the left end."""
    swapped = begin[1] > end[1]
    (r0, c0), (r1, c1) = (
        [torch.where(swapped, b, a) for a, b in zip(*pair, strict=True)]
        for pair in ((begin, end), (end, begin))
    )
    down, right = (r1 - r0).abs(), c1 - c0
    to_row, to_column = torch.where(r1 < r0, r0 - row, row - r0), column - c0
    is_flat = right >= down
    major = torch.where(is_flat, to_column, to_row)
    minor = torch.where(is_flat, to_row, to_column)
    length, rise = torch.maximum(right, down), torch.minimum(right, down)
    unit = length.clamp(min=1)  # an edge may be a point
    off = 2 * (minor * unit - major * rise)
    return (major >= 0) & (major <= length) & (off >= -unit) & (off < unit)
