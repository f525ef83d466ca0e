"""One frame of a store as a picture: does the lidar sit on the images, and the labels under it?"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from occfeat_targets.store.colours import feature_colours
from occfeat_targets.geometry import project
from occfeat_targets.labels import footprint
from occfeat_targets.store.schema import CAMERAS, TargetStore, dequantise, open_store

_MAP_COLOURS = {
    "road": "#c9c9c9",
    "sidewalk": "#e8c9a0",
    "crosswalk": "#7db8e8",
    "parking": "#b9d99a",
    "divider": "#e0a020",
}


def draw_frame(url: str, i: int, out: Path) -> None:
    """Six cameras with the projected occupied voxels, coloured by their feature, and the BEV.

    Raises:
        StoreError: the store or the frame can't be read.
        ValueError: there is no such frame.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    store = open_store(url)
    if not 0 <= i < len(store):
        raise ValueError(f"no frame {i}: {url} has frames 0 to {len(store) - 1}")
    frame = store.frame(i)
    if "features" in frame:
        features = dequantise(frame["features"], frame["feature_scale"])
    else:  # a store without a teacher: all grey
        features = np.zeros((frame["n_voxels"], 0))
    colours = feature_colours(features)
    figure = Figure(figsize=(24, 7.2), layout="constrained")
    FigureCanvasAgg(figure)
    cameras, bev = figure.subfigures(1, 2, width_ratios=[2.7, 1])
    for c, axis in enumerate(cameras.subplots(2, len(CAMERAS) // 2).ravel()):
        _draw_camera(axis, store, frame, c, colours)
    _draw_bev(bev.subplots(), store, frame)
    teacher = store.attrs["teacher"]
    figure.suptitle(
        f"{store.scene(i)} ({store.split(i)})  sample {store.token(i)}  {frame['n_voxels']} voxels "
        f"coloured by feature (PCA)  teacher {teacher['name']}, weights {teacher['weights'][:16]}"
    )
    figure.savefig(out, dpi=75)


def _draw_camera(axis: Any, store: TargetStore, frame: dict, c: int, colours: np.ndarray) -> None:
    image = Image.open(io.BytesIO(frame["images"][c]))
    seen = (frame["feature_cameras"] >> c) & 1 == 1
    centres = store.grid.centres(frame["voxel_index"][seen])
    uv, depth = project(
        frame["K"][c : c + 1].astype(np.float64),
        frame["cam_T_ego"][c : c + 1].astype(np.float64),
        centres,
    )
    # Continuous pixels: the image covers [0, W) x [0, H).
    axis.imshow(image, extent=(0, image.width, image.height, 0))
    order = np.argsort(-depth[0])
    axis.scatter(
        *uv[0, order].T,
        c=colours[seen][order],
        s=np.clip(400 / depth[0, order], 4, 60),
        alpha=0.7,
        linewidths=0,
    )
    axis.set(xlim=(0, image.width), ylim=(image.height, 0), xticks=[], yticks=[])
    axis.set_title(f"{CAMERAS[c]}: {int(seen.sum())} voxels", fontsize=10)


def _draw_bev(axis: Any, store: TargetStore, frame: dict) -> None:
    from matplotlib.colors import to_rgb

    grid = store.grid
    picture = np.ones((*grid.bev_shape, 3))
    for mask, name in zip(frame.get("map", []), store.attrs["map_classes"], strict=False):
        picture[mask == 1] = to_rgb(_MAP_COLOURS[name])
    picture[frame["vehicle"] == 1] = to_rgb("#d04030")
    picture[(frame["vehicle"] == 1) & (frame["vehicle_visible"] == 0)] = to_rgb("#f0b0a8")
    (x_lo, x_hi, _), (y_lo, y_hi, _) = grid.x, grid.y
    # x up, y to the left, as a driver sees a map: only the picture is turned, never the array.
    axis.imshow(picture, origin="lower", extent=(y_lo, y_hi, x_lo, x_hi))
    xyz = frame["points"][:, :3] * store.attrs["point_step_m"]
    xyz = xyz[grid.flat_index(xyz)[1]]
    axis.scatter(xyz[:, 1], xyz[:, 0], c=xyz[:, 2], s=0.5, cmap="viridis", vmin=-1, vmax=4)
    for box in frame["vehicle_boxes"]:
        corners = footprint(box)[[0, 1, 2, 3, 0]]
        axis.plot(corners[:, 1], corners[:, 0], color="black", linewidth=0.8)
    axis.plot([0, 0], [0, 3], color="blue", linewidth=2)
    axis.set(xlim=(y_hi, y_lo), ylim=(x_lo, x_hi), xlabel="y, left (m)", ylabel="x, forward (m)")
    _legend(axis, store)


def _legend(axis: Any, store: TargetStore) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=_MAP_COLOURS[name], label=name) for name in store.attrs["map_classes"]]
    handles.append(Patch(color="#d04030", label="vehicle"))
    axis.legend(handles=handles, loc="upper right", fontsize=8)
    axis.set_title("BEV: lidar by height, labels, map", fontsize=10)
