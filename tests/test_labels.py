"""BEV masks against a test of every cell: boxes, polygons with holes, lines, the whole map."""

import dataclasses
import json
import math

import numpy as np
import pytest
import reference
from pyquaternion import Quaternion

from occfeat_targets.build import read_dataset
from occfeat_targets.config import TargetsConfig
from occfeat_targets.frame import frame_targets, layout_of, make_outputs
from occfeat_targets.outputs.base import FrameInputs
from occfeat_targets.outputs.boxes import Boxes as BoxesOutput
from occfeat_targets.outputs.boxes import footprint, vehicle_masks
from occfeat_targets.outputs.map import map_masks
from occfeat_targets.outputs.masks import draw_line, fill_polygon
from occfeat_targets.sources.base import Boxes, FrameError, MapLayers, Shapes
from occfeat_targets.sources.nuscenes_map import AREAS, MAP_CLASSES
from occfeat_targets.store.grid import VoxelGrid
from occfeat_targets.teachers.base import NoTeacher

# Unequal axes of odd cell sizes, not centred on the car.
GRID = VoxelGrid((-9.0, 14.0, 31), (-8.0, 5.0, 22), (-1.0, 1.0, 2))
BOUNDS = (GRID.x, GRID.y, GRID.z)
MIDDLE, REACH = np.array([2.5, -1.5]), np.array([11.5, 6.5])


def random_boxes(rng, n):
    """Rotated boxes, many of them across the border of the grid or wholly outside."""
    centre = MIDDLE + rng.uniform(-1.3, 1.3, (n, 2)) * REACH
    on_border = rng.uniform(size=n) < 0.4
    centre[on_border, 0] = rng.choice(GRID.x[:2], on_border.sum())
    length, width = rng.uniform(0.3, 9, n), rng.uniform(0.3, 4, n)
    yaw, visibility = rng.uniform(-7, 7, n), rng.integers(0, 5, n)
    zero = np.zeros(n)
    return np.column_stack([centre, zero, length, width, zero + 1, yaw, visibility])


def as_reference(vehicles):
    return [(*v[[0, 1, 3, 4, 6]], int(v[7])) for v in vehicles]


@pytest.mark.parametrize("seed", range(12))
def test_vehicle_masks_of_random_boxes_are_the_loops(seed):
    vehicles = random_boxes(np.random.default_rng(seed), 1 + seed)
    vehicle, visible = vehicle_masks(vehicles, GRID)
    assert vehicle.dtype == visible.dtype == np.uint8
    np.testing.assert_array_equal(vehicle, reference.vehicle_mask(as_reference(vehicles), BOUNDS))
    np.testing.assert_array_equal(visible, reference.visible_mask(as_reference(vehicles), BOUNDS))


def test_no_vehicles_no_mask():
    vehicle, visible = vehicle_masks(np.zeros((0, 8)), GRID)
    assert vehicle.shape == visible.shape == (31, 22)
    assert not vehicle.any()
    assert visible.all()


def test_length_runs_along_the_heading():
    # 8 m long, 1 m wide, heading left (y): few rows in x, many columns in y.
    vehicle, _ = vehicle_masks(np.array([[2, -1, 0, 8, 1, 1, math.pi / 2, 4.0]]), GRID)
    rows, columns = np.nonzero(vehicle)
    x, y = GRID.bev_centres()
    assert np.ptp(x[rows]) < 1 < 6 < np.ptp(y[columns]) < 8


def test_footprint_is_counter_clockwise_and_of_the_right_size():
    corners = footprint(np.array([3.0, -2.0, 0, 4.0, 2.0, 1.5, 0.7]))
    ahead = np.array([math.cos(0.7), math.sin(0.7)])
    left = np.array([-ahead[1], ahead[0]])
    wanted = [[2, 1], [-2, 1], [-2, -1], [2, -1]]
    np.testing.assert_allclose(corners, [(3, -2) + a * ahead + b * left for a, b in wanted])


