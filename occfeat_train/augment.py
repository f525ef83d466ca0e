"""Augmentation on the device: a collated batch of stored bytes to network inputs and targets.

What is random is drawn per frame from (seed, epoch, frame), so it depends neither on the number
of processes nor on where a run was resumed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from occfeat_train.config import AugmentConfig
from occfeat_train.geometry import resize_and_crop, rotation_z


@dataclass(frozen=True)
class Draws:
    """Random numbers of a batch, on the host.

    resize, shift: float32 (B, N) and (B, N, 2), shift in -1..1; image_flip: bool (B, N);
    bev_flip: bool (B, 2); angle: float32 (B,), radians; seed: int64 (B,), for what targets draw.
    """

    resize: torch.Tensor
    shift: torch.Tensor
    image_flip: torch.Tensor
    bev_flip: torch.Tensor
    angle: torch.Tensor
    seed: torch.Tensor


def draw(
    config: AugmentConfig, seed: int, epoch: int, frames: torch.Tensor, n_cameras: int
) -> Draws:
    """Draw for ``frames`` (B,); the same frame gets other numbers in every epoch."""
    rows = []
    for frame in frames.tolist():
        rng = np.random.default_rng([seed, epoch, frame])
        rows.append(
            (
                rng.uniform(*config.resize, n_cameras),
                rng.uniform(-1, 1, (n_cameras, 2)),
                rng.random(n_cameras) < 0.5 * config.flip_images,
                rng.random(2) < 0.5 * config.flip_bev,
                np.radians(config.rotate_bev_deg) * rng.uniform(-1, 1),
                rng.integers(2**63 - 1),
            )
        )
    columns = (torch.from_numpy(np.stack(column)) for column in zip(*rows, strict=True))
    return Draws(*(c.float() if c.is_floating_point() else c for c in columns))


def network_inputs(
    batch: dict[str, torch.Tensor],
    draws: Draws,
    image_size: tuple[int, int],
    max_shift: float,
) -> dict[str, torch.Tensor]:
    """The arguments of ``BEVNet.forward``.

    Args:
        batch: ``images`` uint8 (B, N, H0, W0, 3), ``K`` and ``cam_T_ego``, on the device.
        draws: of the same samples.
        image_size: (H, W) for the network.
        max_shift: ``augment.shift``.

    Returns:
        ``images`` float32 (B, N, 3, H, W) in 0..1, black outside the stored image; ``K``
        changed to match; ``cam_T_bev``; ``image_flip``; ``bev_flip``.
    """
    device = batch["images"].device
    stored = torch.tensor(batch["images"].shape[3:1:-1])  # width, height
    size = torch.tensor(image_size[::-1])
    resized = size * draws.resize[..., None]  # (B, N, 2)
    crop = (resized - size) / 2 + draws.shift * (max_shift * image_size[0])
    images = _crop(batch["images"], resized, crop, image_size, draws.image_flip)
    K = resize_and_crop(batch["K"], (resized / stored).to(device), crop.to(device))
    ego_T_bev = rotation_z(-draws.angle).to(device)
    return {
        "images": images,
        "K": K,
        "cam_T_bev": batch["cam_T_ego"] @ ego_T_bev[:, None],
        "image_flip": draws.image_flip.to(device),
        "bev_flip": draws.bev_flip.to(device),
    }


def _crop(
    images: torch.Tensor,
    resized: torch.Tensor,
    crop: torch.Tensor,
    image_size: tuple[int, int],
    flip: torch.Tensor,
) -> torch.Tensor:
    """Resize, crop and mirror in one bilinear sampling: float32 (B, N, 3, H, W) in 0..1.

    Pixel u of the output is pixel (u + crop) of the resized image; in ``affine_grid``'s units of
    half an image, with x = 2u/W - 1: x' = x·W/W' + (W + 2·crop)/W' - 1.
    """
    B, N = images.shape[:2]
    size = torch.tensor(image_size[::-1])
    scale = size / resized
    offset = (size + 2 * crop) / resized - 1
    theta = torch.zeros(B, N, 2, 3)
    theta[..., 0, 0] = torch.where(flip, -scale[..., 0], scale[..., 0])
    theta[..., 1, 1] = scale[..., 1]
    theta[..., 2] = offset
    grid = F.affine_grid(
        theta.flatten(0, 1).to(images.device), [B * N, 3, *image_size], align_corners=False
    )
    pixels = images.flatten(0, 1).permute(0, 3, 1, 2).float().div_(255)
    # Zero padding alone would darken the outermost pixels of an enlarged image.
    cropped = F.grid_sample(pixels, grid, align_corners=False, padding_mode="border")
    inside = (grid.abs() <= 1).all(dim=-1)
    return (cropped * inside[:, None]).unflatten(0, (B, N))
