"""Lidar segmentation: classes, loss, metric against definitions and loops; what a probe learns."""

import math
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from occfeat_targets.demo_world.labels import CATEGORIES
from occfeat_targets.store.files import StoreError
from occfeat_targets.store.reader import open_store
from occfeat_targets.store.semantics import CLASSES, COLOURS, IGNORED, class_numbers, colours_of
from occfeat_targets.store.settings import ConfigError
from occfeat_train.config import TrainConfig
from occfeat_train.network import Network, build_network, frames_for, prepare
from occfeat_train.objectives.lovasz import lovasz_softmax
from occfeat_train.optimiser import cosine, make_optimiser, make_schedule, parameter_groups
from occfeat_train.optimiser_settings import OptimiserSettings
from occfeat_train.runs.job import Job
from occfeat_train.sensors.camera import Camera
from occfeat_train.tasks.lidarseg import ConfusionMeter, LidarSegmentation

CPU = torch.device("cpu")
# Index of nuScenes-lidarseg -> class, by hand from the devkit's eval/lidarseg/utils.py.
SIXTEEN = {
    9: "barrier",
    14: "bicycle",
    15: "bus",
    16: "bus",
    17: "car",
    18: "construction_vehicle",
    21: "motorcycle",
    2: "pedestrian",
    3: "pedestrian",
    4: "pedestrian",
    6: "pedestrian",
    12: "traffic_cone",
    22: "trailer",
    23: "truck",
    24: "driveable_surface",
    25: "other_flat",
    26: "sidewalk",
    27: "terrain",
    28: "manmade",
    30: "vegetation",
}
TINY = [
    "lidar.size=3-8",
    "lidar.reach_m=[16,16,8]",
    "lidar.cell_m=2",
    "lidar.neighbours=4",
    "finetune.epochs=2",
    "finetune.batch=4",
    "finetune.accumulate=1",
    "finetune.lr=0.01",
    "data.workers=0",
]


def test_the_32_categories_are_the_16_classes():
    numbers = class_numbers(CATEGORIES)
    assert len(numbers) == 32 and len(CLASSES) == 16 and len(COLOURS) == 17
    for i, number in enumerate(numbers):
        assert number == ([*CLASSES].index(SIXTEEN[i]) if i in SIXTEEN else IGNORED), i
    np.testing.assert_array_equal(colours_of(np.array([IGNORED, 3])), COLOURS[[16, 3]])


def test_the_devkit_agrees_on_the_16_classes():
    utils = pytest.importorskip("nuscenes.eval.lidarseg.utils")
    mapper = SimpleNamespace(ignore_class={"name": "void_ignore"})
    wanted = utils.LidarsegClassMapper.get_fine2coarse(mapper)
    for name, number in zip(CATEGORIES, class_numbers(CATEGORIES), strict=True):
        coarse = "void_ignore" if number == IGNORED else [*CLASSES][number]
        assert wanted[name] == coarse


# --- loss -----------------------------------------------------------------------------------------


def lovasz_by_definition(probability, label):
    """The Lovász extension of 1 - IoU of the set of wrong items, one class at a time."""
    losses = []
    for c in sorted({*label.tolist()}):
        truth = {i for i, value in enumerate(label.tolist()) if value == c}
        error = [1 - p if i in truth else p for i, p in enumerate(probability[:, c].tolist())]
        order = sorted(range(len(error)), key=lambda i: -error[i])

        def loss_of(wrong, truth=truth):
            found = (truth - wrong) | (wrong - truth)
            return 1 - len(truth & found) / len(truth | found)

        sets = [{*order[:k]} for k in range(len(order) + 1)]
        steps = [loss_of(b) - loss_of(a) for a, b in pairwise(sets)]
        losses.append(sum(error[i] * step for i, step in zip(order, steps, strict=True)))
    return np.mean(losses)


@pytest.mark.parametrize("labels", [[0, 1, 2, 0, 1, 1], [0, 0, 0, 0, 0, 0], [2], [1, 2]])
def test_lovasz_is_its_definition(labels):
    label = torch.tensor(labels)
    generator = torch.Generator().manual_seed(len(labels))
    probability = torch.rand(len(labels), 3, generator=generator).softmax(dim=1)
    wanted = lovasz_by_definition(probability, label)
    assert lovasz_softmax(probability, label).item() == pytest.approx(wanted, rel=1e-5)


def test_lovasz_of_nothing_is_0_and_of_the_truth_too():
    assert lovasz_softmax(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)).item() == 0
    assert lovasz_softmax(torch.eye(3), torch.arange(3)).item() == 0