@pytest.mark.parametrize(
    ("levels", "counts"),
    [([1], 0), ([2], 1), ([4], 1), ([0], 1), ([1, 1], 0), ([1, 3], 1), ([3, 1], 1)],
)
def test_only_boxes_of_visibility_1_alone_are_left_out(levels, counts):
    vehicles = np.array([[2, -1, 0, 4, 2, 1, 0.3, level] for level in levels], dtype=float)
    vehicle, visible = vehicle_masks(vehicles, GRID)
    assert vehicle.sum() > 10
    assert (visible[vehicle == 1] == counts).all()
    assert (visible[vehicle == 0] == 1).all()


NAMES = ("vehicle.car", "human.pedestrian.adult", "vehicle.bus.rigid", "movable_object.barrier")


def test_all_boxes_are_stored_and_the_masks_are_of_vehicle_classes_alone(demo_root):
    config = TargetsConfig.load(None, ["grid.x=[-9,14,31]", "grid.y=[-8,5,22]", "map.mode=never"])
    dataset = read_dataset(demo_root, None, config)
    shared = vars(dataset) | {
        "box_classes": ("animal", *NAMES),
        "vehicle_classes": ("vehicle.bus.rigid", "vehicle.car"),
    }
    box = random_boxes(np.random.default_rng(0), 4)[:, :7]
    box[:, :2] = [[2, -6], [4, -3], [6, 0], [8, 3]]
    annotated = Boxes(NAMES, box, np.array([1, 2, 0, 4], dtype=np.uint8))
    record = dataclasses.replace(dataset.records[0], boxes=annotated)
    output = BoxesOutput(config.boxes, layout_of(config, shared, 0))
    found = output.compute(FrameInputs(record, output.layout, 0, NoTeacher(), (1, 1)))
    assert found["box_class"].dtype == np.uint8
    assert found["box_class"].tolist() == [1, 2, 3, 4]
    stored = np.column_stack([box, [1, 2, 0, 4]]).astype(np.float32)
    np.testing.assert_array_equal(found["boxes"], stored)
    vehicles = as_reference(stored[[0, 2]].astype(np.float64))
    bounds = (config.grid.x, config.grid.y, config.grid.z)
    np.testing.assert_array_equal(found["vehicle"], reference.vehicle_mask(vehicles, bounds))
    wanted = reference.visible_mask(vehicles, bounds)
    np.testing.assert_array_equal(found["vehicle_visible"], wanted)
    assert found["vehicle"].any()
    unknown = dataclasses.replace(record, boxes=Boxes(("tram",), box[:1], annotated.visibility[:1]))
    assert list(output.faults(unknown)) == ["boxes of no known class: tram"]


@pytest.mark.parametrize(
    ("setting", "room", "message"),
    [
        ("boxes.max_boxes", 1, "Boxes gives [0-9]+ rows of boxes"),
        ("lidar.max_points", 2000, "Points gives [0-9]+ rows of points"),
        ("lidar.max_points", 20, "Voxels gives [0-9]+ rows of voxel_index"),
    ],
)
def test_a_frame_with_more_rows_than_there_is_room_for_says_what_to_raise(
    demo_root, setting, room, message
):
    config = TargetsConfig.load(None, [f"{setting}={room}", "map.mode=never"])
    dataset = read_dataset(demo_root, None, config)
    name = message.partition(" ")[0]
    outputs = make_outputs(config, layout_of(config, vars(dataset), 0))
    outputs = [output for output in outputs if type(output).__name__ == name]
    message = f"{message}, the store has room for {room}: raise {setting}$"
    with pytest.raises(FrameError, match=f"sample .*: {message}"):
        frame_targets(dataset.records[0], config, outputs, NoTeacher())


