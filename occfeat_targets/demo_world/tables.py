"""The JSON tables of a dataroot and its map expansion, with nuScenes' fixed names."""

from __future__ import annotations

import hashlib
from collections import defaultdict

import numpy as np

from occfeat_targets.demo_world import rig
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


def scene_names(version: str, scenes: int) -> list[str]:
    """Official names for that many scenes, those of the train split first.

    About one in four is of the val split, at least one of each.

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


def map_image_name(plan: Plan) -> str:
    """File name of the map raster, which the devkit wants to exist."""
    return f"maps/{token('map', plan.seed)}.png"


def build_tables(
    plan: Plan, names: list[str], scenes: list[Scene], results: list[list[list[dict]]]
) -> Tables:
    """All records of a world: table name -> records, as written to <version>/<name>.json.

    ``names`` are the official ones of ``scenes``; ``results`` what was measured in each frame, by
    scene and sample (see ``frames.read_result``).
    """
    tables: Tables = defaultdict(list)
    for table, groups in (("category", _CATEGORIES), ("attribute", _ATTRIBUTES)):
        for name in (group + name for group in groups for name in groups[group].split()):
            tables[table].append({"token": token(table, name), "name": name, "description": name})
    for number, level in enumerate(_LEVELS, start=1):
        text = f"visibility of whole object is {level[1:]} %"
        tables["visibility"].append({"token": str(number), "level": level, "description": text})
    for sensor in rig.SENSORS:
        key, modality = token("sensor", sensor.channel), "camera" if sensor.intrinsics else "lidar"
        tables["sensor"].append({"token": key, "channel": sensor.channel, "modality": modality})
    for name, scene, measured in zip(names, scenes, results, strict=True):
        samples = _scene_records(tables, plan, name, scene)
        _sensor_records(tables, plan, name, scene, samples)
        _annotation_records(tables, plan, name, scene, samples, measured)
    tables["map"] = [
        {
            "token": token("map", plan.seed),
            "category": "semantic_prior",
            "filename": map_image_name(plan),
            "log_tokens": [log["token"] for log in tables["log"]],
        }
    ]
    return tables


def _chain(table: str, *parts: object, count: int) -> list[dict[str, str]]:
    """Tokens of ``count`` records that follow one another, with those before and after."""
    keys = ["", *(token(table, *parts, number) for number in range(count)), ""]
    return [
        {"token": key, "prev": before, "next": after}
        for before, key, after in zip(keys, keys[1:], keys[2:], strict=False)
    ]


def _scene_records(tables: Tables, plan: Plan, name: str, scene: Scene) -> list[str]:
    """A scene with its log and samples; returns the samples' tokens."""
    log, key = token("log", plan.seed, name), token("scene", plan.seed, name)
    samples = _chain("sample", plan.seed, name, count=plan.samples)
    tables["log"].append(
        {
            "token": log,
            "logfile": scene.log,
            "vehicle": "n000",
            "date_captured": "2018-07-24",
            "location": LOCATION,
        }
    )
    tables["scene"].append(
        {
            "token": key,
            "log_token": log,
            "nbr_samples": plan.samples,
            "first_sample_token": samples[0]["token"],
            "last_sample_token": samples[-1]["token"],
            "name": name,
            "description": f"Synthetic street, {scene.drive.speed:.1f} m/s",
        }
    )
    tables["sample"] += [
        {**links, "timestamp": scene.timestamp(number), "scene_token": key}
        for number, links in enumerate(samples)
    ]
    return [links["token"] for links in samples]


