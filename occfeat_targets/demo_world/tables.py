"""The thirteen JSON tables of a dataroot."""

from __future__ import annotations

from occfeat_targets.demo_world.frames import FrameResult, file_name, vehicle_log
from occfeat_targets.demo_world.map_expansion import LOCATION, token
from occfeat_targets.demo_world.rig import (
    IMAGE_HEIGHT,
    IMAGE_WIDTH,
    LIDAR,
    SENSORS,
    quaternion_from_euler,
)
from occfeat_targets.demo_world.scene import Plan, Scene
from occfeat_targets.demo_world.taxonomy import ATTRIBUTES, CATEGORIES

_LEVELS = ("v0-40", "v40-60", "v60-80", "v80-100")


def build_tables(
    plan: Plan, names: list[str], scenes: list[Scene], results: dict[tuple[int, int], FrameResult]
) -> dict[str, list[dict]]:
    """All records of a world.

    Args:
        plan: the world's parameters.
        names: official name of every scene.
        scenes: the scenes, in the same order.
        results: what was measured in each frame, by (scene, sample).

    Returns:
        Table name -> records, as written to <version>/<name>.json.
    """
    tables = _fixed_tables(plan)
    tables.update(
        {
            name: []
            for name in (
                "log",
                "scene",
                "sample",
                "sample_data",
                "ego_pose",
                "calibrated_sensor",
                "instance",
                "sample_annotation",
            )
        }
    )
    for index, (name, scene) in enumerate(zip(names, scenes, strict=True)):
        _scene_records(tables, plan, name, scene)
        _sensor_records(tables, plan, name, scene)
        _annotation_records(tables, plan, name, scene, index, results)
    tables["map"] = [
        {
            "token": token("map", plan.seed),
            "category": "semantic_prior",
            "filename": map_image_name(plan),
            "log_tokens": [log["token"] for log in tables["log"]],
        }
    ]
    return tables


def map_image_name(plan: Plan) -> str:
    """File name of the map raster, which the devkit wants to exist."""
    return f"maps/{token('map', plan.seed)}.png"


def _fixed_tables(plan: Plan) -> dict[str, list[dict]]:
    return {
        "category": [
            {"token": token("category", name), "name": name, "description": text}
            for name, text in CATEGORIES.items()
        ],
        "attribute": [
            {"token": token("attribute", name), "name": name, "description": text}
            for name, text in ATTRIBUTES.items()
        ],
        "visibility": [
            {
                "token": str(number),
                "level": level,
                "description": f"visibility of whole object is {level[1:]} %",
            }
            for number, level in enumerate(_LEVELS, start=1)
        ],
        "sensor": [
            {
                "token": token("sensor", sensor.channel),
                "channel": sensor.channel,
                "modality": "lidar" if sensor.channel == LIDAR else "camera",
            }
            for sensor in SENSORS
        ],
    }


def _chain(keys: list[str], number: int) -> dict[str, str]:
    """prev and next of one link of a chain of tokens."""
    return {
        "prev": keys[number - 1] if number else "",
        "next": keys[number + 1] if number + 1 < len(keys) else "",
    }


def sample_token(plan: Plan, name: str, sample: int) -> str:
    """Token of a keyframe."""
    return token("sample", plan.seed, name, sample)


def _scene_records(tables, plan: Plan, name: str, scene: Scene) -> None:
    log = token("log", plan.seed, name)
    tables["log"].append(
        {
            "token": log,
            "logfile": vehicle_log(scene),
            "vehicle": "n000",
            "date_captured": "2018-07-24",
            "location": LOCATION,
        }
    )
    samples = [sample_token(plan, name, sample) for sample in range(plan.samples)]
    tables["scene"].append(
        {
            "token": token("scene", plan.seed, name),
            "log_token": log,
            "nbr_samples": plan.samples,
            "first_sample_token": samples[0],
            "last_sample_token": samples[-1],
            "name": name,
            "description": f"Synthetic street ({scene.layout.kind}), {scene.ego_speed:.1f} m/s",
        }
    )
    for sample, key in enumerate(samples):
        tables["sample"].append(
            {
                "token": key,
                "timestamp": scene.timestamp(sample),
                **_chain(samples, sample),
                "scene_token": tables["scene"][-1]["token"],
            }
        )


def _sensor_records(tables, plan: Plan, name: str, scene: Scene) -> None:
    for sensor in SENSORS:
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
        keys = [
            token("sample_data", plan.seed, name, sensor.channel, sample)
            for sample in range(plan.samples)
        ]
        for sample, key in enumerate(keys):
            timestamp = scene.timestamp(sample) - sensor.early_us
            translation, rotation = scene.ego_pose(timestamp)
            tables["ego_pose"].append(
                {
                    "token": key,
                    "timestamp": timestamp,
                    "rotation": rotation,
                    "translation": translation,
                }
            )
            tables["sample_data"].append(
                {
                    "token": key,
                    "sample_token": sample_token(plan, name, sample),
                    "ego_pose_token": key,
                    "calibrated_sensor_token": calibrated,
                    "timestamp": timestamp,
                    "fileformat": "jpg" if camera else "pcd",
                    "is_key_frame": True,
                    "height": IMAGE_HEIGHT if camera else 0,
                    "width": IMAGE_WIDTH if camera else 0,
                    "filename": file_name(scene, sample, sensor),
                    **_chain(keys, sample),
                }
            )


def _annotation_records(tables, plan: Plan, name: str, scene: Scene, index: int, results) -> None:
    """Annotations of a scene, and an instance for everything that is annotated at least once."""
    found: dict[int, list[tuple[int, dict]]] = {}
    for sample in range(plan.samples):
        for entry in results[index, sample]:
            found.setdefault(entry["object_id"], []).append((sample, entry))
    actors = {actor.object_id: actor for actor in scene.actors}
    for object_id, entries in found.items():
        actor = actors[object_id]
        instance = token("instance", plan.seed, name, object_id)
        keys = [
            token("sample_annotation", plan.seed, name, object_id, sample) for sample, _ in entries
        ]
        tables["instance"].append(
            {
                "token": instance,
                "category_token": token("category", actor.category),
                "nbr_annotations": len(keys),
                "first_annotation_token": keys[0],
                "last_annotation_token": keys[-1],
            }
        )
        for number, (sample, entry) in enumerate(entries):
            x, y, yaw = scene.to_global(actor.pose(scene.seconds(scene.timestamp(sample))))
            tables["sample_annotation"].append(
                {
                    "token": keys[number],
                    "sample_token": sample_token(plan, name, sample),
                    "instance_token": instance,
                    "attribute_tokens": [token("attribute", actor.attribute)]
                    if actor.attribute
                    else [],
                    "visibility_token": entry["visibility"],
                    "translation": [x, y, actor.size[2] / 2],
                    "size": list(actor.size),
                    "rotation": quaternion_from_euler(yaw),
                    "num_lidar_pts": entry["num_lidar_pts"],
                    "num_radar_pts": 0,
                    **_chain(keys, number),
                }
            )
