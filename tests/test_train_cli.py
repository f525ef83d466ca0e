"""``occfeat-train`` as a user meets it: the three commands, what is found, what is refused."""

import json
import shutil
import signal
import subprocess
import sys
from contextlib import chdir

import pytest
import torch
import yaml
from click.testing import CliRunner
from conftest import LONG
from safetensors.torch import load_file
from tiny_store import change_attributes, make_tiny_store
from train_runs import SMALL, assert_same_state, final_state, options, run, start, stop_at_step

from occfeat_targets.store.reader import SEAL, open_store
from occfeat_targets.store.settings import settings_file
from occfeat_train.cli import _say_worth, main
from occfeat_train.config import TrainConfig
from occfeat_train.export import export, load_bev_net
from occfeat_train.models.lifts.bevformer import BEVFormerLift
from occfeat_train.objectives import OBJECTIVES
from occfeat_train.runs import resolve
from occfeat_train.runs.run import Run, RunError
from occfeat_train.tasks import TASKS


@pytest.fixture(scope="module")
def workplace(tiny_store, tmp_path_factory):
    """A directory where the commands of the help text were run, with what they printed."""
    cwd = tmp_path_factory.mktemp("workplace")
    shutil.copytree(tiny_store, cwd / "targets.zarr")
    printed = [
        run("pretrain", "--store", "targets.zarr", *options(), cwd=cwd),
        run("finetune", "--fraction", "0.01", cwd=cwd),
        run("evaluate", cwd=cwd),
    ]
    return cwd, printed


def _only(cwd, kind):
    (path,) = (cwd / "runs").glob(f"{kind}-*")
    return path


def test_the_three_commands_find_each_others_results(workplace):
    cwd, (pretrained, finetuned, evaluated) = workplace
    pretraining, finetuning = _only(cwd, "pretrain"), _only(cwd, "finetune")
    assert "preset demo, as " in pretrained
    assert "RANDOM-WEIGHTS teacher" in pretrained and "RANDOM-WEIGHTS teacher" in evaluated
    assert f"Starting from: runs/{pretraining.name}" in finetuned
    assert f"Settings: those of runs/{pretraining.name}" in finetuned
    for printed in (pretrained, finetuned, evaluated):
        assert f"Store: {cwd / 'targets.zarr'}" in printed
    assert "4 frames of 1 scene," in finetuned  # 0.01 of three scenes: the first
    assert f"runs/{finetuning.name} (step 3) on 4 frames of mini_val" in evaluated
    result = json.loads((finetuning / "result.json").read_text())
    assert result["fraction"] == 0.01
    assert 0 <= result["rows"]["ego, visible"]["iou"] <= 100


@pytest.mark.parametrize(
    ("dataset", "weights", "said"),
    [
        ("nuScenes", "random(0)", "come from a RANDOM-WEIGHTS teacher: good to see"),
        ("occfeat demo world", "a1b2", "is of a demo world, its teacher is tiny: good to see"),
        ("nuScenes", "a1b2", ""),
    ],
)
def test_what_numbers_of_a_store_are_worth(tiny_store, tmp_path, capsys, dataset, weights, said):
    store = shutil.copytree(tiny_store, tmp_path / "targets.zarr")
    attrs = open_store(store).attrs
    teacher, source = attrs["teacher"] | {"weights": weights}, attrs["source"]
    change_attributes(store, teacher=teacher, source=source | {"dataset": dataset})
    _say_worth(open_store(str(store)), print)
    printed = capsys.readouterr().out
    assert said in printed and bool(said) == bool(printed)


def test_finetuning_starts_from_the_pretrained_network_and_a_fresh_head(workplace):
    cwd, (_, finetuned, _) = workplace
    assert "encoder 247, compressor 1, decoder 93; fresh: " in finetuned
    assert "not used: 12 tensors of its pretrain head" in finetuned
    out = cwd / "start"
    settings = ["--set", "finetune.lr=1e-30", "--set", "model.freeze_batch_norm=true"]
    run("finetune", "--run-dir", out, *settings, cwd=cwd)
    before, after = final_state(_only(cwd, "pretrain")), final_state(out)
    shared = [k for k in before if k.startswith(".network.bev_net.")]
    assert len(shared) == 341
    for name in shared:
        assert torch.equal(before[name], after[name]), name