def _sensor_records(
    tables: Tables, plan: Plan, name: str, scene: Scene, samples: list[str]
) -> None:
    """Calibration, poses and files of all sensors in one scene."""
    for sensor in rig.SENSORS:
        camera = sensor.intrinsics is not None
        calibrated = token("calibrated_sensor", plan.seed, name, sensor.channel)
        tables["calibrated_sensor"].append(
            {
                "token": calibrated,
                "sensor_token": token("sensor", sensor.channel),
                "translation": list(sensor.translation),
                "rotation": list(sensor.rotation),
                "camera_intrinsic": sensor.camera_matrix().tolist() if camera else [],
            }
        )
        chain = _chain("sample_data", plan.seed, name, sensor.channel, count=plan.samples)
        for number, links in enumerate(chain):
            timestamp = scene.timestamp(number) - sensor.early_us
            translation, rotation = scene.ego_pose(timestamp)
            moment = {"token": links["token"], "timestamp": timestamp}
            tables["ego_pose"].append({**moment, "rotation": rotation, "translation": translation})
            tables["sample_data"].append(
                {
                    **links,
                    **moment,
                    "sample_token": samples[number],
                    "ego_pose_token": links["token"],
                    "calibrated_sensor_token": calibrated,
                    "fileformat": "jpg" if camera else "pcd",
                    "is_key_frame": True,
                    "height": rig.IMAGE_HEIGHT if camera else 0,
                    "width": rig.IMAGE_WIDTH if camera else 0,
                    "filename": scene.file_name(number, sensor),
                }
            )


def _annotation_records(
    tables: Tables,
    plan: Plan,
    name: str,
    scene: Scene,
    samples: list[str],
    measured: list[list[dict]],
) -> None:
    """Annotations of a scene, and an instance for everything that is annotated at least once."""
    found: dict[int, list[tuple[int, dict]]] = defaultdict(list)
    for number, entries in enumerate(measured):
        for entry in entries:
            found[entry["object_id"]].append((number, entry))
    for actor in scene.actors:
        entries = found[actor.object_id]
        if not entries:
            continue
        instance = token("instance", plan.seed, name, actor.object_id)
        chain = _chain("sample_annotation", plan.seed, name, actor.object_id, count=len(entries))
        tables["instance"].append(
            {
                "token": instance,
                "category_token": token("category", actor.category),
                "nbr_annotations": len(chain),
                "first_annotation_token": chain[0]["token"],
                "last_annotation_token": chain[-1]["token"],
            }
        )
        for links, (number, entry) in zip(chain, entries, strict=True):
            x, y, yaw = scene.to_global(actor.pose(scene.seconds(scene.timestamp(number))))
            attributes = [token("attribute", actor.attribute)] if actor.attribute else []
            tables["sample_annotation"].append(
                {
                    **links,
                    "sample_token": samples[number],
                    "instance_token": instance,
                    "attribute_tokens": attributes,
                    "visibility_token": entry["visibility"],
                    "translation": [x, y, actor.size[2] / 2],
                    "size": list(actor.size),
                    "rotation": rig.quaternion_from_euler(yaw),
                    "num_lidar_pts": entry["num_lidar_pts"],
                    "num_radar_pts": 0,
                }
            )


def map_expansion(scenes: list[Scene], seed: int) -> dict:
    """Contents of maps/expansion/<LOCATION>.json for all scenes of a world.

    Its areas are the very polygons that the ground is painted from.
    """
    layers: Tables = {name: [] for name in _MAP_LAYERS.split()}

    def add(layer: str, **fields: object) -> str:
        key = token("map", seed, layer, len(layers[layer]))
        layers[layer].append({"token": key, **fields})
        return key

    def nodes(scene: Scene, points: np.ndarray) -> list[str]:
        xy = scene.xy_global(points).round(9).tolist()  # to the nanometre
        return [add("node", x=x, y=y) for x, y in xy]

    for scene in scenes:
        for layer, polygons in scene.layout.polygons.items():
            whole = layer == "drivable_area"
            rings = [nodes(scene, hole) for hole in scene.layout.holes] if whole else []
            holes = [{"node_tokens": ring} for ring in rings]
            for points in polygons:
                key = add("polygon", exterior_node_tokens=nodes(scene, points), holes=holes)
                add(layer, **({"polygon_tokens": [key]} if whole else {"polygon_token": key}))
        for layer, lines in scene.layout.lines.items():
            for points in lines:
                add(layer, line_token=add("line", node_tokens=nodes(scene, points)))
    canvas = {"version": "1.3", "canvas_edge": list(MAP_SIZE)}
    return {**canvas, **layers, "arcline_path_3": {}, "connectivity": {}}
