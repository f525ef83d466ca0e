"""Simple-BEV's protocol: in which frame it sees the BEV, and which cells a vehicle covers.

The facts are of its ``nuscenesdataset.py``, ``train_nuscenes.py`` and ``utils/vox.py``. What it
needs is in every store: ``cam_T_ego`` and ``boxes``.

Different from that code, on purpose or for what the store holds:

- cameras are where they were when their images were taken, which is what the store holds (there the
  car's motion up to the lidar's time is ignored: at 15 m/s the front camera is half a metre off);
- the camera of a training frame is any of them (there never the first one, CAM_FRONT_LEFT);
- boxes stand upright in ego, where they have a yaw alone (there they are tilted with the car, which
  moves a roof by centimetres: on a real keyframe 14 cells differ, of 368);
- the roof's corners go round it (there they are sorted by height, which twists a roof that is level
  in the camera's frame: its border is then that of a bow tie).
"""

import numpy as np
import torch
from torch import Tensor

from occfeat_targets.store.grid import VoxelGrid
from occfeat_train.tasks.polygons import fill_polygons

HEIGHT_M = 1.5
"""Of a camera above z = 0 of its BEV: so the nuScenes grid's -4.5 to 5.5 m are Simple-BEV's, from
6 m below the camera to 4 m above."""


def camera_frame(cam_T_ego: Tensor, camera: Tensor) -> Tensor:
    """``ego_T_bev`` float32 (B, 4, 4) of the BEV of one camera of each sample: x ahead of it, y to
    its left, z up along its image, not levelled; the origin is :data:`HEIGHT_M` below it.

    ``cam_T_ego`` are (B, N, 4, 4), ``camera`` int64 (B,).
    """
    samples = torch.arange(len(cam_T_ego), device=cam_T_ego.device)
    chosen = cam_T_ego[samples, camera.to(samples.device)].double()
    axes = [[0, -1, 0, 0], [0, 0, -1, HEIGHT_M], [1, 0, 0, 0], [0, 0, 0, 1]]
    cam_T_bev = torch.tensor(axes, dtype=torch.float64, device=chosen.device)
    return (torch.linalg.inv(chosen) @ cam_T_bev).float()


def front_camera(cam_T_ego: Tensor) -> Tensor:
    """The camera of each sample, int64 (B,), that looks most ahead, in nuScenes CAM_FRONT: that of
    evaluation. ``cam_T_ego`` are (B, N, 4, 4)."""
    return cam_T_ego[:, :, 2, 0].argmax(dim=1)


def drawn_camera(seed: Tensor, n_cameras: int) -> Tensor:
    """A random camera of each sample, int64 (B,), that of training; from int64 seeds (B,)."""
    drawn = [np.random.default_rng([2, s]).integers(n_cameras) for s in seed.tolist()]
    return torch.tensor(drawn)


def footprints(boxes: Tensor, ego_T_bev: Tensor, grid: VoxelGrid) -> tuple[Tensor, Tensor]:
    """Which cells the roof of each box covers, bool (M, X, Y), and its centre in cells, float32
    (M, 2), a whole number being a cell's centre.

    Of ``boxes`` (M, >= 7) in ego, in the BEV frame of ``ego_T_bev`` (4, 4). Corners are truncated
    to whole cells, backwards and to the left, and what they enclose is filled as ``cv2.fillPoly``
    does, border included.
    """
    x, y, z, length, width, height, yaw = boxes[:, :7, None].double().unbind(1)  # (M, 1) each
    ends = torch.tensor([[1, -1, -1, 1], [1, 1, -1, -1]], device=boxes.device) / 2
    along, across = length * ends[0], width * ends[1]  # (M, 4)
    cos, sin, top = yaw.cos(), yaw.sin(), (z + height / 2).expand_as(along)
    roof = torch.stack([x + cos * along - sin * across, y + sin * along + cos * across, top], -1)
    centre = torch.stack([x, y, z], dim=-1)[:, 0]
    bev_T_ego = torch.linalg.inv(ego_T_bev.double())
    cells = fill_polygons(_cells(roof, bev_T_ego, grid).trunc().long(), grid.bev_shape)
    row, column = _cells(centre, bev_T_ego, grid).unbind(-1)
    centre = torch.stack([row, grid.y[2] - 1 - column], dim=-1)
    return cells.flip(-1), centre.float()


def _cells(points: Tensor, bev_T_ego: Tensor, grid: VoxelGrid) -> Tensor:
    """Rows and columns of points (..., 3) in ego, a whole number being a cell's centre: rows from
    behind, columns from the left, as Simple-BEV counts them (ours from the right)."""
    x, y, _ = (points @ bev_T_ego[:3, :3].T + bev_T_ego[:3, 3]).unbind(-1)
    (dx, dy, _), (low_x, *_) = grid.cell_size, grid.lower
    return torch.stack([(x - low_x) / dx - 0.5, (grid.y[1] - y) / dy - 0.5], dim=-1)
