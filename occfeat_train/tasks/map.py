"""Map segmentation: the mean over classes of the mean binary cross-entropy over cells.

The paper names the classes, and neither loss nor head; these are the vehicles' without what only
objects have. Classes overlap (a crosswalk lies on a road).

The store has the map in the ego frame only. Polygons are not stored, so where the frame is turned
a cell takes the value of the stored cell that holds its centre.
"""

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from occfeat_targets.store.files import StoreError
from occfeat_targets.store.grid import VoxelGrid
from occfeat_targets.store.reader import TargetStore
from occfeat_targets.store.settings import Settings
from occfeat_train.geometry import flat_index, rotation_z
from occfeat_train.objectives.base import Batch, Loss, Targets, divisors
from occfeat_train.tasks.masks import Branches, MaskTask, iou_rows, mean_row, segmentation_sum


class MapSettings(Settings):
    """Of its loss."""

    pos_weight: float = Field(default=1.0, gt=0)
    """Weight of a class's cells in the cross-entropy (the paper names none)."""


class MapSegmentation(MaskTask):
    """The classes of the store's map: road, sidewalk, crosswalk, parking, divider in nuScenes.

    Protocols: ``ego``, and ``devkit`` where the store has the output ``map_devkit``, whose masks of
    the same classes it scores against in the same BEV frame. It is trained on ``map`` alone.
    """

    Settings = MapSettings
    settings: MapSettings
    arrays = eval_arrays = ("map",)
    heading = "class"
    headline = ("mean", "mean of classes")

    def __init__(self, settings: MapSettings, store: TargetStore, channels: int, turned: bool):
        """Raises StoreError if the store was built without a map."""
        super().__init__(settings, store, channels, turned)
        if not store.attrs["map_classes"]:
            raise StoreError(f"{store.url} has no map: rebuild it with the map expansion")
        if "map_devkit" in store.attrs["arrays"]:
            self.protocols, self.eval_arrays = ("ego", "devkit"), ("map", "map_devkit")
        self.classes = tuple(store.attrs["map_classes"])
        self.head = Branches(channels, mask=len(self.classes))

    def targets(self, batch: Batch, angle: Tensor) -> Targets:
        """See :func:`map_targets`."""
        return map_targets(batch, angle, self.grid)

    def truth(self, batch: Batch, protocol: str) -> tuple[Tensor, Tensor]:
        """Masks uint8 (B, K, X, Y), and (B, X, Y) that all cells count: a map is not hidden."""
        masks = batch["map" if protocol == "ego" else "map_devkit"]
        return masks, torch.ones_like(masks[:, 0])

    def rows(self, counts: Tensor) -> dict[str, dict]:
        """Each class, and ``mean`` over those of which IoU is defined."""
        return iou_rows(self.classes, counts[:, 1]) | {"mean": mean_row(counts[:, 1])}

    def counts(self, targets: Targets) -> Tensor:
        """Cells whose map is known, the same for all classes."""
        return targets["known"].sum().double().cpu()[None]

    def forward(self, bev: Tensor, targets: Targets, counts: Sequence[float], share: float) -> Loss:
        """A term for each class."""
        logits, known, weight = self.head(bev)["mask"], targets["known"], self.settings.pos_weight
        (n_known,) = divisors(counts)
        terms = {}
        for k, name in enumerate(self.classes):
            summed = segmentation_sum(logits[:, k], targets["map"][:, k], known, weight)
            terms[name] = summed / n_known
        return torch.stack(list(terms.values())).mean(), terms


def map_targets(batch: Batch, angle: Tensor, grid: VoxelGrid) -> Targets:
    """Map masks in the BEV frame, and where they are known.

    From collated ``map`` uint8 (B, K, X, Y), 0 or 1, in the ego frame: ``map`` float (B, K, X, Y),
    0 where it is not known; ``known`` bool (B, X, Y), False for cells whose centre lies outside of
    the stored map. ``angle`` as in :meth:`Objective.targets`.
    """
    stored = batch["map"]
    if not angle.any():
        return {"map": stored.float(), "known": torch.ones_like(stored[:, 0], dtype=torch.bool)}
    axes = [torch.from_numpy(axis).to(stored.device) for axis in grid.bev_centres()]
    xy_bev = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
    # In float64: in float32 a centre near the edge between two cells may fall to the wrong side.
    ego_T_bev = rotation_z(-angle.to(stored.device).double())[:, :2, :2]
    xy_ego = torch.einsum("bij,xyj->bxyi", ego_T_bev, xy_bev)
    # At the volume's lower bound, because flat indices of the lowest layer are those of the BEV.
    z = torch.full_like(xy_ego[..., :1], grid.z[0])
    index, known = flat_index(torch.cat([xy_ego, z], dim=-1).reshape(-1, 3), grid)
    source = torch.where(known, index, 0).view(len(angle), 1, -1)  # stored cell of each cell
    known = known.view(len(angle), *grid.bev_shape)
    moved = stored.flatten(2).gather(2, source.expand(-1, stored.shape[1], -1)).view_as(stored)
    return {"map": (moved * known[:, None]).float(), "known": known}
