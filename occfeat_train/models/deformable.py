"""Deformable attention (Zhu et al. 2021) at one scale or at several, in plain PyTorch.

The usual CUDA kernel, and its PyTorch fallback by ``grid_sample``, read a padded batch of queries
per map. Here each query names the map it samples, so any list of (query, map) pairs goes through in
one call: attention is a weighted sum of feature cells, four per sampling point, and
``embedding_bag`` computes it and its gradients on CPU and GPU, touching only what is sampled.

Positions are ``(column, row)`` in cells of the map, 0 at the centre of the first cell: a map of
h x w cells that covers an image of H x W pixels has pixel (u, v) at (u·w/W - ½, v·h/H - ½). Beyond
the map there are zeros: ``grid_sample(align_corners=False, padding_mode="zeros")``.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class DeformableAttention(nn.Module):
    """Each query samples a map at a few learned positions and takes their weighted sum.

    A query predicts, per head and point, an offset in cells and a weight (softmax over the
    points). Initialised as published: weights equal, offsets independent of the query, those of
    head m in direction 2π·m/heads, point p at p + 1 cells along the larger axis.
    """

    def __init__(self, channels: int, heads: int, points: int):
        super().__init__()
        self.heads, self.points = heads, points
        self.value_proj = nn.Linear(channels, channels)
        self.sampling_offsets = nn.Linear(channels, heads * points * 2)
        self.attention_weights = nn.Linear(channels, heads * points)
        nn.init.xavier_uniform_(self.value_proj.weight)
        for module in (self.sampling_offsets, self.attention_weights):
            nn.init.zeros_(module.weight)
        for module in (self.value_proj, self.attention_weights):
            nn.init.zeros_(module.bias)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(_star(heads, points).flatten())

    def forward(
        self,
        query: Tensor,
        values: Tensor,
        centres: Tensor,
        maps: Tensor,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Attend: (S, C), heads one after the other, in the values' dtype after projection.

        Args:
            query: (Q, C).
            values: (M, h, w, C), the maps.
            centres: (S, points, 2) or (S, 1, 2), positions to which the offsets are added; -inf
                where nothing shall be sampled.
            maps: int (S,), which map each of the S samplings reads.
            rows: int (S,), the query of each sampling; None if there is one per query, in order.
        """
        values = self.value_proj(values).unflatten(-1, (self.heads, -1))
        # In bfloat16 an offset of 8 cells would be off by up to 1/32 of a cell, column 40 by 1/8.
        with torch.autocast(query.device.type, enabled=False):
            offsets, weights = self._offsets_and_weights(query)
            if rows is not None:
                offsets, weights = offsets.index_select(0, rows), weights.index_select(0, rows)
            return deformable_sums(values, maps, centres[:, None] + offsets, weights).flatten(1)

    def by_map(self, query: Tensor, values: Tensor, centres: Tensor) -> Tensor:
        """The same where each of M maps has a list of S samplings, by ``grid_sample``, which other
        runtimes have. To (M, S, C), of ``query`` (M, S, C), ``values`` (M, h, w, C) and finite
        ``centres`` (M, S, points or 1, 2)."""
        M, h, w, _ = values.shape
        maps = self.value_proj(values).unflatten(-1, (self.heads, -1)).permute(0, 3, 4, 1, 2)
        offsets, weights = self._offsets_and_weights(query)
        positions = (centres[:, :, None] + offsets).transpose(1, 2)  # (M, heads, S, points, 2)
        grid = (2 * positions + 1) / positions.new_tensor([w, h]) - 1
        sampled = F.grid_sample(maps.flatten(0, 1), grid.flatten(0, 1), align_corners=False)
        sums = (sampled * weights.transpose(1, 2).flatten(0, 1)[:, None]).sum(dim=-1)
        return sums.unflatten(0, (M, self.heads)).permute(0, 3, 1, 2).flatten(2)

    def _offsets_and_weights(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """(..., heads, points, 2), in cells, and (..., heads, points) of queries (..., C)."""
        query = query.to(self.sampling_offsets.weight.dtype)
        offsets = self.sampling_offsets(query).unflatten(-1, (self.heads, self.points, 2))
        weights = self.attention_weights(query).unflatten(-1, (self.heads, self.points))
        return offsets, weights.softmax(dim=-1)


class LevelAttention(nn.Module):
    """The same over maps of several sizes, ``levels``, of the same images: a query's weights are a
    softmax over the points of all of them together. Offsets are in cells of each level's own map.

    Of A anchors, point p is at anchor p mod A; the first offsets are one cell for the first point
    of each anchor, two for the second, and so on.
    """

    def __init__(self, channels: int, heads: int, anchors: int, per_anchor: int, levels: int):
        super().__init__()
        points = anchors * per_anchor
        self.heads, self.points, self.levels = heads, points, levels
        self.value_proj = nn.Linear(channels, channels)
        self.sampling_offsets = nn.Linear(channels, heads * levels * points * 2)
        self.attention_weights = nn.Linear(channels, heads * levels * points)
        nn.init.xavier_uniform_(self.value_proj.weight)
        for module in (self.sampling_offsets, self.attention_weights):
            nn.init.zeros_(module.weight)
        for module in (self.value_proj, self.attention_weights):
            nn.init.zeros_(module.bias)
        star = _star(heads, per_anchor).repeat_interleave(anchors, dim=1)
        star = star[:, None].expand(-1, levels, -1, -1)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(star.flatten())

    def forward(
        self, query: Tensor, values: list[Tensor], centres: Tensor, maps: Tensor, rows: Tensor
    ) -> Tensor:
        """As :meth:`DeformableAttention.forward`: ``values`` (M, h, w, C) of each level, and
        ``centres`` (S, A, 2) in cells of the first."""
        shape = (self.heads, self.levels, self.points)
        projected = [self.value_proj(v).unflatten(-1, (self.heads, -1)) for v in values]
        with torch.autocast(query.device.type, enabled=False):
            query = query.to(self.sampling_offsets.weight.dtype)
            offsets = self.sampling_offsets(query).unflatten(-1, (*shape, 2)).index_select(0, rows)
            weights = self.attention_weights(query).unflatten(-1, (self.heads, -1)).softmax(dim=-1)
            weights = weights.unflatten(-1, shape[1:]).index_select(0, rows)
            centres = centres.repeat(1, self.points // centres.shape[1], 1)
            first = centres.new_tensor(projected[0].shape[2:0:-1])
            sums = []
            for level, value in enumerate(projected):
                there = (centres + 0.5) * (centres.new_tensor(value.shape[2:0:-1]) / first) - 0.5
                positions = there[:, None] + offsets[:, :, level]
                sums.append(deformable_sums(value, maps, positions, weights[:, :, level]))
            return torch.stack(sums).sum(dim=0).flatten(1)


def deformable_sums(values: Tensor, maps: Tensor, positions: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums (S, heads, D) of bilinear samples of ``values`` (M, h, w, heads, D).

    Sampling s reads the map ``maps`` int (S,) at ``positions`` (S, heads, points, 2), which may be
    infinite. In the values' dtype; differentiable by values, positions and ``weights`` (S, heads,
    points).
    """
    _, h, w, heads, D = values.shape
    columns, across = _two_cells(positions[..., 0], w)  # (S, heads, points, 2)
    rows, down = _two_cells(positions[..., 1], h)
    head = torch.arange(heads, dtype=torch.int32, device=values.device)
    rows = rows + maps.to(torch.int32)[:, None, None, None] * h
    cells = rows[..., :, None] * w + columns[..., None, :]
    cells = cells * heads + head[:, None, None, None]
    corners = (weights[..., None] * down)[..., :, None] * across[..., None, :]
    # A bag per sampling and head.
    cells, corners = (x.flatten(2).flatten(0, 1) for x in (cells, corners.to(values)))
    table = values.reshape(-1, D)
    sums = F.embedding_bag(cells, table, mode="sum", per_sample_weights=corners)
    return sums.unflatten(0, (-1, heads))


def _two_cells(position: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The two cells around a position on one axis: int32 (..., 2), and their bilinear weights.

    A cell outside 0..size-1 weighs nothing (and is another one, so that it can be looked up).
    At a whole number the gradient is that towards the next cell, as in ``grid_sample``.
    """
    # Far and infinite positions become ones just outside: no overflow, and no gradient.
    position = position.clamp(-2, size + 1)
    first = position.detach().floor()
    share = position - first
    cells = torch.stack([first, first + 1], dim=-1).to(torch.int32)
    inside = (cells >= 0) & (cells < size)
    return cells.clamp(0, size - 1), torch.stack([1 - share, share], dim=-1) * inside


def _star(heads: int, points: int) -> Tensor:
    """First offsets (heads, points, 2): heads look in different directions, points further out."""
    angle = torch.arange(heads, dtype=torch.float64) * (2 * math.pi / heads)
    direction = torch.stack([angle.cos(), angle.sin()], dim=-1)
    direction = direction / direction.abs().amax(dim=-1, keepdim=True)
    direction[direction.abs() < 1e-12] = 0  # cos(π/2) is not quite: keep whole cells whole
    steps = torch.arange(1, points + 1, dtype=torch.float64)
    return (direction[:, None] * steps[:, None]).float()
