"""OccFeat's pretraining head: a BEV map unsplatted to occupancy and features (paper §3.2, §3.3).

The paper's decoder is linear between its two non-linearities, which this module uses. The 1x1
convolution to N_B·Z_B channels and the first 1x1x1 convolution are one matrix per height; the
second 1x1x1 convolution and the occupancy layer are one vector. So the full volume only ever
holds the 2·N_B hidden units, row block by row block, and the N_y-channel branch runs on occupied
voxels alone (1.4 % of the grid). Same parameters and same function as the dense form.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from occfeat_train.models.instance_norm import InstanceNorm

PRIOR = 0.014
"""Share of occupied voxels (measured on nuScenes, default grid): the occupancy bias starts there
so that training does not spend its first steps learning that the world is mostly empty."""
_ROWS = 8192


class OccFeatHead(nn.Module):
    """Occupancy logits of every voxel and features of chosen ones, from BEV features.

    Args:
        channels: N_B, channels of the BEV map.
        heights: Z_B, voxels along z.
        feature_dim: N_y, channels of the teacher.
        occupancy, features: which of the two outputs (the paper's ablation, Table 3).
    """

    def __init__(
        self,
        channels: int,
        heights: int,
        feature_dim: int,
        occupancy: bool = True,
        features: bool = True,
    ):
        super().__init__()
        self.heights = heights
        self.mix = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1), InstanceNorm(), nn.ReLU()
        )
        self.unsplat = nn.Linear(channels, channels * heights)
        self.expand = nn.Linear(channels, 2 * channels)
        self.reduce = nn.Linear(2 * channels, channels)
        self.occupancy = nn.Linear(channels, 1) if occupancy else None
        self.features = nn.Linear(channels, feature_dim) if features else None
        if occupancy:
            nn.init.constant_(self.occupancy.bias, math.log(PRIOR / (1 - PRIOR)))

    def forward(
        self, bev: torch.Tensor, voxel: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Predict.

        Args:
            bev: (B, N_B, X, Y).
            voxel: int64 (V,), voxels whose features are wanted: b·Z·X·Y + the store's index.

        Returns:
            ``(logits, features)``: (B, Z, X, Y) and (V, N_y); None for what is switched off.
        """
        B, C, X, Y = bev.shape
        rows = self.mix(bev).permute(0, 2, 3, 1).reshape(-1, C)  # (B·X·Y, C)
        weight, bias = self._hidden_layer()
        logits = features = None
        if self.occupancy is not None:
            logits = self._logits(rows, weight, bias).view(B, X, Y, self.heights)
            logits = logits.permute(0, 3, 1, 2)
        if self.features is not None:
            features = self.features(self.reduce(self._hidden_at(rows, voxel, X * Y, weight, bias)))
        return logits, features

    def _hidden_layer(self) -> tuple[torch.Tensor, torch.Tensor]:
        """BEV row to hidden units of each height: weight (Z, 2C, C), bias (Z, 2C)."""
        C = self.expand.in_features
        weight = self.expand.weight @ self.unsplat.weight.view(self.heights, C, C)
        bias = self.unsplat.bias.view(self.heights, C) @ self.expand.weight.T + self.expand.bias
        return weight, bias

    def _logits(self, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """Occupancy logits (B·X·Y, Z) of every voxel above BEV rows (B·X·Y, C)."""
        out_weight = self.occupancy.weight @ self.reduce.weight  # (1, 2C)
        out_bias = self.occupancy.weight @ self.reduce.bias + self.occupancy.bias
        # Hidden units are computed again in the backward pass: all at once they would be the
        # largest tensor of the whole network.
        blocks = [
            checkpoint(
                *(_block, block, weight, bias, out_weight),
                use_reentrant=False,
                preserve_rng_state=False,
            )
            for block in rows.split(_ROWS)
        ]
        return torch.cat(blocks) + out_bias

    def _hidden_at(
        self,
        rows: torch.Tensor,
        voxel: torch.Tensor,
        n_columns: int,
        weight: torch.Tensor,
        bias: torch.Tensor,
    ) -> torch.Tensor:
        """Hidden units (V, 2C) of chosen voxels: one matrix product per height."""
        sample = voxel.div(n_columns * self.heights, rounding_mode="floor")
        height = voxel.div(n_columns, rounding_mode="floor") % self.heights
        order = height.argsort(stable=True)
        chosen = rows[(sample * n_columns + voxel % n_columns)[order]]
        counts = torch.bincount(height, minlength=self.heights).tolist()
        hidden = torch.cat(
            [
                F.linear(part, w, b)
                for part, w, b in zip(chosen.split(counts), weight, bias, strict=True)
            ]
        )
        return F.softplus(hidden)[order.argsort()]


def _block(
    rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, out_weight: torch.Tensor
) -> torch.Tensor:
    """(R, C) to logits (R, Z) without the final bias."""
    hidden = F.softplus(F.linear(rows, weight.flatten(0, 1), bias.flatten()))
    return F.linear(hidden.view(len(rows), *bias.shape), out_weight).squeeze(-1)
