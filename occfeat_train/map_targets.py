"""Map targets on the device: the stored masks, or those masks seen in a turned BEV frame.

The store has the map in the ego frame only. Polygons are not stored, so where the frame is turned
a cell takes the value of the stored cell that holds its centre.
"""

from __future__ import annotations

import torch

from occfeat_targets.store.grid import VoxelGrid
from occfeat_train.geometry import flat_index, rotation_z


def map_targets(
    batch: dict[str, torch.Tensor], angle: torch.Tensor, grid: VoxelGrid
) -> dict[str, torch.Tensor]:
    """Map masks in the BEV frame, and where they are known.

    Args:
        batch: collated ``map`` uint8 (B, K, X, Y), 0 or 1, in the ego frame.
        angle: float32 (B,), by which the BEV frame is turned.
        grid: the store's.

    Returns:
        ``map`` float (B, K, X, Y), 0 where it is not known; ``known`` bool (B, X, Y), False for
        cells whose centre lies outside of the stored map.
    """
    stored = batch["map"]
    if not angle.any():
        return {"map": stored.float(), "known": torch.ones_like(stored[:, 0], dtype=torch.bool)}
    source, known = _sources(angle.to(stored.device), grid)
    n_classes, shape = stored.shape[1], known.shape[1:]
    moved = stored.flatten(2).gather(2, source.flatten(1)[:, None].expand(-1, n_classes, -1))
    return {"map": (moved.unflatten(2, shape) * known[:, None]).float(), "known": known}


def _sources(angle: torch.Tensor, grid: VoxelGrid) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each cell of the turned frame is in the stored map.

    Args:
        angle: float (B,), on the device.
        grid: the store's.

    Returns:
        Flat stored cell int64 (B, X, Y), 0 where there is none; and whether there is one.
    """
    axes = [torch.from_numpy(axis).to(angle.device) for axis in grid.bev_centres()]
    xy_bev = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
    # In float64: in float32 a centre near the edge between two cells may fall to the wrong side.
    ego_T_bev = rotation_z(-angle.double())[:, :2, :2]
    xy_ego = torch.einsum("bij,xyj->bxyi", ego_T_bev, xy_bev)
    # At the volume's lower bound, because flat indices of the lowest layer are those of the BEV.
    z = torch.full_like(xy_ego[..., :1], grid.z[0])
    index, known = flat_index(torch.cat([xy_ego, z], dim=-1).reshape(-1, 3), grid)
    shape = (len(angle), *grid.bev_shape)
    return torch.where(known, index, 0).view(shape), known.view(shape)
