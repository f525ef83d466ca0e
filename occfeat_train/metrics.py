"""Intersection over union as whole numbers: counts over the split, summed over processes."""

from __future__ import annotations

import numpy as np
import torch

from occfeat_targets.store.grid import VoxelGrid
from occfeat_train.distributed import all_reduce_sum

THRESHOLDS = (0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65)
"""BEVFusion's; 0.5 is the headline."""
HEADLINE = THRESHOLDS.index(0.5)
RANGES_M = (20.0, 35.0, 50.0)
"""Edges of the distance rings around ego in which IoU is also given."""


class IoUCounter:
    """True positives, false positives and false negatives of the BEV masks of K classes.

    Counts are kept for each class and ring of distance, with and without hidden cells (where only
    vehicles of visibility 0-40 % lie), at each threshold. A cell is positive if its probability is
    above the threshold (Simple-BEV rounds the probability, which is the same at 0.5).
    """

    def __init__(self, grid: VoxelGrid, device: torch.device, n_classes: int = 1):
        x, y = grid.bev_centres()
        distance = np.hypot(x[:, None], y[None, :])
        self.ring = torch.from_numpy(np.digitize(distance, RANGES_M)).to(device)
        self.classes = torch.arange(n_classes, device=device)[:, None, None]
        # [class, visible, ring, target, number of thresholds exceeded]
        shape = (n_classes, 2, len(RANGES_M) + 1, 2, len(THRESHOLDS) + 1)
        self.histogram = torch.zeros(shape, dtype=torch.int64, device=device)
        self.thresholds = torch.tensor(THRESHOLDS, device=device)

    def add(self, probability: torch.Tensor, target: torch.Tensor, visible: torch.Tensor) -> None:
        """Count a batch: probability float and target 0 or 1, (B, K, X, Y); visible (B, X, Y)."""
        exceeded = torch.bucketize(probability.float().contiguous(), self.thresholds)
        axes = (self.classes, visible.long()[:, None], self.ring, target.long(), exceeded)
        index = torch.zeros_like(exceeded)
        for values, n in zip(axes, self.histogram.shape, strict=True):
            index = index * n + values
        counts = torch.bincount(index.flatten(), minlength=self.histogram.numel())
        self.histogram += counts.view_as(self.histogram)

    def counts(self) -> torch.Tensor:
        """int64 (K, 2, R, T, 3) over all processes.

        Axes: class; visible cells only, all cells; ring of distance (the last is beyond the last
        edge); threshold; true positives, false positives, false negatives.
        """
        hidden, visible = all_reduce_sum(self.histogram.clone()).cpu().unbind(dim=1)
        histogram = torch.stack([visible, hidden + visible], dim=1)
        # Positives at threshold t are the cells that exceed at least t + 1 thresholds.
        positive = histogram.flip(-1).cumsum(-1).flip(-1)[..., 1:]
        true_positive, false_positive = positive[..., 1, :], positive[..., 0, :]
        false_negative = histogram[..., 1, :].sum(-1, keepdim=True) - true_positive
        return torch.stack([true_positive, false_positive, false_negative], dim=-1)


def iou(counts: torch.Tensor) -> torch.Tensor:
    """TP / (TP + FP + FN) of counts (..., 3) as float64 (...,); NaN where all are 0."""
    counts = counts.double()
    return counts[..., 0] / counts.sum(-1)
