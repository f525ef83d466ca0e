"""``occfeat-train predict``: own images, of any cameras, without a store."""

import json

import numpy as np
import pytest
from PIL import Image
from tiny_store import make_tiny_store
from train_runs import options, run

from occfeat_targets.store.reader import open_store
from occfeat_train.data.dataset import FrameDataset
from occfeat_train.evaluate import predict
from occfeat_train.network import trained_network
from occfeat_train.rig import rig_of_frame, write_rig
from occfeat_train.runs.job import Job
from occfeat_train.runs.run import Run

FRAME = 13


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with a store, a map finetuning, its export, and a frame's images with their JSON."""
    cwd = tmp_path_factory.mktemp("predict")
    make_tiny_store(cwd / "targets.zarr", with_map=True)
    run("pretrain", "--run-dir", "pre", *options("pretrain.epochs=1"), cwd=cwd)
    arguments = ("--init", "pre", "--task", "map", "--run-dir", "map")
    run("finetune", *arguments, "--set", "finetune.epochs=1", cwd=cwd)
    run("export", "--run-dir", "map", "--out", "net", cwd=cwd)
    job = Job.of_run(Run(cwd / "map"))
    rig = write_rig(rig_of_frame(job, FRAME))
    for camera, image in zip(rig["cameras"], _batch(job)["images"][0].numpy(), strict=True):
        camera["file"] = f"{camera['name']}.png"
        Image.fromarray(image).save(cwd / camera["file"])
    (cwd / "rig.json").write_text(json.dumps(rig))
    return cwd


def _batch(job):
    dataset = FrameDataset(job.store, [FRAME], ("images", "map"))
    return dataset.collate([dataset[0]])


def _rig(workplace, *cameras, **changes):
    """Write another JSON of some of its cameras, each with changes; returns its path."""
    said = json.loads((workplace / "rig.json").read_text())["cameras"]
    path = workplace / "other.json"
    path.write_text(json.dumps({"cameras": [said[c] | changes for c in cameras]}))
    return path


def _predict(workplace, net, rig, out):
    return run("predict", net, "--calibration", rig, "--out", out, cwd=workplace)


@pytest.mark.parametrize("net", ["map", "net"])
def test_images_of_a_frame_give_what_evaluation_sees(net, workplace, monkeypatch):
    job = Job.of_run(Run(workplace / "map"))
    store = open_store(job.store)
    network, _ = trained_network(job, Run(workplace / "map"), store)
    expected = predict(network, _batch(job), network.objective.predict)["mask"].sigmoid()[0]
    (workplace / "targets.zarr").rename(workplace / "away.zarr")  # it is not needed
    try:
        said = run(
            "predict", net, "--calibration", "rig.json", "--out", f"{net}-out", cwd=workplace
        )
    finally:
        (workplace / "away.zarr").rename(workplace / "targets.zarr")
    assert said.startswith(
        f"{net}-out: prediction.png and prediction.npz, {net} (map network) on 6"
    )
    got = np.load(workplace / f"{net}-out/prediction.npz")
    np.testing.assert_allclose(got["probability"], expected, atol=1e-5)
    assert got["classes"].tolist() == store.attrs["map_classes"]
    assert got["cameras"].tolist() == store.attrs["cameras"]
    assert got["x"].tolist() == got["y"].tolist() == (np.arange(16) - 7.5).tolist()
    assert Image.open(workplace / f"{net}-out/prediction.png").size == (75 * 25.25 // 1, 540)


@pytest.mark.parametrize("cameras", [(1,), (4, 1), (0, 1, 2, 3, 4, 5, 0)])
def test_any_number_of_cameras_will_do(cameras, workplace, tmp_path):
    path = _rig(workplace, *cameras)
    said = json.loads(path.read_text())
    for n, camera in enumerate(said["cameras"]):
        camera["name"] = f"my camera {n}"
    path.write_text(json.dumps(said))
    _predict(workplace, "net", path, tmp_path)
    probability = np.load(tmp_path / "prediction.npz")["probability"]
    assert probability.shape == (5, 16, 16) and 0 < probability.min() < probability.max() < 1


def test_larger_files_have_a_larger_k(workplace, tmp_path):
    """The same scene twice as large, in one colour so that resizing it does not blur."""
    said = json.loads((workplace / "rig.json").read_text())
    results = []
    for factor in (1, 2):
        larger = [
            camera | {"file": f"{factor}-{i}.png"} for i, camera in enumerate(said["cameras"])
        ]
        for i, camera in enumerate(larger):
            camera["image_hw"] = [64 * factor, 96 * factor]
            camera["K"] = (np.diag([factor, factor, 1]) @ camera["K"]).tolist()
            colour = tuple(40 * i + 10 * c for c in range(3))
            Image.new("RGB", (96 * factor, 64 * factor), colour).save(tmp_path / camera["file"])
        (tmp_path / "rig.json").write_text(json.dumps({"cameras": larger}))
        run(
            "predict",
            "net",
            "--calibration",
            tmp_path / "rig.json",
            "--out",
            tmp_path,
            cwd=workplace,
        )
        results.append(np.load(tmp_path / "prediction.npz")["probability"])
    np.testing.assert_allclose(results[0], results[1], atol=1e-5)


def test_files_can_be_given_one_by_one(workplace, tmp_path):
    path = _rig(workplace, 0, 1, file=None)
    arguments = ("predict", "net", "--calibration", path, "--out", tmp_path / "out")
    said = run(*arguments, cwd=workplace, code=1)
    assert "other.json names no file of camera CAM_FRONT_LEFT: add it, or give --images" in said
    said = run(*arguments, "--images", "CAM_FRONT.png", cwd=workplace, code=1)
    assert "1 images for 2 cameras: give one each, CAM_FRONT_LEFT, CAM_FRONT" in said
    assert not (tmp_path / "out").exists()
    one_by_one = ("--images", "CAM_FRONT_LEFT.png", "--images", "CAM_FRONT.png")
    run(*arguments, *one_by_one, cwd=workplace)
    first = np.load(tmp_path / "out/prediction.npz")["probability"]
    _predict(workplace, "net", _rig(workplace, 0, 1), tmp_path)
    assert (np.load(tmp_path / "prediction.npz")["probability"] == first).all()


@pytest.mark.parametrize(
    "content, sentence",
    [
        (None, "No such file"),
        (b"", "cannot identify"),
        (b"<html>", "cannot identify"),
        ("half", "truncated"),
        ((10, 20), "it is 20x10, its K is for 64x96"),
    ],
)
def test_an_image_that_cannot_be_used_is_named(content, sentence, workplace, tmp_path):
    file = tmp_path / "mine.png"
    if isinstance(content, tuple):
        Image.new("RGB", content).save(file)
    elif content == "half":
        whole = (workplace / "CAM_FRONT.png").read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
    elif content is not None:
        file.write_bytes(content)
    path = _rig(workplace, 1, file=str(file))
    arguments = ("predict", "net", "--calibration", path, "--out", tmp_path / "out")
    said = run(*arguments, cwd=workplace, code=1)
    assert f"Error: camera CAM_FRONT: cannot use {file}: " in said and sentence in said


def test_what_predicts_no_masks_is_refused(workplace):
    arguments = ("--calibration", "rig.json", "--out", "out")
    said = run("predict", "nowhere", *arguments, cwd=workplace, code=1)
    assert "nowhere is neither a run nor an exported network" in said
    said = run("predict", "pre", *arguments, cwd=workplace, code=1)
    assert "pre is a BEV network, which predicts no masks: name a finetuning's" in said
