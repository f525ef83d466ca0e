"""One frame as a trained network sees it: what it predicts beside what it should."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from occfeat_targets.store.files import StoreError
from occfeat_targets.store.grid import VoxelGrid
from occfeat_targets.store.reader import open_store
from occfeat_train.data.dataset import FrameDataset
from occfeat_train.data.order import select_frames, split_names
from occfeat_train.evaluate import predict
from occfeat_train.network import Network, trained_network
from occfeat_train.objectives.base import Panel
from occfeat_train.runs.job import Job
from occfeat_train.runs.run import Run, RunError
from occfeat_train.tasks.base import Task


def draw_frame(job: Job, run: Run, i: int | None, device: torch.device, out: Path) -> int:
    """The cameras' images, targets and predictions of a frame, as a PNG.

    The frame is the ``i``-th of the job's store, None the first of its evaluation split; its number
    is returned. RunError: the run has nothing to draw, no checkpoint, or one that does not fit the
    store, or the file can't be written; StoreError: no such frame or store, or it lacks arrays.
    """
    if job.learns.panels is None:
        raise RunError(
            f"{job.title} {job.learns.no_picture}: finetune {run.path}, and view that run"
        )
    if out.is_dir() or not out.parent.is_dir():
        raise RunError(f"cannot write {out}: name a file in a directory that exists")
    store = open_store(job.store)
    if i is None:
        i = select_frames(store, split_names(job.config.data.eval_split, "val"))[0]
    if not 0 <= i < len(store):
        raise StoreError(f"no frame {i}: {job.store} has frames 0 to {len(store) - 1}")
    network, position = trained_network(job, run, store)
    images, panels = _predict(network.to(device), job, i, device)
    title = (
        f"{run.path} ({job.title}, step {position['step']}) on {store.scene(i)} "
        f"({store.split(i)}), sample {store.token(i)}"
    )
    cameras = dict(zip(store.attrs["cameras"], images, strict=True))
    _draw(title, cameras, panels, store.grid, out)
    return i


def _predict(
    network: Network, job: Job, i: int, device: torch.device
) -> tuple[np.ndarray, list[Panel]]:
    """Images (N, H, W, 3) as stored, and what to draw beside them."""
    objective = network.objective
    arrays = objective.eval_arrays if isinstance(objective, Task) else objective.arrays
    dataset = FrameDataset(job.store, [i], ("images", *arrays))
    batch = dataset.collate([dataset[0]])
    on_device = {name: values.to(device) for name, values in batch.items()}
    draw = cast(Callable, objective.panels)
    panels = predict(network, on_device, job, lambda bev: draw(bev, on_device))
    return batch["images"][0].numpy(), panels


def _draw(
    title: str, images: dict[str, np.ndarray], panels: list[Panel], grid: VoxelGrid, out: Path
) -> None:
    """The figure: cameras at the left, two rows of them if there are several; BEV at the right."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = -(-len(images) // 2)
    height, width = next(iter(images.values())).shape[:2]
    # So wide that two rows of cameras fill the height: no gap between them.
    widths = [3.1 * columns * width / height, 3.7 * len(panels)]
    figure = Figure(figsize=(sum(widths), 7.2), layout="constrained")
    FigureCanvasAgg(figure)
    parts: Any = figure.subfigures(1, 2, width_ratios=widths)
    cameras, bev = parts
    axes = cameras.subplots(min(2, len(images)), columns, squeeze=False).ravel()
    for axis in axes[len(images) :]:  # an odd number of cameras leaves one empty
        axis.set_visible(False)
    for axis, (name, image) in zip(axes, images.items(), strict=False):
        axis.imshow(image)
        axis.set(xticks=[], yticks=[])
        axis.set_title(name, fontsize=10)
    axes = bev.subplots(2, len(panels), squeeze=False)
    for column, panel in zip(axes.T, panels, strict=True):
        _draw_bev(column[0], grid, panel.target, f"{panel.title}: target{panel.remark}")
        shown = _draw_bev(column[1], grid, panel.predicted, f"{panel.title}: predicted")
        if panel is panels[0] and panel.predicted.ndim == 2:  # colours of features mean nothing
            bev.colorbar(shown, ax=axes, shrink=0.6, label="probability")
    figure.suptitle(title, fontsize=10, wrap=True)
    figure.savefig(out, dpi=75, format="png")


def _draw_bev(axis: Any, grid: VoxelGrid, picture: np.ndarray, title: str) -> Any:
    """One picture, x up and y to the left, as a driver sees a map."""
    (x_lo, x_hi, _), (y_lo, y_hi, _) = grid.x, grid.y
    extent = (y_lo, y_hi, x_lo, x_hi)
    shown = axis.imshow(picture, "magma", origin="lower", extent=extent, vmin=0, vmax=1)
    axis.plot([0, 0], [0, 3], color="deepskyblue", linewidth=2)  # ego, looking ahead
    axis.set(xlim=(y_hi, y_lo), ylim=(x_lo, x_hi))
    axis.set_xlabel("y, left (m)", fontsize=7)
    axis.set_ylabel("x, forward (m)", fontsize=7)
    axis.tick_params(labelsize=7)
    axis.set_title(title, fontsize=10)
    return shown
