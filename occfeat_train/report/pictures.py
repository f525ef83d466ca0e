"""What a report shows of frames: cameras, BEV of all runs side by side, voxels that turn."""

import base64
import io
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from occfeat_targets.store.colours import store_colours
from occfeat_targets.store.grid import VoxelGrid
from occfeat_targets.store.reader import TargetStore
from occfeat_targets.store.schema import dequantise
from occfeat_train.view import Seen, Viewer, describe_predicted
from occfeat_train.voxel_picture import height_colours


@dataclass
class Frame:
    """One frame of a store, and what several networks make of it."""

    title: str
    cameras: dict[str, str]
    """Name to data URI."""
    maps: dict[str, dict[str, str]] = field(default_factory=dict)
    """Title of a panel to who says it (``target``, or a label) to data URI."""
    volumes: dict[str, tuple[str, Any]] = field(default_factory=dict)
    """Who says it to a sentence about it, and a plotly trace."""

    def add(self, label: str, seen: Seen, grid: VoxelGrid) -> None:
        """What a network sees in it."""
        for panel in seen.panels:
            shown = self.maps.setdefault(panel.title, {})
            if panel.target is not None:
                shown.setdefault("target", _bev_uri(panel.target))
            shown[label] = _bev_uri(panel.predicted)
        if seen.volume:
            trace = voxel_mesh(grid, *seen.volume.predicted)
            self.volumes[label] = (describe_predicted(seen.volume), trace)


def show_frame(store: TargetStore, i: int) -> Frame:
    """Frame i of a store, before any network saw it. StoreError: it can't be read."""
    frame = store.frame(i)
    jpegs = [f"data:image/jpeg;base64,{base64.b64encode(j).decode()}" for j in frame["images"]]
    shown = Frame(store.describe(i), dict(zip(store.attrs["cameras"], jpegs, strict=True)))
    index, colours, what = frame["voxel_index"], None, "by height"
    if "features" in frame:
        colours = store_colours(store)(dequantise(frame["features"], frame["feature_scale"]))
        what = "by feature (PCA)"
    trace = voxel_mesh(store.grid, index, colours)
    shown.volumes["target"] = (f"{len(index)} occupied voxels, coloured {what}", trace)
    return shown


def chosen_frames(viewer: Viewer, n: int) -> list[int]:
    """So many frames, spread over the evaluation split."""
    frames = viewer.held_out()
    return [frames[i] for i in np.linspace(0, len(frames) - 1, min(n, len(frames))).astype(int)]


def _bev_uri(picture: np.ndarray) -> str:
    """A BEV picture of a panel, x up and y to the left."""
    from matplotlib import colormaps

    rgb = picture if picture.ndim == 3 else colormaps["magma"](picture)[..., :3]
    pixels = (255 * rgb[::-1, ::-1]).round().astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "WEBP", quality=90)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


_CORNERS = np.array([[0, 0], [1, 0], [1, 1], [0, 1]])


def voxel_mesh(grid: VoxelGrid, index: np.ndarray, colours: np.ndarray | None) -> Any:
    """Plotly's mesh of the sides of voxels that no other voxel covers: flat indices (V,), by RGB
    (V, 3) or by height."""
    from plotly.graph_objects import Mesh3d

    cell = np.stack(np.unravel_index(index.astype(np.int64), grid.shape), axis=1)[:, [1, 2, 0]]
    if colours is None:
        colours = height_colours(cell[:, 2], grid)
    full = np.zeros(np.array([grid.x[2], grid.y[2], grid.z[2]]) + 2, dtype=bool)
    full[tuple(cell.T + 1)] = True
    quads, owners = [], []
    for axis in range(3):
        others = [a for a in range(3) if a != axis]
        for side in (0, 1):
            step = np.zeros(3, dtype=int)
            step[axis] = 2 * side - 1
            bare = np.flatnonzero(~full[tuple((cell + 1 + step).T)])
            corners = np.zeros((4, 3), dtype=int)
            corners[:, others], corners[:, axis] = _CORNERS, side
            quads.append(cell[bare, None] + corners)
            owners.append(bare)
    quad, owner = np.concatenate(quads), np.concatenate(owners)
    vertices, number = np.unique(quad.reshape(-1, 3), axis=0, return_inverse=True)
    a, b, c, d = number.reshape(-1, 4).T.astype(np.uint32)
    xyz = (vertices * grid.cell_size + grid.lower).astype(np.float32)
    levels = (colours[owner] * 15).round().astype(int)
    faces = [f"#{r:x}{g:x}{b:x}" for r, g, b in levels]
    return Mesh3d(
        **dict(zip("xyz", xyz.T, strict=True)),
        i=np.concatenate([a, a]),
        j=np.concatenate([b, c]),
        k=np.concatenate([c, d]),
        facecolor=faces + faces,
        flatshading=True,
        lighting={"ambient": 0.85, "diffuse": 0.5, "specular": 0.05},
        hoverinfo="skip",
    )
