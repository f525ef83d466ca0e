"""A new objective, task and lift: one file each, outside of the package, and no other change."""

import json
import shlex
from contextlib import chdir

import pytest
import torch
from click.testing import CliRunner
from conftest import LONG
from PIL import Image
from tiny_store import make_tiny_store
from train_runs import SMALL, log_of

from occfeat_targets.store.grid import VoxelGrid
from occfeat_targets.store.settings import ConfigError
from occfeat_train.cli import main
from occfeat_train.config import TrainConfig
from occfeat_train.models.bev_net import BEVNet, ModelSettings
from occfeat_train.models.lifts import LIFTS
from occfeat_train.objectives import OBJECTIVES
from occfeat_train.objectives.occfeat import voxel_targets
from occfeat_train.tasks import TASKS

LIFT = '''
"""The mean over cameras, the same in every cell."""
from occfeat_train.models.lifts.base import Lift


class Flat(Lift):
    def forward(self, features, K, cam_T_bev, image_hw):
        mean = features.mean(dim=(1, 3, 4))
        return mean[:, :, None, None].expand(-1, -1, *self.grid.bev_shape).contiguous()
'''

OBJECTIVE = '''
"""How many voxels a frame has."""
import torch
from pydantic import Field
from torch import nn
from occfeat_targets.store.settings import Settings
from occfeat_train.objectives.base import Objective, divisors


class CountSettings(Settings):
    scale: float = Field(100.0, gt=0)
    """Voxels for which the target is 1."""


class Count(Objective):
    Settings = CountSettings
    arrays = ("voxel_index",)
    no_picture = "learns a number, which is no picture"

    def __init__(self, settings, store, channels, turned):
        super().__init__(settings, store, channels, turned)
        self.head = nn.Linear(channels, 1)

    def targets(self, batch, angle):
        return {"count": batch["n_voxels"] / self.settings.scale}

    def counts(self, targets):
        return torch.tensor([len(targets["count"])], dtype=torch.float64)

    def forward(self, bev, targets, counts, share):
        error = self.head(bev.mean(dim=(2, 3)))[:, 0] - targets["count"]
        terms = {"count": error.square().sum() / divisors(counts)[0]}
        return terms["count"], terms
'''

TASK = '''
"""Which half of the BEV map holds more vehicle cells."""
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from occfeat_train.distributed import all_reduce_sum
from occfeat_train.objectives.base import Panel, divisors
from occfeat_train.tasks.base import Task, as_text


class Meter:
    def __init__(self, task, device):
        self.task, self.right = task, torch.zeros(2, device=device)

    def add(self, batch, predicted):
        right = (predicted > 0) == (self.task.ahead(batch["vehicle"]) > 0.5)
        self.right += torch.stack([right.sum(), torch.tensor(len(right))])

    def result(self):
        right, n = all_reduce_sum(self.right).tolist()
        row = {"iou": round(100 * right / n, 2), "frames": int(n)}
        return {"rows": {"half": row}, "headline": {"name": "right halves", "iou": row["iou"]}}


class Half(Task):
    arrays = eval_arrays = ("vehicle",)

    def __init__(self, settings, store, channels, turned):
        super().__init__(settings, store, channels, turned)
        self.head = nn.Linear(channels, 1)

    def ahead(self, vehicle):
        back, front = vehicle.float().flatten(1).chunk(2, dim=1)
        return (front.sum(1) > back.sum(1)).float()

    def predict(self, bev):
        return self.head(bev.float().mean(dim=(2, 3)))[:, 0]

    def targets(self, batch, angle):
        return {"ahead": self.ahead(batch["vehicle"])}

    def counts(self, targets):
        return torch.tensor([len(targets["ahead"])], dtype=torch.float64)

    def forward(self, bev, targets, counts, share):
        logits = self.predict(bev)
        summed = F.binary_cross_entropy_with_logits(logits, targets["ahead"], reduction="sum")
        terms = {"half": summed / divisors(counts)[0]}
        return terms["half"], terms

    def meter(self, device, protocol):
        return Meter(self, device)

    @classmethod
    def table(cls, rows):
        return [["which", "right"], *([name, as_text(row["iou"])] for name, row in rows.items())]

    def panels(self, bev, batch):
        probability = self.predict(bev).sigmoid()[0].item()
        picture = np.full(self.grid.bev_shape, probability)
        return [Panel("half", batch["vehicle"][0].cpu().numpy(), picture)]
'''


