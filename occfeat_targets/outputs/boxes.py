"""Annotated boxes of every class, and BEV masks of the vehicles among them."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from pydantic import Field

from occfeat_targets.outputs.base import FrameInputs, Output
from occfeat_targets.outputs.masks import bev_image, fill_polygon
from occfeat_targets.sources.base import FrameRecord
from occfeat_targets.store.grid import VoxelGrid
from occfeat_targets.store.reader import TargetStore
from occfeat_targets.store.schema import INVISIBLE, ArraySpec
from occfeat_targets.store.settings import Settings

_MASKS = ("vehicle", "vehicle_visible")
_VEHICLE, _HARDLY_VISIBLE = "#d04030", "#f0b0a8"


class BoxesSettings(Settings):
    """Annotated boxes."""

    max_boxes: int = Field(default=512, ge=1)
    """Room for this many boxes a frame; a frame with more is an error."""


class Boxes(Output):
    """All boxes with their class, and where vehicles lie."""

    Settings = BoxesSettings

    def specs(self) -> tuple[ArraySpec, ...]:
        """See :class:`Output`."""
        n, (X, Y) = self.settings.max_boxes, self.layout.grid.bev_shape
        ragged: dict[str, Any] = {"rows": "n_boxes", "chunk": n, "setting": "boxes.max_boxes"}
        axes, bev = {"box": n, "parameter": 8}, {"x": X, "y": Y}
        doc = "in ego: centre x, y, z, length, width, height (m), yaw (rad), visibility 0-4"
        visible = "0 where only vehicles of visibility 1 lie, else 1"
        return (
            ArraySpec("n_boxes", "int32", {}, "stored boxes", -1),
            ArraySpec("boxes", "float32", axes, doc, np.nan, **ragged),
            ArraySpec("box_class", "uint8", {"box": n}, "index into `box_classes`", 255, **ragged),
            ArraySpec("vehicle", "uint8", bev, "1 = cell centre in a vehicle", 255, chunk=X),
            ArraySpec("vehicle_visible", "uint8", bev, visible, 255, chunk=X),
        )

    def compute(self, frame: FrameInputs) -> dict[str, np.ndarray]:
        """``boxes`` float32 (n, 8), ``box_class`` uint8 (n,), ``vehicle`` and ``vehicle_visible``
        uint8 (X, Y)."""
        annotated = frame.record.boxes
        boxes = np.column_stack([annotated.box, annotated.visibility]).astype(np.float32)
        numbers = {name: i for i, name in enumerate(self.layout.box_classes)}
        classes = np.array([numbers[name] for name in annotated.category], dtype=np.uint8)
        masks = vehicle_masks(boxes[self._is_vehicle(classes)], self.layout.grid)
        return {"boxes": boxes, "box_class": classes, **dict(zip(_MASKS, masks, strict=True))}

    def faults(self, record: FrameRecord) -> Iterator[str]:
        """See :class:`Output`."""
        n, categories = len(record.boxes.category), set(record.boxes.category)
        if n > self.settings.max_boxes:
            yield f"{n} boxes: raise boxes.max_boxes"
        if unknown := sorted(categories - {*self.layout.box_classes}):
            yield f"boxes of no known class: {', '.join(unknown)}"

    def check(self, store: TargetStore, frame: dict[str, Any]) -> Iterator[str]:
        """See :class:`Output`."""
        if frame["box_class"].max(initial=0) >= max(1, len(self.layout.box_classes)):
            yield "box_class holds numbers of no class"
            return
        vehicles = frame["boxes"][self._is_vehicle(frame["box_class"])]
        for name, mask in zip(_MASKS, vehicle_masks(vehicles, store.grid), strict=True):
            if not np.array_equal(frame[name], mask):
                yield f"{name} is not the mask of the vehicles among boxes"

    def _is_vehicle(self, classes: np.ndarray) -> np.ndarray:
        return np.isin(self.layout.box_classes, self.layout.vehicle_classes)[classes]

    def draw_bev(self, axis: Any, store: TargetStore, frame: dict[str, Any]) -> None:
        """The vehicle masks, and the footprint of each box."""
        vehicle = frame["vehicle"] == 1
        hidden = vehicle & (frame["vehicle_visible"] == 0)
        bev_image(axis, store.grid, [(vehicle, _VEHICLE, "vehicle")])
        bev_image(axis, store.grid, [(hidden, _HARDLY_VISIBLE, "vehicle, hardly visible")])
        line = {"color": "black", "linewidth": 0.8}
        axis.plot([], [], label="box of any class", **line)
        for box in frame["boxes"]:
            corners = footprint(box)[[0, 1, 2, 3, 0]]
            axis.plot(corners[:, 1], corners[:, 0], **line)


def vehicle_masks(vehicles: np.ndarray, grid: VoxelGrid) -> tuple[np.ndarray, np.ndarray]:
    """BEV masks uint8 (X, Y) of vehicles (n, 8), rows of ``boxes``: ``vehicle`` is 1 where a cell's
    centre lies in a footprint; ``visible`` is 0 where only vehicles of visibility 1 lie, else 1."""
    seen, unseen = np.zeros((2, *grid.bev_shape), dtype=bool)
    for vehicle in vehicles.astype(np.float64):
        mask = unseen if vehicle[7] == INVISIBLE else seen
        mask |= fill_polygon([footprint(vehicle)], grid)
    return (seen | unseen).astype(np.uint8), (seen | ~unseen).astype(np.uint8)


def footprint(box: np.ndarray) -> np.ndarray:
    """Corners (4, 2) of a box (>= 7,) on the ground plane, counter-clockwise, metres, ego. The ego
    car's tilt is ignored. It moves a footprint: the box stands on its own axis, so that its base
    lies h/2·sin(tilt) from where it is drawn, 3 cm for a car of 1.7 m at 2 degrees."""
    x, y, _, length, width, _, yaw = box[:7]
    corners = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]]) * [length / 2, width / 2]
    cos, sin = np.cos(yaw), np.sin(yaw)
    return corners @ np.array([[cos, sin], [-sin, cos]]) + (x, y)
