"""Vehicle segmentation, with Simple-BEV's targets, heads, losses and learned weights.

10·L_mask·exp(-w₀) + ½·L_centre·exp(-w₁) + ½·L_offset·exp(-w₂) + ½·(w₀ + w₁ + w₂), as in its
``train_nuscenes.py``. Where vehicles are, which cells count and what offsets are from follows one
of two protocols (``tasks.vehicle.protocol``), and both are evaluated:

- ``ego``, ours: the BEV is centred on ego. A cell belongs to a vehicle if its centre lies in the
  footprint. Where a visible and a hidden box overlap, the visible one wins: the cell counts, and
  learns the visible one's offset. Offsets are from a vehicle's centre as it is.
- ``simple-bev``, of the published numbers: the BEV is centred on a camera and as tilted as that one
  is, on the front camera in evaluation, on a random one in training. Corners are truncated to whole
  cells and the border is filled too, see ``simple_bev``. Every cell of a hidden box is left out.
  The last box of a cell has its offset, from its centre rounded to a whole cell. (There it is also
  doubled, by the code that brings it to the BEV map; here not.)
"""

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from occfeat_targets.store.grid import VoxelGrid
from occfeat_targets.store.reader import TargetStore
from occfeat_targets.store.schema import INVISIBLE
from occfeat_targets.store.settings import Settings
from occfeat_train.objectives.base import Batch, Loss, Targets, divisors
from occfeat_train.tasks import simple_bev
from occfeat_train.tasks.masks import Branches, MaskTask, iou_rows, segmentation_sum

CENTRE_SIGMA = 3.0
"""Width of the Gaussian around a vehicle's centre, in cells (Simple-BEV)."""
CENTRE_FLOOR = 1e-3


class VehicleSettings(Settings):
    """Of its labels and loss."""

    protocol: Literal["ego", "simple-bev"] = "ego"
    """Where vehicles are and which cells count, in training and in the one IoU of a result. Of
    ``simple-bev``, training takes a random camera's frame in place of ``augment.rotate_bev_deg``,
    the front camera's if that is 0."""
    pos_weight: float = Field(default=2.13, gt=0)
    """Weight of vehicle cells in the cross-entropy (Simple-BEV, from Lift-Splat)."""


class VehicleSegmentation(MaskTask):
    """Where vehicles are; with and without the cells where only those of visibility 0-40 % lie."""

    Settings = VehicleSettings
    settings: VehicleSettings
    arrays = ("boxes", "box_class")
    eval_arrays = ("vehicle", "vehicle_visible", "boxes", "box_class")
    protocols = ("ego", "simple-bev")
    classes = ("vehicle",)
    heading = "cells"
    headline = ("visible", "visible cells")
    _is_vehicle: Tensor

    def __init__(self, settings: VehicleSettings, store: TargetStore, channels: int, turned: bool):
        super().__init__(settings, store, channels, turned)
        vehicles = store.attrs["vehicle_classes"]
        is_vehicle = torch.tensor([name in vehicles for name in store.attrs["box_classes"]]).bool()
        self.register_buffer("_is_vehicle", is_vehicle, persistent=False)
        self.labelled, self.turned = len(vehicles) > 0, turned
        self.head = SegmentationHead(channels)
        self.log_weights = nn.Parameter(torch.zeros(3))

    def bev_frame(self, batch: Batch, protocol: str) -> Tensor | None:
        """Of ``simple-bev`` a camera's: a random one's in training, if that turns the BEV."""
        if protocol == "ego":
            return None
        cam_T_ego = batch["cam_T_ego"]
        if self.turned and "seed" in batch:
            camera = simple_bev.drawn_camera(batch["seed"], cam_T_ego.shape[1])
        else:
            camera = simple_bev.front_camera(cam_T_ego)
        return simple_bev.camera_frame(cam_T_ego, camera)

    def targets(self, batch: Batch, angle: Tensor) -> Targets:
        """See :func:`vehicle_targets` and :func:`simple_bev_targets`, by protocol."""
        return self._targets(batch, angle, self.protocol)

    def _targets(self, batch: Batch, angle: Tensor, protocol: str) -> Targets:
        chosen, n_boxes = self._is_vehicle[batch["box_class"].long()], batch["n_boxes"]
        sample = torch.arange(len(n_boxes), device=n_boxes.device).repeat_interleave(n_boxes)
        n_vehicles = torch.bincount(sample[chosen], minlength=len(n_boxes))
        frame, boxes = self.bev_frame(batch, protocol), batch["boxes"][chosen]
        if frame is not None:
            return simple_bev_targets(boxes, n_vehicles, frame, self.grid)
        return vehicle_targets(boxes, n_vehicles, angle, self.grid)

    def truth(self, batch: Batch, protocol: str) -> tuple[Tensor, Tensor]:
        """Masks uint8 (B, 1, X, Y), and which cells count as visible, (B, X, Y)."""
        if protocol == "ego":
            return batch["vehicle"][:, None], batch["vehicle_visible"]
        targets = self._targets(batch, torch.zeros(len(batch["n_boxes"])), protocol)
        return targets["vehicle"].to(torch.uint8)[:, None], targets["visible"]

    def rows(self, counts: Tensor) -> dict[str, dict]:
        """``visible`` and ``all``, by which cells count."""
        return iou_rows(("visible", "all"), counts[0])

    def counts(self, targets: Targets) -> Tensor:
        """Visible cells, cells near and far from a centre, visible vehicle cells."""
        near = targets["centre"] > 0.5
        masks = (targets["visible"], near, ~near, targets["has_offset"])
        return torch.stack([mask.sum() for mask in masks]).double().cpu()

    def forward(self, bev: Tensor, targets: Targets, counts: Sequence[float], share: float) -> Loss:
        """Terms ``mask``, ``centre`` and ``offset``."""
        predicted = self.head(bev)
        n_visible, n_near, n_far, n_offset = divisors(counts)
        truth = targets["vehicle"], targets["visible"]
        mask = segmentation_sum(predicted["mask"], *truth, self.settings.pos_weight)
        near, far = centre_sums(predicted["centre"], targets["centre"])
        offset = offset_sum(predicted["offset"], targets["offset"], targets["has_offset"])
        centre = 0.5 * (near / n_near + far / n_far)
        terms = {"mask": mask / n_visible, "centre": centre, "offset": offset / n_offset}
        scale = bev.new_tensor([10.0, 0.5, 0.5]).float() * torch.exp(-self.log_weights)
        loss = (scale * torch.stack(list(terms.values()))).sum()
        return loss + share * 0.5 * self.log_weights.sum(), terms


