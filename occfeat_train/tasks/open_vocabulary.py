"""Voxels that answer to words: zero-shot segmentation, of a pretraining (POP-3D ``eval.py``).

What is true of a voxel: the class that most lidar returns in it have, ignored ones voting too;
where there is none, it is empty if one of 100 points from the lidar to a return lies in it; else
unknown, and not counted. Predicted is empty, or the class of the prompt whose vector has the
largest product with the voxel's feature as it is. Two protocols:

- ``pop3d``: the network's occupancy and features. Its rows ``chance`` are what the same occupancy
  would get if classes were drawn evenly among those of the texts: of expected counts.
- ``looked-up``: no network: the store's voxels, their class by the teacher's own features. What no
  camera sees has no answer and is wrong. It is what a network could reach by learning its targets.

The mean is over 16 classes and empty. A class without a true voxel is left out of it, and the
headline says of how many it is (POP-3D's code counts such a class as IoU 1).
"""

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from occfeat_targets.store.files import StoreError, file_sha256
from occfeat_targets.store.grid import VoxelGrid
from occfeat_targets.store.reader import TargetStore
from occfeat_targets.store.semantics import CLASSES, IGNORED, class_numbers, majority
from occfeat_targets.store.settings import ConfigError, Settings, did_you_mean
from occfeat_targets.store.texts import Texts
from occfeat_train.distributed import all_reduce_sum
from occfeat_train.geometry import flat_index
from occfeat_train.objectives.base import Batch
from occfeat_train.objectives.occfeat import OccFeatHead
from occfeat_train.objectives.pop3d import feature_head
from occfeat_train.tasks.base import Task, as_text

EMPTY = len(CLASSES)
"""The number of what is no class: free space."""
SAMPLES = 100
"""Points along a ray."""


class OpenVocabularySettings(Settings):
    """What voxels are asked."""

    texts: str = ""
    """File of ``occfeat-targets text``."""