def test_a_checkpoint_says_in_json_what_it_is(workplace):
    cwd, _ = workplace
    (path,) = sorted(_only(cwd, "finetune").glob("checkpoint-*.json"))[-1:]
    said = json.loads(path.read_text())
    assert said["position"] == {"epoch": 3, "step_in_epoch": 0, "step": 3, "finished": True}
    assert said["config"]["model"]["channels"] == 8
    assert said["store_identity"]["teacher"]["weights"] == "random(tiny)"
    assert said["versions"].keys() >= {"occfeat", "torch", "zarr"}


def test_export_loads_as_the_readme_says_and_has_no_head(workplace):
    cwd, _ = workplace
    run("export", "--out", "bev-net", cwd=cwd)
    files = [path.stat().st_mode for path in (cwd / "bev-net").iterdir()]
    assert len(files) == 2 and len({*files}) == 1  # as the umask says, not for the owner alone
    network = load_bev_net(cwd / "bev-net")
    weights = load_file(cwd / "bev-net" / "model.safetensors")
    trained = final_state(_only(cwd, "pretrain"))
    assert weights.keys() == network.state_dict().keys()
    assert not any("head" in name or "objective" in name for name in weights)
    for name, value in weights.items():
        assert torch.equal(value, trained[f".network.bev_net.{name}"])
    assert "exists already" in run("export", "--out", "bev-net", cwd=cwd, code=1)
    with pytest.raises(RunError, match="holds no exported network"):
        load_bev_net(cwd)
    (cwd / "bev-net" / "model.safetensors").write_bytes(b"damaged, by a disk say")
    with pytest.raises(RunError, match="holds no exported network: .*header"):
        load_bev_net(cwd / "bev-net")


@LONG
def test_bevformer_pretrains_resumes_and_finetunes(tiny_store, tmp_path):
    settings = options("model.lift=bevformer", "pretrain.epochs=2", "run.save_minutes=60")
    whole = ("pretrain", "--store", tiny_store, "--run-dir", "whole", *settings)
    run(*whole, cwd=tmp_path)
    process = start(*whole[:4], "parts", *settings, cwd=tmp_path)
    output = stop_at_step(process, tmp_path / "parts", 2, signal.SIGTERM)
    assert output.count("stopping after this step") == 1
    resumed = run("pretrain", "--resume", "--run-dir", "parts", cwd=tmp_path)
    assert "resumed after step" in resumed
    assert_same_state(tmp_path / "whole", tmp_path / "parts")  # dropout included
    arguments = ("finetune", "--store", tiny_store, "--init", "whole")
    finetuned = run(*arguments, "--run-dir", "fine", "--set", "finetune.epochs=1", cwd=tmp_path)
    assert "encoder 247, lift 170, decoder 93; fresh: " in finetuned
    assert " on 4 frames of mini_val" in run("evaluate", "--run-dir", "fine", cwd=tmp_path)
    export(Run(tmp_path / "fine"), tmp_path / "net")
    assert isinstance(load_bev_net(tmp_path / "net").lift, BEVFormerLift)
    output = _refused(*arguments, "--set", "model.lift=simplebev", cwd=tmp_path)
    assert "use the model settings it was trained with" in output


def test_evaluate_prints_json(workplace):
    cwd, _ = workplace
    printed = run("evaluate", "--json", cwd=cwd)
    start = printed.index("{\n")
    assert json.loads(printed[start : printed.rindex("}") + 1])["frames"] == 4


def _refused(*arguments, cwd):
    """What a command says that stops before any work; run in this process, to save time."""
    with chdir(cwd):
        result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.output
    return result.output


def test_a_missing_library_is_named_with_its_extra(tmp_path, monkeypatch):
    def find(*_):
        raise ModuleNotFoundError("No module named 'distributed'", name="distributed")

    monkeypatch.setattr(resolve, "finished", find)
    output = _refused("evaluate", cwd=tmp_path)
    assert output.startswith("Error: this needs distributed, which is not installed: pip install")


def test_unusable_stores_are_refused_in_one_sentence(tiny_store, tmp_path):
    assert "no targets store here" in _refused("pretrain", cwd=tmp_path)
    changes = {
        "is not finished": {"complete": False},
        "not an occfeat-targets store": {"format": "other"},
        "has format version 3, this program reads 2": {"format_version": 3},
        "has no usable frames of train, mini_train; its splits are: val": {"splits": ["val", "x"]},
    }
    for message, attributes in changes.items():
        path = shutil.copytree(tiny_store, tmp_path / "spoilt.zarr", dirs_exist_ok=True)
        change_attributes(path, **attributes)
        assert message in _refused("pretrain", "--store", path, cwd=tmp_path)
        shutil.rmtree(path)


