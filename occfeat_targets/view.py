"""One frame of a store as a picture: does the lidar sit on the images, and the labels under it?"""

import math
from pathlib import Path
from typing import Any

from occfeat_targets.frame import stored_outputs
from occfeat_targets.store.reader import open_store


def draw_frame(url: str, i: int, out: Path) -> None:
    """The cameras with the projected occupied voxels, coloured by their feature, and the BEV.
    Raises StoreError if store or frame can't be read, and ValueError if there is no such frame."""
    from matplotlib.figure import Figure

    store = open_store(url)
    if not 0 <= i < len(store):
        raise ValueError(f"no frame {i}: {url} has frames 0 to {len(store) - 1}")
    frame, (_, outputs) = store.frame(i), stored_outputs(store.attrs)
    figure = Figure(figsize=(26, 7.2), layout="constrained")
    parts: Any = figure.subfigures(1, 2, width_ratios=[2.1, 1])
    cameras, bev = parts
    n = len(store.attrs["cameras"])
    n_rows = 2 if n > 3 else 1
    axes = cameras.subplots(n_rows, math.ceil(n / n_rows), squeeze=False).ravel()
    for c, axis in enumerate(axes[:n]):
        for output in outputs:
            output.draw_camera(axis, store, frame, c)
    for axis in axes[n:]:
        axis.axis("off")
    axis = bev.subplots()
    for output in outputs:
        output.draw_bev(axis, store, frame)
    (x_lo, x_hi, _), (y_lo, y_hi, _) = store.grid.x, store.grid.y
    axis.plot([0, 0], [0, 3], color="blue", linewidth=2, label="this car, looking ahead")
    axis.set(xlim=(y_hi, y_lo), ylim=(x_lo, x_hi), xlabel="y, left (m)", ylabel="x, forward (m)")
    axis.set_aspect("equal")
    # Beside the picture: within it, it would hide a corner of the street.
    axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=8, borderaxespad=0)
    axis.set_title("from above: lidar by height, labels, map", fontsize=10)
    teacher = store.attrs["teacher"]
    figure.suptitle(
        f"{store.scene(i)} ({store.split(i)})  sample {store.token(i)}  {frame['n_voxels']} voxels "
        f"coloured by feature (PCA)  teacher {teacher['name']}, weights {teacher['weights'][:16]}"
    )
    figure.savefig(out, dpi=75)