class OpenVocabulary(Task):
    """Evaluation of a network that learned occupancy and a teacher's features."""

    Settings = OpenVocabularySettings
    settings: OpenVocabularySettings
    arrays = ()
    eval_arrays = (
        *("voxel_index", "feature_cameras", "features", "feature_scale"),
        *("points", "lidarseg", "ego_T_lidar"),
    )
    protocols = ("pop3d", "looked-up")
    finetuned = False
    beside: ClassVar[dict[str, str]] = {
        "chance": "pop3d, chance, mean with empty",
        "looked up": "looked-up, mean with empty",
        "16 classes": "pop3d, mean of classes",
        "16 classes, chance": "pop3d, chance, mean of classes",
        "16 classes, looked up": "looked-up, mean of classes",
    }
    head: OccFeatHead
    texts: Tensor
    class_of_text: Tensor

    def __init__(
        self, settings: OpenVocabularySettings, store: TargetStore, channels: int, turned: bool
    ):
        """Raises StoreError: the store has no features or no classes of returns, or the texts are
        of another space; ConfigError: they are of other classes."""
        super().__init__(settings, store, channels, turned)
        self.head = feature_head(store, channels)
        if "lidarseg" not in store.specs:
            raise StoreError(
                f"{store.url} has no classes of lidar returns: rebuild it with --set "
                "'outputs={lidarseg: {}}', of a dataroot with nuScenes-lidarseg"
            )
        self.point_step_m: float = store.attrs["point_step_m"]
        self.class_numbers = class_numbers(store.attrs["lidarseg_classes"])
        texts = Texts.load(Path(settings.texts))
        texts.require_space_of(store)
        self.source = texts.source
        for name in texts.class_names:
            if name not in CLASSES:
                known = did_you_mean(name, [*CLASSES])
                raise ConfigError(
                    f"{settings.texts}: {name!r:.200} is none of the classes ({known})"
                )
        numbers = [[*CLASSES].index(texts.class_names[c]) for c in texts.classes]
        self.register_buffer("texts", torch.from_numpy(texts.embeddings), persistent=False)
        self.register_buffer("class_of_text", torch.tensor(numbers), persistent=False)
        self.counted = f" of voxels; {texts.source}"
        self._last: tuple[Batch, Tensor] | None = None

    def classes_of(self, features: Tensor) -> Tensor:
        """Class numbers int64 (V,) of features (V, C)."""
        with torch.autocast(features.device.type, enabled=False):  # likenesses are close together
            return self.class_of_text[(features.float() @ self.texts.T).argmax(dim=1)]

    def predict(self, bev: Tensor) -> Tensor:
        """Class number or :data:`EMPTY` of each voxel: int64 (B·Z·X·Y,)."""
        opened = self.head.open(bev)
        occupied = (self.head.logits(opened) > 0).flatten().nonzero()[:, 0]
        found = torch.full((len(bev) * self.grid.n_voxels,), EMPTY, device=bev.device)
        found[occupied] = self.classes_of(self.head.features_of(opened, occupied))
        return found

    def look_up(self, batch: Batch) -> Tensor:
        """The same by the store's features; ``IGNORED`` where no camera sees an occupied voxel."""
        voxel, seen = batch["voxel"].long(), batch["feature_cameras"].bool()
        found = voxel.new_full((len(batch["n_voxels"]) * self.grid.n_voxels,), EMPTY)
        found[voxel] = IGNORED
        # A feature's scale changes no maximum.
        found[voxel[seen]] = self.classes_of(batch["features"][seen])
        return found

    def truth(self, batch: Batch) -> Tensor:
        """What is true of each voxel, ``IGNORED`` if unknown: int64 (B·Z·X·Y,). Of the same batch,
        which each protocol's meter asks for, it is computed once."""
        if self._last is None or self._last[0] is not batch:
            self._last = batch, self._truth(batch)
        return self._last[1]

    def _truth(self, batch: Batch) -> Tensor:
        xyz = batch["points"][:, :3].double() * self.point_step_m
        classes = self.class_numbers[batch["lidarseg"].cpu().numpy()]
        ends = batch["n_points"].cumsum(0).tolist()
        frames = []
        for start, end, sensor in zip([0, *ends], ends, batch["ego_T_lidar"], strict=False):
            frame = slice(start, end)
            frames.append(frame_truth(xyz[frame], classes[frame], sensor[:3, 3], self.grid))
        return torch.cat(frames)

    def meter(self, device: torch.device, protocol: str) -> "VoxelMeter":
        """IoU by class, over the whole split."""
        return VoxelMeter(self, device, protocol)

    def remarks(self) -> dict[str, Any]:
        """``texts``: what made them, and which file it was."""
        return {"texts": {"source": self.source, "sha256": file_sha256(Path(self.settings.texts))}}

    @classmethod
    def table(cls, rows: dict[str, Any]) -> list[list[str]]:
        """Lines of cells: a class each."""
        lines = [["protocol, class", "IoU", "voxels"]]
        return lines + [[name, as_text(r["iou"]), f"{r['voxels']:,}"] for name, r in rows.items()]


def frame_truth(xyz: Tensor, classes: np.ndarray, sensor: Tensor, grid: VoxelGrid) -> Tensor:
    """What is true of the voxels of a frame: its class number, :data:`EMPTY`, or ``IGNORED``,
    int64 (Z·X·Y,). Of returns float64 (P, 3), metres, ego, their classes (P,), and the lidar's
    place (3,); rays to returns outside of the grid say nothing."""
    index, inside = flat_index(xyz, grid)
    index, rays = index[inside], xyz[inside] - sensor
    truth = torch.full((grid.n_voxels,), IGNORED, device=xyz.device)
    for share in torch.linspace(0, 1, SAMPLES, dtype=torch.float64).tolist():
        passed, within = flat_index(sensor + share * rays, grid)
        truth[passed[within]] = EMPTY
    voxel, which = index.unique(return_inverse=True)
    most = majority(which.cpu().numpy(), classes[inside.cpu().numpy()], len(voxel))
    truth[voxel] = torch.from_numpy(most.astype(np.int64)).to(truth.device)
    return truth


