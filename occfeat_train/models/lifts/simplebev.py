"""Simple-BEV's lifting: every voxel takes the mean of the image features at its centre.

The published form samples six dense volumes and averages them. Here only the (camera, voxel)
pairs that project into an image are touched, 18 % of all: lifting is a linear map with four
weights a pair (bilinear corners over the number of cameras), applied by ``embedding_bag``, which
never holds more than the result.
"""

from functools import reduce

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from occfeat_targets.store.grid import VoxelGrid
from occfeat_train.geometry import volume_centres
from occfeat_train.models.lifts.base import Lift


class SimpleBEVLift(Lift):
    """Image features to a voxel volume (Simple-BEV §3; Harley et al. 2022).

    A voxel belongs to a camera if its centre has depth > 0 and 0 <= u < W, 0 <= v < H. Sampling
    is ``grid_sample(align_corners=False, padding_mode="border")`` with feature cell (i, j)
    covering its share of the image; the published code mixes two conventions here and is off by
    nothing at the left and top border, rising to one feature pixel at the right and bottom one. A
    voxel that no camera sees is zero.
    """

    returns_volume = True

    def forward(
        self, features: Tensor, K: Tensor, cam_T_bev: Tensor, image_hw: tuple[int, int]
    ) -> Tensor:
        """As :meth:`Lift.forward`."""
        B, _, C, h, w = features.shape
        with torch.no_grad(), torch.autocast(features.device.type, enabled=False):
            cells, weights, seen_by = self._seen_cells(K, cam_T_bev, image_hw, (h, w))
            start = 4 * (seen_by.cumsum(0) - seen_by)
        table = features.permute(0, 1, 3, 4, 2).reshape(-1, C)
        shares = weights.flatten().to(table)
        volume = F.embedding_bag(
            cells.flatten(), table, start, mode="sum", per_sample_weights=shares
        )
        nz, nx, ny = self.grid.shape
        return volume.view(B, nx, ny, nz * C).permute(0, 3, 1, 2)

    def _seen_cells(
        self, K: Tensor, cam_T_bev: Tensor, image_hw: tuple[int, int], feature_hw: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of the P pairs of a voxel and a camera that sees it, by voxel: the four cells of all
        feature maps, int64 (P, 4), and their shares of the mean, float32; and how many cameras see
        each voxel, int64 (B·V,)."""
        N, (h, w) = K.shape[1], feature_hw
        centres = volume_centres(self.grid, K.device)
        pairs = []
        for b in range(len(K)):
            u, v, depth = project(centres, K[b].float(), cam_T_bev[b].float())
            voxel, camera = in_image(u, v, depth, image_hw).nonzero(as_tuple=True)
            u, v, depth = (x[voxel, camera] for x in (u, v, depth))
            uv = torch.stack([u, v], dim=1) * (1 / depth)[:, None]
            pairs.append((voxel + b * len(centres), camera + b * N, uv))
        # Rows b·V + v, ascending, and b·N + n, int64 (P,); pixels float32 (P, 2).
        voxel, camera, uv = (torch.cat(part) for part in zip(*pairs, strict=True))
        cells, weights = bilinear_corners(uv, feature_hw, image_hw)
        seen_by = torch.bincount(voxel, minlength=len(K) * len(centres))
        return cells + (camera * (h * w))[:, None], weights / seen_by[voxel, None], seen_by

    def fixed(
        self, K: Tensor, cam_T_bev: Tensor, image_hw: tuple[int, int], feature_hw: tuple[int, int]
    ) -> nn.Module:
        """As :meth:`Lift.fixed`."""
        cells, weights, seen_by = self._seen_cells(K, cam_T_bev, image_hw, feature_hw)
        voxel, nth = places(seen_by)
        tables = []
        for values in (cells.int(), weights):
            # What is left empty weighs nothing.
            table = values.new_zeros(len(seen_by), max(1, int(seen_by.max())), 4)
            table[voxel, nth] = values
            tables.append(table.flatten(1).T.contiguous())
        return FixedSimpleBEV(self.grid, *tables)


class FixedSimpleBEV(nn.Module):
    """The lift with constant tables (4·M, V), M the most cameras that see one voxel: the cells of
    all feature maps to look up, int32, and their weights, float32."""

    cells: Tensor
    weights: Tensor

    def __init__(self, grid: VoxelGrid, cells: Tensor, weights: Tensor):
        super().__init__()
        self.grid = grid
        self.register_buffer("cells", cells, persistent=False)
        self.register_buffer("weights", weights, persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        """As :meth:`Lift.forward`, of one sample."""
        C, (nz, nx, ny) = features.shape[2], self.grid.shape
        table = features.permute(0, 1, 3, 4, 2).reshape(-1, C)
        # One corner at a time: all at once would hold 4·M times the volume.
        corners = zip(self.cells, self.weights, strict=True)
        volume = reduce(torch.add, (table.index_select(0, i) * w[:, None] for i, w in corners))
        return volume.view(1, nx, ny, nz * C).permute(0, 3, 1, 2)


def places(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Where items go that are sorted by group, of ``counts`` int64 (G,) a group, in a table with a
    row a group: row and column, int64 (S,)."""
    row = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
    return row, torch.arange(len(row), device=counts.device) - (counts.cumsum(0) - counts)[row]


def project(centres: Tensor, K: Tensor, cam_T_bev: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Points (V, 4), homogeneous, in the N cameras of one sample: K (N, 3, 3), cam_T_bev (N, 4, 4).
    Returns ``(u·depth, v·depth, depth)``, each (V, N): not divided, so that depth may be 0."""
    image_T_bev = K @ cam_T_bev[:, :3]  # (N, 3, 4)
    # One matmul for all cameras: (V, 4) x (4, 3·N), no copy of the centres per camera.
    projected = centres @ image_T_bev.transpose(0, 1).reshape(-1, 4).T
    u, v, depth = projected.view(len(centres), 3, -1).unbind(dim=1)
    return u, v, depth


def in_image(u: Tensor, v: Tensor, depth: Tensor, image_hw: tuple[int, int]) -> Tensor:
    """Whether what :func:`project` returned has depth > 0 and lies in the image; bool, as ``u``."""
    H, W = image_hw
    return (depth > 0) & (u >= 0) & (u < W * depth) & (v >= 0) & (v < H * depth)


def bilinear_corners(
    uv: Tensor, feature_hw: tuple[int, int], image_hw: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """The four cells of a feature map (h, w) around pixels (P, 2) of the image (H, W) it covers.

    Returns int64 (P, 4) indices i·w + j, and float (P, 4) bilinear weights that sum to 1. Beyond
    the border the nearest cell counts (``padding_mode="border"``).
    """
    (h, w), (H, W) = feature_hw, image_hw
    x = (uv[:, 0] * (w / W) - 0.5).clamp(0, w - 1)
    y = (uv[:, 1] * (h / H) - 0.5).clamp(0, h - 1)
    left, top = x.long().clamp(max=max(w - 2, 0)), y.long().clamp(max=max(h - 2, 0))
    fx, fy = x - left, y - top
    right, bottom = (left + 1).clamp(max=w - 1), (top + 1).clamp(max=h - 1)
    corners = (top, left), (top, right), (bottom, left), (bottom, right)
    cells = torch.stack([row * w + column for row, column in corners], dim=1)
    weights = torch.stack([(1 - fx) * (1 - fy), fx * (1 - fy), (1 - fx) * fy, fx * fy], dim=1)
    return cells, weights
