"""BEVFormer's lifting, as Simple-BEV's authors re-implemented it (``nets/bevformernet.py``).

One learned query per BEV cell; each of six layers lets the queries look at each other, then at the
images, where the voxel centres above a cell project. No attention over time, one scale.

Different from the published code, on purpose:

- a query's self-attention is centred on its own cell (there: on the transposed one);
- which queries a camera sees is decided per sample (there: by the first of the batch);
- both mirrorings of the BEV map are undone along the axes they were made on (there: the second one
  mirrors the axis of channels, and is undone along a spatial one);
- the feed-forward part has 8·C hidden units, 1024 at C = 128 (there: 1028);
- a query that no camera sees keeps its value in the cross-attention (there: the bias of the
  output projection is added).

That a voxel centre behind a camera is neither seen nor sampled here, and not tested there, changes
nothing: the published code projects it far outside the image. That it reads the queries a second
time in place of their position embedding was mended upstream (a08998f), as it is here.
"""

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from occfeat_targets.store.grid import VoxelGrid
from occfeat_targets.store.settings import ConfigError
from occfeat_train.geometry import volume_centres
from occfeat_train.models.deformable import DeformableAttention
from occfeat_train.models.lifts.base import Lift
from occfeat_train.models.lifts.simplebev import in_image, places, project

LAYERS, HEADS, POINTS, DROPOUT = 6, 4, 8, 0.1
FAR = 1e4
"""Cells from an image where nothing is any more, though float16 still holds it."""


class Views(NamedTuple):
    """The S (query, camera) pairs where the camera sees the query; B samples, Q queries each."""

    query: Tensor
    """int64 (S,), b·Q + q, ascending; q = x·Y + y."""
    camera: Tensor
    """int64 (S,), b·N + n."""
    centres: Tensor
    """float32 (S, Z, 2), anchors, positions as of ``deformable``; -inf behind the camera."""
    start: Tensor
    """int64 (B·Q,), first pair of each query."""
    seen: Tensor
    """bool (B·Q,), whether any camera sees the query."""


class BEVFormerLift(Lift):
    """Image features to BEV features by learned queries and deformable attention."""

    def __init__(self, grid: VoxelGrid, channels: int):
        super().__init__(grid, channels)
        shape = (channels, *grid.bev_shape)
        self.bev_queries = nn.Parameter(0.1 * torch.randn(shape))
        self.bev_queries_pos = nn.Parameter(0.1 * torch.randn(shape))
        layers = (BEVFormerLayer(channels, heights=grid.shape[0]) for _ in range(LAYERS))
        self.layers = nn.ModuleList(layers)

    @classmethod
    def check(cls, channels: int) -> None:
        """A head has a share of the channels."""
        if channels % HEADS:
            rule = f"model.channels must be a multiple of {HEADS}, the attention heads of bevformer"
            raise ConfigError(f"{rule}, got {channels}")

    def forward(
        self, features: Tensor, K: Tensor, cam_T_bev: Tensor, image_hw: tuple[int, int]
    ) -> Tensor:
        """As :meth:`Lift.forward`."""
        B, _, _, h, w = features.shape
        with torch.no_grad(), torch.autocast(features.device.type, enabled=False):
            centres = volume_centres(self.grid, features.device)
            heights = self.grid.shape[0]
            views = seen_queries(centres, heights, K.float(), cam_T_bev.float(), image_hw, (h, w))
        images = features.flatten(0, 1).permute(0, 2, 3, 1)  # (B·N, h, w, C)
        learned = self.bev_queries, self.bev_queries_pos
        queries, position = (p.permute(1, 2, 0).expand(B, -1, -1, -1) for p in learned)
        for layer in self.layers:
            queries = layer(queries, position, images, views)
        return queries.permute(0, 3, 1, 2).to(features.dtype)

    def fixed(
        self, K: Tensor, cam_T_bev: Tensor, image_hw: tuple[int, int], feature_hw: tuple[int, int]
    ) -> nn.Module:
        """As :meth:`Lift.fixed`."""
        centres, heights = volume_centres(self.grid, K.device), self.grid.shape[0]
        views = seen_queries(centres, heights, K, cam_T_bev, image_hw, feature_hw)
        return FixedBEVFormer(self, views, K.shape[1])


