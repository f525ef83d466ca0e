"""The BEV network: images of any number of cameras to a bird's-eye-view feature map.

This is what is pretrained, and what finetuning starts from.
"""

from typing import Annotated, Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from occfeat_targets.store.grid import VoxelGrid
from occfeat_targets.store.settings import Settings
from occfeat_train.models.decoder import Compressor, Decoder
from occfeat_train.models.encoders import ENCODERS, ImageEncoder
from occfeat_train.models.lifts import LIFTS
from occfeat_train.models.lifts.base import Lift

_Side = Annotated[int, Field(ge=32)]


class ModelSettings(Settings):
    """The BEV network."""

    lift: str = "simplebev"
    """How image features become BEV features: a name of ``lifts.LIFTS``, or a plug-in's."""
    encoder: str = "efficientnet-b0"
    """A name of ``encoders.ENCODERS``; ``efficientnet-lite0`` has its weights in the extra
    ``lite0``, the others on the hub."""
    encoder_weights: str = "imagenet"
    """``imagenet`` (supervised, from the hub), a hub id, a local directory, a file of
    torchvision-named weights (MoCo-v2 included), or ``random``."""
    image_size: tuple[_Side, _Side] = (224, 400)
    """Height and width of the images the encoder sees, pixels."""
    channels: int = Field(default=128, ge=2, multiple_of=2)
    """Channels of lifted features and BEV map (N_B)."""
    drop_path: float = Field(default=0.2, ge=0, lt=1)
    """Stochastic depth of EfficientNet."""
    freeze_batch_norm: bool = False
    """Keep batch-norm statistics as they are: for very small batches."""

    @field_validator("encoder")
    @classmethod
    def _is_known(cls, name: str) -> str:
        if name not in ENCODERS:
            raise ValueError(f"must be one of {', '.join(ENCODERS)}, got {name!r}")
        return name

    @model_validator(mode="after")
    def _suits_the_lift(self) -> Self:
        LIFTS(self.lift).check(self.channels)
        return self


class BEVNet(nn.Module):
    """Encoder, lifting, compressor (if the lift returns a volume), decoder."""

    def __init__(self, settings: ModelSettings, grid: VoxelGrid):
        super().__init__()
        channels = settings.channels
        self.encoder = ImageEncoder(settings.encoder, channels, settings.drop_path)
        self.lift: Lift = LIFTS(settings.lift)(grid, channels)
        self.compressor = nn.Identity()
        if self.lift.returns_volume:
            self.compressor = Compressor(grid.shape[0] * channels, channels)
        self.decoder = Decoder(channels)

    def forward(
        self,
        images: Tensor,
        K: Tensor,
        cam_T_bev: Tensor,
        image_flip: Tensor | None = None,
        bev_flip: Tensor | None = None,
    ) -> Tensor:
        """BEV features (B, C, X, Y), never mirrored.

        Args:
            images: float (B, N, 3, H, W), RGB in 0..1; cameras in any order.
            K: float32 (B, N, 3, 3), intrinsics of these images (before any mirroring).
            cam_T_bev: float32 (B, N, 4, 4); ``cam_T_ego`` of the store unless the BEV is turned.
            image_flip: bool (B, N), which images are mirrored left-right; their features are
                mirrored back, as in Simple-BEV, so that ``K`` holds.
            bev_flip: bool (B, 2), along which axes (X, Y) the decoder sees the features mirrored.
        """
        *_, H, W = images.shape
        return self.see(self.encode(images, image_flip), K, cam_T_bev, (H, W), bev_flip)

    def encode(self, images: Tensor, image_flip: Tensor | None = None) -> Tensor:
        """Features (B, N, C, h, w) of images as in :meth:`forward`, never mirrored."""
        features = self.encoder(images.flatten(0, 1)).unflatten(0, images.shape[:2])
        return mirror(features, image_flip, dims=(-1,))

    def see(
        self,
        features: Tensor,
        K: Tensor,
        cam_T_bev: Tensor,
        image_hw: tuple[int, int],
        bev_flip: Tensor | None = None,
    ) -> Tensor:
        """BEV features, as :meth:`forward`, of what :meth:`encode` makes of images (H, W)."""
        bev = self.lift(features, K, cam_T_bev, image_hw)
        bev = mirror(bev, bev_flip, dims=(-2, -1))
        bev = self.decoder(self.compressor(bev))
        return mirror(bev, bev_flip, dims=(-2, -1))


def mirror(x: Tensor, flip: Tensor | None, dims: tuple[int, ...]) -> Tensor:
    """Mirror some items of ``x`` (*items, C, H, W) along ``dims``, counted from the end. ``flip``:
    bool (*items) for one axis or (*items, n) for n axes; None mirrors nothing."""
    if flip is None:
        return x
    choices = [flip] if len(dims) == 1 else flip.unbind(-1)
    for dim, chosen in zip(dims, choices, strict=True):
        x = torch.where(chosen[..., None, None, None], x.flip(dim), x)
    return x
