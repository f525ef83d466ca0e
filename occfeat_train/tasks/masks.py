"""What tasks of BEV masks share: a head's branch, the loss, the IoU meter, the picture.

IoU comes from whole numbers: counts over the split, summed over processes.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from occfeat_targets.store.grid import VoxelGrid
from occfeat_train.distributed import all_reduce_sum
from occfeat_train.models.instance_norm import InstanceNorm
from occfeat_train.objectives.base import Batch, Panel
from occfeat_train.tasks.base import Meter, Task, as_text

THRESHOLDS = (0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65)
"""BEVFusion's; 0.5 is the headline."""
HEADLINE = THRESHOLDS.index(0.5)
_CELLS = "true_positive, false_positive, false_negative"
RANGES_M = (20.0, 35.0, 50.0)
"""Edges of the distance rings around the BEV frame's origin in which IoU is also given."""
_EDGES = [f"{edge:g}" for edge in (0, *RANGES_M)]
_RINGS = [*(f"{a}-{b} m" for a, b in pairwise(_EDGES)), f"> {_EDGES[-1]} m"]


class MaskTask(Task):
    """A task whose head gives the logits of K masks as ``mask``: (B, K, X, Y), (B, X, Y) of one."""

    classes: tuple[str, ...]
    """Names of the masks."""
    heading: ClassVar[str]
    """Of the first column of its table."""
    headline: ClassVar[tuple[str, str]]
    """The row that is the headline, and what to call that."""
    labelled: bool = True
    """Whether the store has labels of it."""

    def truth(self, batch: Batch, protocol: str) -> tuple[Tensor, Tensor]:
        """Masks uint8 (B, K, X, Y) by a protocol, in its BEV frame, and which cells are not hidden,
        (B, X, Y)."""
        raise NotImplementedError

    def rows(self, counts: Tensor) -> dict[str, dict[str, Any]]:
        """What is reported of :meth:`IoUCounter.counts`; see :func:`iou_rows`."""
        raise NotImplementedError

    def probability(self, predicted: dict[str, Tensor]) -> Tensor:
        """Of each mask, float32 (B, K, X, Y), from what its head gives."""
        probability = predicted["mask"].float().sigmoid()
        return probability.reshape(-1, len(self.classes), *probability.shape[-2:])

    def meter(self, device: torch.device, protocol: str) -> Meter:
        """IoU at probability 0.5, by distance, and at the best threshold."""
        return MaskMeter(self, device, protocol)

    def panels(self, bev: Tensor, batch: Batch) -> list[Panel]:
        """Each class; a target that does not count (hidden) is darker."""
        target, visible = self.truth(batch, self.protocol)
        probability = self.probability(self.predict(bev))[0].cpu().numpy()
        shown = (target * torch.where(visible.bool(), 1.0, 0.4)[:, None])[0].cpu().numpy()
        remark = "" if bool(visible.all()) else " (purple: hardly visible)"
        targets = shown if self.labelled else [None] * len(self.classes)
        titles = [f"{name}, {self.protocol}" for name in self.classes]
        drawn = zip(titles, targets, probability, strict=True)
        return [Panel(*each, remark) for each in drawn]

    @classmethod
    def table(cls, rows: dict[str, Any]) -> list[list[str]]:
        """Lines of cells: a row each."""
        lines = [[f"protocol, {cls.heading}", "all ranges", *_RINGS, "best threshold"]]
        for name, values in rows.items():
            best, threshold = values["best"]["iou"], values["best"]["threshold"]
            at = "" if threshold is None else f" at {threshold}"
            cells = [values["iou"], *values["by_range"].values()]
            lines.append([name, *map(as_text, cells), as_text(best) + at])
        return lines


