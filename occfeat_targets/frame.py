"""One keyframe to its arrays: a pure function, no cluster and no store.

In a notebook::

    dataset = read_dataset(dataroot, None, config)
    teacher = load_teacher(config.teacher)
    outputs = make_outputs(config, layout_of(config, vars(dataset), teacher.dim))
    frame_targets(dataset.records[0], config, outputs, teacher)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from occfeat_targets.config import TargetsConfig
from occfeat_targets.outputs import ALWAYS, OUTPUTS
from occfeat_targets.outputs.base import FrameInputs, Layout, Output
from occfeat_targets.sources.base import FrameError, FrameRecord
from occfeat_targets.store.settings import Settings
from occfeat_targets.teachers.base import Teacher

SHARED = ("cameras", "box_classes", "vehicle_classes", "map_classes")
"""What the frames of a dataset have in common: fields of ``Dataset``, attributes of a store."""


def layout_of(config: TargetsConfig, shared: Mapping[str, Any], feature_dim: int) -> Layout:
    """What the outputs of a store have in common.

    Args:
        config: its settings.
        shared: has the keys :data:`SHARED`: ``vars(dataset)``, or a store's attributes.
        feature_dim: channels of the teacher.
    """
    return Layout(
        grid=config.grid,
        image_size=config.images.size,
        max_points=config.lidar.max_points * config.lidar.sweeps,
        sweeps=config.lidar.sweeps,
        feature_dim=feature_dim,
        **{key: tuple(shared[key]) for key in SHARED},
    )


def make_outputs(config: TargetsConfig, layout: Layout) -> list[Output]:
    """The outputs of a store, each with its settings."""
    names = [name for name in ALWAYS if name != "map" or layout.map_classes]
    outputs = [OUTPUTS(name)(getattr(config, name, Settings()), layout) for name in names]
    for name, values in config.outputs.items():
        output = OUTPUTS(name)
        outputs.append(output(output.Settings.of(values), layout))
    return outputs


def stored_outputs(attrs: dict[str, Any]) -> tuple[TargetsConfig, list[Output]]:
    """Settings and outputs of a store, by its root attributes."""
    config = TargetsConfig.of(attrs["config"])
    return config, make_outputs(config, layout_of(config, attrs, attrs["teacher"]["dim"]))


def frame_targets(
    record: FrameRecord, config: TargetsConfig, outputs: Sequence[Output], teacher: Teacher
) -> dict[str, np.ndarray]:
    """What the store holds of one frame that is not in the dataset's tables.

    Returns:
        Arrays by the names, dtypes and axes of the outputs' specs, trimmed to what is valid.

    Raises:
        FrameError: naming scene, sample and file, when the frame can't be processed.
    """
    layout, arrays = outputs[0].layout, {}
    inputs = FrameInputs(
        record,
        layout,
        config.lidar.near_m,
        teacher,
        config.teacher.input_size,
        full_size=config.images.corruption != "none",  # which works on the original's pixels
    )
    try:
        for output in outputs:
            arrays |= output.compute(inputs)
    except ValueError as error:  # ImageError among them
        raise FrameError(f"{record}: {error}") from error
    return arrays