def vehicle_targets(boxes: Tensor, counts: Tensor, angle: Tensor, grid: VoxelGrid) -> Targets:
    """Vehicle mask, validity, centre heat map and offsets, in the BEV frame.

    Of vehicles float32 (M, 8), as the store's ``boxes``, sample by sample; ``counts`` int64 (B,),
    how many each sample has; ``angle`` as in :meth:`Objective.targets`.

    Returns ``vehicle`` float (B, X, Y); ``visible`` bool (B, X, Y), False where only vehicles of
    visibility 0-40 % lie; ``centre`` float (B, X, Y) in 0..1; ``offset`` float (B, 2, X, Y), cell
    minus vehicle centre in cells; ``has_offset`` bool (B, X, Y).

    All by the protocol ``ego``.
    """
    turn = angle.to(boxes.device).repeat_interleave(counts)
    (cos, sin), (x, y) = (turn.cos(), turn.sin()), boxes[:, :2].unbind(1)
    boxes = boxes.clone()
    boxes[:, 0], boxes[:, 1] = cos * x - sin * y, sin * x + cos * y
    boxes[:, 6] += turn
    return _stacked([_vehicle_maps(b, grid) for b in boxes.split(counts.tolist())])


def simple_bev_targets(
    boxes: Tensor, counts: Tensor, ego_T_bev: Tensor, grid: VoxelGrid
) -> Targets:
    """As :func:`vehicle_targets`, by the protocol ``simple-bev`` in its frames (B, 4, 4):
    ``visible`` is False wherever a vehicle of visibility 0-40 % lies."""
    samples = zip(boxes.split(counts.tolist()), ego_T_bev, strict=True)
    return _stacked([_simple_bev_maps(b, frame, grid) for b, frame in samples])


def _stacked(samples: list[dict[str, Tensor]]) -> Targets:
    targets = {name: torch.stack([s[name] for s in samples]) for name in samples[0]}
    targets["has_offset"] = (targets["vehicle"] > 0) & targets["visible"]
    return targets


def _vehicle_maps(boxes: Tensor, grid: VoxelGrid) -> dict[str, Tensor]:
    """Maps (X, Y) of one sample's boxes (M, 8)."""
    if len(boxes) == 0:
        return _nothing(boxes, grid)
    x, y = (torch.from_numpy(c).float().to(boxes.device) for c in grid.bev_centres())
    (dx, dy, _), (lo_x, lo_y, _) = grid.cell_size, grid.lower
    inside = _footprints(boxes, x, y)
    seen = boxes[:, 7] != INVISIBLE
    is_seen = (inside & seen[:, None, None]).any(dim=0)
    is_unseen = (inside & ~seen[:, None, None]).any(dim=0)
    # Centres in cells, where a whole number is a cell's centre.
    u, v = (boxes[:, 0] - lo_x) / dx - 0.5, (boxes[:, 1] - lo_y) / dy - 0.5
    # Whose offset a cell learns: the first visible vehicle that covers it.
    owner = (inside * (1 + seen.int())[:, None, None]).argmax(dim=0)
    return {
        "vehicle": (is_seen | is_unseen).float(),
        "visible": is_seen | ~is_unseen,
        "centre": _heat(u, v, grid),
        "offset": _offset(u[owner], v[owner]) * (is_seen | is_unseen),
    }


