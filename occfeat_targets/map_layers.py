"""The layers of nuScenes' map expansion that make the map classes, as plain arrays.

Read from the JSON directly: nuscenes-devkit's ``get_map_mask`` crashes on lines that leave and
re-enter the patch (MultiLineString under shapely 2), so masks are drawn in ``labels``.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

_POLYGON_LAYERS = ("drivable_area", "walkway", "ped_crossing", "carpark_area")
"""Layers of the classes road, sidewalk, crosswalk and parking; dividers are ``road_divider``."""


@dataclass(frozen=True)
class Shapes:
    """Polygons (exterior ring and holes) or lines (one ring each) with their bounding boxes."""

    rings: list[list[np.ndarray]]
    """Per shape: float64 (K, 2) arrays, metres, global frame."""
    bounds: np.ndarray
    """float64 (n, 4): x min, y min, x max, y max."""

    @classmethod
    def of(cls, rings: list[list[np.ndarray]]) -> Shapes:
        """Shapes with their bounds computed."""
        outer = [(*shape[0].min(axis=0), *shape[0].max(axis=0)) for shape in rings]
        return cls(rings, np.array(outer, dtype=np.float64).reshape(-1, 4))

    def near(self, xy: np.ndarray, reach_m: float) -> Iterator[list[np.ndarray]]:
        """Shapes whose bounds come within ``reach_m`` of a point (x, y), global frame."""
        low, high = self.bounds[:, :2] - reach_m, self.bounds[:, 2:] + reach_m
        for i in np.flatnonzero(((low <= xy) & (xy <= high)).all(axis=1)):
            yield self.rings[i]


@dataclass(frozen=True)
class MapLayers:
    """One location's map."""

    polygons: tuple[Shapes, ...]
    """Road, sidewalk, crosswalk, parking."""
    dividers: Shapes


_reading = threading.Lock()


def load_map(path: str) -> MapLayers:
    """Read a map-expansion file (``maps/expansion/<location>.json``); cached per process.

    Raises:
        ValueError: naming the file, when it is missing, not JSON or lacks a layer.
    """
    with _reading:  # threads of a GPU worker would all parse the same large file
        return _read(path)


@lru_cache(maxsize=4)  # nuScenes has four locations
def _read(path: str) -> MapLayers:
    try:
        tables = json.loads(Path(path).read_text())
        nodes = {n["token"]: (n["x"], n["y"]) for n in tables["node"]}

        def points(holder: dict, key: str = "node_tokens") -> np.ndarray:
            return np.array([nodes[t] for t in holder[key]], dtype=np.float64).reshape(-1, 2)

        polygon = {
            p["token"]: [points(p, "exterior_node_tokens"), *map(points, p["holes"])]
            for p in tables["polygon"]
        }
        line = {t["token"]: [points(t)] for t in tables["line"]}
        layers = [
            [
                polygon[t]
                for r in tables[layer]
                for t in r.get("polygon_tokens") or [r["polygon_token"]]
            ]
            for layer in _POLYGON_LAYERS
        ]
        dividers = [line[r["line_token"]] for r in tables["road_divider"]]
    except OSError as error:
        raise ValueError(f"{path}: cannot read the map expansion: {error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a nuScenes map expansion file ({error!r})") from error
    return MapLayers(
        tuple(Shapes.of([s for s in shapes if len(s[0]) > 2]) for shapes in layers),
        Shapes.of([s for s in dividers if len(s[0]) > 1]),
    )
