"""TPVFormer's lifting (Huang et al., CVPR 2023), the network of POP-3D: three planes of learned
queries, from above, from the side and from the front, that look at the images.

Each of three layers lets the plane from above look at itself, then each plane at the images, at
anchors on the line that a query stands for, and at several sizes of them. A voxel is the sum of its
three planes' queries.

Different from the published code, on purpose:

- sizes of the images are made here, of one feature map, by convolutions of stride 2 (there: those
  of a feature pyramid);
- neither levels nor cameras have embeddings: cameras may be any, in any order;
- each plane has value and output projections of its own (there: one of each for all three), and the
  feed-forward part no dropout;
- the plane from above looks at itself as in ``bevformer``, once (there: at two copies of itself,
  for want of a frame before, and at values without positions);
- which queries a camera sees is decided per sample (there: by the first of the batch);
- the volume goes through the BEV network's decoder (there: straight to the heads).
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from occfeat_targets.store.grid import VoxelGrid
from occfeat_targets.store.settings import ConfigError
from occfeat_train.models.deformable import LevelAttention
from occfeat_train.models.lifts.base import Lift
from occfeat_train.models.lifts.bevformer import CrossAttention, SelfAttention, Views, seen_queries

LAYERS, HEADS, LEVELS, POINTS = 3, 8, 4, 4
PER_ANCHOR = 2
"""Sampling points of a head, level and anchor."""


class Plane(NamedTuple):
    """One of the three, of a volume's axes (X, Y, Z) = (0, 1, 2)."""

    name: str
    rows: int
    columns: int
    along: int
    """The axis that its queries' lines run along."""
    anchors: int
    """Places on such a line."""


PLANES = (Plane("above", 0, 1, 2, 4), Plane("side", 2, 0, 1, 32), Plane("front", 1, 2, 0, 32))


class TpvLift(Lift):
    """Image features to a volume by three planes of queries."""

    returns_volume = True

    def __init__(self, grid: VoxelGrid, channels: int):
        super().__init__(grid, channels)
        sizes = [n for _, _, n in (grid.x, grid.y, grid.z)]
        self.planes = nn.ParameterDict(
            {p.name: 0.1 * torch.randn(channels, sizes[p.rows], sizes[p.columns]) for p in PLANES}
        )
        self.row_position = nn.Parameter(0.1 * torch.randn(channels // 2, sizes[0], 1))
        self.column_position = nn.Parameter(0.1 * torch.randn(channels // 2, 1, sizes[1]))
        halves = (nn.Conv2d(channels, channels, 3, 2, 1) for _ in range(LEVELS - 1))
        self.pyramid = nn.ModuleList(halves)
        self.layers = nn.ModuleList(TpvLayer(channels) for _ in range(LAYERS))

    @classmethod
    def check(cls, channels: int) -> None:
        """A head has a share of the channels."""
        if channels % HEADS:
            rule = f"model.channels must be a multiple of {HEADS}, the attention heads of tpv"
            raise ConfigError(f"{rule}, got {channels}")

    def fixed(
        self, K: Tensor, cam_T_bev: Tensor, image_hw: tuple[int, int], feature_hw: tuple[int, int]
    ) -> nn.Module:
        """ConfigError: it has none."""
        raise ConfigError("ONNX files are of the lifts simplebev and bevformer, not of tpv")

    def forward(
        self, features: Tensor, K: Tensor, cam_T_bev: Tensor, image_hw: tuple[int, int]
    ) -> Tensor:
        """As :meth:`Lift.forward`."""
        B, _, _, h, w = features.shape
        with torch.no_grad(), torch.autocast(features.device.type, enabled=False):
            poses = K.float(), cam_T_bev.float(), image_hw, (h, w)
            views = {
                p.name: seen_queries(anchors(self.grid, p, K.device), p.anchors, *poses)
                for p in PLANES
            }
        level, maps = features.flatten(0, 1), []
        for halve in (nn.Identity(), *self.pyramid):
            level = halve(level)
            maps.append(level.permute(0, 2, 3, 1))  # (B·N, h, w, C)
        queries = {
            name: plane.permute(1, 2, 0).expand(B, -1, -1, -1)
            for name, plane in self.planes.items()
        }
        rows, columns = self.row_position, self.column_position
        X, Y = self.grid.bev_shape
        position = torch.cat([rows.expand(-1, X, Y), columns.expand(-1, X, Y)]).permute(1, 2, 0)
        for layer in self.layers:
            queries = layer(queries, position.expand(B, -1, -1, -1), maps, views)
        above, side, front = (queries[p.name] for p in PLANES)  # (B, X, Y), (B, Z, X), (B, Y, Z)
        volume = above[:, :, :, None] + side.transpose(1, 2)[:, :, None] + front[:, None]
        return volume.flatten(3).permute(0, 3, 1, 2).to(features.dtype)  # of (B, X, Y, Z, C)


class TpvLayer(nn.Module):
    """Self-attention from above, cross-attention and a feed-forward part of all three planes, each
    added and normalised; norms and feed-forward part are shared by the planes, as published."""

    def __init__(self, channels: int):
        super().__init__()
        self.self_attention = SelfAttention(channels, HEADS, POINTS)
        self.norm1 = nn.LayerNorm(channels)
        self.cross_attention = nn.ModuleDict(
            {
                p.name: CrossAttention(
                    channels, LevelAttention(channels, HEADS, p.anchors, PER_ANCHOR, LEVELS)
                )
                for p in PLANES
            }
        )
        self.norm2 = nn.LayerNorm(channels)
        widen, narrow = nn.Linear(channels, 2 * channels), nn.Linear(2 * channels, channels)
        self.ffn = nn.Sequential(widen, nn.ReLU(inplace=True), narrow)
        self.norm3 = nn.LayerNorm(channels)

    def forward(
        self,
        queries: dict[str, Tensor],
        position: Tensor,
        maps: list[Tensor],
        views: dict[str, Views],
    ) -> dict[str, Tensor]:
        """Queries (B, rows, columns, C) of each plane, the position embedding of the one from above
        (B, X, Y, C), maps (B·N, h, w, C) of each level."""
        above = PLANES[0].name
        looked = self.norm1(self.self_attention(queries[above], position))
        queries = {n: looked if n == above else self.norm1(q) for n, q in queries.items()}
        found = {}
        for name, attention in self.cross_attention.items():
            nowhere = torch.zeros_like(queries[name])  # only the self-attention has positions
            seen = self.norm2(attention(queries[name], nowhere, maps, views[name]))
            found[name] = self.norm3(seen + self.ffn(seen))
        return found


def anchors(grid: VoxelGrid, plane: Plane, device: torch.device) -> Tensor:
    """Where a plane's queries look: float32 (rows·columns·anchors, 4), homogeneous, metres, anchors
    fastest; rows and columns at their cells' centres, anchors from the first cell's centre to the
    last one's."""
    axes = []
    for axis, (lo, hi, n) in enumerate((grid.x, grid.y, grid.z)):
        steps = plane.anchors if axis == plane.along else n
        at = torch.linspace(0.5, n - 0.5, steps, dtype=torch.float64, device=device)
        axes.append(lo + at * ((hi - lo) / n))
    order = (plane.rows, plane.columns, plane.along)
    mesh = torch.meshgrid(*(axes[axis] for axis in order), indexing="ij")
    xyz = torch.stack([mesh[order.index(axis)] for axis in range(3)], dim=-1).reshape(-1, 3)
    return nn.functional.pad(xyz, (0, 1), value=1.0).float()
