"""Augmentation on the device: a collated batch of stored bytes to network inputs and targets.

What is random is drawn per frame from (seed, epoch, frame), so it depends neither on the number
of processes nor on where a run was resumed.
"""

from dataclasses import dataclass

import numpy as np
import torch
from pydantic import Field, field_validator
from torch.nn import functional as F

from occfeat_targets.store.settings import Settings, Size
from occfeat_train.geometry import resize_and_crop, rotation_z


class AugmentSettings(Settings):
    """Simple-BEV's training augmentation, drawn per camera or per sample."""

    resize: tuple[float, float] = (0.8, 1.2)
    """Images are resized by a factor drawn from here, then cropped at the centre."""
    shift: float = Field(default=0.2, ge=0, lt=1)
    """The crop is moved by up to this share of the image's height, in both directions."""
    flip_images: bool = True
    """Mirror each image with probability 1/2; its features are mirrored back."""
    flip_bev: bool = True
    """Mirror lifted features along x and y, with probability 1/2 each; undone before the heads."""
    rotate_bev_deg: float = Field(default=180.0, ge=0, le=180)
    """Turn the BEV frame by up to this angle either way: cameras, voxels and labels together.
    Stands for Simple-BEV's random reference camera, which ``tasks.vehicle.protocol=simple-bev``
    takes instead, unless this is 0."""

    @field_validator("resize")
    @classmethod
    def _is_a_range(cls, resize: tuple[float, float]) -> tuple[float, float]:
        if not 0 < resize[0] <= resize[1]:
            raise ValueError(f"must be [low, high], 0 < low, got {list(resize)}")
        return resize


NO_AUGMENT = AugmentSettings(
    resize=(1.0, 1.0), shift=0.0, flip_images=False, flip_bev=False, rotate_bev_deg=0.0
)
"""What evaluation uses: images resized to the network's size, nothing else."""


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
    settings: AugmentSettings, seed: int, epoch: int, frames: torch.Tensor, n_cameras: int
) -> Draws:
    """Draw for ``frames`` (B,); the same frame gets other numbers in every epoch."""
    rows = []
    for frame in frames.tolist():
        rng = np.random.default_rng([seed, epoch, frame])
        row = (
            rng.uniform(*settings.resize, n_cameras),
            rng.uniform(-1, 1, (n_cameras, 2)),
            rng.random(n_cameras) < 0.5 * settings.flip_images,
            rng.random(2) < 0.5 * settings.flip_bev,
            np.radians(settings.rotate_bev_deg) * rng.uniform(-1, 1),
            rng.integers(2**63 - 1),
        )
        rows.append(row)
    columns = (torch.from_numpy(np.stack(column)) for column in zip(*rows, strict=True))
    return Draws(*(c.float() if c.is_floating_point() else c for c in columns))


def network_inputs(
    batch: dict[str, torch.Tensor],
    draws: Draws,
    image_size: Size,
    max_shift: float,
    ego_T_bev: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """The arguments of ``BEVNet.forward``.

    From ``images`` uint8 (B, N, H0, W0, 3), ``K`` and ``cam_T_ego`` on the device, and draws of the
    same samples; ``image_size`` is the network's, ``max_shift`` is ``augment.shift``; ``ego_T_bev``
    float32 (B, 4, 4) is the BEV frame, None: ego, turned by the draws' angle. Returns
    ``images`` float32 (B, N, 3, H, W) in 0..1, black outside the stored image; ``K`` changed to
    match; ``cam_T_bev``; ``image_flip``; ``bev_flip``.
    """
    device = batch["images"].device
    stored = torch.tensor(batch["images"].shape[3:1:-1])  # width, height
    size = torch.tensor(image_size[::-1])
    resized = size * draws.resize[..., None]  # (B, N, 2)
    crop = (resized - size) / 2 + draws.shift * (max_shift * image_size[0])
    # Resize, crop and mirror in one sampling. Pixel u of the output is pixel (u + crop) of the
    # resized image; in affine_grid's units of half an image, with x = 2u/W - 1:
    # x' = x·W/W' + (W + 2·crop)/W' - 1.
    scale = size / resized
    theta = torch.zeros(*draws.resize.shape, 2, 3)
    theta[..., 0, 0] = torch.where(draws.image_flip, -scale[..., 0], scale[..., 0])
    theta[..., 1, 1] = scale[..., 1]
    theta[..., 2] = (size + 2 * crop) / resized - 1
    theta = theta.flatten(0, 1).to(device)
    grid = F.affine_grid(theta, [len(theta), 3, *image_size], align_corners=False)
    pixels = batch["images"].flatten(0, 1).permute(0, 3, 1, 2).float().div_(255)
    # Zero padding alone would darken the outermost pixels of an enlarged image.
    sampled = F.grid_sample(pixels, grid, align_corners=False, padding_mode="border")
    inside = (grid.abs() <= 1).all(dim=-1)[:, None]
    images = (sampled * inside).unflatten(0, draws.resize.shape)
    K = resize_and_crop(batch["K"], (resized / stored).to(device), crop.to(device))
    if ego_T_bev is None:
        ego_T_bev = rotation_z(-draws.angle).to(device)
    return {
        "images": images,
        "K": K,
        "cam_T_bev": batch["cam_T_ego"] @ ego_T_bev[:, None],
        "image_flip": draws.image_flip.to(device),
        "bev_flip": draws.bev_flip.to(device),
    }
