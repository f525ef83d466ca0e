"""Cameras and voxels in torch: projection, changed intrinsics, rotations about the vertical.

Pixels are continuous: an image covers [0, W) x [0, H) in (u, v). ``a_T_b`` takes points from
frame b to frame a. The *BEV frame* is ego turned by an angle about z (augmentation), else ego.
"""

import torch

from occfeat_targets.store.grid import VoxelGrid


def rotation_z(angle: torch.Tensor) -> torch.Tensor:
    """Transforms (B, 4, 4) that turn points counter-clockwise about z by ``angle`` (B,) rad."""
    cos, sin = angle.cos(), angle.sin()
    a_T_b = torch.eye(4, dtype=angle.dtype, device=angle.device).repeat(len(angle), 1, 1)
    a_T_b[:, 0, 0], a_T_b[:, 0, 1] = cos, -sin
    a_T_b[:, 1, 0], a_T_b[:, 1, 1] = sin, cos
    return a_T_b


def resize_and_crop(K: torch.Tensor, scale: torch.Tensor, crop: torch.Tensor) -> torch.Tensor:
    """Intrinsics (..., 3, 3), continuous pixels, after an image was resized and a window cut out.

    ``scale`` (..., 2) is new over old width and height, ``crop`` (..., 2) the left and top edge of
    the window in pixels of the resized image.
    """
    K = K.clone()
    K[..., :2, :] *= scale[..., :, None]
    K[..., :2, 2] -= crop
    return K


def project(
    xyz_ego: torch.Tensor, K: torch.Tensor, cam_T_ego: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where points (P, 3) in ego, metres, are in each of N cameras: pixels (N, P, 2), which mean
    nothing where the depth (N, P), metres, is not positive."""
    xyz = xyz_ego @ cam_T_ego[:, :3, :3].mT + cam_T_ego[:, None, :3, 3]
    depth = xyz[..., 2]
    pixels = (xyz @ K.mT)[..., :2] / torch.where(depth > 0, depth, 1)[..., None]
    return pixels, depth


def volume_centres(grid: VoxelGrid, device: torch.device) -> torch.Tensor:
    """Centres of all voxels in (X, Y, Z) order, homogeneous: float32 (X·Y·Z, 4), metres."""
    axes = [
        lo + (torch.arange(n, dtype=torch.float64, device=device) + 0.5) * ((hi - lo) / n)
        for lo, hi, n in (grid.x, grid.y, grid.z)
    ]
    xyz = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 3)
    return torch.nn.functional.pad(xyz, (0, 1), value=1.0).float()


def flat_index(xyz: torch.Tensor, grid: VoxelGrid) -> tuple[torch.Tensor, torch.Tensor]:
    """As :meth:`VoxelGrid.flat_index` of points float (M, 3), metres, but keeping their places.
    Returns ``(index, inside)``: int64 (M,), meaningless where ``inside``, bool (M,), is False."""
    lower, size = (xyz.new_tensor(a) for a in (grid.lower, grid.cell_size))
    cell = ((xyz - lower) / size).floor()
    cells = xyz.new_tensor([grid.x[2], grid.y[2], grid.z[2]])
    inside = ((cell >= 0) & (cell < cells)).all(dim=1)
    ix, iy, iz = cell.long().unbind(dim=1)
    return (iz * grid.x[2] + ix) * grid.y[2] + iy, inside


def neighbours(place: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The two cells around a place on an axis of ``size`` cells, int64, and the second's share; 0
    is the centre of the first cell, and beyond the outermost centres all is theirs."""
    at = place.clamp(0, size - 1)
    lower = at.floor().long()
    return lower, (lower + 1).clamp(max=size - 1), at - lower