def test_vehicles_of_nuscenes_are_all_categories_of_that_name_and_no_other(demo_root):
    dataset = read_dataset(demo_root, None, TargetsConfig())
    rows = json.loads((demo_root / "v1.0-mini" / "category.json").read_text())
    boxed, others = (
        rows[:23],
        {row["name"] for row in rows[23:]},
    )  # these are of lidar returns alone
    assert dataset.box_classes == tuple(row["name"] for row in boxed)
    assert {"noise", "flat.other", "static.manmade", "vehicle.ego"} <= others and len(others) == 9
    wanted = {row["name"] for row in boxed if row["name"].split(".")[0] == "vehicle"}
    assert set(dataset.vehicle_classes) == wanted
    assert {"vehicle.car", "vehicle.bus.rigid", "vehicle.bicycle"} <= wanted


def bev_labels(dataset, number, config):
    """The masks and boxes of a keyframe."""
    layout = layout_of(config, vars(dataset), 0)
    frame = FrameInputs(dataset.records[number], layout, 0, NoTeacher(), (1, 1))
    labels = {}
    for output in make_outputs(config, layout):
        if type(output).__name__ in ("Boxes", "Map"):
            labels |= output.compute(frame)
    return labels


UNEVEN = ("grid.x=[-40,48,110]", "grid.y=[-32,30,93]")


def assert_vehicle_masks_are_the_loops(dataroot, number, overrides):
    config = TargetsConfig.load(None, ["map.mode=never", *overrides])
    dataset = read_dataset(dataroot, None, config)
    labels = bev_labels(dataset, number, config)
    bounds = (config.grid.x, config.grid.y, config.grid.z)
    boxes = reference.vehicle_boxes(reference.Tables(dataroot), dataset.records[number].token)
    np.testing.assert_array_equal(labels["vehicle"], reference.vehicle_mask(boxes, bounds))
    np.testing.assert_array_equal(labels["vehicle_visible"], reference.visible_mask(boxes, bounds))
    assert labels["vehicle"].sum() > 50
    # Stored boxes are float32; the angle may differ by a whole turn.
    stored = labels["boxes"]
    assert stored.dtype == np.float32
    assert len(stored) == len(dataset.records[number].boxes.category) > len(boxes)
    names = [dataset.box_classes[c] for c in labels["box_class"]]
    stored = stored[[name.startswith("vehicle.") for name in names]]
    np.testing.assert_allclose(
        stored[:, [0, 1, 3, 4, 7]], np.array(boxes)[:, [0, 1, 2, 3, 5]], atol=1e-5
    )
    assert np.abs(np.exp(1j * stored[:, 6]) - np.exp(1j * np.array(boxes)[:, 4])).max() < 1e-6
    return boxes


@pytest.mark.parametrize("overrides", [(), UNEVEN], ids=["default", "uneven"])
def test_vehicle_masks_of_the_real_keyframe_are_the_loops(nuscenes_one, overrides):
    boxes = assert_vehicle_masks_are_the_loops(nuscenes_one, 0, overrides)
    assert len(boxes) > 5
    assert {box[5] for box in boxes} >= {1, 4}


@pytest.mark.parametrize("number", [0, 3])
def test_vehicle_masks_of_the_demo_world_are_the_loops(demo_root, number):
    assert_vehicle_masks_are_the_loops(demo_root, number, UNEVEN)


def even_odd(rings):
    return reference.bev_mask(BOUNDS, lambda x, y: reference.in_polygon(x, y, rings[0], rings[1:]))


def star(rng, centre, radius, corners):
    """A simple polygon round a centre, of uneven radius, either way round, now and then closed."""
    angle = np.sort(rng.uniform(0, 2 * math.pi, corners))[:: rng.choice([-1, 1])]
    reach = radius * rng.uniform(0.4, 1.0, corners)
    ring = centre + reach[:, None] * np.column_stack([np.cos(angle), np.sin(angle)])
    return np.concatenate([ring, ring[:1]]) if rng.uniform() < 0.3 else ring


