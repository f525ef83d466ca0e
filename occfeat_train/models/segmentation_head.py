"""Segmentation heads on BEV features: Simple-BEV's for vehicles, and one for the map."""

from __future__ import annotations

import torch
from torch import nn

from occfeat_train.models.instance_norm import InstanceNorm


class SegmentationHead(nn.Module):
    """Three branches of conv 3x3, InstanceNorm, ReLU, conv 1x1.

    Simple-BEV's fourth branch, an embedding that no loss reads, is left out.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.mask = _branch(channels, 1)
        self.centre = _branch(channels, 1)
        self.offset = _branch(channels, 2)

    def forward(self, bev: torch.Tensor) -> dict[str, torch.Tensor]:
        """Predict from (B, C, X, Y).

        Returns:
            ``mask`` logits (B, X, Y), ``centre`` (B, X, Y) in 0..1, ``offset`` (B, 2, X, Y) in
            cells.
        """
        return {
            "mask": self.mask(bev).squeeze(1),
            "centre": self.centre(bev).squeeze(1).float().sigmoid(),
            "offset": self.offset(bev),
        }


class MapHead(nn.Module):
    """One such branch with a channel per map class; classes may overlap.

    The paper does not describe its map head.
    """

    def __init__(self, channels: int, n_classes: int):
        super().__init__()
        self.mask = _branch(channels, n_classes)

    def forward(self, bev: torch.Tensor) -> dict[str, torch.Tensor]:
        """Predict from (B, C, X, Y): ``mask`` logits (B, K, X, Y) of K classes."""
        return {"mask": self.mask(bev)}


def _branch(channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        InstanceNorm(),
        nn.ReLU(),
        nn.Conv2d(channels, out_channels, 1),
    )