class BEVFormerLayer(nn.Module):
    """Self-attention, cross-attention and a feed-forward part, each added and normalised."""

    def __init__(self, channels: int, heights: int):
        super().__init__()
        self.self_attention = SelfAttention(channels)
        self.norm1 = nn.LayerNorm(channels)
        self.cross_attention = CrossAttention(
            channels, DeformableAttention(channels, HEADS, heights)
        )
        self.norm2 = nn.LayerNorm(channels)
        widen, narrow = nn.Linear(channels, 8 * channels), nn.Linear(8 * channels, channels)
        self.ffn = nn.Sequential(widen, nn.ReLU(inplace=True), narrow)
        self.norm3 = nn.LayerNorm(channels)

    def forward(self, queries: Tensor, position: Tensor, images: Tensor, views: Views) -> Tensor:
        """Queries and their position embedding (B, X, Y, C), images (B·N, h, w, C)."""
        queries = self.norm1(self.self_attention(queries, position))
        queries = self.norm2(self.cross_attention(queries, position, images, views))
        return self.norm3(queries + self.ffn(queries))


class SelfAttention(nn.Module):
    """Each query samples the BEV map of queries around its own cell."""

    def __init__(self, channels: int, heads: int = HEADS, points: int = POINTS):
        super().__init__()
        self.attention = DeformableAttention(channels, heads, points)
        # Two linear maps in a row, as published: the attention's own and that of the block.
        self.attention_proj = nn.Linear(channels, channels)
        self.output_proj = nn.Linear(channels, channels)
        self.dropout = nn.Dropout(DROPOUT)
        nn.init.xavier_uniform_(self.attention_proj.weight)
        nn.init.zeros_(self.attention_proj.bias)

    def forward(self, queries: Tensor, position: Tensor) -> Tensor:
        """(B, X, Y, C) to the same; ``position`` (B, X, Y, C) is not in the residual."""
        B, X, Y, C = queries.shape
        embedded = queries + position
        centres = own_cells((X, Y), queries.device).expand(B, -1, -1, -1)
        maps = torch.arange(B, device=queries.device).repeat_interleave(X * Y)
        update = self.attention(embedded.reshape(-1, C), embedded, centres.flatten(0, 1), maps)
        update = self.output_proj(self.attention_proj(update))
        return queries + self.dropout(update.view(B, X, Y, C))


class CrossAttention(nn.Module):
    """Each query samples every camera that sees it and takes the mean over those cameras.

    Heads have one sampling point per voxel centre above the cell ("anchor"), 8 in the paper. A
    camera sees a query if one of its anchors projects into the image. Then all its anchors with
    depth > 0 are sampled, at their projections plus offsets; what falls outside the image adds
    zero, so the weights of a query are not renormalised at the image's border.
    """

    def __init__(self, channels: int, attention: nn.Module):
        super().__init__()
        self.attention = attention
        self.output_proj = nn.Linear(channels, channels)
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, queries: Tensor, position: Tensor, images: Any, views: Views) -> Tensor:
        """(B, X, Y, C) to the same; images (B·N, h, w, C), or what else the attention reads."""
        embedded = (queries + position).flatten(0, 2)
        sampled = self.attention(embedded, images, views.centres, views.camera, views.query)
        pairs = torch.arange(len(sampled), device=sampled.device)
        # Pairs are sorted by query; one without pairs is an empty bag, that is zero.
        mean = F.embedding_bag(pairs, sampled, views.start, mode="mean")
        update = self.output_proj(mean) * views.seen[:, None]
        return queries + self.dropout(update.view(queries.shape))