class VoxelMeter:
    """Counts true against predicted classes of known voxels, in whole numbers."""

    def __init__(self, task: OpenVocabulary, device: torch.device, protocol: str):
        self.task, self.protocol = task, protocol
        n = EMPTY + 1
        self.confusion = torch.zeros(n, n + 1, dtype=torch.int64, device=device)
        """[true, predicted]; in the last column what has no answer."""

    def add(self, batch: Batch, predicted: Tensor) -> None:
        """Count a batch on the device; ``predicted`` as of :meth:`OpenVocabulary.predict`."""
        truth = self.task.truth(batch)
        found = predicted if self.protocol == "pop3d" else self.task.look_up(batch)
        n, known = EMPTY + 1, truth != IGNORED
        pairs = truth[known] * (n + 1) + found[known].clamp(max=n)
        self.confusion += torch.bincount(pairs, minlength=n * (n + 1)).view(n, n + 1)

    def result(self) -> dict[str, Any]:
        """See ``tasks.base.Meter``: a row for each class, ``iou`` None without a voxel of it; for
        ``empty``; the means over all and over the 16 alone; ``occupied`` against empty; and, if it
        is of a network, ``chance``."""
        confusion = all_reduce_sum(self.confusion.double()).cpu().numpy()
        true, ious = confusion.sum(axis=1), intersection_over_union(confusion)
        names = [*CLASSES, "empty"]
        rows = {
            name: {"iou": iou, "voxels": int(n)}
            for name, iou, n in zip(names, ious, true, strict=True)
        }
        known = [iou for iou in ious if iou is not None]
        mean = mean_of(ious)
        rows["mean with empty"] = {"iou": mean, "voxels": int(true.sum())}
        rows["mean of classes"] = {"iou": mean_of(ious[:EMPTY]), "voxels": int(true[:EMPTY].sum())}
        rows["occupied"] = occupied_row(confusion)
        if self.protocol == "pop3d":
            chances = intersection_over_union(self._by_chance(confusion))
            for name, part in (("mean with empty", chances), ("mean of classes", chances[:EMPTY])):
                rows[f"chance, {name}"] = {"iou": mean_of(part), "voxels": rows[name]["voxels"]}
        name = f"mean of {len(known)} of {len(names)} classes"
        return {"rows": rows, "headline": {"name": name, "iou": mean}}

    def _by_chance(self, confusion: np.ndarray) -> np.ndarray:
        """Expected counts if what is predicted as occupied had an even chance of each class."""
        possible = self.task.class_of_text.unique().cpu().numpy()
        expected = confusion.copy()
        expected[:, :EMPTY] = 0
        expected[:, possible] = confusion[:, :EMPTY].sum(axis=1, keepdims=True) / len(possible)
        return expected


def intersection_over_union(confusion: np.ndarray) -> list[float | None]:
    """Of each class, per cent, of counts [true, predicted]; None of one that is nowhere true."""
    n = len(confusion)
    right, true = confusion.diagonal(), confusion.sum(axis=1)
    union = true + confusion.sum(axis=0)[:n] - right
    return [float(100 * r / u) if t else None for r, u, t in zip(right, union, true, strict=True)]


def mean_of(ious: list[float | None]) -> float | None:
    """Over those that are defined."""
    known = [iou for iou in ious if iou is not None]
    return float(np.mean(known)) if known else None


def occupied_row(confusion: np.ndarray) -> dict[str, Any]:
    """Of all classes as one, against empty."""
    right = confusion[:EMPTY].sum() - confusion[:EMPTY, EMPTY].sum()
    union = confusion.sum() - confusion[EMPTY, EMPTY]
    true = confusion[:EMPTY].sum()
    return {"iou": float(100 * right / union) if true else None, "voxels": int(true)}
