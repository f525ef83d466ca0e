"""What a training step computes beyond the BEV network: targets, head, loss.

An objective is a module with

- ``arrays``: the store's arrays it needs besides images and calibration;
- ``targets(batch, angle)``: its targets, on the device; what is random in them follows from
  ``batch["seed"]``, int64 (B,) on the host, of the frame and epoch;
- ``counts(targets)``: float64 (T,), how many items each loss term is a mean over;
- ``forward(bev, targets, counts, share)``: the loss and the value of each term. ``counts`` are
  those of the whole optimiser step, summed over micro-batches and processes, as plain numbers
  (DDP would copy a tensor to the GPU, and reading it there would wait for the encoder), and
  ``share`` is this micro-batch's part of the step: the losses of all of them add up to the
  step's loss.

One that is evaluated also has

- ``classes``: names of its K masks, and a head that predicts their logits as ``mask``,
  (B, K, X, Y), or (B, X, Y) for a single one;
- ``eval_arrays`` and ``truth(batch)``: the store's masks to compare with, in the ego frame.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from occfeat_targets.store.grid import VoxelGrid
from occfeat_targets.store.schema import StoreError, TargetStore
from occfeat_train import losses
from occfeat_train.config import TrainConfig
from occfeat_train.map_targets import map_targets
from occfeat_train.models.bev_net import BEVNet
from occfeat_train.models.occfeat_head import OccFeatHead
from occfeat_train.models.query_head import QueryHead
from occfeat_train.models.segmentation_head import MapHead, SegmentationHead
from occfeat_train.query_targets import RADIUS_M, query_targets
from occfeat_train.targets import vehicle_targets, voxel_targets

Targets = dict[str, torch.Tensor]


def _divisors(counts: Sequence[float]) -> list[float]:
    """Counts to divide sums by: where there is nothing the sum is 0, and so is the mean."""
    return [max(1.0, float(count)) for count in counts]


class OccFeat(nn.Module):
    """L = L_occ + λ·L_feat (paper eq. 1 to 3), either term may be off."""

    def __init__(self, config: TrainConfig, store: TargetStore):
        """Raises StoreError if features are wanted of a store built without."""
        super().__init__()
        self.grid: VoxelGrid = store.grid
        self.point_step_m: float = store.attrs["point_step_m"]
        self.feature_weight = config.pretrain.feature_weight
        if config.pretrain.features and not store.attrs["teacher"]["dim"]:
            raise StoreError(
                f"{store.url} has no features, it was built with teacher.name=none: build one with "
                "a teacher, or pretrain on occupancy alone (--set pretrain.features=false)"
            )
        turned = config.augment.rotate_bev_deg != 0
        self.arrays: tuple[str, ...] = ("voxel_index", "feature_cameras")
        self.arrays += ("points",) if turned else ()
        if config.pretrain.features:
            self.arrays += ("features", "feature_scale") if turned else ("features",)
        self.head = OccFeatHead(
            config.model.channels,
            self.grid.shape[0],
            store.attrs["teacher"]["dim"],
            config.pretrain.occupancy,
            config.pretrain.features,
        )

    def targets(self, batch: dict[str, torch.Tensor], angle: torch.Tensor) -> Targets:
        """See :func:`voxel_targets`; also ``n_samples``."""
        targets = voxel_targets(batch, angle, self.grid, self.point_step_m)
        return targets | {"n_samples": torch.tensor(len(angle))}

    def counts(self, targets: Targets) -> torch.Tensor:
        """Voxels, and occupied voxels with a feature."""
        n_voxels = targets["n_samples"].item() * self.grid.n_voxels
        return torch.tensor([n_voxels, targets["valid"].sum().item()], dtype=torch.float64)

    def forward(
        self, bev: torch.Tensor, targets: Targets, counts: Sequence[float], share: float
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss and its terms ``occupancy`` and ``features`` for BEV features (B, C, X, Y)."""
        logits, features = self.head(bev, targets["voxel"])
        n_voxels, n_valid = _divisors(counts)
        terms = {}
        loss = bev.new_zeros(())
        if logits is not None:
            terms["occupancy"] = losses.occupancy_sum(logits, targets["voxel"]) / n_voxels
            loss = loss + terms["occupancy"]
        if features is not None:
            summed = losses.cosine_sum(features, targets["features"], targets["valid"])
            terms["features"] = summed / n_valid
            loss = loss + self.feature_weight * terms["features"]
        return loss, terms


