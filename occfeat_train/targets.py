"""Training targets on the device: voxels and features, vehicle masks, centres and offsets.

Everything is in the BEV frame: ego, turned by the augmentation's angle.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from occfeat_targets.store.grid import VoxelGrid
from occfeat_train.geometry import flat_index, rotation_z

CENTRE_SIGMA = 3.0
"""Width of the Gaussian around a vehicle's centre, in cells (Simple-BEV)."""
CENTRE_FLOOR = 1e-3
INVISIBLE = 1
"""nuScenes visibility 0-40 %."""


def voxel_targets(
    batch: dict[str, torch.Tensor], angle: torch.Tensor, grid: VoxelGrid, point_step_m: float
) -> dict[str, torch.Tensor]:
    """Occupied voxels and their feature targets.

    Args:
        batch: collated ``voxel`` (V,), ``feature_cameras`` (V,), ``features`` int8 (V, C) unless
            only occupancy is learned, and, if any angle is not 0, ``points``, ``point_count`` and,
            with the features, ``feature_scale``.
        angle: float32 (B,), by which the BEV frame is turned.
        grid: the store's.
        point_step_m: the store's attribute.

    Returns:
        ``voxel`` int64 (V',) distinct flat indices over the batch, ``valid`` bool (V',) that have
        a feature target, and, if the batch has features, ``features`` (V', C) whose direction is
        the target.
    """
    voxel = batch["voxel"].long()
    valid = batch["feature_cameras"] > 0
    if not angle.any():
        targets = {"voxel": voxel, "valid": valid}
        return targets | ({"features": batch["features"]} if "features" in batch else {})
    old, new = _moved_points(batch, angle, grid, point_step_m)
    new_voxel, row = new.unique(return_inverse=True)
    # A point's features are those of the voxel it came from. Rounding to the stored step moves a
    # few points out of their voxel, and points outside the stored grid have none.
    source = torch.searchsorted(voxel, old)
    known = (F.pad(voxel, (0, 1), value=-2)[source] == old) & F.pad(valid, (0, 1))[source]
    n = len(voxel) + 1
    pair, count = (row[known] * n + source[known]).unique(return_counts=True)
    row, source = pair.div(n, rounding_mode="floor"), pair % n
    n_sources = torch.bincount(row, minlength=len(new_voxel))
    targets = {"voxel": new_voxel, "valid": n_sources > 0}
    if "features" not in batch:
        return targets
    features = batch["features"].float() * batch["feature_scale"].float()[:, None]
    summed = F.embedding_bag(
        source,
        features,
        n_sources.cumsum(0) - n_sources,
        mode="sum",
        per_sample_weights=count.float(),
    )
    return targets | {"features": summed}


