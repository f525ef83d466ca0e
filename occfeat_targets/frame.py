"""One keyframe to its arrays: a pure function, no cluster and no store.

In a notebook::

    dataset = read_dataset(dataroot, None, config)
    teacher = load_teacher(config.teacher)
    outputs = make_outputs(config, layout_of(config, vars(dataset), teacher.dim))
    frame_targets(dataset.records[0], config, outputs, teacher)
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from occfeat_targets.config import TargetsConfig
from occfeat_targets.outputs import OPTIONAL, OUTPUTS
from occfeat_targets.outputs.base import FrameInputs, Layout, Output
from occfeat_targets.sources.base import FrameError, FrameRecord
from occfeat_targets.store.settings import Settings
from occfeat_targets.teachers.base import Teacher

SHARED = ("cameras", "box_classes", "vehicle_classes", "map_classes")
"""What the frames of a dataset have in common: fields of ``Dataset``, attributes of a store."""
MAY_SHARE = ("lidarseg_classes",)
"""Likewise, but attributes of those stores alone where there are some."""


def layout_of(
    config: TargetsConfig, shared: Mapping[str, Any], feature_dim: int, patch_size: int = 1
) -> Layout:
    """What the outputs of a store have in common, by its settings, the teacher's channels and
    patch, and ``shared``, which has the keys :data:`SHARED` and may have :data:`MAY_SHARE`:
    ``vars(dataset)``, or a store's attributes."""
    height, width = (side // patch_size for side in config.teacher.size_of(patch_size))
    return Layout(
        grid=config.grid,
        image_size=config.images.size,
        max_points=config.lidar.max_points * config.lidar.sweeps,
        sweeps=config.lidar.sweeps,
        feature_dim=feature_dim,
        feature_hw=(height, width),
        **{key: tuple(shared[key]) for key in SHARED},
        **{key: tuple(shared.get(key, ())) for key in MAY_SHARE},
    )


def make_outputs(config: TargetsConfig, layout: Layout) -> list[Output]:
    """The outputs of a store, each with its settings."""
    left_out = OPTIONAL if layout.map_classes else ("map", *OPTIONAL)
    names = [name for name in OUTPUTS.names if name not in left_out]
    outputs = [OUTPUTS(name)(getattr(config, name, Settings()), layout) for name in names]
    for name, values in config.outputs.items():
        output = OUTPUTS(name)
        outputs.append(output(output.Settings.of(values), layout))
    return outputs


def stored_outputs(attrs: dict[str, Any]) -> tuple[TargetsConfig, list[Output]]:
    """Settings and outputs of a store, by its root attributes. A store of unknown origin is read
    within ``registry.only_plugins``."""
    config = TargetsConfig.of(attrs["config"])
    dim, patch_size = attrs["teacher"]["dim"], attrs["teacher"].get("patch_size", 1)
    return config, make_outputs(config, layout_of(config, attrs, dim, patch_size))


def frame_targets(
    record: FrameRecord, config: TargetsConfig, outputs: Sequence[Output], teacher: Teacher
) -> dict[str, np.ndarray]:
    """What the store holds of one frame that is not in the tables: arrays by the names, dtypes and
    axes of the outputs' specs, trimmed to what is valid. Raises FrameError: the frame can't be
    processed (naming scene, sample, file), or an output breaks its specs (naming the array)."""
    full_size = config.images.corruption != "none"  # it works on the original's pixels
    layout, near_m, size = outputs[0].layout, config.lidar.near_m, config.teacher.size_for(teacher)
    inputs = FrameInputs(record, layout, near_m, teacher, size, full_size)
    arrays = inputs.arrays
    try:
        for output in outputs:
            given = output.compute(inputs)
            _require_specs(output, given)
            arrays |= given
        _require_same_rows(outputs, arrays)
    except ValueError as error:
        raise FrameError(f"{record}: {error}") from error
    return arrays


def _require_specs(output: Output, arrays: Mapping[str, np.ndarray]) -> None:
    """Raise ValueError unless an output's arrays are as its specs say."""
    specs, name = {spec.name: spec for spec in output.specs()}, type(output).__name__
    missing = {spec.name for spec in specs.values() if spec.chunk is not None} - arrays.keys()
    if missing or arrays.keys() - specs.keys():
        raise ValueError(f"{name} gives {[*arrays]}, its specs are of {[*specs]}")
    for key, values in arrays.items():
        spec, values, shape = specs[key], np.asarray(values), specs[key].shape
        if spec.rows:
            if len(values) > shape[0]:
                text = f"{len(values)} rows of {key}, the store has room for {shape[0]}"
                raise ValueError(f"{name} gives {text}: raise {spec.setting}")
            shape = (len(values), *shape[1:])
        if (values.dtype, values.shape) != (np.dtype(spec.dtype), shape):
            given = f"{values.dtype} {values.shape}, its spec says {spec.dtype} {spec.axes}"
            raise ValueError(f"{name} gives {key} as {given}")


def _require_same_rows(outputs: Sequence[Output], arrays: Mapping[str, np.ndarray]) -> None:
    """Raise ValueError if arrays with the same count of rows differ in length."""
    rows: dict[str, dict[str, int]] = {}
    for spec in (spec for output in outputs for spec in output.specs() if spec.rows):
        counter = str(spec.rows)
        lengths = rows.setdefault(counter, {})
        if counter in arrays:
            lengths[counter] = int(np.ravel(arrays[counter])[-1])
        lengths[spec.name] = len(arrays[spec.name])
    for counter, lengths in rows.items():
        if len(set(lengths.values())) > 1:
            raise ValueError(f"arrays counted by {counter} differ in their rows: {lengths}")