def _simple_bev_maps(boxes: Tensor, ego_T_bev: Tensor, grid: VoxelGrid) -> dict[str, Tensor]:
    """Maps (X, Y) of one sample's boxes (M, 8), seen from a camera."""
    if len(boxes) == 0:
        return _nothing(boxes, grid)
    inside, centres = simple_bev.footprints(boxes, ego_T_bev, grid)
    hidden = boxes[:, 7] == INVISIBLE
    order = torch.arange(1, len(boxes) + 1, device=boxes.device)[:, None, None]
    last = (inside * order).argmax(dim=0)
    u, v = centres.round().unbind(1)
    vehicle = inside.any(dim=0)
    return {
        "vehicle": vehicle.float(),
        "visible": ~(inside & hidden[:, None, None]).any(dim=0),
        "centre": _heat(u, v, grid),
        "offset": _offset(u[last], v[last]) * vehicle,
    }


def _nothing(boxes: Tensor, grid: VoxelGrid) -> dict[str, Tensor]:
    """Maps of no boxes."""
    empty = boxes.new_zeros(grid.bev_shape)
    none = {"vehicle": empty, "centre": empty, "visible": torch.ones_like(empty).bool()}
    return none | {"offset": torch.stack([empty, empty])}


def _heat(u: Tensor, v: Tensor, grid: VoxelGrid) -> Tensor:
    """A Gaussian around each centre (M,), rounded to a cell, and the largest of them: (X, Y)."""
    i, j = (torch.arange(n, device=u.device, dtype=torch.float32) for n in grid.bev_shape)
    to_u, to_v = i - u.round()[:, None], j - v.round()[:, None]  # (M, X), (M, Y)
    scale = -0.5 / CENTRE_SIGMA**2
    heat = ((to_u**2 * scale).exp()[:, :, None] * (to_v**2 * scale).exp()[:, None]).amax(dim=0)
    return torch.where(heat < CENTRE_FLOOR, 0.0, heat)


def _offset(u: Tensor, v: Tensor) -> Tensor:
    """Cell minus what it is from, (X, Y) each, in cells: (2, X, Y)."""
    i, j = (torch.arange(n, device=u.device, dtype=torch.float32) for n in u.shape)
    return torch.stack([i[:, None] - u, j - v])


def _footprints(boxes: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Which cell centres lie in which box on the ground plane: bool (M, X, Y)."""
    cos, sin = boxes[:, 6].cos()[:, None, None], boxes[:, 6].sin()[:, None, None]
    to_x = x[:, None] - boxes[:, 0, None, None]
    to_y = y - boxes[:, 1, None, None]
    along, across = cos * to_x + sin * to_y, cos * to_y - sin * to_x
    half = boxes[:, 3:5, None, None] / 2
    return (along.abs() <= half[:, 0]) & (across.abs() <= half[:, 1])


class SegmentationHead(Branches):
    """Simple-BEV's, without its fourth branch, an embedding that no loss reads."""

    def __init__(self, channels: int):
        super().__init__(channels, mask=1, centre=1, offset=2)

    def forward(self, bev: Tensor) -> dict[str, Tensor]:
        """``mask`` logits (B, X, Y), ``centre`` (B, X, Y) in 0..1, ``offset`` (B, 2, X, Y), cells.
        Of BEV features (B, C, X, Y)."""
        predicted = super().forward(bev)
        mask, centre = (predicted[name].squeeze(1) for name in ("mask", "centre"))
        return predicted | {"mask": mask, "centre": centre.float().sigmoid()}


def centre_sums(predicted: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Squared error of the centre heat map, (B, X, Y), summed where the target is above and
    below one half (Simple-BEV's balanced MSE is half the sum of the two means)."""
    error = (predicted.float() - target).square()
    positive = target > 0.5
    return (error * positive).sum(), (error * ~positive).sum()


def offset_sum(predicted: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """L1 error of the offsets (B, 2, X, Y), both components, summed over ``mask`` (B, X, Y)."""
    return ((predicted.float() - target).abs().sum(dim=1) * mask).sum()