def _moved_points(
    batch: dict[str, torch.Tensor], angle: torch.Tensor, grid: VoxelGrid, point_step_m: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Old and new voxel (flat over the batch) of the points that the new grid holds.

    The old one is -1 for points outside the stored grid.
    """
    counts = batch["point_count"]
    sample = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    xyz_ego = batch["points"][:, :3].float() * point_step_m
    bev_T_ego = rotation_z(angle).to(xyz_ego.device)[:, :3, :3]
    xyz_bev = torch.einsum("pij,pj->pi", bev_T_ego[sample], xyz_ego)
    old, was_inside = flat_index(xyz_ego, grid)
    new, inside = flat_index(xyz_bev, grid)
    old = torch.where(was_inside, old + sample * grid.n_voxels, -1)
    return old[inside], (new + sample * grid.n_voxels)[inside]


def vehicle_targets(
    batch: dict[str, torch.Tensor], angle: torch.Tensor, grid: VoxelGrid
) -> dict[str, torch.Tensor]:
    """Vehicle mask, validity, centre heat map and offsets, as in Simple-BEV.

    Unlike in Simple-BEV's code the offset is not doubled, and masks follow the store's rule: a cell
    belongs to a vehicle if its centre lies in the footprint.

    Args:
        batch: collated ``vehicle_boxes`` float32 (M, 8) and ``vehicle_count`` (B,).
        angle: float32 (B,).
        grid: the store's.

    Returns:
        ``vehicle`` float (B, X, Y); ``visible`` bool (B, X, Y), False where only vehicles of
        visibility 0-40 % lie; ``centre`` float (B, X, Y) in 0..1; ``offset`` float (B, 2, X, Y),
        cell minus vehicle centre in cells; ``has_offset`` bool (B, X, Y).
    """
    boxes = _turned_boxes(batch["vehicle_boxes"], batch["vehicle_count"], angle)
    samples = [_vehicle_maps(b, grid) for b in boxes.split(batch["vehicle_count"].tolist())]
    targets = {name: torch.stack([s[name] for s in samples]) for name in samples[0]}
    targets["has_offset"] = (targets["vehicle"] > 0) & targets["visible"]
    return targets


def _turned_boxes(boxes: torch.Tensor, counts: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """Boxes (M, 8) in the BEV frame."""
    turn = angle.to(boxes.device).repeat_interleave(counts)
    cos, sin, boxes = turn.cos(), turn.sin(), boxes.clone()
    x, y = boxes[:, 0].clone(), boxes[:, 1].clone()
    boxes[:, 0], boxes[:, 1] = cos * x - sin * y, sin * x + cos * y
    boxes[:, 6] += turn
    return boxes


def _vehicle_maps(boxes: torch.Tensor, grid: VoxelGrid) -> dict[str, torch.Tensor]:
    """Maps (X, Y) of one sample's boxes (M, 8)."""
    x, y = (torch.from_numpy(c).float().to(boxes.device) for c in grid.bev_centres())
    (dx, dy, _), (lo_x, lo_y, _) = grid.cell_size, grid.lower
    if len(boxes) == 0:
        empty = boxes.new_zeros(len(x), len(y))
        none = {"vehicle": empty, "centre": empty, "visible": torch.ones_like(empty).bool()}
        return none | {"offset": boxes.new_zeros(2, len(x), len(y))}
    inside = _footprints(boxes, x, y)
    seen = boxes[:, 7] != INVISIBLE
    is_seen = (inside & seen[:, None, None]).any(dim=0)
    is_unseen = (inside & ~seen[:, None, None]).any(dim=0)
    # Centres in cells, where a whole number is a cell's centre.
    u, v = (boxes[:, 0] - lo_x) / dx - 0.5, (boxes[:, 1] - lo_y) / dy - 0.5
    i, j = (torch.arange(n, device=boxes.device, dtype=torch.float32) for n in (len(x), len(y)))
    to_u, to_v = i - u.round()[:, None], j - v.round()[:, None]  # (M, X), (M, Y)
    scale = -0.5 / CENTRE_SIGMA**2
    heat = ((to_u**2 * scale).exp()[:, :, None] * (to_v**2 * scale).exp()[:, None]).amax(dim=0)
    # Whose offset a cell learns: the first visible vehicle that covers it.
    owner = (inside * (1 + seen.int())[:, None, None]).argmax(dim=0)
    offset = torch.stack([i[:, None] - u[owner], j - v[owner]])
    return {
        "vehicle": (is_seen | is_unseen).float(),
        "visible": is_seen | ~is_unseen,
        "centre": torch.where(heat < CENTRE_FLOOR, 0.0, heat),
        "offset": offset * (is_seen | is_unseen),
    }


def _footprints(boxes: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Which cell centres lie in which box on the ground plane: bool (M, X, Y)."""
    cos, sin = boxes[:, 6].cos()[:, None, None], boxes[:, 6].sin()[:, None, None]
    to_x = x[:, None] - boxes[:, 0, None, None]
    to_y = y - boxes[:, 1, None, None]
    along, across = cos * to_x + sin * to_y, cos * to_y - sin * to_x
    half = boxes[:, 3:5, None, None] / 2
    return (along.abs() <= half[:, 0]) & (across.abs() <= half[:, 1])
