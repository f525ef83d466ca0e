"""ONNX files for one rig: they run in another runtime, agree, and hold what TensorRT has."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from tiny_store import make_tiny_store

from occfeat_targets.store.settings import ConfigError
from occfeat_train.config import TrainConfig
from occfeat_train.export import ExportedNetwork
from occfeat_train.models.lifts import LIFTS
from occfeat_train.onnx_file import write_onnx
from occfeat_train.rig import calibration, read_rig, rig_of_frame
from occfeat_train.runs.job import Job

GRID = {"x": [-8, 8, 16], "y": [-8, 8, 16], "z": [-1, 3, 2]}
HW = (40, 64)  # the first is no multiple of 16: maps of odd sizes


@pytest.fixture(scope="module")
def rig(tmp_path_factory):
    """The six cameras of a tiny store."""
    store = make_tiny_store(tmp_path_factory.mktemp("onnx") / "targets.zarr")
    return rig_of_frame(Job("pretrain", str(store), TrainConfig()), 3)


def network(lift, task):
    """One with random weights, none of them at an initial value that hides something."""
    torch.manual_seed(0)
    model = {"lift": lift, "encoder_weights": "random", "image_size": HW, "channels": 8}
    said = {"model": model, "grid": GRID, "task": task, "settings": {}, "map_classes": ["road"]}
    said |= {"cameras": [], "box_classes": [], "vehicle_classes": [], "teacher": {}}
    made = ExportedNetwork(said)
    for name, parameter in made.named_parameters():
        if "offsets" in name or "attention_weights" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return made


@pytest.mark.parametrize("lift, task", [(LIFTS.names[0], "vehicle"), (LIFTS.names[1], None)])
def test_both_lifts_agree_in_another_runtime(lift, task, rig, tmp_path):
    made = network(lift, task)
    write_onnx(made, rig, tmp_path)
    model = onnx.load(tmp_path / "model.onnx")
    operations = {node.op_type for node in model.graph.node}
    assert not [o for o in operations if o in ("Loop", "If", "NonZero") or "Sequence" in o]
    assert {node.domain for node in model.graph.node} == {""}
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    names = [output.name for output in session.get_outputs()]
    assert names == (["mask", "centre", "offset"] if task else ["bev"])
    calibrated = calibration(rig, HW)
    seen = []
    for seed in range(2):
        images = torch.rand(1, 6, 3, *HW, generator=torch.Generator().manual_seed(seed))
        got = session.run(None, {"images": images.numpy()})
        with torch.inference_mode():
            expected = made(images, *calibrated)
        for name, values in zip(names, got, strict=True):
            np.testing.assert_allclose(values, expected[name], atol=1e-4, rtol=0)
        seen.append(got[0])
    assert np.abs(seen[0] - seen[1]).max() > 1e-2  # the image is no constant
    assert read_rig(tmp_path / "calibration.json") == rig
    assert {p.name for p in tmp_path.iterdir()} == {"model.onnx", "calibration.json"}


# Cameras in JSON


def test_intrinsics_are_those_of_the_network_s_images(rig):
    K, cam_T_ego = calibration(rig[:2], (32, 192))  # of images of 64 x 96: half, and double
    wanted = [[120, 0, 96], [0, 30, 16], [0, 0, 1]]
    np.testing.assert_allclose(K, [[wanted, wanted]], rtol=1e-6)
    np.testing.assert_allclose(cam_T_ego[0, 1], rig[1].cam_T_ego, rtol=1e-6)


def _write(path, rig, **changes):
    cameras = [camera.model_dump(mode="json") for camera in rig[:2]]
    cameras[1] |= changes
    path.write_text(json.dumps({"cameras": cameras}))


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"K": [[60, 0, 48], [0, 60, 32]]}, "K"),
        ({"K": [[60, 0, 48], [0, 60, 32], [0, 0, 2]]}, "K must be"),
        ({"K": [[float("nan"), 0, 48], [0, 60, 32], [0, 0, 1]]}, "K"),
        ({"cam_T_ego": (2 * np.eye(4)).tolist()}, "cam_T_ego must be a rotation"),
        ({"cam_T_ego": np.diag([1.0, 1, -1, 1]).tolist()}, "cam_T_ego must be a rotation"),
        ({"image_hw": [0, 96]}, "image_hw"),
        ({"distortion": [0.1]}, "unknown setting .*distortion"),
    ],
)
def test_impossible_cameras_are_named(changes, sentence, rig, tmp_path):
    _write(tmp_path / "rig.json", rig, **changes)
    with pytest.raises(ConfigError, match=f"rig.json: camera {rig[1].name}: .*{sentence}"):
        read_rig(tmp_path / "rig.json")


@pytest.mark.parametrize("text", ["", "[]", '{"cameras": []}', '{"cameras": [{}]}', "\x00"])
def test_a_file_without_cameras_is_one_sentence(text, tmp_path):
    (tmp_path / "rig.json").write_text(text)
    with pytest.raises(ConfigError, match="rig.json"):
        read_rig(tmp_path / "rig.json")


def test_two_cameras_of_one_name_are_refused(rig, tmp_path):
    _write(tmp_path / "rig.json", rig, name=rig[0].name)
    with pytest.raises(ConfigError, match="by a name of its own"):
        read_rig(tmp_path / "rig.json")