@pytest.fixture
def plugins(tmp_path, monkeypatch):
    """The three files in a folder that is on the path."""
    for name, text in (("flat", LIFT), ("toys.count", OBJECTIVE), ("toys.half", TASK)):
        path = tmp_path / "plugins" / f"{name.replace('.', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path / "plugins"))
    return tmp_path


def _trusted(*names):
    return [word for name in names for word in ("--plugin", name)]


def _next(said):
    """The command that the end tells, as one would paste it."""
    program, *arguments = shlex.split(said.rpartition("\nNext: ")[2])
    assert program == "occfeat-train"
    return arguments


def _occfeat_train(*arguments, cwd, code=0):
    with chdir(cwd):
        result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result.output


def test_toys_of_each_kind_train_and_are_evaluated_and_drawn(plugins, tiny_store):
    settings = ["model.lift=flat:Flat", 'objectives."toys.count:Count".scale=50']
    options = [word for text in (*SMALL, *settings) for word in ("--set", text)]
    store = ("--store", tiny_store)
    pretrain = ("pretrain", *store, "--objective", "toys.count:Count", "--run-dir", "runs/pre")
    told = _next(_occfeat_train(*pretrain, *options, cwd=plugins))
    config = json.loads((plugins / "runs/pre/run.json").read_text())["config"]
    assert config["pretrain"]["objective"] == "toys.count:Count"
    assert config["objectives"] == {"toys.count:Count": {"scale": 50.0}}
    losses = [line["count"] for line in log_of(plugins / "runs/pre")]
    assert len(losses) == 9 and losses[-1] < losses[0]
    trusted = _trusted("flat:Flat", "toys.count:Count")
    assert told == ["finetune", "--init", "runs/pre", "--fraction", "0.01", *trusted]
    said = _occfeat_train("view", "--run-dir", "runs/pre", *trusted, cwd=plugins, code=1)
    assert "toys.count:Count pretraining learns a number, which is no picture: finetune" in said
    finetuned = _occfeat_train(
        *("finetune", "--task", "toys.half:Half", "--run-dir", "runs/fine", *trusted), cwd=plugins
    )
    trusted += _trusted("toys.half:Half")
    assert _next(finetuned) == ["evaluate", "--run-dir", "runs/fine", *trusted]
    assert "toys.half:Half finetuning on 12 frames" in finetuned
    assert "encoder 247, decoder 93; fresh: head 2; not used: 2 tensors" in finetuned
    evaluated = _occfeat_train(*_next(finetuned), cwd=plugins)
    assert "on 4 frames of mini_val: toys.half:Half IoU" in evaluated
    result = json.loads((plugins / "runs/fine/result.json").read_text())
    iou = result["rows"]["ego, half"]["iou"]
    assert result["headline"] == {"name": "ego, right halves", "iou": iou, "protocol": "ego"}
    row = ["ego,", "half", f"{iou:.1f}"]
    assert row in [line.split() for line in evaluated.splitlines()]
    seen = _occfeat_train("view", *trusted, cwd=plugins)
    assert "as runs/fine (toys.half:Half finetuning) sees it" in seen
    assert Image.open(plugins / "prediction.png").size[0] > 500


@LONG
def test_a_toy_is_evaluated_on_corrupted_images_too(plugins):
    splits = {"mini_train": 1, "mini_val": 1}
    make_tiny_store(plugins / "targets.zarr", splits=splits)
    for severity in ("easy", "mid", "hard"):
        setting = f"images.corruption=fog-{severity}"
        make_tiny_store(plugins / f"out/{severity}.zarr", settings=[setting], dim=0, splits=splits)
    options = [word for text in (*SMALL, "finetune.epochs=1") for word in ("--set", text)]
    task = ("--task", "toys.half:Half", "--init", "none")
    _occfeat_train("finetune", *task, *options, cwd=plugins)
    trusted = _trusted("toys.half:Half")
    said = _occfeat_train("evaluate", "--corrupted", "out", *trusted, cwd=plugins)
    assert "toys.half:Half IoU, ego, right halves, in per cent" in said
    assert "mRR over 1 of 8 corruptions" in said


