"""The BEV network: six images to a bird's-eye-view feature map. This is what is pretrained."""

from __future__ import annotations

import torch
from torch import nn

from occfeat_targets.store.grid import VoxelGrid
from occfeat_train.config import ModelConfig
from occfeat_train.models.decoder import Compressor, Decoder
from occfeat_train.models.encoders import ImageEncoder
from occfeat_train.models.lift_bevformer import BEVFormerLift
from occfeat_train.models.lift_simplebev import SimpleBEVLift


class BEVNet(nn.Module):
    """Encoder, lifting, compressor, decoder.

    ``simplebev`` lifts to a voxel volume, which the compressor flattens; ``bevformer`` lifts to a
    BEV map and needs no compressor.
    """

    def __init__(self, config: ModelConfig, grid: VoxelGrid):
        super().__init__()
        self.encoder = ImageEncoder(config.encoder, config.channels, config.drop_path)
        if config.network == "bevformer":
            self.lift = BEVFormerLift(grid, config.channels)
            self.compressor = nn.Identity()
        else:
            self.lift = SimpleBEVLift(grid)
            self.compressor = Compressor(grid.shape[0] * config.channels, config.channels)
        self.decoder = Decoder(config.channels)

    def forward(
        self,
        images: torch.Tensor,
        K: torch.Tensor,
        cam_T_bev: torch.Tensor,
        image_flip: torch.Tensor | None = None,
        bev_flip: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """BEV features.

        Args:
            images: float (B, N, 3, H, W), RGB in 0..1; cameras in any order.
            K: float32 (B, N, 3, 3), intrinsics of these images (before any mirroring).
            cam_T_bev: float32 (B, N, 4, 4); ``cam_T_ego`` of the store unless the BEV is turned.
            image_flip: bool (B, N), which images are mirrored left-right; their features are
                mirrored back, as in Simple-BEV, so that ``K`` holds.
            bev_flip: bool (B, 2), along which BEV axes (X, Y) the decoder sees the lifted
                features mirrored; undone before returning.

        Returns:
            (B, C, X, Y), never mirrored.
        """
        B, N, _, H, W = images.shape
        features = self.encoder(images.flatten(0, 1)).unflatten(0, (B, N))
        features = mirror(features, image_flip, dims=(-1,))
        bev = self.lift(features, K, cam_T_bev, (H, W))
        bev = mirror(bev, bev_flip, dims=(-2, -1))
        bev = self.decoder(self.compressor(bev))
        return mirror(bev, bev_flip, dims=(-2, -1))


def mirror(x: torch.Tensor, flip: torch.Tensor | None, dims: tuple[int, ...]) -> torch.Tensor:
    """Mirror some items of a batch.

    Args:
        x: (*items, C, H, W).
        flip: bool (*items) for one axis or (*items, n) for n axes; None mirrors nothing.
        dims: the axes, counted from the end.
    """
    if flip is None:
        return x
    for i, dim in enumerate(dims):
        chosen = flip[..., i] if len(dims) > 1 else flip
        x = torch.where(chosen[..., None, None, None], x.flip(dim), x)
    return x
