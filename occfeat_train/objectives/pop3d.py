"""POP-3D (Vobecky et al., NeurIPS 2023): voxels that are free or occupied and carry features in the
space of CLIP's texts, learned from images without a label.

L = L_occ + L_feat. L_occ is the cross-entropy of all voxels, a voxel without a return being free,
plus Lovász-softmax of both classes (POP3D ``train.py``; its two logits are one here, their
difference). L_feat is the squared error of CLIP's features as they are, not of unit length, the
mean over pairs and channels. A pair is a lidar return and a camera that sees it, so that a return
in two cameras counts twice; its feature is predicted where the return is, between voxels. That
takes the teacher's ``tokens``; of a store without, a pair is an occupied voxel, at its centre.

Unlike there: the features come from a BEV network's volume (``model.lift=tpv`` is nearest to
theirs), the teacher is MaskCLIP itself, not a network distilled from it, and returns beyond the
grid are left out in place of moved to its border.
"""

from collections.abc import Sequence

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from occfeat_targets.store.files import StoreError
from occfeat_targets.store.reader import TargetStore
from occfeat_targets.store.settings import Settings
from occfeat_train.geometry import flat_index, rotation_z
from occfeat_train.objectives.base import (
    Batch,
    Dots,
    Loss,
    Objective,
    Panel,
    Targets,
    Volume,
    divisors,
)
from occfeat_train.objectives.lovasz import lovasz_softmax
from occfeat_train.objectives.occfeat import OccFeatHead, occupancy_sum, voxel_targets
from occfeat_train.objectives.pairs import sample_tokens, seen_from


class Pop3dSettings(Settings):
    """How its terms are weighed."""

    lovasz_weight: float = Field(default=1.0, ge=0)
    """Of Lovász-softmax beside the cross-entropy."""
    feature_weight: float = Field(default=1.0, ge=0)
    """Of the features beside occupancy."""