class ImgAlso(nn.Module):
    """L = L_occupancy + L_intensity, ALSO's losses on BEV features: the paper's baseline (§4.2)."""

    arrays: tuple[str, ...] = ("points", "ego_T_lidar")

    def __init__(self, config: TrainConfig, store: TargetStore):
        """Raises StoreError if the store has several sweeps, or cells too large for the radius."""
        super().__init__()
        sweeps = store.attrs["config"]["lidar"]["sweeps"]
        if sweeps > 1:
            raise StoreError(
                f"{store.url} accumulates {sweeps} lidar sweeps and says of no point from where it "
                "was seen, which img-also must know: rebuild it with lidar.sweeps=1"
            )
        dx, dy, _ = store.grid.cell_size
        if math.hypot(dx, dy) > 2 * RADIUS_M:
            raise StoreError(
                f"{store.url} has BEV cells of {dx:g} x {dy:g} m, but img-also needs every point "
                f"within {RADIUS_M:g} m of a cell's centre: rebuild it with a finer grid"
            )
        self.grid: VoxelGrid = store.grid
        self.point_step_m: float = store.attrs["point_step_m"]
        self.n_queries = config.pretrain.queries
        self.head = QueryHead(config.model.channels)

    def targets(self, batch: dict[str, torch.Tensor], angle: torch.Tensor) -> Targets:
        """See :func:`query_targets`."""
        return query_targets(batch, angle, self.grid, self.point_step_m, self.n_queries)

    def counts(self, targets: Targets) -> torch.Tensor:
        """Pairs of a query and a cell, and those whose intensity is known."""
        n_known = targets["has_intensity"].sum().item()
        return torch.tensor([len(targets["cell"]), n_known], dtype=torch.float64)

    def forward(
        self, bev: torch.Tensor, targets: Targets, counts: Sequence[float], share: float
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss and its terms ``occupancy`` and ``intensity`` for BEV features (B, C, X, Y)."""
        predicted = self.head(bev, targets["cell"], targets["relative"])
        wanted = (targets[name] for name in ("occupied", "intensity", "has_intensity"))
        occupancy, intensity = losses.query_sums(predicted, *wanted)
        n_pairs, n_known = _divisors(counts)
        terms = {"occupancy": occupancy / n_pairs, "intensity": intensity / n_known}
        return terms["occupancy"] + terms["intensity"], terms


class Segmentation(nn.Module):
    """Vehicle segmentation with Simple-BEV's losses and learned weights (``train_nuscenes.py``).

    10·L_mask·exp(-w₀) + ½·L_centre·exp(-w₁) + ½·L_offset·exp(-w₂) + ½·(w₀ + w₁ + w₂).
    """

    arrays: tuple[str, ...] = ("vehicle_boxes",)
    eval_arrays: tuple[str, ...] = ("vehicle", "vehicle_visible")
    classes: tuple[str, ...] = ("vehicle",)

    def __init__(self, config: TrainConfig, store: TargetStore):
        super().__init__()
        self.grid: VoxelGrid = store.grid
        self.pos_weight = config.finetune.pos_weight
        self.head = SegmentationHead(config.model.channels)
        self.log_weights = nn.Parameter(torch.zeros(3))

    def targets(self, batch: dict[str, torch.Tensor], angle: torch.Tensor) -> Targets:
        """See :func:`vehicle_targets`."""
        return vehicle_targets(batch, angle, self.grid)

    def truth(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Masks uint8 (B, 1, X, Y), and which cells count as visible, (B, X, Y)."""
        return batch["vehicle"][:, None], batch["vehicle_visible"]

    def counts(self, targets: Targets) -> torch.Tensor:
        """Visible cells, cells near and far from a centre, visible vehicle cells."""
        near = targets["centre"] > 0.5
        masks = (targets["visible"], near, ~near, targets["has_offset"])
        return torch.stack([mask.sum() for mask in masks]).double().cpu()

    def forward(
        self, bev: torch.Tensor, targets: Targets, counts: Sequence[float], share: float
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss and its terms ``mask``, ``centre`` and ``offset`` for BEV features (B, C, X, Y)."""
        predicted = self.head(bev)
        n_visible, n_near, n_far, n_offset = _divisors(counts)
        near, far = losses.centre_sums(predicted["centre"], targets["centre"])
        terms = {
            "mask": losses.segmentation_sum(
                predicted["mask"], targets["vehicle"], targets["visible"], self.pos_weight
            )
            / n_visible,
            "centre": 0.5 * (near / n_near + far / n_far),
            "offset": losses.offset_sum(
                predicted["offset"], targets["offset"], targets["has_offset"]
            )
            / n_offset,
        }
        scale = bev.new_tensor([10.0, 0.5, 0.5]).float() * torch.exp(-self.log_weights)
        loss = (scale * torch.stack(list(terms.values()))).sum()
        return loss + share * 0.5 * self.log_weights.sum(), terms


class MapSegmentation(nn.Module):
    """Map segmentation: the mean over classes of the mean binary cross-entropy over cells.

    The paper names the five classes and no loss; this is the vehicles' cross-entropy without
    what only objects have. Classes overlap (a crosswalk lies on a road).
    """

    arrays: tuple[str, ...] = ("map",)
    eval_arrays: tuple[str, ...] = ("map",)

    def __init__(self, config: TrainConfig, store: TargetStore):
        """Raises StoreError if the store was built without a map."""
        super().__init__()
        if not store.attrs["map_classes"]:
            raise StoreError(f"{store.url} has no map: rebuild it with the map expansion")
        self.grid: VoxelGrid = store.grid
        self.classes: tuple[str, ...] = tuple(store.attrs["map_classes"])
        self.pos_weight = config.finetune.map_pos_weight
        self.head = MapHead(config.model.channels, len(self.classes))

    def targets(self, batch: dict[str, torch.Tensor], angle: torch.Tensor) -> Targets:
        """See :func:`map_targets`."""
        return map_targets(batch, angle, self.grid)

    def truth(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Masks uint8 (B, K, X, Y), and (B, X, Y) that all cells count: a map is not hidden."""
        return batch["map"], torch.ones_like(batch["map"][:, 0])

    def counts(self, targets: Targets) -> torch.Tensor:
        """Cells whose map is known, the same for all classes."""
        return targets["known"].sum().double().cpu()[None]

    def forward(
        self, bev: torch.Tensor, targets: Targets, counts: Sequence[float], share: float
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss and its terms, one for each class, for BEV features (B, C, X, Y)."""
        logits = self.head(bev)["mask"]
        (n_known,) = _divisors(counts)
        terms = {}
        for k, name in enumerate(self.classes):
            summed = losses.segmentation_sum(
                logits[:, k], targets["map"][:, k], targets["known"], self.pos_weight
            )
            terms[name] = summed / n_known
        return torch.stack(list(terms.values())).mean(), terms


OBJECTIVES = {
    "occfeat": OccFeat,
    "img-also": ImgAlso,
    "vehicle": Segmentation,
    "map": MapSegmentation,
}
"""By name: pretraining's (:data:`config.PRETRAININGS`) and finetuning's (:data:`config.TASKS`)."""


class Network(nn.Module):
    """What is trained: the BEV network and one objective, as one module for DDP."""

    def __init__(self, config: TrainConfig, objective: nn.Module):
        super().__init__()
        self.bev_net = BEVNet(config.model, objective.grid)
        self.objective = objective
        self.freeze_batch_norm = config.model.freeze_batch_norm
        self.to(memory_format=torch.channels_last)

    def forward(
        self,
        inputs: dict[str, torch.Tensor],
        targets: Targets,
        counts: Sequence[float],
        share: float,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss and terms of a micro-batch, see the module's docstring."""
        return self.objective(self.bev_net(**inputs), targets, counts, share)

    def train(self, mode: bool = True) -> Network:
        """As usual, but frozen batch norms stay in evaluation mode."""
        super().train(mode)
        if self.freeze_batch_norm:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self
