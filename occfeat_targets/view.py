"""One frame of a store as a picture: does the lidar sit on the images, and the labels under it?"""

import math
from pathlib import Path
from typing import Any

import numpy as np

from occfeat_targets.frame import stored_outputs
from occfeat_targets.geometry import in_image, project
from occfeat_targets.store.colours import Paint, from_above, store_colours
from occfeat_targets.store.pick import SCALE, pick
from occfeat_targets.store.reader import TargetStore, open_store
from occfeat_targets.store.schema import dequantise

_STAR: Any = {"marker": "*", "color": "white", "markeredgecolor": "black", "markersize": 16}


def draw_frame(
    url: str, i: int, out: Path, colours: Path | None = None, picked: str | None = None
) -> None:
    """The cameras with the projected occupied voxels, coloured by their feature, and the BEV.

    Colours are those of ``store_colours``, or show the likeness to a voxel, see ``pick``; the BEV
    then is of voxels in place of labels. Raises StoreError if store, frame or colours can't be
    read, and ValueError if there is no such frame or voxel."""
    from matplotlib.figure import Figure

    store = open_store(url)
    if not 0 <= i < len(store):
        raise ValueError(f"no frame {i}: {url} has frames 0 to {len(store) - 1}")
    frame, (_, outputs) = store.frame(i), stored_outputs(store.attrs)
    paint, place = pick(store, i, picked) if picked else (store_colours(store, colours), None)
    for output in outputs:
        output.paint = paint
    figure = Figure(figsize=(26, 7.2), layout="constrained")
    parts: Any = figure.subfigures(1, 2, width_ratios=[2.1, 1])
    cameras, bev = parts
    n = len(store.attrs["cameras"])
    n_rows = 2 if n > 3 else 1
    axes = cameras.subplots(n_rows, math.ceil(n / n_rows), squeeze=False).ravel()
    for c, axis in enumerate(axes[:n]):
        for output in outputs:
            output.draw_camera(axis, store, frame, c)
        if place is not None:
            _mark(axis, store, frame, c, place)
    for axis in axes[n:]:
        axis.axis("off")
    axis = bev.subplots()
    if place is None:
        for output in outputs:
            output.draw_bev(axis, store, frame)
    else:
        _draw_likeness(axis, store, frame, paint, place)
    (x_lo, x_hi, _), (y_lo, y_hi, _) = store.grid.x, store.grid.y
    axis.plot([0, 0], [0, 3], color="blue", linewidth=2, label="this car, looking ahead")
    axis.set(xlim=(y_hi, y_lo), ylim=(x_lo, x_hi), xlabel="y, left (m)", ylabel="x, forward (m)")
    axis.set_aspect("equal")
    # Beside the picture: within it, it would hide a corner of the street.
    axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=8, borderaxespad=0)
    if place is None:
        axis.set_title("from above: lidar by height, labels, map", fontsize=10)
    teacher = store.attrs["teacher"]
    figure.suptitle(
        f"{store.scene(i)} ({store.split(i)})  sample {store.token(i)}  {frame['n_voxels']} voxels "
        f"coloured by {paint.title}  teacher {teacher['name']}, weights {teacher['weights'][:16]}"
    )
    figure.savefig(out, dpi=75)


def _mark(axis: Any, store: TargetStore, frame: dict[str, Any], c: int, place: np.ndarray) -> None:
    """The picked voxel in camera c's picture, if it is there."""
    K, cam_T_ego = (frame[name][c : c + 1].astype(np.float64) for name in ("K", "cam_T_ego"))
    uv, depth = (values[0] for values in project(K, cam_T_ego, place[None]))
    if in_image(uv, depth, store.attrs["config"]["images"]["size"])[0]:
        axis.plot(*uv[0], **_STAR)


def _draw_likeness(
    axis: Any, store: TargetStore, frame: dict[str, Any], paint: Paint, place: np.ndarray
) -> None:
    """The voxels from above, the picked one, and what the colours mean, here and in the images."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap

    features = dequantise(frame["features"], frame["feature_scale"])
    picture = from_above(store.grid, frame["voxel_index"], paint(features))
    (x_lo, x_hi, _), (y_lo, y_hi, _) = store.grid.x, store.grid.y
    picture[(picture == 0).all(axis=2)] = 1  # unlike is dark: no voxel must not be
    axis.imshow(picture, origin="lower", extent=(y_lo, y_hi, x_lo, x_hi))
    axis.plot(place[1], place[0], **_STAR, linestyle="none", label="picked")
    scale = ScalarMappable(cmap=LinearSegmentedColormap.from_list("likeness", [*SCALE.items()]))
    axis.figure.colorbar(
        scale, ax=axis, location="bottom", shrink=0.6, label="cosine of the features"
    )
    axis.set_title(f"from above: {paint.title}", fontsize=10)
