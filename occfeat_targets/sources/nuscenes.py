"""nuScenes: dataroot to plain records. The only module that imports nuscenes-devkit."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from itertools import chain, islice
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import (
    AfterValidator,
    Field,
    FiniteFloat,
    TypeAdapter,
    ValidationError,
    create_model,
)
from tqdm import tqdm

from occfeat_targets.geometry import inverse_rigid, rigid, yaw
from occfeat_targets.sources.base import (
    Boxes,
    Dataset,
    FrameRecord,
    FramesSettings,
    MapLayers,
    MapMode,
    SourceError,
)
from occfeat_targets.sources.nuscenes_map import MAP_CLASSES, read_map

if TYPE_CHECKING:
    from nuscenes.nuscenes import NuScenes

CAMERAS = (
    "CAM_FRONT_LEFT",
    "CAM_FRONT",
    "CAM_FRONT_RIGHT",
    "CAM_BACK_LEFT",
    "CAM_BACK",
    "CAM_BACK_RIGHT",
)
LIDAR = "LIDAR_TOP"
LIDAR_ROW_BYTES = 20  # x, y, z, intensity, ring as float32
_SPLITS = {
    "v1.0-mini": ("mini_train", "mini_val"),
    "v1.0-trainval": ("train", "val"),
    "v1.0-test": ("test",),
}


def _inside(name: str) -> str:
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\0" in name:
        raise ValueError("must be a path inside the dataroot")
    return name


_Name = Annotated[str, Field(max_length=1000), AfterValidator(_inside)]
_Pixels = Annotated[int, Field(ge=0, lt=2**16)]
_Vector = Annotated[list[FiniteFloat], Field(min_length=3, max_length=3)]
_Rotation = Annotated[list[FiniteFloat], Field(min_length=4, max_length=4)]
_POSE = {"token": str, "rotation": _Rotation, "translation": _Vector}
_BOX = {"size": _Vector, "category_name": str, "visibility_token": Literal["", *"1234"]}
_ROWS: dict[str, Any] = {
    "scene": {"name": _Name, "log_token": str, "first_sample_token": str},
    "sample": {
        **dict.fromkeys(("token", "scene_token", "next"), str),
        "data": dict[str, str],  # this and the next by the devkit
        "anns": list[str],
    },
    "sample_data": {
        **dict.fromkeys(("token", "ego_pose_token", "calibrated_sensor_token", "prev"), str),
        "filename": _Name,
        "timestamp": Annotated[int, Field(ge=0, lt=2**63)],
        "height": _Pixels,
        "width": _Pixels,
    },
    "ego_pose": _POSE,
    "calibrated_sensor": {**_POSE, "camera_intrinsic": list[_Vector]},
    "sample_annotation": {**_POSE, **_BOX},
    "log": {"location": _Name},
    "lidarseg": {"filename": _Name},
}
"""What is used of a table's rows, and checked then."""
_NEVER_BOXED = ("noise", "flat.", "static.", "vehicle.ego")
"""Categories that nuScenes-lidarseg adds begin so."""


