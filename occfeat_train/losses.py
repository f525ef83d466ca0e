"""Loss terms, each as a sum over what counts; ``objectives`` says how many that are.

A step may be split over micro-batches and processes. Sums add up and so do counts, so every term
is the mean over the whole batch however it was split (a mean of means would not be).
"""

from __future__ import annotations

import torch
from torch.nn import functional as F


def occupancy_sum(logits: torch.Tensor, voxel: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy summed over all voxels (paper eq. 2, before 1/|V|).

    Args:
        logits: (B, Z, X, Y).
        voxel: int64 (V,), distinct flat indices of the occupied voxels of the batch.
    """
    logits = logits.float().flatten()
    # BCE(l, t) = softplus(l) - t·l; the occupied ones are few
    return F.softplus(logits).sum() - logits[voxel].sum()


def cosine_sum(predicted: torch.Tensor, target: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Negative cosine similarity summed over valid voxels (paper eq. 3, before 1/|V_occ|).

    Args:
        predicted: (V, C).
        target: (V, C); only its direction matters.
        valid: bool (V,), voxels that some camera sees.
    """
    cosine = F.cosine_similarity(predicted.float(), target.float(), dim=1)
    return -(cosine * valid).sum()


def query_sums(
    predicted: torch.Tensor,
    occupied: torch.Tensor,
    intensity: torch.Tensor,
    has_intensity: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Binary cross-entropy of occupancy summed over all pairs, and absolute error of intensity
    summed over those with one (ALSO).

    Args:
        predicted: (M, 2), logit and intensity.
        occupied: float (M,), 0 or 1.
        intensity: float (M,).
        has_intensity: bool (M,).
    """
    logits, brightness = predicted.float().unbind(dim=1)
    occupancy = F.binary_cross_entropy_with_logits(logits, occupied, reduction="sum")
    return occupancy, ((brightness - intensity).abs() * has_intensity).sum()


def segmentation_sum(
    logits: torch.Tensor, target: torch.Tensor, valid: torch.Tensor, pos_weight: float
) -> torch.Tensor:
    """Weighted binary cross-entropy summed over valid cells; all float (B, X, Y)."""
    logits = logits.float()
    weight = logits.new_tensor(pos_weight)
    loss = F.binary_cross_entropy_with_logits(logits, target, pos_weight=weight, reduction="none")
    return (loss * valid).sum()


def centre_sums(predicted: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared error of the centre heat map, (B, X, Y), summed where the target is above and
    below one half (Simple-BEV's balanced MSE is half the sum of the two means)."""
    error = (predicted.float() - target).square()
    positive = target > 0.5
    return (error * positive).sum(), (error * ~positive).sum()


def offset_sum(predicted: torch.Tensor, target: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """L1 error of the offsets (B, 2, X, Y), both components, summed over ``mask`` (B, X, Y)."""
    return ((predicted.float() - target).abs().sum(dim=1) * mask).sum()