@pytest.mark.parametrize("seed", range(12))
def test_polygons_with_holes_are_the_loops(seed):
    rng = np.random.default_rng(seed)
    centre = MIDDLE + rng.uniform(-1, 1, 2) * REACH
    rings = [star(rng, centre, rng.uniform(4, 12), 11)]
    rings += [star(rng, centre + rng.uniform(-3, 3, 2), 2.5, 7) for _ in range(seed % 3)]
    mask = fill_polygon(rings, GRID)
    assert mask.shape == (31, 22)
    np.testing.assert_array_equal(mask, even_odd(rings))
    assert mask.any()


@pytest.mark.parametrize("seed", range(8))
def test_polygons_far_larger_than_the_grid_are_the_loops(seed):
    rng = np.random.default_rng(seed)
    # The border passes through the grid at random, or not at all.
    centre = MIDDLE + rng.uniform(-1, 1, 2) * 2000
    rings = [star(rng, centre, 4000, 9), star(rng, MIDDLE, 5, 9)]
    np.testing.assert_array_equal(fill_polygon(rings, GRID), even_odd(rings))


def test_polygon_round_the_grid_fills_it_and_one_beside_it_does_not():
    square = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * 1e4
    assert fill_polygon([square], GRID).all()
    for shift in ([3e4, 0], [-3e4, 0], [0, 3e4], [0, -3e4]):
        assert not fill_polygon([square + shift], GRID).any()
    hole = np.array([[-5.0, -5], [5, -5], [5, 2], [-5, 2]])
    np.testing.assert_array_equal(fill_polygon([square, hole], GRID), ~fill_polygon([hole], GRID))
    assert fill_polygon([hole], GRID).any()


def test_polygon_through_cell_centres_counts_each_side_once():
    # Two rectangles that share an edge through a row of centres: every cell is in exactly one.
    x, y = GRID.bev_centres()
    for axis, value in [(0, x[9]), (1, y[9])]:
        ends = [np.array([[-50.0, -50], [50, 50]]) for _ in range(2)]
        ends[0][1, axis] = ends[1][0, axis] = value
        masks = [
            fill_polygon([np.array([[a[0], a[1]], [b[0], a[1]], [b[0], b[1]], [a[0], b[1]]])], GRID)
            for a, b in ends
        ]
        assert (masks[0] ^ masks[1]).all()


@pytest.mark.parametrize("seed", range(12))
def test_lines_that_leave_and_come_back_are_the_loops(seed):
    rng = np.random.default_rng(seed)
    line = MIDDLE + rng.uniform(-2.5, 2.5, (7, 2)) * REACH
    line[3] = line[2]  # a repeated node, as map data has
    inside = (np.abs(line - MIDDLE) < REACH).all(axis=1)
    width = rng.uniform(0.2, 3)
    mask = np.zeros(GRID.bev_shape, dtype=bool)
    draw_line(mask, line, width, GRID)
    wanted = reference.bev_mask(
        BOUNDS, lambda x, y: reference.distance_to_polyline(x, y, line.tolist()) <= width / 2
    )
    np.testing.assert_array_equal(mask, wanted)
    assert not inside.all()


def test_some_of_those_lines_leave_and_come_back():
    # Keeps the test above honest: a line whose middle node is outside paints on both its ends.
    mask = np.zeros(GRID.bev_shape, dtype=bool)
    line = np.array([[0.0, -4.0], [0.0, 40.0], [6.0, 40.0], [6.0, -4.0]])
    draw_line(mask, line, 1.0, GRID)
    x, _ = GRID.bev_centres()
    rows = x[mask.any(axis=1)]
    assert ((np.abs(rows) <= 0.5) | (np.abs(rows - 6) <= 0.5)).all()
    assert (rows < 1).any() and (rows > 5).any()


def test_drawing_keeps_what_is_there():
    mask = np.zeros(GRID.bev_shape, dtype=bool)
    mask[0, 0] = mask[30, 21] = True
    draw_line(mask, np.array([[0.0, -3.0], [5.0, 1.0]]), 1.0, GRID)
    assert mask[0, 0] and mask[30, 21]
    assert mask.sum() > 5


