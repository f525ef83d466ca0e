"""The JSON tables of a dataroot and its map expansion, with nuScenes' fixed names."""

import hashlib

import numpy as np

from occfeat_targets.demo_world import rig
from occfeat_targets.demo_world.labels import CATEGORIES
from occfeat_targets.demo_world.scene import MAP_SIZE, Plan, Scene

LOCATION = "boston-seaport"
_CATEGORIES = {
    "human.pedestrian.": "adult child wheelchair stroller personal_mobility police_officer "
    "construction_worker",
    "": "animal",
    "vehicle.": "car motorcycle bicycle bus.bendy bus.rigid truck construction "
    "emergency.ambulance emergency.police trailer",
    "movable_object.": "barrier trafficcone pushable_pullable debris",
    "static_object.": "bicycle_rack",
}
_ATTRIBUTES = {
    "vehicle.": "moving stopped parked",
    "cycle.": "with_rider without_rider",
    "pedestrian.": "sitting_lying_down standing moving",
}
_LEVELS = ("v0-40", "v40-60", "v60-80", "v80-100")
#: Numbers of official scenes of the train and the val split.
VERSIONS = {
    "v1.0-mini": ((61, 553, 655, 757, 796, 1077, 1094, 1100), (103, 916)),
    "v1.0-trainval": (
        (1, 2, 4, 5, 6, 7, 8, 9, 10, 11, 19, 20, *range(21, 35), *range(41, 63)),
        (3, 12, 13, 14, 15, 16, 17, 18, 35, 36, 38, 39, 92, 93, 94, 95),
    ),
}
_MAP_LAYERS = (
    "polygon line node drivable_area road_segment road_block lane ped_crossing walkway stop_line "
    "carpark_area road_divider lane_divider traffic_light lane_connector"
)
Tables = dict[str, list[dict]]
# Fields of the records of every table.
_COLUMNS = {
    "category": "token name description index",
    "attribute": "token name description",
    "visibility": "token level description",
    "sensor": "token channel modality",
    "log": "token logfile vehicle date_captured location",
    "map": "token category filename log_tokens",
    "lidarseg": "token sample_data_token filename",
    "scene": "token log_token name description nbr_samples first_sample_token last_sample_token",
    "sample": "token prev next scene_token timestamp",
    "calibrated_sensor": "token sensor_token translation rotation camera_intrinsic",
    "ego_pose": "token timestamp translation rotation",
    "sample_data": "token prev next timestamp sample_token ego_pose_token calibrated_sensor_token "
    "is_key_frame fileformat height width filename",
    "instance": "token category_token nbr_annotations first_annotation_token last_annotation_token",
    "sample_annotation": "token prev next sample_token instance_token attribute_tokens "
    "visibility_token translation size rotation num_lidar_pts num_radar_pts",
}


def scene_names(version: str, scenes: int) -> list[str]:
    """Official names for that many scenes: first those of train, then about one in four of val.

    Raises:
        ValueError: unknown version, or a number of scenes that the version has no names for.
    """
    if version not in VERSIONS:
        raise ValueError(f"unknown version {version!r}: use one of {', '.join(VERSIONS)}")
    train, val = VERSIONS[version]
    most = len(train) + len(val)
    if not 2 <= scenes <= most:
        raise ValueError(
            f"scenes must be between 2 (one to train, one to validate) and {most} for "
            f"{version}, but is {scenes}"
        )
    held_out = min(len(val), max(1, round(scenes / 4), scenes - len(train)))
    return [f"scene-{number:04d}" for number in train[: scenes - held_out] + val[:held_out]]


def token(*parts: object) -> str:
    """A token of 32 hex characters that depends on the parts alone."""
    return hashlib.md5("/".join(map(str, parts)).encode(), usedforsecurity=False).hexdigest()


def build_tables(
    plan: Plan, names: list[str], scenes: list[Scene], results: list[list[list[dict]]]
) -> Tables:
    """All records of a world: table name -> records, as written to <version>/<name>.json.

    ``names`` are the official ones of ``scenes``; ``results`` what was measured, by scene and
    sample: object_id, num_lidar_pts and visibility of what is seen.
    """
    tables: Tables = {name: [] for name in _COLUMNS}
    # What was annotated with boxes comes first, as in nuScenes.
    for name in dict.fromkeys((*_names(_CATEGORIES), *CATEGORIES)):
        _add(tables, "category", token("category", name), name, name, CATEGORIES.index(name))
    for name in _names(_ATTRIBUTES):
        _add(tables, "attribute", token("attribute", name), name, name)
    for number, level in enumerate(_LEVELS, start=1):
        text = f"visibility of whole object is {level[1:]} %"
        _add(tables, "visibility", str(number), level, text)
    for sensor in rig.SENSORS:
        modality = "camera" if sensor.intrinsics else "lidar"
        _add(tables, "sensor", token("sensor", sensor.channel), sensor.channel, modality)
    for index, (name, scene, measured) in enumerate(zip(names, scenes, results, strict=True)):
        owner = f"{plan.seed}/{name}"  # makes its tokens differ from other scenes'
        log, key = token("log", owner), token("scene", owner)
        samples = [token("sample", owner, number) for number in range(plan.samples)]
        _add(tables, "log", log, scene.log, "n000", "2018-07-24", LOCATION)
        text = f"Synthetic street, {scene.drive.speed:.1f} m/s"
        _add(tables, "scene", key, log, name, text, len(samples), samples[0], samples[-1])
        for number, links in enumerate(_chain(samples)):
            _add(tables, "sample", *links, key, scene.timestamp(number))
            _add(tables, "lidarseg", *lidarseg_row(plan, index, number))
        _sensor_records(tables, owner, scene, samples)
        _annotation_records(tables, owner, scene, samples, measured)
    key, logs = token("map", plan.seed), [log["token"] for log in tables["log"]]
    _add(tables, "map", key, "semantic_prior", f"maps/{key}.png", logs)
    return tables


