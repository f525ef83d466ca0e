"""One frame as a trained network sees it: what it predicts beside what it should."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from occfeat_targets.store.colours import feature_colours
from occfeat_targets.store.grid import VoxelGrid
from occfeat_targets.store.schema import CAMERAS, StoreError, open_store
from occfeat_train.data import FrameDataset, collate, select_frames
from occfeat_train.evaluate import predict
from occfeat_train.jobs import Job, split_names, trained_network
from occfeat_train.objectives import OccFeat
from occfeat_train.runs import Run, RunError


class Panel(NamedTuple):
    """Two BEV pictures, each (X, Y) in 0..1 or RGB (X, Y, 3)."""

    title: str
    target: np.ndarray
    predicted: np.ndarray


def draw_frame(job: Job, run: Run, i: int | None, device: torch.device, out: Path) -> int:
    """The six images, targets and predictions of a frame, as a PNG.

    Args:
        job: the run's, with the store to look at.
        run: a finetuning, or a pretraining by OccFeat.
        i: frame number in the store; None takes the first of the evaluation split.
        device: where to compute.
        out: the file to write.

    Returns:
        The frame's number.

    Raises:
        RunError: the run has nothing to draw, no checkpoint, or one that does not fit the store;
            or the file can't be written.
        StoreError: there is no such frame or store, or it lacks what the run learned.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if job.objective == "img-also":
        raise RunError(
            f"{job.title} learns points along lidar rays, of which there is no picture: finetune "
            f"{run.path}, and view that run"
        )
    if out.is_dir() or not out.parent.is_dir():
        raise RunError(f"cannot write {out}: name a file in a directory that exists")
    store = open_store(job.store)
    if i is None:
        splits = split_names(job.config.data.eval_split, "val")
        i = select_frames(store, splits, 1.0, "frame")[0]
    if not 0 <= i < len(store):
        raise StoreError(f"no frame {i}: {job.store} has frames 0 to {len(store) - 1}")
    network, position = trained_network(job, run, store)
    images, panels = _predict(network.to(device), job, i, device)
    figure = Figure(figsize=(13 + 3.7 * len(panels), 7.2), layout="constrained")
    FigureCanvasAgg(figure)
    cameras, bev = figure.subfigures(1, 2, width_ratios=[13, 3.7 * len(panels)])
    for axis, name, image in zip(cameras.subplots(2, 3).ravel(), CAMERAS, images, strict=True):
        axis.imshow(image)
        axis.set(xticks=[], yticks=[])
        axis.set_title(name, fontsize=10)
    axes = bev.subplots(2, len(panels), squeeze=False)
    for column, panel in zip(axes.T, panels, strict=True):
        _draw_bev(column[0], store.grid, panel.target, f"{panel.title}: target")
        shown = _draw_bev(column[1], store.grid, panel.predicted, f"{panel.title}: predicted")
        if panel is panels[0] and panel.predicted.ndim == 2:  # colours of features mean nothing
            bev.colorbar(shown, ax=axes, shrink=0.6, label="probability")
    figure.suptitle(
        f"{run.path} ({job.title}, step {position['step']}) on {store.scene(i)} "
        f"({store.split(i)}), sample {store.token(i)}"
    )
    figure.savefig(out, dpi=75, format="png")
    return i


def _predict(
    network: torch.nn.Module, job: Job, i: int, device: torch.device
) -> tuple[np.ndarray, list[Panel]]:
    """Images uint8 (6, H, W, 3) and panels of a frame."""
    objective = network.objective
    occfeat = isinstance(objective, OccFeat)
    names = objective.arrays if occfeat else objective.eval_arrays
    frame = collate([FrameDataset(job.store, [i], ("images", *names))[0]])
    batch = {name: values.to(device) for name, values in frame.items()}
    if occfeat:
        panels = _occfeat_panels(network, batch, job, device)
    else:
        panels = _mask_panels(network, batch, job, device)
    return frame["images"][0].numpy(), panels


def _mask_panels(
    network: torch.nn.Module, batch: dict[str, torch.Tensor], job: Job, device: torch.device
) -> list[Panel]:
    """One panel a class; a target that does not count (a vehicle hardly visible) is darker."""
    target, visible = network.objective.truth(batch)
    mask = predict(network, batch, job, device)["mask"]
    probability = mask.float().sigmoid().view_as(target)[0].cpu().numpy()
    shown = (target * torch.where(visible.bool(), 1.0, 0.4)[:, None])[0].cpu().numpy()
    return list(map(Panel, network.objective.classes, shown, probability))


def _occfeat_panels(
    network: torch.nn.Module, batch: dict[str, torch.Tensor], job: Job, device: torch.device
) -> list[Panel]:
    """From above: whether any voxel of a column is occupied, and the highest feature in it."""
    objective = network.objective
    grid, targets = objective.grid, objective.targets(batch, torch.zeros(1))
    logits, features = predict(network, batch, job, device, targets["voxel"])
    voxel = targets["voxel"].cpu().numpy()
    panels = []
    if logits is not None:
        occupied = np.zeros(grid.shape)
        occupied.ravel()[voxel] = 1
        probability = logits[0].float().sigmoid().cpu().numpy()
        panels.append(Panel("occupancy", occupied.max(axis=0), probability.max(axis=0)))
    if features is not None:
        valid = targets["valid"].cpu().numpy()
        wanted, got = (f.float().cpu().numpy()[valid] for f in (targets["features"], features))
        pictures = (feature_colours(values, wanted) for values in (wanted, got))
        titled = "features (PCA)"
        panels.append(Panel(titled, *(_from_above(voxel[valid], p, grid) for p in pictures)))
    return panels


def _from_above(voxel: np.ndarray, colours: np.ndarray, grid: VoxelGrid) -> np.ndarray:
    """RGB (X, Y, 3): the colour (V, 3) of the highest voxel of each column, else black."""
    picture = np.zeros((*grid.bev_shape, 3))
    _, x, y = np.unravel_index(voxel, grid.shape)
    picture[x, y] = colours  # voxels ascend with height, and the last one stays
    return picture


def _draw_bev(axis: Any, grid: VoxelGrid, picture: np.ndarray, title: str) -> Any:
    """One picture, x up and y to the left, as a driver sees a map."""
    (x_lo, x_hi, _), (y_lo, y_hi, _) = grid.x, grid.y
    extent = (y_lo, y_hi, x_lo, x_hi)
    shown = axis.imshow(picture, "magma", origin="lower", extent=extent, vmin=0, vmax=1)
    axis.plot([0, 0], [0, 3], color="deepskyblue", linewidth=2)  # ego, looking ahead
    axis.set(xlim=(y_hi, y_lo), ylim=(x_lo, x_hi))
    axis.tick_params(labelsize=7)
    axis.set_title(title, fontsize=10)
    return shown
