"""What an objective is: all that a training step computes beyond the BEV network.

A file of an objective holds everything about it: its settings, which arrays of the store it reads,
its targets, its head, its loss, its picture. A ``tasks.base.Task`` is one that can be evaluated.

Loss terms are sums over what counts, divided by how many that are in the whole optimiser step.
Sums add up and so do counts, so every term is the mean over the whole batch however it was split
over micro-batches and processes (a mean of means would not be).
"""

from __future__ import annotations  # ``Settings`` is also a name in the class

from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

import numpy as np
from torch import Tensor, nn

from occfeat_targets.store.colours import Paint
from occfeat_targets.store.grid import VoxelGrid
from occfeat_targets.store.reader import TargetStore
from occfeat_targets.store.settings import Settings

Batch = dict[str, Tensor]
"""Collated arrays of the store on the device, see ``data.dataset``; while training also ``seed``
int64 (B,) on the host, from which follows what is random in a frame and epoch."""
Targets = dict[str, Tensor]
Loss = tuple[Tensor, dict[str, Tensor]]
"""The loss, and each of its terms by name."""


class Panel(NamedTuple):
    """A target beside its prediction: two BEV pictures, each (X, Y) in 0..1 or RGB (X, Y, 3). The
    target is None where the store has none."""

    title: str
    target: np.ndarray | None
    predicted: np.ndarray
    remark: str = ""
    """On the target, after its title."""
    key: tuple[tuple[str, tuple[float, float, float]], ...] = ()
    """What colours mean, if that can be said: names and RGB."""


class Volume(NamedTuple):
    """Voxels of a frame beside predicted ones: flat indices (V,), ascending, and their RGB (V, 3)
    in 0..1, None where there is nothing to colour them by."""

    target: tuple[np.ndarray, np.ndarray | None]
    predicted: tuple[np.ndarray, np.ndarray | None]


class Dots(NamedTuple):
    """P lidar points of a frame and what is true and predicted of each, as RGB (P, 3) in 0..1."""

    xyz_ego: np.ndarray
    """(P, 3), metres."""
    target: np.ndarray
    predicted: np.ndarray

    def panel(self, title: str, grid: VoxelGrid) -> Panel:
        """The highest of each BEV cell; black where there is none."""
        index, inside = grid.flat_index(self.xyz_ego)
        upwards = np.argsort(self.xyz_ego[inside, 2], kind="stable")  # the last of a cell stays
        _, x, y = np.unravel_index(index[upwards], grid.shape)
        pictures = np.zeros((2, *grid.bev_shape, 3))
        for picture, colours in zip(pictures, (self.target, self.predicted), strict=True):
            picture[x, y] = colours[inside][upwards]
        return Panel(title, *pictures)


class Objective(nn.Module):
    """Base of all objectives, found by name in ``objectives.OBJECTIVES`` (``pretrain.objective``).

    Made of ``settings`` of its own ``Settings``, from the section ``objectives.NAME``; the
    ``store`` it will be trained or evaluated on; ``channels`` C of the BEV features; and whether
    augmentation turns the BEV frame.
    StoreError: the store lacks what it needs; the message says what to do.
    """

    Settings: ClassVar[type[Settings]] = Settings
    sensor: ClassVar[str] = "camera"
    """What its network looks through: a name of ``sensors.SENSORS``."""
    one_camera: ClassVar[bool] = False
    """Of lidar: whether it wants the rows in one random camera alone."""
    predicts_features: bool = False
    """Whether it predicts the teacher's features of voxels."""
    arrays: tuple[str, ...]
    """The store's arrays that it needs besides its sensor's and calibration."""
    head: nn.Module
    paint: Paint
    """How features are coloured: there once something is to be drawn."""

    def __init__(self, settings: Settings, store: TargetStore, channels: int, turned: bool):
        super().__init__()
        self.settings = settings
        self.grid: VoxelGrid = store.grid

    @classmethod
    def zero_shot(cls, settings: Settings) -> str:
        """The task, a name of ``tasks.TASKS``, as which it can be evaluated without finetuning, by
        its own ``head``; empty: none."""
        return ""

    def frame(self, batch: Batch) -> Tensor | None:
        """The BEV frame that it wants, ``ego_T_bev`` float32 (B, 4, 4) on the device; None: ego,
        turned as augmentation says."""
        return None

    def targets(self, batch: Batch, angle: Tensor) -> Targets:
        """Targets on the device, in the BEV frame: ego turned by ``angle`` float32 (B,), rad, if
        :meth:`frame` wants no other."""
        raise NotImplementedError

    def counts(self, targets: Targets) -> Tensor:
        """How many items each loss term is a mean over: float64 (T,), on any device."""
        raise NotImplementedError

    def forward(self, bev: Tensor, targets: Targets, counts: Sequence[float], share: float) -> Loss:
        """Predict from BEV features (B, C, X, Y) of a micro-batch, and compare with its targets.

        ``counts`` are of the whole optimiser step, over micro-batches and processes, as plain
        numbers (DDP would copy a tensor to the GPU, and reading it there would wait for the
        encoder). ``share`` is a micro-batch's part of the step: their losses add up to the step's.
        """
        raise NotImplementedError

    panels: Callable[[Tensor, Batch], list[Panel]] | None = None
    """``panels(bev, batch)``: pictures of a batch of one frame, nothing augmented, of which ``bev``
    (1, C, X, Y) are the features. None: it has no picture, for the reason below."""
    no_picture: ClassVar[str] = "has no picture of its own"
    """The end of a sentence that begins with the run's title."""
    dots: Callable[[Tensor, Batch], Dots] | None = None
    """``dots(rows, batch)``: likewise of lidar points, to be drawn into the images too."""
    volume: Callable[[Tensor, Batch], Volume] | None = None
    """``volume(bev, batch)``: likewise in 3-D, if it predicts voxels."""


def divisors(counts: Sequence[float]) -> list[float]:
    """Counts to divide sums by: where there is nothing the sum is 0, and so is the mean."""
    return [max(1.0, float(count)) for count in counts]
