"""Fixed tables of the nuScenes format: categories, attributes, visibility levels, scene names."""

from __future__ import annotations

CATEGORIES = {
    "human.pedestrian.adult": "Adult subcategory.",
    "human.pedestrian.child": "Child subcategory.",
    "human.pedestrian.wheelchair": "Wheelchairs, with the person in it.",
    "human.pedestrian.stroller": "Strollers, with the person in it.",
    "human.pedestrian.personal_mobility": "A small vehicle on which a person stands upright.",
    "human.pedestrian.police_officer": "Police officer.",
    "human.pedestrian.construction_worker": "Construction worker.",
    "animal": "All animals.",
    "vehicle.car": "Vehicle designed primarily for personal use.",
    "vehicle.motorcycle": "Motor-powered two-wheeled vehicle.",
    "vehicle.bicycle": "Human or electric powered two-wheeled vehicle.",
    "vehicle.bus.bendy": "Bendy bus subcategory.",
    "vehicle.bus.rigid": "Rigid bus subcategory.",
    "vehicle.truck": "Vehicle designed primarily to haul cargo.",
    "vehicle.construction": "Vehicle designed primarily for construction.",
    "vehicle.emergency.ambulance": "All types of ambulances.",
    "vehicle.emergency.police": "All types of police vehicles.",
    "vehicle.trailer": "Any vehicle trailer.",
    "movable_object.barrier": "Temporary road barrier.",
    "movable_object.trafficcone": "All types of traffic cone.",
    "movable_object.pushable_pullable": "Objects that a person may push or pull.",
    "movable_object.debris": "Movable object left on the driveable surface.",
    "static_object.bicycle_rack": "Device intended to park bicycles in a row.",
}

ATTRIBUTES = {
    "vehicle.moving": "Vehicle is moving.",
    "vehicle.stopped": "Vehicle is stationary but has an intent to move.",
    "vehicle.parked": "Vehicle is stationary with no immediate intent to move.",
    "cycle.with_rider": "There is a rider on the bicycle or motorcycle.",
    "cycle.without_rider": "There is no rider on the bicycle or motorcycle.",
    "pedestrian.sitting_lying_down": "The human is sitting or lying down.",
    "pedestrian.standing": "The human is standing.",
    "pedestrian.moving": "The human is moving.",
}

#: Lower bounds of the visible share of visibility levels "1" to "4".
VISIBILITY_BOUNDS = (0.0, 0.4, 0.6, 0.8)

_MINI = ((61, 553, 655, 757, 796, 1077, 1094, 1100), (103, 916))
_TRAINVAL = (
    (1, 2, 4, 5, 6, 7, 8, 9, 10, 11, 19, 20, *range(21, 35), *range(41, 63)),
    (3, 12, 13, 14, 15, 16, 17, 18, 35, 36, 38, 39, 92, 93, 94, 95),
)
VERSIONS = {"v1.0-mini": _MINI, "v1.0-trainval": _TRAINVAL}


def scene_names(version: str, scenes: int) -> list[str]:
    """Official names for that many scenes, about one in four from the val split, at least one each.

    Args:
        version: "v1.0-mini" (at most 10 scenes) or "v1.0-trainval" (at most 64).
        scenes: how many, at least 2.

    Returns:
        The train scenes' names, then the val scenes' names.

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
    chosen = train[: scenes - held_out] + val[:held_out]
    return [f"scene-{number:04d}" for number in chosen]


def visibility_level(visible: int, silhouette: int) -> str:
    """Visibility token "1".."4" from the pixels seen and the pixels of the whole silhouette."""
    share = visible / silhouette if silhouette else 0.0
    return str(sum(share >= bound for bound in VISIBILITY_BOUNDS))