class Pop3d(Objective):
    """L = cross-entropy + Lovász-softmax + squared error of features."""

    Settings = Pop3dSettings
    settings: Pop3dSettings
    head: OccFeatHead
    predicts_features = True

    def __init__(self, settings: Pop3dSettings, store: TargetStore, channels: int, turned: bool):
        """Raises StoreError: the store has no features; or the BEV is turned, and it has no tokens,
        without which a turned voxel has none."""
        super().__init__(settings, store, channels, turned)
        self.point_step_m: float = store.attrs["point_step_m"]
        self.image_hw: tuple[int, int] = tuple(store.attrs["config"]["images"]["size"])
        self.arrays = ("voxel_index", "feature_cameras")
        self.at_points = "tokens" in store.specs
        if self.at_points:
            self.arrays += ("points", "tokens", "token_scale")
        elif turned:
            raise StoreError(
                f"{store.url} has no tokens of a teacher, so pop3d can't turn its BEV frame: set "
                "augment.rotate_bev_deg=0, or rebuild it with --set 'outputs={tokens: {}}'"
            )
        else:
            self.arrays += ("features", "feature_scale")
        self.head = feature_head(store, channels)

    @classmethod
    def zero_shot(cls, settings: Settings) -> str:
        """Voxels that answer to words."""
        return "open-vocabulary"

    def targets(self, batch: Batch, angle: Tensor) -> Targets:
        """``voxel`` int64 (V,), flat indices of the occupied ones; and of M pairs ``sample`` int64
        (M,), ``place`` float32 (M, 3), in voxels as of ``OccFeatHead.features_at``, and
        ``feature`` float32 (M, C); also ``n_samples``."""
        occupancy = {k: v for k, v in batch.items() if k != "features"}
        targets = voxel_targets(occupancy, angle, self.grid, self.point_step_m)
        found = self._at_points(batch, angle) if self.at_points else self._at_voxels(batch)
        names = ("sample", "place", "feature")
        targets = {"voxel": targets["voxel"], "n_samples": torch.tensor(len(angle))}
        return targets | dict(zip(names, found, strict=True))

    def _at_points(self, batch: Batch, angle: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        counts = batch["n_points"]
        sample = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
        xyz_ego = batch["points"][:, :3].float() * self.point_step_m
        bev_T_ego = rotation_z(angle).to(xyz_ego.device)[:, :3, :3]
        with torch.autocast(xyz_ego.device.type, enabled=False):
            xyz_bev = torch.einsum("pij,pj->pi", bev_T_ego[sample], xyz_ego)
        _, inside = flat_index(xyz_bev, self.grid)
        pairs = seen_from(xyz_ego, sample, batch, self.image_hw, inside[:, None])
        feature = sample_tokens(batch["tokens"], batch["token_scale"], pairs.image, pairs.place)
        lower, size = (xyz_bev.new_tensor(a) for a in (self.grid.lower, self.grid.cell_size))
        place = (xyz_bev[pairs.row] - lower) / size - 0.5
        return sample[pairs.row], place[:, [2, 0, 1]], feature

    def _at_voxels(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        valid = batch["feature_cameras"].bool()
        sample, *place = unravel(batch["voxel"].long()[valid], self.grid.shape)
        feature = batch["features"][valid].float() * batch["feature_scale"][valid, None].float()
        return sample, torch.stack(place, dim=1).float(), feature

    def counts(self, targets: Targets) -> Tensor:
        """Voxels, and pairs."""
        n_voxels = targets["n_samples"].item() * self.grid.n_voxels
        return torch.tensor([n_voxels, len(targets["sample"])], dtype=torch.float64)

    def forward(self, bev: Tensor, targets: Targets, counts: Sequence[float], share: float) -> Loss:
        """Terms ``occupancy``; ``lovasz``, of the micro-batch alone: it is no mean over items; and
        ``features``."""
        opened = self.head.open(bev)
        logits = self.head.logits(opened).float()
        predicted = self.head.features_at(opened, targets["sample"], targets["place"]).float()
        n_voxels, n_pairs = divisors(counts)
        occupied = logits.new_zeros(logits.numel(), dtype=torch.int64)
        occupied[targets["voxel"]] = 1
        p = logits.flatten().sigmoid()
        error = (predicted - targets["feature"]).square().sum()
        terms = {
            "occupancy": occupancy_sum(logits, targets["voxel"]) / n_voxels,
            "lovasz": share * lovasz_softmax(torch.stack([1 - p, p], dim=1), occupied),
            "features": error / (n_pairs * predicted.shape[1]),
        }
        loss = terms["occupancy"] + self.settings.lovasz_weight * terms["lovasz"]
        return loss + self.settings.feature_weight * terms["features"], terms

    def dots(self, bev: Tensor, batch: Batch) -> Dots:
        """Each pair where it is, by the teacher's feature and by ours."""
        targets = self.targets(batch, torch.zeros(1))
        opened = self.head.open(bev)
        predicted = self.head.features_at(opened, targets["sample"], targets["place"])
        place = targets["place"][:, [1, 2, 0]].cpu().numpy()
        xyz = self.grid.lower + (place + 0.5) * self.grid.cell_size
        pair = targets["feature"], predicted
        return Dots(xyz, *(self.paint(f.float().cpu().numpy()) for f in pair))

    def panels(self, bev: Tensor, batch: Batch) -> list[Panel]:
        """From above: whether any voxel of a column is occupied, and the highest feature in it."""
        occupied = np.zeros(self.grid.shape)
        occupied.ravel()[batch["voxel"].cpu().numpy()] = 1
        probability = self.head.logits(self.head.open(bev))[0].float().sigmoid().cpu().numpy()
        seen = Panel("occupancy", occupied.max(axis=0), probability.max(axis=0))
        return [seen, self.dots(bev, batch).panel(self.paint.title, self.grid)]

    def volume(self, bev: Tensor, batch: Batch) -> Volume:
        """Occupied voxels; predicted are those of probability above 0.5, by their feature."""
        logits, _ = self.head(bev, batch["voxel"].long()[:0])
        chosen = (logits[0].flatten() > 0).nonzero()[:, 0]
        colours = self.paint(self.head(bev, chosen)[1].float().cpu().numpy())
        true = batch["voxel"].cpu().numpy()
        return Volume((true, None), (chosen.cpu().numpy(), colours))


def feature_head(store: TargetStore, channels: int) -> OccFeatHead:
    """What predicts occupancy and features of a store's teacher. StoreError: it has none."""
    if not (dim := store.attrs["teacher"]["dim"]):
        raise StoreError(f"{store.url} has no features: build one with a CLIP, --teacher DIR")
    return OccFeatHead(channels, store.grid.shape[0], dim)


def unravel(index: Tensor, shape: tuple[int, int, int]) -> tuple[Tensor, ...]:
    """Sample, and place along each axis, of flat indices in volumes of one shape."""
    rest, found = index, []
    for size in reversed(shape):
        found.append(rest % size)
        rest = rest.div(size, rounding_mode="floor")
    return rest, *reversed(found)
