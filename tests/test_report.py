"""``occfeat-train report``: runs in one HTML file that loads nothing."""

import base64
import gzip
import json
import re
import shutil
import statistics
import subprocess

import numpy as np
import pytest
from tiny_store import make_tiny_store
from train_runs import options, run

from occfeat_targets.store.grid import VoxelGrid
from occfeat_targets.store.reader import SEAL
from occfeat_train.report.groups import collect, result_table, settings_apart
from occfeat_train.report.pictures import voxel_mesh

plotly = pytest.importorskip("plotly")
QUICK = options("pretrain.epochs=1", "finetune.epochs=1")
FINETUNED = ("with-1", "with-2", "without-1")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A store, a pretraining, two finetunings from it that differ in their seed, one without."""
    cwd = tmp_path_factory.mktemp("report")
    make_tiny_store(cwd / "targets.zarr")
    run("pretrain", "--store", "targets.zarr", "--run-dir", "pre", *QUICK, cwd=cwd)
    for name in FINETUNED:
        init, seed = "none" if "without" in name else "pre", f"run.seed={name[-1]}"
        asked = ("--store", "targets.zarr", "--config", "paper", "--init", init, *QUICK)
        run("finetune", "--run-dir", name, *asked, "--set", seed, cwd=cwd)
        run("evaluate", "--run-dir", name, cwd=cwd)
    return cwd


@pytest.fixture(scope="module")
def report(workplace):
    said = run("report", *FINETUNED, "--frames", 2, cwd=workplace)
    assert said.startswith("report.html: 4 runs, ")
    return (workplace / "report.html").read_text()


def _figures(report):
    data = re.search(r'id="figures">([^<]*)<', report).group(1)
    return json.loads(gzip.decompress(base64.b64decode(data)))


def test_it_loads_nothing(report):
    assert not re.findall(r'(?:src|href)\s*=\s*"?(?!data:)\w', report)
    assert not re.search(r"https?:|url\(|@import", report)
    assert "default-src 'none'" in report and '<meta name="viewport"' in report


def test_it_has_each_run_and_its_numbers_with_their_protocol(report, workplace):
    values = {}
    for name in ("pre", *FINETUNED):
        assert name in report
    for name in FINETUNED:
        values[name] = json.loads((workplace / name / "result.json").read_text())
        assert values[name]["rows"]["simple-bev, visible"]["iou"] == values[name]["headline"]["iou"]
    pair = [values[name]["headline"]["iou"] for name in FINETUNED[:2]]
    assert f"{statistics.fmean(pair):.1f} ± {statistics.stdev(pair):.1f}" in report
    for seed, value in zip("12", pair, strict=True):
        assert f"{value:.1f} (seed {seed})" in report
    protocol = "vehicle IoU at probability 0.5, simple-bev, visible cells, 4 frames of mini_val"
    assert report.count(f">{protocol}</td>") == 2
    assert report.count("vehicle IoU in per cent at probability 0.5") == 3


def test_runs_that_differ_in_their_seed_alone_are_one_group(workplace):
    groups = collect([workplace / name for name in FINETUNED])
    assert [(group.label, len(group.runs)) for group in groups] == [
        ("pre", 1),
        ("with", 2),
        ("without-1", 1),
    ]
    assert [line[1] for line in result_table(groups)] == ["starts from", "pre", "none"]
    assert settings_apart(groups) == {"with → without-1": ["init: pre -> none"]}


def test_settings_that_differ_are_named(workplace, tmp_path):
    other = shutil.copytree(workplace / "pre", tmp_path / "pre")
    said = json.loads((other / "run.json").read_text())
    said["config"]["pretrain"]["lr"] = 0.5
    del said[SEAL]
    (other / "run.json").write_text(json.dumps(said))
    groups = collect([workplace / "pre", other])
    assert [group.label for group in groups] == ["pre", "pre"]
    assert settings_apart(groups) == {"pre → pre": ["config.pretrain.lr: 0.001 -> 0.5"]}


def test_curves_are_those_of_the_logs(report, workplace):
    lines = [json.loads(text) for text in (workplace / "with-2" / "log.jsonl").open()]
    wanted = [line["mask"] for line in lines]
    traces = [trace for figure in _figures(report) for trace in figure["data"]]
    found = [trace for trace in traces if trace.get("y") == wanted]
    assert len(found) == 1 and found[0]["x"] == [line["step"] for line in lines]
    assert found[0]["name"] == "with" and len(wanted) > 1


def test_frames_show_target_and_prediction_of_each_group(report):
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", report)
    assert captions.count("CAM_FRONT") == 2
    vehicle = ["target", "with (seed 1)", "without-1 (seed 1)"]
    first = captions.index("target", captions.index("target", captions.index("target") + 1) + 1)
    assert captions[first : first + 3] == vehicle
    (volume,) = [f for f in _figures(report) if f["data"][0]["type"] == "mesh3d"]
    labels = [button["label"] for button in volume["layout"]["updatemenus"][0]["buttons"]]
    assert labels == ["target", "pre (seed 0)"]
    assert [trace["type"] for trace in volume["data"]] == ["mesh3d", "mesh3d", "scatter3d"]


def test_what_can_t_be_drawn_is_said(workplace, tmp_path):
    """Without store and checkpoint there are still numbers and curves."""
    bare = shutil.copytree(workplace / "with-1", tmp_path / "bare")
    for path in bare.glob("checkpoint-*"):
        path.unlink()
    said = run("report", bare, "--out", "a.html", cwd=tmp_path)
    assert said.startswith("a.html: 2 runs")
    assert "No pictures of bare: " in (tmp_path / "a.html").read_text()
    run("report", workplace / "with-1", "--store", "gone.zarr", "--out", "b.html", cwd=tmp_path)
    text = (tmp_path / "b.html").read_text()
    assert "No pictures of with-1: " in text and "no targets store here" in text
    assert "is not a run" in run("report", tmp_path, cwd=tmp_path, code=1)
    assert "cannot write nowhere/a" in run(
        "report", bare, "--out", "nowhere/a", cwd=tmp_path, code=1
    )


def test_without_plotly_one_sentence_says_so(workplace, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    said = run("report", workplace / "with-1", cwd=tmp_path, code=1)
    assert said == "Error: a report needs plotly: pip install 'occfeat[report]'\n"


def test_the_mesh_is_the_bare_sides_of_the_voxels():
    """Two cubes side by side have ten sides of two triangles; each side lies on its cube."""
    grid = VoxelGrid((0, 2, 2), (0, 1, 1), (0, 3, 3))
    mesh = voxel_mesh(grid, np.array([0, 1]), np.eye(3)[:2])
    assert len(mesh.i) == len(mesh.facecolor) == 20 and len(mesh.x) == 12
    area = {"#f00": 0.0, "#0f0": 0.0}
    xyz = np.stack([mesh.x, mesh.y, mesh.z], axis=1)
    for *corners, colour in zip(mesh.i, mesh.j, mesh.k, mesh.facecolor, strict=True):
        a, b, c = xyz[corners]
        area[colour] += np.linalg.norm(np.cross(b - a, c - a)) / 2
        centre = (a + b + c) / 3
        assert (centre[0] < 1) if colour == "#f00" else (centre[0] > 1)  # never between them
    assert area == pytest.approx({"#f00": 5, "#0f0": 5})
    assert len(voxel_mesh(grid, np.zeros(0, int), None).i) == 0


def test_a_browser_shows_it_without_a_word_of_complaint(report, workplace, tmp_path):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium or google-chrome on this machine")
    flags = ["--headless", "--no-sandbox", "--enable-logging=stderr", "--v=0"]
    flags += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path / 'profile'}"]
    flags += ["--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
    flags += ["--window-size=390,9000", "--virtual-time-budget=20000", "--dump-dom"]
    page = (workplace / "report.html").resolve().as_uri()
    seen = subprocess.run([browser, *flags, page], capture_output=True, text=True, timeout=240)
    complaints = [line for line in seen.stderr.splitlines() if ":CONSOLE" in line]
    assert not [line for line in complaints if "willReadFrequently" not in line], complaints
    # Each figure was drawn, the volume by WebGL.
    page = re.sub(r"<script.*?</script>", "", seen.stdout, flags=re.DOTALL)
    assert page.count('class="plot-container') == len(_figures(report))
    assert "<canvas" in page and "WebGL is not supported" not in page
