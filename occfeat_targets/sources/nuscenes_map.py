"""nuScenes' map expansion to plain arrays. It is read from the JSON itself: nuscenes-devkit's
``get_map_mask`` crashes on lines that leave and re-enter the patch (MultiLineString under shapely
2)."""

import json
import threading
from functools import lru_cache
from pathlib import Path

import numpy as np

from occfeat_targets.sources.base import MapLayers, Shapes

AREAS = {
    "road": "drivable_area",
    "sidewalk": "walkway",
    "crosswalk": "ped_crossing",
    "parking": "carpark_area",
}
"""Map class to layer of polygons."""
LINES = {"divider": "road_divider"}
"""Map class to layer of lines."""
MAP_CLASSES = (*AREAS, *LINES)
_reading = threading.Lock()


def read_map(path: str) -> MapLayers:
    """The layers of a file ``maps/expansion/<location>.json``, kept for the next call. Raises
    ValueError, naming the file: it is missing or not such a map."""
    with _reading:  # threads of a GPU worker would all parse the same large file
        return _read_map(path)


@lru_cache(maxsize=4)  # nuScenes has four locations
def _read_map(path: str) -> MapLayers:
    try:
        tables = json.loads(Path(path).read_text())
        nodes = {n["token"]: (n["x"], n["y"]) for n in tables["node"]}

        def points(holder: dict, key: str = "node_tokens") -> np.ndarray:
            found = np.array([nodes[t] for t in holder[key]], dtype=np.float64).reshape(-1, 2)
            if not np.isfinite(found).all():
                raise ValueError("a node is not finite")
            return found

        polygon = {
            p["token"]: [points(p, "exterior_node_tokens"), *map(points, p["holes"])]
            for p in tables["polygon"]
        }
        line = {t["token"]: [points(t)] for t in tables["line"]}
        areas = {}
        for name, layer in AREAS.items():
            tokens = (r.get("polygon_tokens") or [r["polygon_token"]] for r in tables[layer])
            areas[name] = [polygon[token] for each in tokens for token in each]
        lines = {n: [line[r["line_token"]] for r in tables[layer]] for n, layer in LINES.items()}
    except OSError as error:
        raise ValueError(f"{path}: cannot read the map expansion: {error}") from error
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: not a nuScenes map expansion file ({error!r:.300})") from error
    return MapLayers(
        {name: Shapes([s for s in found if len(s[0]) > 2]) for name, found in areas.items()},
        {name: Shapes([s for s in found if len(s[0]) > 1]) for name, found in lines.items()},
    )