def test_a_store_of_another_grid_is_refused(workplace, tmp_path):
    cwd, _ = workplace
    other = make_tiny_store(tmp_path / "other.zarr", settings=["grid.z=[-1,3,4]"])
    pretraining, finetuning = _only(cwd, "pretrain"), _only(cwd, "finetune")
    for arguments in (
        ("finetune", "--store", other, "--init", pretraining, *options()),
        ("evaluate", "--store", other, "--run-dir", finetuning),
    ):
        output = _refused(*arguments, cwd=tmp_path)
        assert "is for the grid {'x':" in output
        assert "use a store of that grid" in output


def test_resuming_on_other_targets_is_refused(workplace, tmp_path):
    cwd, _ = workplace
    other = make_tiny_store(tmp_path / "other.zarr", seed=1)
    arguments = ("pretrain", "--resume", "--run-dir", _only(cwd, "pretrain"), "--store", other)
    output = _refused(*arguments, cwd=tmp_path)
    assert "is not the store this run was started on; records_sha256: 0 -> 1" in output


@pytest.mark.parametrize("setting", ["lidar.near_m=1", "map.line_width_m=1"])
def test_resuming_on_targets_made_otherwise_is_refused(workplace, tmp_path, setting):
    cwd, _ = workplace
    other = make_tiny_store(tmp_path / "other.zarr", settings=[setting])
    arguments = ("pretrain", "--resume", "--run-dir", _only(cwd, "pretrain"), "--store", other)
    assert setting.partition("=")[0] in _refused(*arguments, cwd=tmp_path)


def test_resuming_with_frames_that_had_failed_is_refused(workplace, tiny_store, tmp_path):
    cwd, _ = workplace
    shutil.copytree(tiny_store, tmp_path / "other.zarr")
    change_attributes(tmp_path / "other.zarr", failed={"3": "a sentence"})
    arguments = ("pretrain", "--resume", "--run-dir", _only(cwd, "pretrain"), "--store")
    assert "failed" in _refused(*arguments, tmp_path / "other.zarr", cwd=tmp_path)


def test_other_mistakes_are_one_sentence_too(tiny_store, workplace, tmp_path):
    cwd, _ = workplace
    store = ("--store", tiny_store)
    sentences = {
        "model.encoder must be one of efficientnet-b0, efficientnet-lite0, resnet-50": (
            *("pretrain", *store, "--set", "model.encoder=resnet50"),
        ),
        "a resumed run keeps its --fraction": (
            *("finetune", "--resume", "--run-dir", _only(cwd, "finetune")),
            *("--fraction", "0.5"),
        ),
        "a resumed run keeps its pretrain.lr: leave --set pretrain.lr=1 out": (
            *("pretrain", "--resume", "--run-dir", _only(cwd, "pretrain")),
            *("--set", "pretrain.lr=1"),
        ),
        "did you mean pretrain.epochs?": ("pretrain", *store, "--set", "pretrain.epoch=3"),
        "12 frames are less than one step": ("pretrain", *store, "--set", "pretrain.batch=13"),
        "there is no preset 'x'; there are also, demo, lidar-demo, lidar-miniature": (
            "pretrain",
            *store,
            "--config",
            "x",
        ),
        "there is no finished pretraining in runs/": ("finetune", *store),
        "there is no finished finetune run": ("evaluate",),
        "there is no unfinished pretrain run": ("pretrain", "--resume"),
        "is not a run of occfeat-train": ("finetune", *store, "--init", tmp_path),
        "is not empty: choose another": ("pretrain", *store, "--run-dir", cwd),
        "is a pretraining: finetune it first": ("evaluate", "--run-dir", _only(cwd, "pretrain")),
        "the network in": (
            *("finetune", *store, "--init", _only(cwd, "pretrain")),
            *("--set", "model.channels=16"),
        ),
    }
    for sentence, arguments in sentences.items():
        output = _refused(*arguments, cwd=tmp_path)
        assert sentence in output
    assert not list(tmp_path.glob("runs/*/checkpoint-*"))


def test_what_a_finetuning_starts_from_is_said_truly(workplace, tmp_path):
    cwd, _ = workplace
    unfinished = shutil.copytree(_only(cwd, "pretrain"), tmp_path / "unfinished")
    max(unfinished.glob("checkpoint-*.json")).unlink()
    too_large = ("--set", "finetune.batch=99")
    said = _refused("finetune", "--init", unfinished, *too_large, cwd=tmp_path)
    assert f"Starting from: {unfinished} (occfeat pretraining, NOT FINISHED: step 8)" in said
    finetuned = _only(cwd, "finetune")
    said = _refused("finetune", "--init", finetuned, *too_large, cwd=tmp_path)
    assert f"Starting from: {finetuned} (vehicle finetuning)" in said