@pytest.mark.parametrize("seed", range(4))
def test_map_is_moved_into_the_ego_frame(seed):
    rng = np.random.default_rng(seed)
    wxyz = Quaternion(axis=[0, 0, 1], angle=rng.uniform(0, 6)) * Quaternion(
        axis=rng.normal(size=3), angle=0.02
    )
    global_T_ego = wxyz.transformation_matrix
    global_T_ego[:3, 3] = [*rng.uniform(300, 2000, 2), 0.0]
    here = global_T_ego[:2, 3]
    layers = [[[star(rng, here + rng.uniform(-9, 9, 2), 9, 9)] for _ in range(2)] for _ in range(4)]
    layers[0][0].append(star(rng, layers[0][0][0].mean(axis=0), 3, 7))
    layers[1].append([star(rng, here + 5000, 9, 9)])
    lines = [[here + rng.uniform(-25, 25, (5, 2))] for _ in range(2)]
    areas = dict(zip(AREAS, map(Shapes, layers), strict=True))
    found = map_masks(MapLayers(areas, {"divider": Shapes(lines)}), global_T_ego, 1.5, GRID)
    masks = np.stack([found[name] for name in MAP_CLASSES])
    np.testing.assert_array_equal(masks, naive_map(layers, lines, global_T_ego, 1.5, BOUNDS))
    assert masks.any(axis=(1, 2)).all()


def naive_map(layers, lines, global_T_ego, width, bounds):
    ego_T_global = np.linalg.inv(global_T_ego)

    def to_ego(ring):
        return [reference.apply(ego_T_global, (x, y, 0.0))[:2] for x, y in ring]

    layers = [[[to_ego(ring) for ring in rings] for rings in shapes] for shapes in layers]
    lines = [to_ego(line) for (line,) in lines]

    def in_layer(shapes):
        return lambda x, y: any(reference.in_polygon(x, y, r[0], r[1:]) for r in shapes)

    def on_line(x, y):
        return any(reference.distance_to_polyline(x, y, line) <= width / 2 for line in lines)

    masks = [reference.bev_mask(bounds, in_layer(shapes)) for shapes in layers]
    return np.stack([*masks, reference.bev_mask(bounds, on_line)])


def test_demo_worlds_map_is_the_loops(demo_root):
    config = TargetsConfig.load(
        None, ["grid.x=[-40,48,34]", "grid.y=[-32,30,27]", "map.mode=required"]
    )
    dataset = read_dataset(demo_root, None, config)
    assert dataset.map_classes == ("road", "sidewalk", "crosswalk", "parking", "divider")
    bounds = (config.grid.x, config.grid.y, config.grid.z)
    (path,) = (demo_root / "maps" / "expansion").glob("*.json")
    tables = json.loads(path.read_text())
    node = {row["token"]: (row["x"], row["y"]) for row in tables["node"]}
    polygon = {
        row["token"]: [
            [node[t] for t in row["exterior_node_tokens"]],
            *([node[t] for t in hole["node_tokens"]] for hole in row["holes"]),
        ]
        for row in tables["polygon"]
    }
    line = {row["token"]: [node[t] for t in row["node_tokens"]] for row in tables["line"]}
    layers = [
        [polygon[t] for row in tables["drivable_area"] for t in row["polygon_tokens"]],
        *(
            [polygon[row["polygon_token"]] for row in tables[layer]]
            for layer in ("walkway", "ped_crossing", "carpark_area")
        ),
    ]
    lines = [[line[row["line_token"]]] for row in tables["road_divider"]]
    painted = np.zeros(5, dtype=int)
    for number in (0, -1):
        masks = bev_labels(dataset, number, config)["map"]
        global_T_ego = dataset.records[number].global_T_ego
        wanted = naive_map(layers, lines, global_T_ego, config.map.line_width_m, bounds)
        np.testing.assert_array_equal(masks, wanted)
        painted += wanted.any(axis=(1, 2))
    assert (painted[[0, 1, 4]] > 0).all()
