"""Finetuning by Simple-BEV's protocol and evaluation under both, each IoU by its name."""

import json
import re
import shutil
import signal

import pytest
import torch
from conftest import LONG
from train_runs import assert_same_state, curve, options, run, start, stop_at_step

from occfeat_train import view
from occfeat_train.augment import draw
from occfeat_train.data.dataset import FrameDataset
from occfeat_train.evaluate import predict
from occfeat_train.network import prepare, trained_network
from occfeat_train.report.groups import collect, result_table
from occfeat_train.runs.job import Job
from occfeat_train.runs.run import Run
from occfeat_train.tasks import simple_bev
from occfeat_train.tasks.vehicle import VehicleSegmentation

PROTOCOLS = ("ego", "simple-bev")
OTHERS = ("`pop3d`", "`looked-up`", "`stored`")
"""Of other tasks than vehicles."""
CPU = torch.device("cpu")
SETTINGS = options(
    "tasks.vehicle.protocol=simple-bev",
    "augment.rotate_bev_deg=180",
    "finetune.epochs=2",
    "run.validate_every=1",
)


def finetune(store, name):
    """The command."""
    where = ("--store", store, "--run-dir", f"runs/{name}")
    return ("finetune", "--init", "none", *where, *SETTINGS)


@pytest.fixture(scope="module")
def workplace(tiny_store, tmp_path_factory):
    """A finished and evaluated finetuning, with what the commands printed."""
    cwd = tmp_path_factory.mktemp("protocols")
    printed = [run(*finetune(tiny_store, "fine"), cwd=cwd), run("evaluate", cwd=cwd)]
    return cwd, printed


@pytest.fixture(scope="module")
def network(workplace):
    """With its job, and a batch of held-out frames."""
    run_ = Run(workplace[0] / "runs/fine")
    job = Job.of_run(run_)
    data = FrameDataset(job.store, range(12, 16), ("images", *VehicleSegmentation.eval_arrays))
    network, _ = trained_network(job, run_, data.reader.store)
    return network, job, data.collate([data[i] for i in range(4)])


@LONG
def test_a_killed_run_resumes_to_the_same_weights(workplace, tiny_store):
    """By SIGKILL in its second epoch."""
    cwd, _ = workplace
    process = start(*finetune(tiny_store, "killed"), cwd=cwd)
    stop_at_step(process, cwd / "runs/killed", 4, signal.SIGKILL)
    assert not (cwd / "runs/killed/checkpoint-00000006.pt").exists()
    said = run("finetune", "--resume", "--run-dir", "runs/killed", cwd=cwd)
    assert "resumed after step 3" in said
    assert_same_state(cwd / "runs/fine", cwd / "runs/killed")
    assert curve(cwd / "runs/fine")[-1] == curve(cwd / "runs/killed")[-1]


def test_both_protocols_are_counted_in_one_pass_each_in_its_frame(workplace, network):
    cwd, _ = workplace
    net, _, batch = network
    result = json.loads((cwd / "runs/fine/result.json").read_text())
    names = [f"{protocol}, {cells}" for protocol in PROTOCOLS for cells in ("visible", "all")]
    assert list(result["rows"]) == names
    assert result["headline"] == {
        "name": "simple-bev, visible cells",
        "iou": result["rows"]["simple-bev, visible"]["iou"],
        "protocol": "simple-bev",
    }
    front = simple_bev.camera_frame(batch["cam_T_ego"], torch.ones(4, dtype=torch.int64))
    for protocol, frame in zip(PROTOCOLS, (torch.eye(4).expand(4, 4, 4), front), strict=True):
        moved = batch | {"cam_T_ego": batch["cam_T_ego"] @ frame[:, None]}
        net.objective.frame = lambda _: None  # as if that were ego
        mask = predict(net, moved, net.objective.predict)["mask"] > 0
        del net.objective.frame
        target, _ = net.objective.truth(batch, protocol)
        both = (mask & (target[:, 0] > 0)).sum()
        wrong, missed = mask.sum() - both, target.sum() - both
        counts = result["rows"][f"{protocol}, all"]["true_positive, false_positive, false_negative"]
        assert counts == [both, wrong, missed]


def test_training_sees_cameras_and_labels_in_one_random_frame(network):
    """A vehicle's centre is the same pixel by the pose that the lift gets and by ego's."""
    net, job, batch = network
    inputs, targets = prepare(batch, job, net, 3, CPU)
    frames = net.objective.frame(batch | {"seed": _seeds(job, batch)})
    torch.testing.assert_close(inputs["cam_T_bev"], batch["cam_T_ego"] @ frames[:, None])
    level = inputs["cam_T_bev"][:, :, :3, 3].norm(dim=-1).amin(dim=1)
    torch.testing.assert_close(level, torch.full((4,), simple_bev.HEIGHT_M))  # one camera's own
    again, other = (prepare(batch, job, net, epoch, CPU) for epoch in (3, 4))
    assert torch.equal(again[1]["vehicle"], targets["vehicle"])
    assert not torch.equal(other[1]["vehicle"], targets["vehicle"])


def _seeds(job, batch):
    return draw(job.config.augment, job.config.run.seed, 3, batch["frame"], 6).seed


# Each IoU names its protocol


def _bare(text):
    """Paragraphs with a number of IoU that name no protocol. (That of voxels has none.)"""
    shown = re.compile(r"(?<!oxel )(?<!ccupancy )IoU\b")
    parts = [part for part in re.split(r"\n\s*\n", text) if re.search(r"\d\.\d (%|±)", part)]
    return [
        p for p in parts if shown.search(p) and not any(name in p for name in (*PROTOCOLS, *OTHERS))
    ]


def test_a_bare_number_is_found():
    assert _bare("It has an IoU of 14.5 %.") and not _bare("By `ego`, it has an IoU of 14.5 %.")


def test_what_is_printed_and_drawn_names_the_protocol(workplace):
    cwd, (finetuned, evaluated) = workplace
    assert finetuned.count("held-out frames: simple-bev IoU ") == 2
    for line in (cwd / "runs/fine/log.jsonl").read_text().splitlines():
        said = json.loads(line)
        assert all("simple-bev" in key for key in said if "IoU" in key)
    table = evaluated[evaluated.index("protocol, cells") :].splitlines()[1:5]
    assert [line.split()[0].strip(",") for line in table] == ["ego"] * 2 + ["simple-bev"] * 2
    run("export", "--run-dir", "runs/fine", "--out", "net", "--hub-card", cwd=cwd)
    card = (cwd / "net/README.md").read_text()
    assert "%, simple-bev, visible cells, 4 frames" in card and "labels (simple-bev) of" in card
    viewer = view.Viewer(Job.of_run(Run(cwd / "runs/fine")), Run(cwd / "runs/fine"), CPU)
    (panel,) = viewer.look(12).panels
    assert panel.title == "vehicle, simple-bev"


def test_results_of_before_there_were_protocols_are_not_shown(workplace, tmp_path):
    """As if they had not been evaluated: they would pass for the other protocol's."""
    old = shutil.copytree(workplace[0] / "runs/fine", tmp_path / "old")
    result = json.loads((old / "result.json").read_text())
    del result["headline"]["protocol"]
    (old / "result.json").write_text(json.dumps(result))
    (_, line) = result_table(collect([old]))
    assert line[-1].startswith("not evaluated: ")


def test_pages_name_the_protocol_of_each_iou(pytestconfig):
    root = pytestconfig.rootpath
    for path in (root / "README.md", root / "CHANGELOG.md", *(root / "docs").rglob("*.md")):
        assert not _bare(path.read_text()), path
