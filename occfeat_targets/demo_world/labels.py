"""nuScenes-lidarseg of the demo world: which category each lidar return hit."""

import numpy as np

from occfeat_targets.demo_world.scene import World
from occfeat_targets.demo_world.solids import EGO_ID, FIRST_STATIC_ID
from occfeat_targets.demo_world.things import Material

#: By nuScenes-lidarseg's index, which is what its files hold.
CATEGORIES = (
    *("noise", "animal", "human.pedestrian.adult", "human.pedestrian.child"),
    *("human.pedestrian.construction_worker", "human.pedestrian.personal_mobility"),
    *("human.pedestrian.police_officer", "human.pedestrian.stroller"),
    *("human.pedestrian.wheelchair", "movable_object.barrier", "movable_object.debris"),
    *("movable_object.pushable_pullable", "movable_object.trafficcone"),
    *("static_object.bicycle_rack", "vehicle.bicycle", "vehicle.bus.bendy", "vehicle.bus.rigid"),
    *("vehicle.car", "vehicle.construction", "vehicle.emergency.ambulance"),
    *("vehicle.emergency.police", "vehicle.motorcycle", "vehicle.trailer", "vehicle.truck"),
    *("flat.driveable_surface", "flat.other", "flat.sidewalk", "flat.terrain"),
    *("static.manmade", "static.other", "static.vegetation", "vehicle.ego"),
)
_GROUND = {
    "flat.terrain": {Material.TERRAIN},
    "flat.sidewalk": {Material.SIDEWALK, Material.KERB},
    "flat.other": {Material.ISLAND},
}
_PLANTS = (Material.FOLIAGE, Material.BARK)


def lidarseg(world: World, object_id: np.ndarray, material: np.ndarray) -> np.ndarray:
    """Index into :data:`CATEGORIES` of what returns hit, uint8 (N,), from ``object_id`` and
    ``material`` (N,) as ``render.cast_rays`` gives them; all must have hit something."""
    of_ground = np.full(len(Material), CATEGORIES.index("flat.driveable_surface"))
    for category, materials in _GROUND.items():
        of_ground[[*materials]] = CATEGORIES.index(category)
    labels = of_ground[material]
    static = object_id >= FIRST_STATIC_ID
    labels[static] = CATEGORIES.index("static.manmade")
    labels[static & np.isin(material, _PLANTS)] = CATEGORIES.index("static.vegetation")
    labels[object_id == EGO_ID] = CATEGORIES.index("vehicle.ego")
    for actor, _ in world.placed:
        labels[object_id == actor.object_id] = CATEGORIES.index(actor.category)
    return labels.astype(np.uint8)
