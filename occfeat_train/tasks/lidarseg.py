"""Lidar segmentation: the class of each return (nuScenes-lidarseg's 16), as ScaLR finetunes and
probes for it: batch norm and a linear layer that begins at zero, cross-entropy plus Lovász-softmax.

A prediction of each row goes to the returns that are nearest to it, so that every stored return
counts. The store leaves out returns on the ego car and beyond its reach. Two protocols, from the
same counts:

- ``stored``: IoU over all stored returns. The originals score all returns of a file.
- ``all-returns``: returns left out count as missed, which they can't have been in the originals:
  a lower bound.

A class that no return of the split has is left out of the mean, and the headline says of how many
classes it is (SLidR's code counts such a class as IoU 1).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from occfeat_targets.store.files import StoreError
from occfeat_targets.store.reader import TargetStore
from occfeat_targets.store.semantics import (
    CLASSES,
    COLOURS,
    IGNORED,
    class_numbers,
    colours_of,
)
from occfeat_targets.store.settings import Settings
from occfeat_train.distributed import all_reduce_sum
from occfeat_train.objectives.base import Batch, Dots, Loss, Panel, Targets, divisors
from occfeat_train.objectives.lovasz import lovasz_softmax
from occfeat_train.tasks.base import Task, as_text


class LidarSegmentation(Task):
    """L = cross-entropy + Lovász-softmax over the labelled rows."""

    sensor = "lidar"
    arrays = ("lidarseg",)
    eval_arrays = ("lidarseg", "lidarseg_left_out")
    protocols = ("stored", "all-returns")
    counted = ""
    _class_of: Tensor

    def __init__(self, settings: Settings, store: TargetStore, channels: int, turned: bool):
        """Raises StoreError: the store's returns have no classes."""
        super().__init__(settings, store, channels, turned)
        if not store.attrs.get("lidarseg_classes"):
            raise StoreError(
                f"{store.url} has no classes of lidar returns: rebuild it with --set "
                "'outputs={lidarseg: {}}', of a dataroot with nuScenes-lidarseg"
            )
        numbers = torch.from_numpy(class_numbers(store.attrs["lidarseg_classes"])).long()
        self.register_buffer("_class_of", numbers, persistent=False)
        self.point_step_m: float = store.attrs.get("point_step_m", 0.0)  # an export draws nothing
        linear = nn.Linear(channels, len(CLASSES))
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
        self.head = nn.Sequential(nn.BatchNorm1d(channels), linear)

    def targets(self, batch: Batch, angle: Tensor) -> Targets:
        """``label`` int64 (R,) of each row, ``semantics.IGNORED`` where none of the 16."""
        return {"label": self._class_of[batch["lidarseg"][batch["row_point"]].long()]}

    def counts(self, targets: Targets) -> Tensor:
        """Labelled rows."""
        n = (targets["label"] != IGNORED).sum().item()
        return torch.tensor([n], dtype=torch.float64)

    def forward(
        self, rows: Tensor, targets: Targets, counts: Sequence[float], share: float
    ) -> Loss:
        """Terms ``entropy``; and ``lovasz``, of the micro-batch alone: it is no mean over items."""
        labelled = targets["label"] != IGNORED
        logits, label = self.head(rows).float()[labelled], targets["label"][labelled]
        (n,) = divisors(counts)
        entropy = F.cross_entropy(logits, label, reduction="sum") / n
        lovasz = share * lovasz_softmax(logits.softmax(dim=1), label)
        return entropy + lovasz, {"entropy": entropy, "lovasz": lovasz}

    def predict(self, rows: Tensor) -> Tensor:
        """The class 0..15 of each row, int64 (R,)."""
        return self.head(rows).argmax(dim=1)

    def meter(self, device: torch.device, protocol: str) -> "ConfusionMeter":
        """IoU by class, over the whole split."""
        return ConfusionMeter(self._class_of, device, protocol)

    def dots(self, rows: Tensor, batch: Batch) -> Dots:
        """Each stored return in the colour of its class."""
        predicted = self.predict(rows)[batch["nearest_row"]]
        truth = self._class_of[batch["lidarseg"].long()]
        colours = (colours_of(classes.cpu().numpy()) for classes in (truth, predicted))
        return Dots(batch["points"].cpu().numpy()[:, :3] * self.point_step_m, *colours)

    def panels(self, rows: Tensor, batch: Batch) -> list[Panel]:
        """Classes from above."""
        panel = self.dots(rows, batch).panel("class of the highest return", self.grid)
        colours = zip(CLASSES, COLOURS.tolist(), strict=False)  # the last is of what is ignored
        return [panel._replace(key=tuple((name, tuple(rgb)) for name, rgb in colours))]

    @classmethod
    def table(cls, rows: dict[str, Any]) -> list[list[str]]:
        """Lines of cells: a class each."""
        lines = [["protocol, class", "IoU", "returns"]]
        return lines + [[name, as_text(r["iou"]), f"{r['returns']:,}"] for name, r in rows.items()]


class ConfusionMeter:
    """Counts true against predicted classes, in whole numbers."""

    def __init__(self, class_of: Tensor, device: torch.device, protocol: str):
        n = len(CLASSES)
        self._class_of, self.protocol = class_of.to(device), protocol
        self.confusion = torch.zeros(n, n, dtype=torch.int64, device=device)
        """[true class, predicted class], returns of ignored classes left out."""
        self.left_out = torch.zeros(n, dtype=torch.int64, device=device)

    def add(self, batch: Batch, predicted: Tensor) -> None:
        """Count a batch on the device, of which ``predicted`` (R,) are its rows' classes."""
        n, truth = len(CLASSES), self._class_of[batch["lidarseg"].long()]
        found, labelled = predicted[batch["nearest_row"]], truth != IGNORED
        pairs = truth[labelled] * n + found[labelled]
        self.confusion += torch.bincount(pairs, minlength=n * n).view(n, n)
        by_class = batch["lidarseg_left_out"].long().sum(dim=0)
        known = self._class_of != IGNORED
        self.left_out.index_add_(0, self._class_of[known], by_class[known])

    def result(self) -> dict[str, Any]:
        """See ``tasks.base.Meter``: a row for each class, ``iou`` None without a return of it, and
        ``mean`` over the others."""
        both = torch.cat([self.confusion, self.left_out[:, None]], dim=1).double()
        counted = all_reduce_sum(both).long()
        confusion, missed = counted[:, :-1], counted[:, -1]
        if self.protocol == "stored":
            missed = torch.zeros_like(missed)
        right, true = confusion.diagonal(), confusion.sum(dim=1) + missed
        union = true + confusion.sum(dim=0) - right
        rows = {}
        for name, n, r, u in zip(CLASSES, *(v.tolist() for v in (true, right, union)), strict=True):
            rows[name] = {"iou": 100 * r / u if n else None, "returns": n}
        known = [row["iou"] for row in rows.values() if row["returns"]]
        mean = float(np.mean(known)) if known else None
        rows["mean"] = {"iou": mean, "returns": int(true.sum())}
        name = f"mean of {len(known)} of {len(CLASSES)} classes"
        return {"rows": rows, "headline": {"name": name, "iou": mean}}
