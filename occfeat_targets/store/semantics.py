"""The 16 classes by which lidar segmentation on nuScenes is scored, and how each is coloured."""

from collections.abc import Sequence

import numpy as np

IGNORED = 255
CLASSES = {
    "barrier": ("movable_object.barrier",),
    "bicycle": ("vehicle.bicycle",),
    "bus": ("vehicle.bus.bendy", "vehicle.bus.rigid"),
    "car": ("vehicle.car",),
    "construction_vehicle": ("vehicle.construction",),
    "motorcycle": ("vehicle.motorcycle",),
    "pedestrian": (
        *("human.pedestrian.adult", "human.pedestrian.child"),
        *("human.pedestrian.construction_worker", "human.pedestrian.police_officer"),
    ),
    "traffic_cone": ("movable_object.trafficcone",),
    "trailer": ("vehicle.trailer",),
    "truck": ("vehicle.truck",),
    "driveable_surface": ("flat.driveable_surface",),
    "other_flat": ("flat.other",),
    "sidewalk": ("flat.sidewalk",),
    "terrain": ("flat.terrain",),
    "manmade": ("static.manmade",),
    "vegetation": ("static.vegetation",),
}
"""Name to the categories of nuScenes-lidarseg that it joins, as in the devkit's challenge
(``eval/lidarseg/utils.py``); what is in none is ignored, the ego car for one."""
COLOURS = np.array(
    [
        *([0.44, 0.50, 0.56], [0.86, 0.08, 0.24], [1.00, 0.50, 0.31], [1.00, 0.62, 0.00]),
        *([0.91, 0.59, 0.27], [1.00, 0.24, 0.39], [0.00, 0.00, 0.90], [0.18, 0.31, 0.31]),
        *([1.00, 0.55, 0.00], [1.00, 0.39, 0.28], [0.00, 0.81, 0.75], [0.69, 0.00, 0.29]),
        *([0.29, 0.00, 0.29], [0.44, 0.71, 0.24], [0.87, 0.72, 0.53], [0.00, 0.69, 0.00]),
        [0.75, 0.75, 0.75],
    ]
)
"""RGB (17, 3) in 0..1 of each class, near to nuScenes' own, the last of what is ignored."""


def class_numbers(lidarseg_classes: Sequence[str]) -> np.ndarray:
    """Number 0..15 of the class, or :data:`IGNORED`, of each of a store's ``lidarseg_classes``:
    uint8 (n,), to be indexed with the array ``lidarseg``."""
    numbers = {name: i for i, names in enumerate(CLASSES.values()) for name in names}
    return np.array([numbers.get(name, IGNORED) for name in lidarseg_classes], dtype=np.uint8)


def majority(group: np.ndarray, classes: np.ndarray, n_groups: int) -> np.ndarray:
    """The class that most points of each group have: uint8 (n_groups,), of M points' group int
    (M,) and class number or :data:`IGNORED` (M,). The ignored ones vote too, and win a tie; then
    the lowest number does; a group without points has :data:`IGNORED` (POP-3D's
    ``dataset_wrapper.py``, where the ignored class is number 0)."""
    n = len(CLASSES) + 1
    votes = (classes.astype(np.int64) + 1) % (IGNORED + 1)  # ignored first
    counts = np.bincount(group.astype(np.int64) * n + votes, minlength=n_groups * n)
    return (counts.reshape(n_groups, n).argmax(axis=1) - 1).astype(np.uint8)


def colours_of(classes: np.ndarray) -> np.ndarray:
    """RGB float (M, 3) in 0..1 of class numbers (M,), :data:`IGNORED` among them."""
    return COLOURS[np.minimum(classes, len(CLASSES))]
