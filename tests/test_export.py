"""Exported networks: the same outputs as the run's, without the run, its store or a pickle."""

import json

import huggingface_hub
import pytest
import torch
from conftest import LONG
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from tiny_store import make_tiny_store
from train_runs import final_state, options, run

from occfeat_targets.store.reader import open_store
from occfeat_train import export
from occfeat_train.export import ExportedNetwork, load_bev_net, load_network
from occfeat_train.model_card import model_card
from occfeat_train.models.encoder_weights import load_encoder_weights
from occfeat_train.models.encoders import ImageEncoder
from occfeat_train.network import trained_network
from occfeat_train.runs.job import Job
from occfeat_train.runs.run import Run, RunError


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with a store, a pretraining and a finetuning for each task."""
    cwd = tmp_path_factory.mktemp("export")
    make_tiny_store(cwd / "targets.zarr", with_map=True)
    settings = options("pretrain.epochs=1", "finetune.epochs=1", "run.seed=7")
    run("pretrain", "--run-dir", "runs/pre", *settings, cwd=cwd)
    for task in ("vehicle", "map"):
        arguments = ("--task", task, "--fraction", "0.5", "--run-dir", f"runs/{task}")
        run("finetune", *arguments, "--set", "finetune.epochs=1", cwd=cwd)
    return cwd


def an_input(cwd, frame=0):
    """Images (1, 6, 3, 32, 64), K, cam_T_ego of a frame of its store."""
    frame = open_store(str(cwd / "targets.zarr")).frame(frame)
    K, cam_T_ego = (torch.from_numpy(frame[name])[None].float() for name in ("K", "cam_T_ego"))
    K = K * torch.tensor([64 / 96, 32 / 64, 1.0])[:, None]
    return torch.rand(1, 6, 3, 32, 64, generator=torch.Generator().manual_seed(0)), K, cam_T_ego


@pytest.mark.parametrize("task", ["vehicle", "map"])
def test_a_finetuned_network_is_exported_with_its_head(task, workplace):
    run("evaluate", "--run-dir", f"runs/{task}", cwd=workplace)
    said = run("export", "--run-dir", f"runs/{task}", "--out", f"{task}-net", cwd=workplace)
    assert said == f"{task}-net: the {task} network of runs/{task}\n"
    network = load_network(workplace / f"{task}-net")
    finetuned = Run(workplace / "runs" / task)
    job = Job.of_run(finetuned)
    theirs, _ = trained_network(job, finetuned, open_store(job.store))
    inputs = an_input(workplace)
    with torch.inference_mode():
        expected = theirs.eval().objective.predict(theirs.bev_net(*inputs))
        predicted = network(*inputs)
        bev = load_bev_net(workplace / f"{task}-net")(*inputs)
        torch.testing.assert_close(bev, network.bev_net(*inputs), atol=0, rtol=0)
    assert predicted.keys() == expected.keys() and "mask" in predicted
    for name, values in expected.items():  # instance norm enlarges what rounding differs by
        torch.testing.assert_close(predicted[name], values, atol=1e-4, rtol=0)


def test_a_pretrained_one_gives_bev_features(workplace):
    run("export", "--run-dir", "runs/pre", "--out", "pre-net", cwd=workplace)
    inputs = an_input(workplace)
    with torch.inference_mode():
        bev = load_network(workplace / "pre-net")(*inputs)["bev"]
        assert torch.equal(bev, load_bev_net(workplace / "pre-net")(*inputs))
    trained = final_state(workplace / "runs/pre")
    for name, value in load_file(workplace / "pre-net/model.safetensors").items():
        assert torch.equal(value, trained[f".network.bev_net.{name}"])


def test_its_description_says_where_it_comes_from(workplace):
    finetuned = Run(workplace / "runs/map")
    finetuned.path.joinpath("result.json").unlink(missing_ok=True)
    run("export", "--run-dir", "runs/map", "--out", "untested", cwd=workplace)
    run("evaluate", "--run-dir", "runs/map", cwd=workplace)
    run("export", "--run-dir", "runs/map", "--out", "tested", cwd=workplace)
    text = (workplace / "tested/model.json").read_text()
    said = json.loads(text)
    assert said["result"] == {
        name: value
        for name, value in json.loads((finetuned.path / "result.json").read_text()).items()
        if name in ("splits", "frames", "headline", "rows", "counted")
    }
    assert json.loads((workplace / "untested/model.json").read_text())["result"] is None
    assert said["seed"] == 7 and said["fraction"] == 0.5 and said["pretraining"] == "occfeat"
    assert (
        said["store"]["source"] == {"dataset": "tiny", "version": "1"}
        and said["store"]["n_frames"] == 16
    )
    assert said["map_classes"][0] == "road" and said["stored_image_size"] == [64, 96]
    assert str(workplace) not in text


def test_a_result_of_another_step_is_not_this_network_s(workplace):
    run("evaluate", "--run-dir", "runs/vehicle", cwd=workplace)
    path = workplace / "runs/vehicle/result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"step": 99}))
    run("export", "--run-dir", "runs/vehicle", "--out", "stale", cwd=workplace)
    path.unlink()
    assert load_network(workplace / "stale").description["result"] is None


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"format": "other"}, "was not written by occfeat-train export"),
        ({"grid": {"x": [0, 1, 2]}}, "is damaged"),
        ({"task": "map", "map_classes": ["road"]}, "the network in .* is another one"),
    ],
)
def test_a_damaged_description_is_one_sentence(changes, sentence, workplace, tmp_path):
    run("export", "--run-dir", "runs/map", "--out", tmp_path / "net", cwd=workplace)
    path = tmp_path / "net/model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(RunError, match=sentence):
        load_network(tmp_path / "net")


# ONNX


@LONG
def test_onnx_is_for_the_cameras_of_a_frame_or_file(workplace):
    said = run("export", "--run-dir", "runs/pre", "--out", "net", "--onnx", cwd=workplace)
    assert said.splitlines()[1].startswith("net/model.onnx: for CAM_FRONT_LEFT, CAM_FRONT, ")
    path = workplace / "net/calibration.json"
    cameras = json.loads(path.read_text())["cameras"]
    frame = open_store(str(workplace / "targets.zarr")).frame(12)  # the first of validation
    assert [camera["K"] for camera in cameras] == frame["K"].tolist()
    assert [camera["cam_T_ego"] for camera in cameras] == frame["cam_T_ego"].tolist()
    (workplace / "two.json").write_text(json.dumps({"cameras": cameras[:2]}))
    arguments = ("export", "--run-dir", "runs/map", "--out", "two", "--onnx")
    said = run(*arguments, "--calibration", "two.json", cwd=workplace)
    assert said.endswith("two/model.onnx: for CAM_FRONT_LEFT, CAM_FRONT\n")
    refused = run("export", "--onnx", "--out", "three", "--frame", 16, cwd=workplace, code=1)
    assert "has frames 0 to 15" in refused and not (workplace / "three").exists()


def test_without_an_exporter_it_says_what_to_install(workplace, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    said = run("export", "--onnx", "--out", "none", cwd=workplace, code=1)
    assert "pip install 'occfeat[export]'" in said and not (workplace / "none").exists()


# The hub


def test_a_card_says_what_it_learned_from_and_how_well(workplace):
    run("evaluate", "--run-dir", "runs/map", cwd=workplace)
    run("export", "--run-dir", "runs/map", "--out", "carded", "--hub-card", cwd=workplace)
    network = load_network(workplace / "carded")
    result = network.description["result"]
    card = ModelCard.load(workplace / "carded/README.md")
    said = card.data.to_dict()
    assert said["library_name"] == "occfeat" and "license" not in said
    for fact in (
        "# map network",
        f"IoU {result['headline']['iou']} %, ego, mean of classes, 4 frames of mini_val",
        "the labels of 50 % of training scenes",
        "occfeat; teacher of RANDOM weights",
        "records sha256 0,",
        "| Seed | 7, step ",
        "tiny 1; its licence holds for these weights too",
    ):
        assert fact in card.text, fact
    assert str(workplace) not in card.content


def test_the_licence_is_that_of_the_data(workplace):
    network = ExportedNetwork.of_run(Run(workplace / "runs/pre"))
    said = network.description | {"result": None}
    for source, licence, sentence in (
        ({"dataset": "nuScenes", "version": "v1.0-mini"}, "cc-by-nc-sa-4.0", "not for commercial"),
        ({"dataset": "occfeat demo world"}, None, "rendered"),
        (None, None, "the run does not say"),
    ):
        store = said["store"] | {"source": source}
        card = ModelCard(model_card(said | {"store": store}))
        assert card.data.license == licence and sentence in card.text


def test_save_pretrained_loads_again_and_is_what_is_pushed(workplace, tmp_path, monkeypatch):
    network = ExportedNetwork.of_run(Run(workplace / "runs/map"))
    network.save_pretrained(tmp_path / "saved")
    inputs = an_input(workplace)
    again = ExportedNetwork.from_pretrained(tmp_path / "saved")
    with torch.inference_mode():
        assert torch.equal(again(*inputs)["mask"], network(*inputs)["mask"])
    pushed = {}

    class Hub:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, **_):
            pushed["repo"] = repo_id
            return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

        def upload_folder(self, folder_path, **_):
            pushed["files"] = {p.name: p.read_bytes() for p in folder_path.iterdir()}

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Hub)
    network.push_to_hub("someone/net")
    assert pushed["repo"] == "someone/net"
    assert pushed["files"] == {p.name: p.read_bytes() for p in (tmp_path / "saved").iterdir()}
    assert pushed["files"].keys() == {"model.safetensors", "model.json", "README.md"}


def test_of_a_hub_id_only_what_cannot_run_code_is_fetched(workplace, tmp_path, monkeypatch):
    asked = {}

    def fetch(repo_id, **options):
        asked.update(options, repo_id=repo_id)
        return str(tmp_path)

    ExportedNetwork.of_run(Run(workplace / "runs/pre")).write(tmp_path)
    monkeypatch.setattr(export, "snapshot_download", fetch)
    ExportedNetwork.from_pretrained("someone/net", revision="v1")
    files = ["model.safetensors", "model.json"]
    assert asked == {"repo_id": "someone/net", "revision": "v1", "allow_patterns": files}


# The encoder


def test_the_encoder_alone_is_one_to_start_from(workplace):
    said = run("export", "--run-dir", "runs/vehicle", "--encoder", "e.safetensors", cwd=workplace)
    assert said == (
        "e.safetensors: efficientnet-b0 of runs/vehicle by the names of efficientnet_pytorch\n"
    )
    path = workplace / "e.safetensors"
    encoder = ImageEncoder("efficientnet-b0", 8)
    load_encoder_weights(encoder, str(path))
    trained = final_state(workplace / "runs/vehicle")
    for name, value in encoder.backbone.state_dict().items():
        assert torch.equal(value, trained[f".network.bev_net.encoder.backbone.{name}"]), name
    refused = run("export", "--run-dir", "runs/map", "--encoder", path, cwd=workplace, code=1)
    assert "name a new .safetensors" in refused


@pytest.mark.parametrize(
    "given, sentence",
    [
        ((), "name --out DIRECTORY, or --encoder"),
        (("--encoder", "other.safetensors", "--onnx"), "name --out DIRECTORY, or --encoder"),
        (("--out", "other", "--frame", 0), "--frame and --calibration are of --onnx"),
    ],
)
def test_options_that_would_do_nothing_are_refused(given, sentence, workplace):
    assert sentence in run("export", *given, cwd=workplace, code=2)
