"""One frame as a trained network sees it: what it predicts beside what it should."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch

from occfeat_targets.store.colours import Paint, store_colours
from occfeat_targets.store.files import StoreError
from occfeat_targets.store.grid import VoxelGrid
from occfeat_targets.store.pick import pick
from occfeat_targets.store.reader import open_store
from occfeat_targets.store.settings import ConfigError
from occfeat_train.data.order import select_frames, split_names
from occfeat_train.evaluate import predict
from occfeat_train.geometry import project
from occfeat_train.network import Network, frames_for, trained_network
from occfeat_train.objectives.base import Dots, Panel, Volume
from occfeat_train.runs.job import Job
from occfeat_train.runs.run import Run, RunError
from occfeat_train.tasks.base import Task
from occfeat_train.voxel_picture import draw_voxels


class Seen(NamedTuple):
    """A frame as a network sees it."""

    images: np.ndarray
    """uint8 (N, H, W, 3), RGB, as stored."""
    panels: list[Panel]
    volume: Volume | None
    dots: Dots | None = None
    K: torch.Tensor | None = None
    """(N, 3, 3), of the images."""
    cam_T_ego: torch.Tensor | None = None
    """(N, 4, 4)."""


class Viewer:
    """A run's network, to look at frames of its store with."""

    def __init__(self, job: Job, run: Run, device: torch.device, colours: Path | None = None):
        """With the colours of ``store_colours``. RunError: the run has nothing to draw, no
        checkpoint, or one that does not fit the store; StoreError: the store is unreadable or lacks
        arrays, or the colours don't fit it."""
        if job.learns.panels is None:
            raise RunError(
                f"{job.title} {job.learns.no_picture}: finetune {run.path}, and view that run"
            )
        self.job, self.run, self.device, self.store = job, run, device, open_store(job.store)
        self.network, self.position = trained_network(job, run, self.store)
        self.network.to(device)
        self.colours = store_colours(self.store, colours)

    def held_out(self) -> list[int]:
        """The frames of the evaluation split. StoreError: there are none."""
        return select_frames(self.store, split_names(self.job.config.data.eval_split, "val"))

    def look(self, i: int) -> Seen:
        """Frame i. StoreError: there is no such frame, or it is damaged."""
        return look(self.network, self.job, i, self.device, self.colours)

    def figure(self, i: int, picked: str | None = None) -> Any:
        """Frame i as a matplotlib figure. Raises as :meth:`look` does; and with the likeness to a
        ``picked`` voxel, as ``pick`` does."""
        store, paint, place = self.store, cast(Paint, self.colours), None
        if not 0 <= i < len(store):
            raise StoreError(f"no frame {i}: {self.job.store} has frames 0 to {len(store) - 1}")
        if picked and not self.network.objective.predicts_features:
            raise ConfigError(f"--pick is for what predicts features: not a {self.job.title}")
        if picked:
            paint, place = pick(store, i, picked)
        seen = look(self.network, self.job, i, self.device, paint)
        title = (
            f"{self.run.path} ({self.job.title}, step {self.position['step']}) on {store.scene(i)} "
            f"({store.split(i)}), sample {store.token(i)}"
        )
        return _draw(title, store.attrs["cameras"], seen, store.grid, place)


def save_frame(viewer: Viewer, i: int | None, out: Path, picked: str | None = None) -> int:
    """Write the cameras' images, targets and predictions of a frame as a PNG.

    The frame is the ``i``-th of the store, None the first of its evaluation split; its number is
    returned. Raises as :meth:`Viewer.figure` does; RunError: the file can't be written.
    """
    require_place(out)
    if i is None:
        i = viewer.held_out()[0]
    viewer.figure(i, picked).savefig(out, dpi=75, format="png")
    return i


def require_place(out: Path) -> None:
    """RunError: a file can't be written there."""
    if out.is_dir() or not out.parent.is_dir():
        raise RunError(f"cannot write {out}: name a file in a directory that exists")


def look(network: Network, job: Job, i: int, device: torch.device, paint: Paint) -> Seen:
    """Frame i of the job's store, and what a network on the device makes of it."""
    objective = network.objective
    objective.paint = paint
    arrays = objective.eval_arrays if isinstance(objective, Task) else objective.arrays
    dataset = frames_for(job, network, [i], ("images", *arrays))
    batch = dataset.collate([dataset[0]])
    on_device = {name: values.to(device) for name, values in batch.items()}
    hooks = (objective.panels, objective.volume, objective.dots)
    parts = [cast(Callable, part) for part in hooks]
    panels, volume, dots = predict(
        network, on_device, lambda bev: [part and part(bev, on_device) for part in parts]
    )
    calibration = batch["K"][0], batch["cam_T_ego"][0]
    return Seen(batch["images"][0].numpy(), panels, volume, dots, *calibration)