class MaskMeter:
    """Counts of a :class:`MaskTask` over a split."""

    def __init__(self, task: MaskTask, device: torch.device, protocol: str):
        self.task, self.protocol = task, protocol
        self.counter = IoUCounter(task.grid, device, len(task.classes))

    def add(self, batch: Batch, predicted: dict[str, Tensor]) -> None:
        """Count a batch on the device."""
        target, visible = self.task.truth(batch, self.protocol)
        self.counter.add(self.task.probability(predicted), target, visible)

    def result(self) -> dict[str, Any]:
        """See :class:`tasks.base.Meter`; rows as of :func:`iou_rows`."""
        rows = self.task.rows(self.counter.counts())
        row, name = self.task.headline
        return {"rows": rows, "headline": {"name": name, "iou": rows[row]["iou"]}}


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

    def add(self, probability: Tensor, target: Tensor, visible: Tensor) -> None:
        """Count a batch: probability float and target 0 or 1, (B, K, X, Y); visible (B, X, Y)."""
        exceeded = torch.bucketize(probability.float().contiguous(), self.thresholds)
        axes = (self.classes, visible.long()[:, None], self.ring, target.long(), exceeded)
        index = torch.zeros_like(exceeded)
        for values, n in zip(axes, self.histogram.shape, strict=True):
            index = index * n + values
        counts = torch.bincount(index.flatten(), minlength=self.histogram.numel())
        self.histogram += counts.view_as(self.histogram)

    def counts(self) -> Tensor:
        """int64 (K, 2, R, T, 3) over all processes: class; visible cells only, all cells; ring (the
        last is beyond the last edge); threshold; true and false positives, false negatives."""
        hidden, visible = all_reduce_sum(self.histogram.clone()).cpu().unbind(dim=1)
        histogram = torch.stack([visible, hidden + visible], dim=1)
        # Positives at threshold t are the cells that exceed at least t + 1 thresholds.
        positive = histogram.flip(-1).cumsum(-1).flip(-1)[..., 1:]
        true_positive, false_positive = positive[..., 1, :], positive[..., 0, :]
        false_negative = histogram[..., 1, :].sum(-1, keepdim=True) - true_positive
        return torch.stack([true_positive, false_positive, false_negative], dim=-1)


def iou(counts: Tensor) -> Tensor:
    """TP / (TP + FP + FN) of counts (..., 3) as float64 (...,); NaN where all are 0."""
    counts = counts.double()
    return counts[..., 0] / counts.sum(-1)


def iou_rows(names: Sequence[str], counts: Tensor) -> dict[str, dict[str, Any]]:
    """IoU in per cent, None where undefined, a row for each of n names; ``counts`` are int64
    (n, R, T, 3), as of :meth:`IoUCounter.counts`."""
    rows = {}
    for name, row, *scores in zip(names, counts, *_scores(counts), strict=True):
        by_range, by_threshold, best = scores
        at = None if best.isnan() else THRESHOLDS[by_threshold.tolist().index(best.item())]
        headline = row.sum(dim=0)[HEADLINE].tolist()
        rows[name] = _row(by_range, by_threshold, best, at) | {_CELLS: headline}
    return rows


def mean_row(counts: Tensor) -> dict[str, Any]:
    """The mean over the n classes of which IoU is defined; counts as of :func:`iou_rows`. Its best
    is BEVFusion's mean over classes of the maximum over thresholds."""
    by_range, by_threshold, best = (values.nanmean(dim=0) for values in _scores(counts))
    return _row(by_range, by_threshold, best)


def _scores(counts: Tensor) -> tuple[Tensor, ...]:
    """IoU float64 at 0.5 by range (n, R), by threshold (n, T), and the best (n,)."""
    by_range, by_threshold = iou(counts[:, :, HEADLINE]), iou(counts.sum(dim=1))
    best = by_threshold.nan_to_num(-1).amax(dim=1)
    return by_range, by_threshold, best.masked_fill(best < 0, torch.nan)


def _row(
    by_range: Tensor, by_threshold: Tensor, best: Tensor, best_threshold: float | None = None
) -> dict[str, Any]:
    """From IoU as of :func:`_scores` of one class."""
    return {
        "iou": _percent(by_threshold[HEADLINE]),
        "by_range": dict(zip(_RINGS, map(_percent, by_range), strict=True)),
        "by_threshold": dict(zip(map(str, THRESHOLDS), map(_percent, by_threshold), strict=True)),
        "best": {"iou": _percent(best), "threshold": best_threshold},
    }


def _percent(value: Tensor) -> float | None:
    return None if value.isnan() else round(100 * value.item(), 2)


def segmentation_sum(logits: Tensor, target: Tensor, valid: Tensor, pos_weight: float) -> Tensor:
    """Weighted binary cross-entropy summed over valid cells; all float (B, X, Y)."""
    logits = logits.float()
    weight = logits.new_tensor(pos_weight)
    loss = F.binary_cross_entropy_with_logits(logits, target, pos_weight=weight, reduction="none")
    return (loss * valid).sum()


class Branches(nn.ModuleDict):
    """A head of branches of a name and so many channels: conv 3x3, InstanceNorm, ReLU, conv 1x1."""

    def __init__(self, channels: int, **out_channels: int):
        super().__init__()
        for name, out in out_channels.items():
            mix = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
            self[name] = nn.Sequential(mix, InstanceNorm(), nn.ReLU(), nn.Conv2d(channels, out, 1))

    def forward(self, bev: Tensor) -> dict[str, Tensor]:
        """What each branch makes of (B, C, X, Y), by name."""
        return {name: branch(bev) for name, branch in self.items()}