def test_a_tracker_is_needed_for_training_alone(workplace, tmp_path, monkeypatch):
    """A run that was tracked can be evaluated where the package is not installed."""
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    cwd, _ = workplace
    on = ("--tracker", "wandb")
    said = _refused("pretrain", "--store", cwd / "targets.zarr", *on, cwd=tmp_path)
    assert "run.tracker=wandb needs the package: pip install wandb" in said
    run = shutil.copytree(_only(cwd, "finetune"), tmp_path / "run")
    description = json.loads((run / "run.json").read_text())
    description["config"]["run"]["tracker"] = "wandb"
    del description[SEAL]
    (run / "run.json").write_text(json.dumps(description))
    with chdir(tmp_path):
        changed = ("evaluate", "--run-dir", "run", "--set", "run.precision=bfloat16")
        evaluated = CliRunner().invoke(main, changed)
    assert evaluated.exit_code == 0, evaluated.output
    assert json.loads((run / "result.json").read_text())["set"] == ["run.precision=bfloat16"]


def test_a_checkpoint_with_code_in_it_is_not_run(workplace, tmp_path, capsys):
    cwd, _ = workplace
    copy = Run(shutil.copytree(_only(cwd, "pretrain"), tmp_path / "copy"))
    torch.save({"network": print}, max(copy.path.glob("checkpoint-*.pt")))
    assert copy.load()[1]["step"] == 8
    assert "checkpoint-00000009.pt is damaged (Weights only load failed" in capsys.readouterr().err


def test_the_paper_preset_lists_every_setting_at_its_default_but_the_protocol(pytestconfig):
    path = pytestconfig.rootpath / "occfeat_train" / "presets" / "paper.yaml"
    defaults = TrainConfig().plain()
    for section, registry in (("objectives", OBJECTIVES), ("tasks", TASKS)):
        assert defaults[section] == {}
        defaults[section] = {name: registry(name).Settings().plain() for name in registry.names}
    assert defaults["tasks"]["vehicle"]["protocol"] == "ego"
    defaults["tasks"]["vehicle"]["protocol"] = "simple-bev"
    assert yaml.safe_load(path.read_text()) == defaults


@pytest.mark.parametrize(
    ("fraction", "epochs", "lr", "batch", "accumulate"),
    [(0.01, 100, 1e-4, 6, 1), (0.05, 50, 1e-4, 6, 1), (0.1, 50, 1e-4, 6, 1), (1, 30, 3e-4, 8, 5)],
)
def test_finetuning_follows_the_paper_for_its_fraction(fraction, epochs, lr, batch, accumulate):
    plan = TrainConfig().for_fraction(fraction).finetune
    assert (plan.epochs, plan.lr, plan.batch, plan.accumulate) == (epochs, lr, batch, accumulate)
    own = TrainConfig.load(None, ["finetune.epochs=7"]).for_fraction(fraction).finetune
    assert (own.epochs, own.lr) == (7, lr)
    assert plan.clip == own.clip == ("sum" if fraction == 1 else "mean")
    own = TrainConfig.load(None, ["finetune.accumulate=2"]).for_fraction(fraction).finetune
    assert own.clip == "mean"


def test_the_trainer_loads_nothing_of_the_offline_stage(tiny_store, tmp_path):
    """Importing and running every command, in one process."""
    code = f"""
import sys
from occfeat_train.cli import main
settings = {[text for s in (*SMALL, "pretrain.epochs=1") for text in ("--set", s)]!r}
for arguments in (
    ["pretrain", "--store", {str(tiny_store)!r}, *settings],
    ["finetune", "--store", {str(tiny_store)!r}, "--set", "finetune.epochs=1"],
    ["evaluate"],
    ["view"],
    ["export", "--out", "net"],
):
    main(arguments, standalone_mode=False)
print("LOADED", *sorted(sys.modules))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split("LOADED")[1].split())
    assert not {m.split(".")[0] for m in loaded} & {"nuscenes", "dask", "distributed", "cv2"}
    ours = {m for m in loaded if m.startswith("occfeat_targets.")}
    assert {m.split(".")[1] for m in ours} == {"store"}


def test_settings_prints_what_can_be_given_back(tmp_path):
    (tmp_path / "mine.yaml").write_text(run("settings", cwd=tmp_path))
    assert TrainConfig.load(tmp_path / "mine.yaml") == TrainConfig.load(
        settings_file("paper", "occfeat_train")
    )
    assert "no preset 'papre'" in run("settings", "papre", cwd=tmp_path, code=1)
