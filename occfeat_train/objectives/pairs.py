"""Which points fall where in which image: what ScaLR, SLidR and POP-3D learn from."""

from typing import NamedTuple

import torch
from torch import Tensor

from occfeat_train.geometry import neighbours
from occfeat_train.objectives.base import Batch


class Pairs(NamedTuple):
    """M pairs of a point and a camera that sees it."""

    row: Tensor
    """int64 (M,), which point; a row of the batch of a lidar network."""
    image: Tensor
    """int64 (M,), flat (B, N) number of the image."""
    place: Tensor
    """float32 (M, 2), where in it, (u / W, v / H) in [0, 1)."""


def rows_in_ego(batch: Batch, point_step_m: float) -> tuple[Tensor, Tensor]:
    """The places of a batch's rows in ego, float32 (R, 3), metres, and their samples, (R,)."""
    xyz = batch["points"][batch["row_point"], :3].float() * point_step_m
    n_rows = batch["n_rows"]
    return xyz, torch.arange(len(n_rows), device=n_rows.device).repeat_interleave(n_rows)


def camera_pairs(batch: Batch, point_step_m: float, image_hw: tuple[int, int]) -> Pairs:
    """All pairs of a batch's rows, in images of size ``image_hw`` as stored; of a sample with one
    ``camera``, those of it alone."""
    xyz, sample = rows_in_ego(batch, point_step_m)
    only = batch["camera"][sample, None]
    everywhere = torch.arange(batch["K"].shape[1], device=only.device)
    return seen_from(xyz, sample, batch, image_hw, (only < 0) | (only == everywhere))


def seen_from(
    xyz: Tensor, sample: Tensor, batch: Batch, image_hw: tuple[int, int], asked: Tensor
) -> Pairs:
    """Pairs of places float32 (R, 3) in ego, metres, of the samples int64 (R,), and the cameras
    ``asked`` bool (R, N or 1): farther than 1 m in front of the camera and inside of its image;
    what stands between is ignored (SCALR ``nuscenes_for_scalr.py``)."""
    pose, K = batch["cam_T_ego"], batch["K"]  # (B, N, ...)
    n_cameras = pose.shape[1]
    with torch.autocast(xyz.device.type, enabled=False):  # half precision would be pixels off
        in_camera = torch.einsum("rnij,rj->rni", pose[sample, :, :3, :3], xyz)
        in_camera = in_camera + pose[sample, :, :3, 3]
        pixels = torch.einsum("rnij,rnj->rni", K[sample], in_camera)[..., :2]
    depth = in_camera[..., 2]
    size = xyz.new_tensor(image_hw[::-1])
    place = pixels / torch.where(depth > 1, depth, 1)[..., None] / size
    seen = (depth > 1) & ((place >= 0) & (place < 1)).all(dim=-1) & asked
    row, camera = seen.nonzero(as_tuple=True)
    return Pairs(row, sample[row] * n_cameras + camera, place[row, camera])


def sample_tokens(tokens: Tensor, scale: Tensor, image: Tensor, place: Tensor) -> Tensor:
    """Features float32 (M, C) at places in images: bilinear between the centres of a feature map's
    cells, and constant beyond the outermost (``grid_sample(align_corners=False, "border")``).
    ScaLR's and SLidR's upsampling has aligned corners, which moves tokens by up to half a cell.

    From ``tokens`` int8 (B, N, h, w, C), ``scale`` float16 (B, N, h, w), and :class:`Pairs`.
    """
    *_, h, w, channels = tokens.shape
    (x, x_next, x_part), (y, y_next, y_part) = (
        neighbours(place[:, axis] * cells - 0.5, cells) for axis, cells in ((0, w), (1, h))
    )
    flat, steps = tokens.reshape(-1, channels), scale.reshape(-1).float()
    found = place.new_zeros(len(place), channels)
    for row, row_part in ((y, 1 - y_part), (y_next, y_part)):
        for column, column_part in ((x, 1 - x_part), (x_next, x_part)):
            cell = (image * h + row) * w + column
            found += flat[cell].float() * (steps[cell] * row_part * column_part)[:, None]
    return found
