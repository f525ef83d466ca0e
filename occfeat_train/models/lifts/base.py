"""What a lift is: image features of any number of cameras to BEV features."""

from typing import ClassVar

from torch import Tensor, nn

from occfeat_targets.store.grid import VoxelGrid


class Lift(nn.Module):
    """Base of all lifts, found by name in ``lifts.LIFTS`` (``model.lift``); ``grid`` is that of the
    BEV frame, ``channels`` C of the image features."""

    returns_volume: ClassVar[bool] = False
    """Whether it returns a volume, channels z·C + c, which ``BEVNet`` compresses (even if Z=1)."""

    def __init__(self, grid: VoxelGrid, channels: int):
        super().__init__()
        self.grid = grid

    @classmethod
    def check(cls, channels: int) -> None:
        """Raise ConfigError if ``model.channels`` is a number that it can't have, and say why."""

    def forward(
        self, features: Tensor, K: Tensor, cam_T_bev: Tensor, image_hw: tuple[int, int]
    ) -> Tensor:
        """To (B, C, X, Y), or (B, Z·C, X, Y) if a volume; channels last in memory, features' dtype.

        Args:
            features: (B, N, C, h, w), of N cameras in any order.
            K: float32 (B, N, 3, 3), intrinsics of the images the features come from, pixels.
            cam_T_bev: float32 (B, N, 4, 4), metres.
            image_hw: (H, W) of those images, which the features cover.
        """
        raise NotImplementedError

    def fixed(
        self, K: Tensor, cam_T_bev: Tensor, image_hw: tuple[int, int], feature_hw: tuple[int, int]
    ) -> nn.Module:
        """The same lift with cameras as constants, of operations that every runtime has.

        Arguments as of :meth:`forward`, of one sample: (1, N, ...); ``feature_hw`` is (h, w). The
        module takes ``features`` alone, shares this one's parameters, and agrees up to rounding.
        Unless a lift says how, it is its forward, of whatever operations that has.
        """
        return _Fixed(self, K, cam_T_bev, image_hw)


class _Fixed(nn.Module):
    def __init__(self, lift: Lift, K: Tensor, cam_T_bev: Tensor, image_hw: tuple[int, int]):
        super().__init__()
        self.lift, self.image_hw = lift, image_hw
        self.register_buffer("K", K, persistent=False)
        self.register_buffer("cam_T_bev", cam_T_bev, persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        return self.lift(features, self.K, self.cam_T_bev, self.image_hw)