def lidarseg_row(plan: Plan, index: int, sample: int) -> tuple[str, str, str]:
    """Of keyframe ``sample`` of scene ``index``: both tokens, which are the same, and the file."""
    owner = f"{plan.seed}/{scene_names(plan.version, plan.scenes)[index]}"
    key = token("sample_data", owner, rig.LIDAR_SENSOR.channel, sample)
    return key, key, f"lidarseg/{plan.version}/{key}_lidarseg.bin"


def _names(groups: dict[str, str]) -> list[str]:
    return [group + name for group in groups for name in groups[group].split()]


def _add(tables: Tables, table: str, *values: object) -> None:
    """Append a record with the values of its table's columns."""
    tables[table].append(dict(zip(_COLUMNS[table].split(), values, strict=True)))


def _chain(tokens: list[str]) -> list[tuple[str, str, str]]:
    """Links of records that follow one another: (token, prev, next) of each."""
    return list(zip(tokens, ["", *tokens[:-1]], [*tokens[1:], ""], strict=True))


def _sensor_records(tables: Tables, owner: str, scene: Scene, samples: list[str]) -> None:
    """Calibration, poses and files of all sensors in one scene."""
    for sensor in rig.SENSORS:
        channel, camera = sensor.channel, bool(sensor.intrinsics)
        calibrated = token("calibrated_sensor", owner, channel)
        pose = list(sensor.translation), list(sensor.rotation)
        matrix = sensor.camera_matrix().tolist() if camera else []
        _add(tables, "calibrated_sensor", calibrated, token("sensor", channel), *pose, matrix)
        kind = ("jpg", *rig.IMAGE_HW) if camera else ("pcd", 0, 0)
        chain = _chain([token("sample_data", owner, channel, n) for n in range(len(samples))])
        for number, links in enumerate(chain):
            timestamp = scene.timestamp(number) - sensor.early_us
            _add(tables, "ego_pose", links[0], timestamp, *scene.ego_pose(timestamp))
            owners = samples[number], links[0], calibrated
            file = scene.file_name(number, sensor)
            _add(tables, "sample_data", *links, timestamp, *owners, True, *kind, file)


def _annotation_records(
    tables: Tables, owner: str, scene: Scene, samples: list[str], measured: list[list[dict]]
) -> None:
    """Annotations of a scene, and an instance for everything that is annotated at least once."""
    frames = [{entry["object_id"]: entry for entry in entries} for entries in measured]
    for actor in scene.actors:
        key = actor.object_id
        entries = [(number, found[key]) for number, found in enumerate(frames) if key in found]
        if not entries:
            continue
        instance, category = token("instance", owner, key), token("category", actor.category)
        keys = [token("annotation", owner, key, number) for number, _ in entries]
        _add(tables, "instance", instance, category, len(keys), keys[0], keys[-1])
        attributes = [token("attribute", actor.attribute)] if actor.attribute else []
        for links, (number, entry) in zip(_chain(keys), entries, strict=True):
            x, y, yaw = actor.pose(scene.seconds(scene.timestamp(number)))
            owners = samples[number], instance, attributes, entry["visibility"]
            box = [x, y, actor.size[2] / 2], list(actor.size), rig.quaternion_from_euler(yaw)
            _add(tables, "sample_annotation", *links, *owners, *box, entry["num_lidar_pts"], 0)


def map_expansion(scenes: list[Scene], seed: int) -> dict:
    """Contents of maps/expansion/<LOCATION>.json: the polygons that the ground is painted from."""
    layers: Tables = {name: [] for name in _MAP_LAYERS.split()}

    def add(layer: str, **fields: object) -> str:
        key = token("map", seed, layer, len(layers[layer]))
        layers[layer].append({"token": key, **fields})
        return key

    def nodes(points: np.ndarray) -> list[str]:
        return [add("node", x=x, y=y) for x, y in points.round(9).tolist()]  # to the nanometre

    for scene in scenes:
        for layer, polygons in scene.layout.polygons.items():
            whole = layer == "drivable_area"
            holes = [{"node_tokens": nodes(hole)} for hole in scene.layout.holes if whole]
            for points in polygons:
                key = add("polygon", exterior_node_tokens=nodes(points), holes=holes)
                add(layer, **({"polygon_tokens": [key]} if whole else {"polygon_token": key}))
        for layer, lines in scene.layout.lines.items():
            for points in lines:
                add(layer, line_token=add("line", node_tokens=nodes(points)))
    canvas = {"version": "1.3", "canvas_edge": list(MAP_SIZE)}
    return {**canvas, **layers, "arcline_path_3": {}, "connectivity": {}}
