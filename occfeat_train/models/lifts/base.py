"""What a lift is: image features of any number of cameras to BEV features."""

from __future__ import annotations

import torch
from torch import nn

from occfeat_targets.store.grid import VoxelGrid


class Lift(nn.Module):
    """Base of all lifts, found by name in ``lifts.LIFTS`` (``model.lift``).

    Args:
        grid: the voxel grid of the BEV frame.
        channels: C, of the image features.
    """

    out_channels: int
    """Of what it returns. If these are not C, as of a volume with its heights side by side,
    ``BEVNet`` adds a compressor."""

    def __init__(self, grid: VoxelGrid, channels: int):
        super().__init__()
        self.grid = grid
        self.out_channels = channels

    @classmethod
    def check(cls, channels: int) -> None:
        """Refuse a number of channels that it can't have, while settings are read.

        Raises:
            ConfigError: naming ``model.channels`` and the rule.
        """

    def forward(
        self,
        features: torch.Tensor,
        K: torch.Tensor,
        cam_T_bev: torch.Tensor,
        image_hw: tuple[int, int],
    ) -> torch.Tensor:
        """Lift.

        Args:
            features: (B, N, C, h, w), of N cameras in any order.
            K: float32 (B, N, 3, 3), intrinsics of the images the features come from, pixels.
            cam_T_bev: float32 (B, N, 4, 4), metres.
            image_hw: (H, W) of those images, which the features cover.

        Returns:
            (B, ``out_channels``, X, Y), channels last in memory; dtype of ``features``.
        """
        raise NotImplementedError
