"""Exported networks: the same outputs as the run's, without the run, its store or a pickle."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny_store import make_tiny_store
from train_runs import final_state, options, run

from occfeat_targets.store.reader import open_store
from occfeat_train.export import load_bev_net, load_network
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
    for name, values in expected.items():
        torch.testing.assert_close(predicted[name], values, atol=1e-5, rtol=0)


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
        if name in ("splits", "frames", "headline", "rows")
    }
    assert json.loads((workplace / "untested/model.json").read_text())["result"] is None
    assert said["seed"] == 7 and said["fraction"] == 0.5 and said["pretraining"] == "occfeat"
    assert said["store"]["source"] == {"dataset": "tiny"} and said["store"]["n_frames"] == 16
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