def test_lovasz_has_the_right_gradient():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    label = torch.tensor([0, 1, 1, 2, 0, 0, 1])
    assert torch.autograd.gradcheck(lambda x: lovasz_softmax(x.softmax(dim=1), label), (logits,))


# --- metric ---------------------------------------------------------------------------------------


def test_iou_is_that_of_the_loop_over_returns():
    rng = np.random.default_rng(0)
    numbers = class_numbers(CATEGORIES)
    meters = {
        protocol: ConfusionMeter(torch.from_numpy(numbers).long(), CPU, protocol)
        for protocol in LidarSegmentation.protocols
    }
    rows, seen = [], [9, 17, 24, 25, 0, 31]  # of two of them nothing counts
    left_out = np.zeros(32, dtype=int)
    for _ in range(3):
        labels, n_rows = rng.choice(seen, 200), 30
        predicted, nearest = rng.integers(0, 16, n_rows), rng.integers(0, n_rows, 200)
        lost = rng.integers(0, 9, (2, 32)) * np.isin(np.arange(32), [*seen, 28])
        left_out += lost.sum(axis=0)
        rows += [(numbers[a], predicted[b]) for a, b in zip(labels, nearest, strict=True)]
        batch = {
            "lidarseg": torch.from_numpy(labels),
            "lidarseg_left_out": torch.from_numpy(lost),
            "nearest_row": torch.from_numpy(nearest),
        }
        for meter in meters.values():
            meter.add(batch, torch.from_numpy(predicted))
    for protocol, meter in meters.items():
        result, known = meter.result(), []
        for c, name in enumerate(CLASSES):
            missed = sum(int(left_out[i]) for i in range(32) if numbers[i] == c)
            missed *= protocol == "all-returns"
            right = sum(t == c and p == c for t, p in rows)
            wrong = sum((t == c) != (p == c) for t, p in rows if t != IGNORED)
            true = sum(t == c for t, _ in rows) + missed
            row = result["rows"][name]
            assert row["returns"] == true
            if true:
                assert row["iou"] == pytest.approx(100 * right / (right + wrong + missed))
                known.append(row["iou"])
            else:
                assert row["iou"] is None
        n = 4 if protocol == "stored" else 5
        assert len(known) == n
        assert result["headline"]["iou"] == pytest.approx(np.mean(known))
        assert result["headline"]["name"] == f"mean of {n} of 16 classes"


def test_a_split_without_a_labelled_return_has_no_mean():
    meter = ConfusionMeter(torch.from_numpy(class_numbers(CATEGORIES)).long(), CPU, "stored")
    assert meter.result()["headline"]["iou"] is None


# --- learning -------------------------------------------------------------------------------------


def job_of(store, *settings):
    config = TrainConfig.load(None, [*TINY, *settings])
    return Job("finetune", str(store), config, task="lidarseg")


def step(network, job, epoch=0):
    data = frames_for(job, network, range(4), network.objective.arrays, training=True)
    batch = data.collate([data[i] for i in range(4)])
    inputs, targets = prepare(batch, job, network, epoch, CPU)
    return network(inputs, targets, network.objective.counts(targets).tolist(), 1.0)


def test_targets_are_the_classes_of_the_rows_returns(tiny_lidar_store):
    job = job_of(tiny_lidar_store)
    store = open_store(tiny_lidar_store)
    network, _ = build_network(job, store, load_weights=False)
    data = frames_for(job, network, range(4), network.objective.arrays, training=True)
    batch = data.collate([data[3], data[1]])
    _, targets = prepare(batch, job, network, 0, CPU)
    numbers, wanted = class_numbers(CATEGORIES), []
    for i in (3, 1):
        labels = store.frame(i)["lidarseg"]
        wanted += [numbers[labels[p]] for p in data[i]["row_point"]]
    assert targets["label"].tolist() == wanted
    assert len({*wanted}) == 3


def test_the_untrained_head_knows_nothing(tiny_lidar_store):
    job = job_of(tiny_lidar_store)
    network, _ = build_network(job, open_store(tiny_lidar_store), load_weights=False)
    _, terms = step(network.train(), job)
    assert terms["entropy"].item() == pytest.approx(math.log(16), rel=1e-5)