class NuScenesSource:
    """nuScenes, and whatever is written like it; see ``base.Source``."""

    def detect(self, dataroot: Path) -> bool:
        """Whether there is a directory of tables."""
        return any(dataroot.glob("*/sample_data.json"))

    def read(
        self,
        dataroot: Path,
        version: str | None,
        frames: FramesSettings,
        sweeps: int,
        map_mode: MapMode,
    ) -> Dataset:
        """See ``base.Source``: reads the tables once."""
        from nuscenes.nuscenes import NuScenes

        version = find_version(dataroot, version)
        dataroot = dataroot.resolve()  # workers may run elsewhere
        try:
            nusc = NuScenes(version=version, dataroot=str(dataroot), verbose=False)
        except Exception as error:  # whatever its code says of tables that are not as it thinks
            problem = f"nuscenes-devkit cannot load {dataroot / version}: {error!r:.300}"
            raise SourceError(problem) from error
        split_of = _split_of_scene(dataroot, version)
        scenes = _selected_scenes(nusc, frames, split_of)
        map_path = _map_paths(nusc, dataroot, scenes, map_mode)
        chains = (_chain(nusc, "sample", scene.first_sample_token) for scene in scenes)
        samples = list(islice(chain.from_iterable(chains), frames.limit))
        progress = tqdm(samples, desc="reading tables", unit="frame", disable=None)
        is_demo = (dataroot / "demo_world.json").exists()
        names = dict.fromkeys(str(row.get("name", "")) for row in nusc.category)
        classes = tuple(name for name in names if not name.startswith(_NEVER_BOXED))
        return Dataset(
            records=[_record(nusc, split_of, map_path, sample, sweeps) for sample in progress],
            name="occfeat demo world" if is_demo else "nuScenes",
            version=version,
            reader=metadata.version("nuscenes-devkit"),
            scenes=tuple(scene.name for scene in scenes),
            splits=tuple(dict.fromkeys(split_of.values())),
            cameras=CAMERAS,
            box_classes=classes,
            vehicle_classes=tuple(name for name in classes if name.startswith("vehicle.")),
            map_classes=MAP_CLASSES if any(map_path.values()) else (),
            lidarseg_classes=_lidarseg_classes(nusc),
        )

    def n_returns(self, path: Path) -> int:
        """See ``base.Source``."""
        try:
            size = path.stat().st_size
        except OSError:
            raise ValueError("is missing") from None
        if not path.is_file():
            raise ValueError("is no regular file")
        if size == 0 or size % LIDAR_ROW_BYTES:
            raise ValueError(f"is truncated: {size} bytes, not a multiple of {LIDAR_ROW_BYTES}")
        return size // LIDAR_ROW_BYTES

    def read_lidar(self, path: Path) -> np.ndarray:
        """See ``base.Source``."""
        try:
            self.n_returns(path)
            return np.fromfile(path, "<f4").reshape(-1, 5)[:, :4]
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} {error}") from error

    def read_lidarseg(self, path: Path) -> np.ndarray:
        """See ``base.Source``: a file ``lidarseg/<version>/<token>_lidarseg.bin``."""
        try:
            return np.fromfile(path, np.uint8)
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error}") from error

    def read_map(self, path: str) -> MapLayers:
        """See ``base.Source``: a file ``maps/expansion/<location>.json``."""
        return read_map(path)


def find_version(dataroot: Path, version: str | None) -> str:
    """The dataset version to read: the one asked for, or the only one there. Raises SourceError: no
    dataroot, no such version, or several to choose from."""
    if not dataroot.is_dir():
        raise SourceError(f"no such directory: {dataroot}")
    found = sorted(p.parent.name for p in dataroot.glob("*/sample_data.json"))
    if not found:
        raise SourceError(
            f"{dataroot} is not a nuScenes dataroot: it should hold samples/, maps/ and a table "
            "directory such as v1.0-mini/ with sample_data.json in it"
        )
    if version is None and len(found) > 1:
        raise SourceError(f"{dataroot} holds {', '.join(found)}: choose one with --version")
    if version is not None and version not in found:
        raise SourceError(f"no version {version} in {dataroot}; found {', '.join(found)}")
    return version or found[0]


def _split_of_scene(dataroot: Path, version: str) -> dict[str, str]:
    """Scene name to split: the official ones, or the dataroot's own ``<version>/splits.json``."""
    from nuscenes.utils.splits import create_splits_scenes

    own = dataroot / version / "splits.json"  # the devkit's convention for custom splits
    if own.exists():
        try:
            splits = TypeAdapter(dict[str, list[str]]).validate_json(own.read_bytes())
        except (OSError, ValueError) as error:
            said = f'{own} should be {{"train": [scene names], "val": [scene names]}}'
            raise SourceError(f"{said}: {str(error).splitlines()[0]}") from error
    elif version in _SPLITS:
        official = create_splits_scenes()
        splits = {name: official[name] for name in _SPLITS[version]}
    else:
        raise SourceError(
            f"{version} has no official splits ({', '.join(_SPLITS)} have); describe them in "
            f'{own} as {{"train": [scene names], "val": [scene names]}}'
        )
    return {scene: split for split, scenes in splits.items() for scene in scenes}