def _draw(
    title: str, cameras: list[str], seen: Seen, grid: VoxelGrid, place: np.ndarray | None
) -> Any:
    """The figure: cameras at the left, two rows of them if there are several; BEV at the right,
    with a star at a picked ``place`` (3,); and voxels beyond."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns, panels = -(-len(cameras) // 2), seen.panels
    height, width = seen.images[0].shape[:2]
    # So wide that two rows of cameras, or four with dots, fill the height: no gap between them.
    tall = 12.8 if seen.dots else 7.2
    widths = [3.1 * columns * width / height, 3.7 * tall / 7.2 * len(panels)]
    widths += [5.5] if seen.volume else []
    figure = Figure(figsize=(sum(widths), tall), layout="constrained")
    FigureCanvasAgg(figure)
    parts: Any = figure.subfigures(1, len(widths), width_ratios=widths)
    _draw_cameras(parts[0], cameras, seen)
    axes = parts[1].subplots(2, len(panels), squeeze=False)
    for column, panel in zip(axes.T, panels, strict=True):
        if panel.target is None:
            column[0].set_visible(False)
        else:
            draw_bev(column[0], grid, panel.target, f"{panel.title}: target{panel.remark}")
        shown = draw_bev(column[1], grid, panel.predicted, f"{panel.title}: predicted")
        for name, colour in panel.key:
            column[1].scatter([], [], color=colour, marker="s", label=name)
        if panel.key:
            column[1].legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=4, fontsize=8)
        if panel is panels[0] and panel.predicted.ndim == 2:  # colours of features mean nothing
            parts[1].colorbar(shown, ax=axes, shrink=0.6, label="probability")
    if place is not None:
        for axis in axes.ravel():
            axis.plot(place[1], place[0], "*", color="white", markersize=12)
    if seen.volume:
        _draw_volume(parts[2].subplots(2, 1), grid, seen.volume)
    figure.suptitle(title, fontsize=10, wrap=True)
    return figure


def _draw_cameras(part: Any, cameras: list[str], seen: Seen) -> None:
    """The images in two rows if there are several; twice, with true and predicted dots on them, if
    there are dots."""
    layers: dict[str, np.ndarray | None] = {"": None}
    if seen.dots:
        layers = {": target": seen.dots.target, ": predicted": seen.dots.predicted}
    n_rows, columns = min(2, len(cameras)), -(-len(cameras) // 2)
    axes = part.subplots(n_rows * len(layers), columns, squeeze=False)
    for block, (what, colours) in zip(np.split(axes, len(layers)), layers.items(), strict=True):
        for axis in block.ravel()[len(cameras) :]:  # an odd number of cameras leaves one empty
            axis.set_visible(False)
        for c, (axis, name) in enumerate(zip(block.ravel(), cameras, strict=False)):
            axis.imshow(seen.images[c], extent=(0, seen.images.shape[2], seen.images.shape[1], 0))
            axis.set(xticks=[], yticks=[])
            axis.set_title(name + what, fontsize=10)
            if colours is not None:
                _draw_dots(axis, seen, c, colours)


def _draw_dots(axis: Any, seen: Seen, c: int, colours: np.ndarray) -> None:
    """Lidar points (P, 3) in camera c's image."""
    xyz = torch.from_numpy(cast(Dots, seen.dots).xyz_ego).float()
    K, cam_T_ego = cast(torch.Tensor, seen.K), cast(torch.Tensor, seen.cam_T_ego)
    uv, depth = project(xyz, K[c, None], cam_T_ego[c, None])
    size = uv.new_tensor(seen.images.shape[2:0:-1])
    inside = ((depth[0] > 1) & (uv[0] >= 0).all(dim=1) & (uv[0] < size).all(dim=1)).numpy()
    axis.scatter(*uv[0].numpy()[inside].T, c=colours[inside], s=2, linewidths=0)


def _draw_volume(axes: Any, grid: VoxelGrid, volume: Volume) -> None:
    """True voxels above, predicted ones below."""
    draw_voxels(axes[0], grid, *volume.target, f"{len(volume.target[0])} occupied voxels")
    draw_voxels(axes[1], grid, *volume.predicted, describe_predicted(volume))


def describe_predicted(volume: Volume) -> str:
    """How many voxels are predicted, and how well that fits."""
    true, predicted = volume.target[0], volume.predicted[0]
    if true is predicted:
        return "the same voxels: predicted features"
    both = len(np.intersect1d(true, predicted))
    union = len(true) + len(predicted) - both
    return (
        f"{len(predicted)} predicted voxels (probability > 0.5), "
        f"voxel IoU of this frame {100 * both / max(1, union):.1f} %"
    )


def draw_bev(axis: Any, grid: VoxelGrid, picture: np.ndarray, title: str) -> Any:
    """One picture, (X, Y) in 0..1 or RGB, x up and y to the left, as a driver sees a map."""
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


def draw_masks(
    title: str, images: dict[str, np.ndarray], masks: dict[str, np.ndarray], grid: VoxelGrid
) -> Any:
    """A figure of images (H, W, 3) by camera at the left and masks (X, Y) in 0..1 by class at the
    right, each in two rows if there are several."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shapes = [(min(2, len(part)), -(-len(part) // 2)) for part in (images, masks)]
    widths = [13 / 3 * shapes[0][1], 7.5 / shapes[1][0] * shapes[1][1] + 1]
    figure = Figure(figsize=(sum(widths), 7.2), layout="constrained")
    FigureCanvasAgg(figure)
    parts: Any = figure.subfigures(1, 2, width_ratios=widths)
    cameras, bev = (
        part.subplots(*shape, squeeze=False).ravel()
        for part, shape in zip(parts, shapes, strict=True)
    )
    for axis, (name, image) in zip(cameras, images.items(), strict=False):
        axis.imshow(image)
        axis.set(xticks=[], yticks=[])
        axis.set_title(name, fontsize=10)
    for axis, (name, mask) in zip(bev, masks.items(), strict=False):
        shown = draw_bev(axis, grid, mask, name)
    parts[1].colorbar(shown, ax=bev, shrink=0.6, label="probability")
    for axis in (*cameras[len(images) :], *bev[len(masks) :]):  # odd numbers leave one empty
        axis.set_visible(False)
    figure.suptitle(title, fontsize=10, wrap=True)
    return figure
