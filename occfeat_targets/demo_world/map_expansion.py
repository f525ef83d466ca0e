"""The map expansion file: all scenes' streets as polygons and lines of one location."""

from __future__ import annotations

import hashlib

import numpy as np

from occfeat_targets.demo_world.scene import MAP_SIZE, Scene

LOCATION = "boston-seaport"


def token(*parts: object) -> str:
    """A token of 32 hex characters that depends on the parts alone."""
    return hashlib.md5("/".join(map(str, parts)).encode(), usedforsecurity=False).hexdigest()


class _MapWriter:
    """Collects the records of one map expansion file."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        empty = (
            "polygon",
            "line",
            "node",
            "drivable_area",
            "road_segment",
            "road_block",
            "lane",
            "ped_crossing",
            "walkway",
            "stop_line",
            "carpark_area",
            "road_divider",
            "lane_divider",
            "traffic_light",
            "lane_connector",
        )
        self.layers: dict[str, list[dict]] = {name: [] for name in empty}

    def add(self, layer: str, **fields: object) -> str:
        """Append a record to a layer and return its token."""
        key = token("map", self.seed, layer, len(self.layers[layer]))
        self.layers[layer].append({"token": key, **fields})
        return key

    def nodes(self, points: np.ndarray) -> list[str]:
        """Add points (N, 2), global metres, to the nanometre."""
        return [self.add("node", x=round(float(x), 9), y=round(float(y), 9)) for x, y in points]

    def polygon(self, scene: Scene, shape) -> str:
        """Add a polygon given in the scene frame."""
        exterior = self.nodes(scene.xy_global(shape.exterior))
        holes = [{"node_tokens": self.nodes(scene.xy_global(hole))} for hole in shape.holes]
        return self.add("polygon", exterior_node_tokens=exterior, holes=holes)

    def line(self, scene: Scene, points: np.ndarray) -> str:
        """Add a line given in the scene frame."""
        return self.add("line", node_tokens=self.nodes(scene.xy_global(points)))


def map_expansion(scenes: list[Scene], seed: int) -> dict:
    """Contents of maps/expansion/<LOCATION>.json for all scenes of a world.

    Layers filled: drivable_area (with holes), road_segment, ped_crossing, walkway, carpark_area,
    road_divider, lane_divider. They hold the very polygons that the ground is painted from.
    """
    out = _MapWriter(seed)
    for scene in scenes:
        layout = scene.layout
        shapes = layout.polygons
        segments = [
            out.add(
                "road_segment",
                polygon_token=out.polygon(scene, shape),
                is_intersection=crossing,
                drivable_area_token="",
                exit_lines=[],
                entry_lines=[],
            )
            for shape, crossing in layout.segments
        ]
        out.add(
            "drivable_area",
            polygon_tokens=[out.polygon(scene, shape) for shape in shapes["drivable_area"]],
        )
        for shape in shapes["walkway"]:
            out.add("walkway", polygon_token=out.polygon(scene, shape))
        for shape in shapes["ped_crossing"]:
            out.add(
                "ped_crossing",
                polygon_token=out.polygon(scene, shape),
                road_segment_token=segments[0],
            )
        for shape in shapes.get("carpark_area", []):
            out.add(
                "carpark_area",
                polygon_token=out.polygon(scene, shape),
                orientation=0.0,
                road_block_token="",
            )
        for points in layout.lines.get("road_divider", []):
            out.add(
                "road_divider", line_token=out.line(scene, points), road_segment_token=segments[-1]
            )
        for points in layout.lines.get("lane_divider", []):
            out.add("lane_divider", line_token=out.line(scene, points), lane_divider_segments=[])
    return {
        "version": "1.3",
        "canvas_edge": list(MAP_SIZE),
        **out.layers,
        "arcline_path_3": {},
        "connectivity": {},
    }