class FixedBEVFormer(nn.Module):
    """The lift where each of N cameras has a constant list of the queries it sees, padded to the
    longest, L; a query takes the mean over rows of those lists, at most M."""

    centres: Tensor
    listed: Tensor
    rows: Tensor
    share: Tensor
    cells: Tensor

    def __init__(self, lift: BEVFormerLift, views: Views, n_cameras: int):
        super().__init__()
        self.lift = lift
        by_camera = views.camera.argsort(stable=True)
        camera, nth = places(torch.bincount(views.camera, minlength=n_cameras))
        L = max(1, int(nth.max() + 1) if len(nth) else 0)
        # What is far outside of the image reads zeros, as what is behind the camera shall.
        centres = views.centres.new_full((n_cameras, L, *views.centres.shape[1:]), -FAR)
        centres[camera, nth] = views.centres[by_camera].clamp(-FAR, FAR)
        listed = views.query.new_zeros(n_cameras, L)
        listed[camera, nth] = views.query[by_camera]
        row = torch.empty_like(views.query)
        row[by_camera] = camera * L + nth
        seen_by = torch.bincount(views.query, minlength=len(views.seen))
        rows = row.new_full((len(seen_by), max(1, int(seen_by.max()))), n_cameras * L)
        rows[places(seen_by)] = row  # the others are one more row, of zeros
        share = 1 / seen_by.clamp(min=1)[:, None]
        cells = own_cells(lift.grid.bev_shape, rows.device)
        constants = {"centres": centres, "listed": listed.int(), "rows": rows.T.int()}
        for name, values in (constants | {"share": share, "cells": cells}).items():
            self.register_buffer(name, values.contiguous(), persistent=False)
        self.register_buffer("seen", views.seen[:, None].float(), persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        """As :meth:`Lift.forward`, of one sample."""
        images = features[0].permute(0, 2, 3, 1)
        learned = self.lift.bev_queries, self.lift.bev_queries_pos
        queries, position = (p.permute(1, 2, 0) for p in learned)  # (X, Y, C)
        layers: Any = self.lift.layers
        for layer in layers:
            queries = layer.norm1(self._look_around(layer.self_attention, queries, position))
            queries = layer.norm2(self._look_out(layer.cross_attention, queries, position, images))
            queries = layer.norm3(queries + layer.ffn(queries))
        return queries.permute(2, 0, 1)[None]

    def _look_around(self, part: SelfAttention, queries: Tensor, position: Tensor) -> Tensor:
        embedded = (queries + position)[None]
        update = part.attention.by_map(embedded.flatten(1, 2), embedded, self.cells)
        return queries + part.output_proj(part.attention_proj(update)).view_as(queries)

    def _look_out(
        self, part: CrossAttention, queries: Tensor, position: Tensor, images: Tensor
    ) -> Tensor:
        embedded = (queries + position).flatten(0, 1)
        listed = embedded.index_select(0, self.listed.flatten()).unflatten(0, self.listed.shape)
        attention = cast(DeformableAttention, part.attention)
        sampled = attention.by_map(listed, images, self.centres).flatten(0, 1)
        sampled = F.pad(sampled, (0, 0, 0, 1))
        mean = sum(sampled.index_select(0, row) for row in self.rows) * self.share
        return queries + (part.output_proj(mean) * self.seen).view_as(queries)


def own_cells(bev_shape: tuple[int, int], device: torch.device) -> Tensor:
    """Positions of the queries in the map of queries, float32 (1, X·Y, 1, 2): X rows, Y columns."""
    rows, columns = (torch.arange(n, device=device) for n in bev_shape)
    # The query of cell (x, y) is at column y, row x.
    cells = torch.stack(torch.meshgrid(rows, columns, indexing="ij")[::-1], dim=-1)
    return cells.to(torch.float32).view(1, -1, 1, 2)


def seen_queries(
    centres: Tensor,
    heights: int,
    K: Tensor,
    cam_T_bev: Tensor,
    image_hw: tuple[int, int],
    feature_hw: tuple[int, int],
) -> Views:
    """Which cameras see which queries, and where the voxel centres above them project.

    ``centres`` are float32 (Q·Z, 4), homogeneous, metres, z fastest; ``heights`` is Z,
    ``feature_hw`` (h, w) of the feature maps; the rest as in :meth:`Lift.forward`.
    """
    B, N = K.shape[:2]
    Q = len(centres) // heights
    (h, w), (H, W) = feature_hw, image_hw
    queries, cameras, anchors = [], [], []
    for b in range(B):
        u, v, depth = project(centres, K[b], cam_T_bev[b])
        seen = in_image(u, v, depth, image_hw).view(Q, heights, N).any(dim=1)
        query, camera = seen.nonzero(as_tuple=True)
        u, v, depth = (a.view(Q, heights, N)[query, :, camera] for a in (u, v, depth))
        cells = torch.stack([u / depth * (w / W) - 0.5, v / depth * (h / H) - 0.5], dim=-1)
        anchors.append(cells.masked_fill((depth <= 0)[..., None], -torch.inf))
        queries.append(query + b * Q)
        cameras.append(camera + b * N)
    query = torch.cat(queries)
    seen_by = torch.bincount(query, minlength=B * Q)
    start = seen_by.cumsum(0) - seen_by
    return Views(query, torch.cat(cameras), torch.cat(anchors), start, seen_by > 0)