def _selected_scenes(nusc: NuScenes, frames: FramesSettings, split_of: dict[str, str]) -> list:
    rows = [_row(nusc, "scene", scene["token"]) for scene in nusc.scene]
    names = [scene.name for scene in rows]
    if lost := [name for name in names if name not in split_of]:
        raise SourceError(f"scenes in no split of {nusc.version}: {', '.join(lost[:5])}")
    for name in frames.scenes:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=3) or names[:3]
            raise SourceError(f"no scene {name} in {nusc.version}; there are {', '.join(near)}, …")
    for split in frames.splits:
        if split not in split_of.values():
            known = ", ".join(dict.fromkeys(split_of.values()))
            raise SourceError(f"no split {split} in {nusc.version}; there are {known}")
    kept = frames.splits or split_of.values()
    wanted = {name for name in frames.scenes or names if split_of[name] in kept}
    scenes = [scene for scene in rows if scene.name in wanted]
    if not scenes:
        raise SourceError(
            f"no keyframes left: of the {len(names)} of {nusc.version} in {nusc.dataroot} no scene "
            f"is in splits {list(frames.splits)} and scenes {list(frames.scenes)}"
        )
    return scenes


def _map_paths(nusc: NuScenes, dataroot: Path, scenes: list, mode: MapMode) -> dict[str, str]:
    """Map-expansion file of each scene's location, by scene name; empty strings for no maps."""
    place = {s.name: _row(nusc, "log", s.log_token).location for s in scenes}
    paths = {name: str(dataroot / "maps/expansion" / f"{place[name]}.json") for name in place}
    missing = [path for path in dict.fromkeys(paths.values()) if not Path(path).exists()]
    if mode == "never" or (mode == "auto" and {*missing} == {*paths.values()}):
        return dict.fromkeys(paths, "")
    if missing:
        raise SourceError(
            f"missing map expansion: {', '.join(missing)}. Unpack nuScenes' map expansion (v1.3) "
            "there, or build without map labels: --set map.mode=never"
        )
    return paths


@cache
def _model(table: str) -> Any:
    columns: Any = {name: (kind, ...) for name, kind in _ROWS[table].items()}
    return create_model(table, **columns)


