"""OccFeat: predict which voxels are occupied and the teacher's features in them (paper §3).

The paper's decoder is linear between its two non-linearities, which the head uses. The 1x1
convolution to N_B·Z_B channels and the first 1x1x1 convolution are one matrix per height; the
second 1x1x1 convolution and the occupancy layer are one vector. So the full volume only ever
holds the 2·N_B hidden units, row block by row block, and the N_y-channel branch runs on occupied
voxels alone (1.4 % of the grid). Same parameters and same function as the dense form.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, Self, cast

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from occfeat_targets.store.colours import from_above
from occfeat_targets.store.files import StoreError
from occfeat_targets.store.grid import VoxelGrid
from occfeat_targets.store.reader import TargetStore
from occfeat_targets.store.settings import Settings
from occfeat_train.geometry import flat_index, neighbours, rotation_z
from occfeat_train.models.instance_norm import InstanceNorm
from occfeat_train.objectives.base import Batch, Loss, Objective, Panel, Targets, Volume, divisors

PRIOR = 0.014
"""Share of occupied voxels (measured on nuScenes, default grid): the occupancy bias starts there
so that training does not spend its first steps learning that the world is mostly empty."""
_ROWS = 8192


class OccFeatSettings(Settings):
    """Which of the two losses, and how they are weighed."""

    occupancy: bool = True
    """Use L_occ."""
    features: bool = True
    """Use L_feat."""
    feature_weight: float = Field(default=0.01, ge=0)
    """λ of L = L_occ + λ·L_feat."""

    @model_validator(mode="after")
    def _learns_something(self) -> Self:
        if not (self.occupancy or self.features):
            raise ValueError("objectives.occfeat: occupancy or features must be true")
        return self


class OccFeat(Objective):
    """L = L_occ + λ·L_feat (paper eq. 1 to 3), either term may be off."""

    Settings = OccFeatSettings
    settings: OccFeatSettings

    def __init__(self, settings: OccFeatSettings, store: TargetStore, channels: int, turned: bool):
        """Raises StoreError if features are wanted of a store built without."""
        super().__init__(settings, store, channels, turned)
        self.point_step_m: float = store.attrs["point_step_m"]
        dim = store.attrs["teacher"]["dim"]
        if settings.features and not dim:
            raise StoreError(
                f"{store.url} has no features, it was built with teacher.name=none: build one "
                "with a teacher, or pretrain on occupancy alone (--set "
                "objectives.occfeat.features=false)"
            )
        self.predicts_features = settings.features
        self.arrays = ("voxel_index", "feature_cameras")
        self.arrays += ("points",) if turned else ()
        if settings.features:
            self.arrays += ("features", "feature_scale") if turned else ("features",)
        heights = self.grid.shape[0]
        self.head = OccFeatHead(channels, heights, dim, settings.occupancy, settings.features)

    @classmethod
    def zero_shot(cls, settings: OccFeatSettings) -> str:
        """As POP-3D, if it learned both; its head is the same."""
        return "open-vocabulary" if settings.occupancy and settings.features else ""

    def targets(self, batch: Batch, angle: Tensor) -> Targets:
        """See :func:`voxel_targets`; also ``n_samples``."""
        targets = voxel_targets(batch, angle, self.grid, self.point_step_m)
        return targets | {"n_samples": torch.tensor(len(angle))}

    def counts(self, targets: Targets) -> Tensor:
        """Voxels, and occupied voxels with a feature."""
        n_voxels = targets["n_samples"].item() * self.grid.n_voxels
        return torch.tensor([n_voxels, targets["valid"].sum().item()], dtype=torch.float64)

    def forward(self, bev: Tensor, targets: Targets, counts: Sequence[float], share: float) -> Loss:
        """Terms ``occupancy`` and ``features``."""
        logits, features = self.head(bev, targets["voxel"])
        n_voxels, n_valid = divisors(counts)
        terms = {}
        loss = bev.new_zeros(())
        if logits is not None:
            terms["occupancy"] = occupancy_sum(logits, targets["voxel"]) / n_voxels
            loss = loss + terms["occupancy"]
        if features is not None:
            similar = cosine_sum(features, targets["features"], targets["valid"])
            terms["features"] = similar / n_valid
            loss = loss + self.settings.feature_weight * terms["features"]
        return loss, terms

    def panels(self, bev: Tensor, batch: Batch) -> list[Panel]:
        """From above: whether any voxel of a column is occupied, and the highest feature in it."""
        targets = self.targets(batch, torch.zeros(1))
        logits, features = self.head(bev, targets["voxel"])
        voxel = targets["voxel"].cpu().numpy()
        panels = []
        if logits is not None:
            occupied = np.zeros(self.grid.shape)
            occupied.ravel()[voxel] = 1
            probability = logits[0].float().sigmoid().cpu().numpy()
            panels.append(Panel("occupancy", occupied.max(axis=0), probability.max(axis=0)))
        if features is not None:
            valid = targets["valid"].cpu().numpy()
            wanted, got = (f.float().cpu().numpy()[valid] for f in (targets["features"], features))
            true, predicted = (
                from_above(self.grid, voxel[valid], self.paint(f)) for f in (wanted, got)
            )
            panels.append(Panel(self.paint.title, true, predicted))
        return panels

    def volume(self, bev: Tensor, batch: Batch) -> Volume:
        """Occupied voxels by their feature; predicted are those of probability above 0.5, and the
        occupied ones if occupancy is not learned."""
        targets = self.targets(batch, torch.zeros(1))
        voxel = targets["voxel"]
        logits, _ = self.head(bev, voxel)
        chosen = voxel if logits is None else (logits[0].flatten() > 0).nonzero()[:, 0]
        colours = (None, None)
        if self.settings.features:
            pair = targets["features"] * targets["valid"][:, None], self.head(bev, chosen)[1]
            colours = (self.paint(features.float().cpu().numpy()) for features in pair)
        true = voxel.cpu().numpy()
        index = (true, true if chosen is voxel else chosen.cpu().numpy())
        return Volume(*zip(index, colours, strict=True))


def voxel_targets(batch: Batch, angle: Tensor, grid: VoxelGrid, point_step_m: float) -> Targets:
    """Occupied voxels and their feature targets.

    From collated ``voxel`` (V,), ``feature_cameras`` (V,), ``features`` int8 (V, C) unless only
    occupancy is learned, and, if any ``angle`` (as in :meth:`Objective.targets`) is not 0,
    ``points``, ``n_points`` and, with the features, ``feature_scale``; the store's grid and step.

    Returns ``voxel`` int64 (V',), distinct flat indices over the batch; ``valid`` bool (V',), that
    have a feature target; if there are any, ``features`` (V', C), whose direction is the target.
    """
    voxel = batch["voxel"].long()
    valid = batch["feature_cameras"].bool()  # uint16, with more than 8 cameras, has no comparison
    if not angle.any():
        targets = {"voxel": voxel, "valid": valid}
        return targets | ({"features": batch["features"]} if "features" in batch else {})
    old, new = _moved_points(batch, angle, grid, point_step_m)
    new_voxel, row = new.unique(return_inverse=True)
    # A point's features are those of the voxel it came from. Rounding to the stored step moves a
    # few points out of their voxel, and points outside the stored grid have none.
    source = torch.searchsorted(voxel, old)
    known = (F.pad(voxel, (0, 1), value=-2)[source] == old) & F.pad(valid, (0, 1))[source]
    n = len(voxel) + 1
    pair, count = (row[known] * n + source[known]).unique(return_counts=True)
    row, source = pair.div(n, rounding_mode="floor"), pair % n
    n_sources = torch.bincount(row, minlength=len(new_voxel))
    targets = {"voxel": new_voxel, "valid": n_sources > 0}
    if "features" not in batch:
        return targets
    features = batch["features"].float() * batch["feature_scale"].float()[:, None]
    start, weights = n_sources.cumsum(0) - n_sources, count.float()
    summed = F.embedding_bag(source, features, start, mode="sum", per_sample_weights=weights)
    return targets | {"features": summed}


def _moved_points(
    batch: Batch, angle: Tensor, grid: VoxelGrid, point_step_m: float
) -> tuple[Tensor, Tensor]:
    """Old (-1: outside) and new voxel, flat over the batch, of the points the new grid holds."""
    counts = batch["n_points"]
    sample = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    xyz_ego = batch["points"][:, :3].float() * point_step_m
    bev_T_ego = rotation_z(angle).to(xyz_ego.device)[:, :3, :3]
    xyz_bev = torch.einsum("pij,pj->pi", bev_T_ego[sample], xyz_ego)
    old, was_inside = flat_index(xyz_ego, grid)
    new, inside = flat_index(xyz_bev, grid)
    old = torch.where(was_inside, old + sample * grid.n_voxels, -1)
    return old[inside], (new + sample * grid.n_voxels)[inside]


class OccFeatHead(nn.Module):
    """Occupancy logits of every voxel and features of chosen ones, from BEV features (§3.2, §3.3).

    N_B ``channels``, Z_B ``heights``, N_y = ``feature_dim``; either output may be off (Table 3).
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
        conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.mix = nn.Sequential(conv, InstanceNorm(), nn.ReLU())
        self.unsplat = nn.Linear(channels, channels * heights)
        self.expand = nn.Linear(channels, 2 * channels)
        self.reduce = nn.Linear(2 * channels, channels)
        self.occupancy = nn.Linear(channels, 1) if occupancy else None
        self.features = nn.Linear(channels, feature_dim) if features else None
        if self.occupancy:
            nn.init.constant_(self.occupancy.bias, math.log(PRIOR / (1 - PRIOR)))

    def forward(self, bev: Tensor, voxel: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Logits (B, Z, X, Y) and features (V, N_y), None for what is off; ``bev`` (B, N_B, X, Y).
        ``voxel`` int64 (V,) says whose features are wanted: b·Z·X·Y + the store's index."""
        opened = self.open(bev)
        logits = self.logits(opened) if self.occupancy else None
        return logits, self.features_of(opened, voxel) if self.features else None

    def open(self, bev: Tensor) -> "Opened":
        """What all that is predicted from BEV features (B, N_B, X, Y) begins with."""
        C = bev.shape[1]
        rows = self.mix(bev).permute(0, 2, 3, 1).reshape(-1, C)  # (B·X·Y, C)
        # From such a row to the hidden units of each height: (Z, 2C, C) and (Z, 2C).
        weight = self.expand.weight @ self.unsplat.weight.view(self.heights, C, C)
        bias = self.unsplat.bias.view(self.heights, C) @ self.expand.weight.T + self.expand.bias
        return Opened(rows, weight, bias, (bev.shape[-2], bev.shape[-1]))

    def logits(self, opened: "Opened") -> Tensor:
        """Of being occupied, of all voxels: (B, Z, X, Y)."""
        rows, weight, bias, (X, Y) = opened
        out = cast(nn.Linear, self.occupancy)
        out_weight = out.weight @ self.reduce.weight  # (1, 2C)
        out_bias = out.weight @ self.reduce.bias + out.bias
        # Hidden units are computed again in the backward pass: all at once they would be the
        # largest tensor of the whole network.
        again = partial(checkpoint, _block, use_reentrant=False, preserve_rng_state=False)
        blocks = [again(block, weight, bias, out_weight) for block in rows.split(_ROWS)]
        return (torch.cat(blocks) + out_bias).view(-1, X, Y, self.heights).permute(0, 3, 1, 2)

    def features_of(self, opened: "Opened", voxel: Tensor) -> Tensor:
        """Features (V, N_y) of voxels, as of :meth:`forward`."""
        (X, Y), last = opened.bev_shape, cast(nn.Module, self.features)
        sample = voxel.div(X * Y * self.heights, rounding_mode="floor")
        height = voxel.div(X * Y, rounding_mode="floor") % self.heights
        cell = sample * (X * Y) + voxel % (X * Y)
        entered, back = opened.enter(height, lambda order: opened.rows[cell[order]])
        return last(self.reduce(F.softplus(entered)[back]))

    def features_at(self, opened: "Opened", sample: Tensor, place: Tensor) -> Tensor:
        """Features (M, N_y) between voxels, of the samples int64 (M,): the volume is interpolated
        linearly between their centres, and constant beyond the outermost. ``place`` float (M, 3)
        is in voxels along (Z, X, Y), 0 at the centre of the first."""
        rows, _, _, (X, Y) = opened
        (z, z_next, up), (x, x_next, ahead), (y, y_next, left) = (
            neighbours(place[:, axis], size) for axis, size in enumerate((self.heights, X, Y))
        )
        found = rows.new_zeros(len(place), rows.shape[1])
        for ix, share_x in ((x, 1 - ahead), (x_next, ahead)):
            for iy, share_y in ((y, 1 - left), (y_next, left)):
                found = found + rows[(sample * X + ix) * Y + iy] * (share_x * share_y)[:, None]
        low, high = (
            entered[back]
            for entered, back in (opened.enter(h, found.__getitem__) for h in (z, z_next))
        )
        hidden = F.softplus(low * (1 - up)[:, None] + high * up[:, None])
        return cast(nn.Module, self.features)(self.reduce(hidden))


class Opened(NamedTuple):
    """BEV features, and what makes hidden units of each height of them."""

    rows: Tensor
    """(B·X·Y, C)."""
    weight: Tensor
    """(Z, 2C, C)."""
    bias: Tensor
    """(Z, 2C)."""
    bev_shape: tuple[int, int]

    def enter(self, height: Tensor, rows_of: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Hidden units (M, 2C), before their activation, of M items: one matrix product per height,
        so they are sorted by it; and int64 (M,), where each is. ``rows_of`` gives rows by order."""
        order = height.argsort(stable=True)
        counts = torch.bincount(height, minlength=len(self.weight)).tolist()
        parts = zip(rows_of(order).split(counts), self.weight, self.bias, strict=True)
        return torch.cat([F.linear(*part) for part in parts]), order.argsort()


def _block(rows: Tensor, weight: Tensor, bias: Tensor, out_weight: Tensor) -> Tensor:
    """(R, C) to logits (R, Z) without the final bias."""
    hidden = F.softplus(F.linear(rows, weight.flatten(0, 1), bias.flatten()))
    return F.linear(hidden.view(len(rows), *bias.shape), out_weight).squeeze(-1)


def occupancy_sum(logits: Tensor, voxel: Tensor) -> Tensor:
    """Binary cross-entropy summed over all voxels (paper eq. 2, before 1/|V|). Of logits (B, Z, X,
    Y); ``voxel`` int64 (V,), distinct flat indices of the occupied ones."""
    logits = logits.float().flatten()
    # BCE(l, t) = softplus(l) - t·l; the occupied ones are few
    return F.softplus(logits).sum() - logits[voxel].sum()


def cosine_sum(predicted: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Negative cosine similarity summed over valid voxels (paper eq. 3, before 1/|V_occ|). Of
    features (V, C); ``valid`` bool (V,), voxels that some camera sees."""
    cosine = F.cosine_similarity(predicted.float(), target.float(), dim=1)
    return -(cosine * valid).sum()