@pytest.mark.parametrize("frozen", [True, False])
def test_a_probe_leaves_the_backbone_bit_for_bit(tiny_lidar_store, frozen):
    job = job_of(tiny_lidar_store, f"finetune.freeze_backbone={str(frozen).lower()}")
    torch.manual_seed(0)
    network, _ = build_network(job, open_store(tiny_lidar_store), load_weights=False)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    plan = job.plan
    optimiser = make_optimiser(network.train(), plan.optimiser, plan.lr, plan.weight_decay)
    for _ in range(2):  # the head begins at 0: at first nothing reaches the backbone
        optimiser.zero_grad()
        step(network, job)[0].backward()
        optimiser.step()
    changed = {name for name, v in network.state_dict().items() if not torch.equal(v, before[name])}
    assert any(name.startswith("objective.head.1") for name in changed)
    buffers = {"lidar_net.embedding.norm.running_mean", "lidar_net.layers.0.space.0.weight"}
    assert buffers <= changed if not frozen else not any("lidar_net" in name for name in changed)


def test_a_store_without_classes_says_what_to_do(tiny_store):
    with pytest.raises(StoreError, match="no classes of lidar returns: rebuild"):
        build_network(job_of(tiny_store), open_store(tiny_store), load_weights=False)


# --- rates ----------------------------------------------------------------------------------------


def test_layer_decay_is_the_formula(tiny_lidar_store):
    job = job_of(tiny_lidar_store, "lidar.size=2-8")
    network, _ = build_network(job, open_store(tiny_lidar_store), load_weights=False)
    settings = OptimiserSettings(name="adamw", layer_decay=0.5, head_lr_factor=3)
    rate, decay = {}, {}
    for group in parameter_groups(network, settings, 0.1, 0.2):
        for parameter in group["params"]:
            rate[parameter], decay[parameter] = group["lr"], group["weight_decay"]
    factors = {"embedding": 0.5**3, "layers.0": 0.5**2, "layers.1": 0.5, "objective": 3}
    assert len(rate) == len([*network.parameters()])
    for name, parameter in network.named_parameters():
        factor = next(f for part, f in factors.items() if part in name)
        assert rate[parameter] == pytest.approx(0.1 * factor), name
        assert decay[parameter] == (0 if parameter.ndim == 1 else 0.2), name


def test_without_layer_decay_all_is_one_group_but_the_head(tiny_lidar_store):
    job = job_of(tiny_lidar_store)
    network, _ = build_network(job, open_store(tiny_lidar_store), load_weights=False)
    one = parameter_groups(network, OptimiserSettings(), 0.1, 0.2)
    assert len(one) == 1 and len(one[0]["params"]) == len([*network.parameters()])
    groups = parameter_groups(network, OptimiserSettings(head_lr_factor=100), 0.1, 0.2)
    assert sorted({group["lr"] for group in groups}) == pytest.approx([0.1, 10])
    assert {group["weight_decay"] for group in groups} == {0.2}


def test_cameras_have_no_layers_to_decay(tiny_store):
    config = TrainConfig.load(None, ["model.encoder_weights=random", "model.channels=8"])
    objective = Job("pretrain", "", config).objective(open_store(tiny_store))
    network = Network(Camera(config), objective)
    with pytest.raises(ConfigError, match="layer_decay is for lidar"):
        make_optimiser(network, OptimiserSettings(layer_decay=0.9), 0.1, 0)


def test_sgd_has_momentum_and_dampening():
    linear = torch.nn.Linear(1, 1, bias=False)
    linear.backbone, linear.objective = linear, linear
    settings = OptimiserSettings(name="sgd", momentum=0.9, dampening=0.1)
    optimiser = make_optimiser(linear, settings, 0.5, 0.0)
    weight, velocity = linear.weight.item(), None
    for gradient in (1.0, 2.0, -1.0):
        linear.weight.grad = torch.tensor([[gradient]])
        optimiser.step()
        velocity = gradient if velocity is None else 0.9 * velocity + 0.9 * gradient
        weight -= 0.5 * velocity
        assert linear.weight.item() == pytest.approx(weight, rel=1e-6)


def test_the_cosine_rises_from_0_and_falls_to_the_least():
    factor = cosine(total=100, warmup=20, least=0.1)
    assert [factor(s) for s in (0, 5, 20, 60, 100, 101)] == pytest.approx(
        [0, 0.25, 1, 0.55, 0.1, 0.1]
    )
    optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    settings = OptimiserSettings(schedule="cosine", warmup_epochs=2, min_lr=0.05)
    schedule = make_schedule(optimiser, settings, 0.5, 100, 10)
    rates = []
    for _ in range(100):
        rates.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        schedule.step()
    assert rates == pytest.approx([0.5 * factor(step) for step in range(100)])
    assert make_schedule(optimiser, OptimiserSettings(), 0.5, 100, 10) is None