def test_an_array_that_the_store_lacks_is_named_before_any_work(plugins, tiny_store):
    wanting = plugins / "plugins" / "wanting.py"
    wanting.write_text(OBJECTIVE.replace('("voxel_index",)', '("voxel_index", "lidarseg")'))
    options = [word for text in SMALL for word in ("--set", text)]
    arguments = ("--store", tiny_store, "--objective", "wanting:Count", *options)
    said = _occfeat_train("pretrain", *arguments, cwd=plugins, code=1)
    assert f"{tiny_store} has no lidarseg, which wanting:Count pretraining needs" in said
    assert not (plugins / "runs").exists()


def test_a_plug_in_s_settings_are_its_own(plugins):
    wrong = {
        'objectives."toys.count:Count".scale=0': "toys.count:Count.scale must be greater than 0",
        'objectives."toys.count:Count".scal=1': "did you mean objectives.toys.count:Count.scale?",
        "objectives.nowhere:Toy.x=1": "cannot load the objective 'nowhere:Toy'",
        "objectives.flat:Toy.x=1": "cannot load the objective 'flat:Toy'",
        "model.lift=nowhere:Toy": "must be importable as package.module:name",
        "tasks.vehicles.x=1": "no task 'vehicles' (did you mean vehicle?)",
    }
    for setting, sentence in wrong.items():
        with pytest.raises(ConfigError) as error:
            TrainConfig.load(None, [setting])
        assert sentence in str(error.value)


def test_a_task_nobody_has_is_one_sentence(tiny_store, tmp_path):
    said = _occfeat_train(
        *("finetune", "--store", tiny_store, "--init", "none", "--task", "maps"),
        cwd=tmp_path,
        code=1,
    )
    assert said.strip().endswith(
        "Error: no task 'maps' (did you mean map?); a plug-in is named package.module:name"
    )


@pytest.mark.parametrize("registry", [OBJECTIVES, TASKS, LIFTS], ids=lambda r: r.kind)
def test_every_entry_is_there_and_no_name_is_written_elsewhere(registry, pytestconfig):
    for name in registry.names:
        assert registry(name).__doc__
    package = pytestconfig.rootpath / "occfeat_train"
    modules = "cli evaluate robustness view export onnx_file predict rig train network"
    for module in modules.split():
        text = (package / f"{module}.py").read_text().replace('package_name="occfeat"', "")
        assert not [n for n in registry.names if f'"{n}"' in text], module


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16])
@pytest.mark.parametrize("angle", [0.0, 0.5])
def test_more_than_eight_cameras_have_wider_bits(dtype, angle):
    grid = VoxelGrid((-2.0, 2.0, 4), (-2.0, 2.0, 4), (0.0, 1.0, 1))
    batch = {
        "voxel": torch.tensor([5, 10], dtype=torch.int32),
        "feature_cameras": torch.tensor([0, 200]).to(dtype),
        "points": torch.tensor([[-250, -250, 250, 0], [250, 250, 250, 0]], dtype=torch.int16),
        "n_points": torch.tensor([2]),
    }
    targets = voxel_targets(batch, torch.tensor([angle]), grid, 0.002)
    assert targets["voxel"].tolist() == [5, 10] and targets["valid"].tolist() == [False, True]


@pytest.mark.parametrize("lift", LIFTS.names)
@pytest.mark.parametrize("n_cameras", [1, 2, 7])
def test_any_number_of_cameras(lift, n_cameras, tiny_store):
    from occfeat_targets.store.reader import open_store

    store = open_store(tiny_store)
    torch.manual_seed(0)
    settings = ModelSettings(lift=lift, encoder_weights="random", channels=8)
    network = BEVNet(settings, store.grid).eval()
    K, cam_T_ego = (torch.from_numpy(store.per_frame[n][:1]) for n in ("K", "cam_T_ego"))
    chosen = [c % 6 for c in range(n_cameras)]
    images = torch.rand(1, n_cameras, 3, 64, 96)
    with torch.no_grad():
        bev = network(images, K[:, chosen], cam_T_ego[:, chosen])
    assert bev.shape == (1, 8, *store.grid.bev_shape) and bev.isfinite().all()