def _row(nusc: NuScenes, table: str, token: str) -> Any:
    """A row of a table, checked. Raises SourceError, naming table and row."""
    try:
        return _model(table).model_validate(nusc.get(table, token), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        what = ".".join(map(str, first["loc"]))
        problem = f"row {token:.40}: {what}: {first['msg']}, got {first['input']!r:.60}"
    except (KeyError, TypeError):
        problem = f"there is no row {token!r:.60}, which another table names"
    raise SourceError(f"{nusc.version}/{table}.json: {problem}")


def _chain(nusc: NuScenes, table: str, token: str, link: str = "next") -> Iterator[Any]:
    seen = set()
    while token or not seen:  # the first must be there, whatever it is called
        if token in seen:
            problem = f"row {token} comes after itself: {link} goes in a circle"
            raise SourceError(f"{nusc.version}/{table}.json: {problem}")
        seen.add(token)
        row = _row(nusc, table, token)
        yield row
        token = getattr(row, link)


def _sensor_pose(nusc: NuScenes, data: Any) -> tuple[np.ndarray, np.ndarray, Any]:
    """``(global_T_ego, ego_T_sensor, calibrated_sensor)`` of a sample_data at its own time."""
    pose = _row(nusc, "ego_pose", data.ego_pose_token)
    sensor = _row(nusc, "calibrated_sensor", data.calibrated_sensor_token)
    global_T_ego = rigid(pose.rotation, pose.translation)
    return global_T_ego, rigid(sensor.rotation, sensor.translation), sensor


def _record(
    nusc: NuScenes, split_of: dict, map_path: dict, sample: Any, n_sweeps: int
) -> FrameRecord:
    """One keyframe; the dicts have splits and map files by scene name."""
    name = _row(nusc, "scene", sample.scene_token).name
    where = f"{name}, sample {sample.token}"
    if missing := [c for c in (LIDAR, *CAMERAS) if c not in sample.data]:
        raise SourceError(f"{where}: no keyframe of {', '.join(missing)}")
    lidar = _row(nusc, "sample_data", sample.data[LIDAR])
    global_T_ego = _sensor_pose(nusc, lidar)[0]
    ego_T_global = inverse_rigid(global_T_ego)
    sweep_paths, ego_T_sweep = [], []
    for sweep in islice(_chain(nusc, "sample_data", lidar.token, "prev"), n_sweeps):
        global_T_then, then_T_lidar, _sensor = _sensor_pose(nusc, sweep)
        sweep_paths.append(str(Path(nusc.dataroot) / sweep.filename))
        ego_T_sweep.append(ego_T_global @ global_T_then @ then_T_lidar)
    images, K, cam_T_ego = [], [], []
    for camera in CAMERAS:
        image = _row(nusc, "sample_data", sample.data[camera])
        global_T_egocam, egocam_T_cam, sensor = _sensor_pose(nusc, image)
        if len(sensor.camera_intrinsic) != 3:
            raise SourceError(f"{where}: {camera}: camera_intrinsic is not 3x3")
        images.append(image)
        K.append(sensor.camera_intrinsic)
        # Through the camera's own ego pose: the car moves between lidar and camera times.
        cam_T_ego.append(inverse_rigid(global_T_egocam @ egocam_T_cam) @ global_T_ego)
    return FrameRecord(
        token=sample.token,
        scene=name,
        split=split_of[name],
        timestamp_us=lidar.timestamp,
        map_path=map_path[name],
        image_paths=tuple(str(Path(nusc.dataroot) / image.filename) for image in images),
        image_hw=tuple((image.height, image.width) for image in images),
        K=np.array(K, dtype=np.float64),
        cam_T_ego=np.stack(cam_T_ego),
        sweep_paths=tuple(sweep_paths),
        ego_T_sweep=np.stack(ego_T_sweep),
        global_T_ego=global_T_ego,
        boxes=_boxes(nusc, sample.anns, ego_T_global),
        lidarseg_path=_lidarseg_path(nusc, lidar.token),
    )


def _lidarseg_path(nusc: NuScenes, token: str) -> str:
    """The file of labels of a lidar keyframe, whose row has the keyframe's token, if there is."""
    try:
        nusc.get("lidarseg", token)
    except (AssertionError, KeyError):  # no such table, no such row
        return ""
    return str(Path(nusc.dataroot) / _row(nusc, "lidarseg", token).filename)


def _lidarseg_classes(nusc: NuScenes) -> tuple[str, ...]:
    """Names by index, if the dataroot has nuScenes-lidarseg."""
    names = nusc.lidarseg_idx2name_mapping if "lidarseg" in nusc.table_names else {}
    if [*map(str, sorted(names))] != [*map(str, range(len(names)))] or len(names) > 255:
        problem = f"`index` should count its rows from 0, got {sorted(names)!s:.100}"
        raise SourceError(f"{nusc.version}/category.json: {problem}")
    return tuple(str(names[i]) for i in range(len(names)))


def _boxes(nusc: NuScenes, tokens: list[str], ego_T_global: np.ndarray) -> Boxes:
    rows = [_row(nusc, "sample_annotation", token) for token in tokens]
    n = len(rows)
    ego_T_box = ego_T_global @ rigid(
        np.reshape([row.rotation for row in rows], (n, 4)),
        np.reshape([row.translation for row in rows], (n, 3)),
    )
    width, length, height = np.reshape([row.size for row in rows], (n, 3)).T
    return Boxes(
        category=tuple(row.category_name for row in rows),
        box=np.column_stack([ego_T_box[:, :3, 3], length, width, height, yaw(ego_T_box)]),
        visibility=np.array([int(row.visibility_token or 0) for row in rows], dtype=np.uint8),
    )
