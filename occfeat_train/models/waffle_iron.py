"""WaffleIron (Puy et al., ICCV 2023): a lidar network of dense layers alone, plain PyTorch.

Each layer projects all points on one of three planes, whose cells take the mean of theirs, mixes
neighbouring cells by two depthwise convolutions, and gives each point its cell's values back; then
it mixes channels point by point. As in the authors' code but for the layout: points of all clouds
of a batch are rows one after another, with nothing between them. The original pads clouds to one
length, and padding takes part in its batch norms: there a cloud's features depend on its neighbours
in the batch.
"""

from typing import Any

import torch
from torch import Tensor, nn

from occfeat_train.models.lidar_settings import FEATURES, PLANES, LidarSettings

Plane = tuple[Tensor, tuple[int, int, int], Tensor]
"""The cell of each row, int64 (R,), flat; the sizes (B, H, W) of all cells; and how many rows are
in each, at least 1, (B·H·W, 1)."""


class WaffleIron(nn.Module):
    """Rows of lidar points, as ``data.cloud`` makes them, to features of each."""

    def __init__(self, settings: LidarSettings):
        super().__init__()
        self.embedding = Embedding(settings.width)
        self.cells, norm = settings.cells, nn.BatchNorm1d if settings.batch_norm else nn.LayerNorm
        layers = range(settings.depth)
        self.layers = nn.ModuleList(Layer(settings.width, norm, settings.drop_path) for _ in layers)

    def forward(
        self, features: Tensor, neighbours: Tensor, cells: Tensor, n_rows: Tensor
    ) -> Tensor:
        """From ``features`` float32 (R, 5), ``neighbours`` int64 (R, K), ``cells`` int64 (R, 3) and
        ``n_rows`` int64 (B,), see ``data.cloud.CloudWork``: features (R, C)."""
        rows = self.embedding(features, neighbours)
        n_samples = len(n_rows)
        sample = torch.arange(n_samples, device=rows.device).repeat_interleave(n_rows)
        planes = []
        for (a, b), cell in zip(PLANES, cells.unbind(dim=1), strict=True):
            shape = n_samples, self.cells[a], self.cells[b]
            count = torch.bincount(cell, minlength=shape[0] * shape[1] * shape[2])
            planes.append((cell, shape, count.clamp(min=1)[:, None]))
        for i, layer in enumerate(self.layers):
            rows = layer(rows, planes[i % len(planes)], sample)
        return rows

    def in_layers(self) -> list[nn.Module]:
        """Its parts, from the input on: each may learn at a rate of its own."""
        return [self.embedding, *self.layers]


class Embedding(nn.Module):
    """A point by itself and, by the largest of each channel, beside its neighbours."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.BatchNorm1d(FEATURES)
        self.point = nn.Linear(FEATURES, width)
        self.beside = nn.Sequential(
            nn.BatchNorm1d(FEATURES),
            nn.Linear(FEATURES, width, bias=False),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Linear(width, width, bias=False),
        )
        self.merge = nn.Linear(2 * width, width)

    def forward(self, features: Tensor, neighbours: Tensor) -> Tensor:
        """From (R, 5) and int64 (R, K): (R, C)."""
        features = self.norm(features)
        offsets = features[neighbours] - features[:, None]
        beside = self.beside(offsets.flatten(0, 1)).unflatten(0, neighbours.shape).amax(dim=1)
        return self.merge(torch.cat([self.point(features), beside], dim=1))


class Layer(nn.Module):
    """Mixes the cells of one plane, then channels; each adds to what is there."""

    def __init__(self, width: int, norm: Any, drop_path: float):
        super().__init__()
        self.drop_path = drop_path
        self.space_norm, self.channel_norm = norm(width), norm(width)
        convs = [nn.Conv2d(width, width, 3, padding=1, groups=width) for _ in range(2)]
        self.space = nn.Sequential(convs[0], nn.ReLU(), convs[1])
        self.channels = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
        # The authors' scales are 1x1 depthwise convolutions, which begin uniform in -1..1.
        self.space_scale = nn.Parameter(torch.empty(width).uniform_(-1, 1))
        self.channel_scale = nn.Parameter(torch.empty(width).uniform_(-1, 1))

    def forward(self, rows: Tensor, plane: Plane, sample: Tensor) -> Tensor:
        """From rows (R, C), a plane and the sample (R,) of each row: (R, C)."""
        cell, shape, count = plane
        normed = self.space_norm(rows)
        # At least in float32: sums in half precision were the authors' source of instability.
        wide = normed.to(torch.promote_types(normed.dtype, torch.float32))
        mean = wide.new_zeros(len(count), rows.shape[1]).index_add(0, cell, wide) / count
        mixed = self.space(mean.to(normed.dtype).view(*shape, -1).permute(0, 3, 1, 2))
        mixed = mixed.permute(0, 2, 3, 1).flatten(0, 2)[cell]
        rows = rows + self._drop(mixed * self.space_scale.to(mixed.dtype), sample, shape[0])
        mixed = self.channels(self.channel_norm(rows))
        return rows + self._drop(mixed * self.channel_scale.to(mixed.dtype), sample, shape[0])

    def _drop(self, rows: Tensor, sample: Tensor, n_samples: int) -> Tensor:
        """Stochastic depth: in training nothing at all of some samples, more of the others."""
        if not self.training or self.drop_path == 0:
            return rows
        kept = 1 - self.drop_path
        drawn = torch.rand(n_samples, device=rows.device) < kept
        return rows * (drawn.to(rows.dtype) / kept)[sample, None]
