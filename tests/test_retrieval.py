"""POP-3D's retrieval benchmark on the demo world: scores and average precision by loops, from the
files themselves; what its files must be like."""

import json
import shutil
from contextlib import chdir
from itertools import groupby

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import build_store
from pyquaternion import Quaternion
from train_runs import options, run

from occfeat_pipelines.retrieval import main, read_queries, records_of
from occfeat_targets.store.files import StoreError
from occfeat_targets.store.reader import open_store
from occfeat_targets.store.schema import FAILED
from occfeat_targets.store.texts import Texts
from occfeat_train.evaluate import predict
from occfeat_train.network import frames_for
from occfeat_train.query import open_viewer
from occfeat_train.runs.job import Job
from occfeat_train.runs.run import Run

ASKED = {"a car or a lorry": "vehicle", "something flat; below": "flat"}
"""What begins a category that a sentence is true of."""


def tables(root):
    nuscenes = pytest.importorskip("nuscenes.nuscenes")
    return nuscenes.NuScenes("v1.0-mini", str(root), verbose=False)


def raw(nusc, root, token):
    """Returns in ego (P, 3), and their categories, of the files themselves."""
    key = nusc.get("sample", token)["data"]["LIDAR_TOP"]
    data = nusc.get("sample_data", key)
    mounted = nusc.get("calibrated_sensor", data["calibrated_sensor_token"])
    points = np.fromfile(root / data["filename"], np.float32).reshape(-1, 5)[:, :3]
    turned = points.astype(float) @ Quaternion(mounted["rotation"]).rotation_matrix.T
    labels = np.fromfile(root / nusc.get("lidarseg", key)["filename"], np.uint8)
    names = nusc.lidarseg_idx2name_mapping
    return turned + mounted["translation"], [names[label] for label in labels]


def naive_ap(true, scores):
    """Area under precision over recall, a step at each score."""
    total, hits, chosen = 0.0, 0, 0
    pairs = sorted(zip(scores.tolist(), true.tolist(), strict=True), reverse=True)
    for _, tied in groupby(pairs, key=lambda pair: pair[0]):
        more = [is_true for _, is_true in tied]
        hits, chosen = hits + sum(more), chosen + len(more)
        total += sum(more) / int(true.sum()) * hits / chosen
    return 100 * total


def seen_by(store, i, xyz):
    """(return, camera, u, v) of the stored images, in the order of cameras."""
    frame = store.frame(i)
    H, W = store.attrs["config"]["images"]["size"]
    found = []
    for camera in range(6):
        pose, K = frame["cam_T_ego"][camera], frame["K"][camera]
        in_camera = xyz @ pose[:3, :3].T + pose[:3, 3]
        ahead = np.flatnonzero(in_camera[:, 2] > 1)
        for row, (u, v, w) in zip(ahead, in_camera[ahead] @ K.T, strict=True):
            if 0 <= u / w < W and 0 <= v / w < H:
                found.append((row, camera, u / w / W, v / w / H))
    return found


def naive_token(frame, camera, u, v):
    """Bilinear between the centres of cells, constant beyond the outermost."""
    cells = frame["tokens"][camera].astype(float) * frame["token_scale"][camera][..., None]
    h, w, _ = cells.shape
    x, y = np.clip(u * w - 0.5, 0, w - 1), np.clip(v * h - 0.5, 0, h - 1)
    x0, y0 = int(min(x, w - 2)), int(min(y, h - 2))
    top = (1 - x + x0) * cells[y0, x0] + (x - x0) * cells[y0, x0 + 1]
    low = (1 - x + x0) * cells[y0 + 1, x0] + (x - x0) * cells[y0 + 1, x0 + 1]
    return (1 - y + y0) * top + (y - y0) * low


@pytest.fixture(scope="module")
def workplace(demo_root, tmp_path_factory):
    """A store of the demo world, a pretraining on it, texts, and a benchmark of both sentences in
    the frames of validation."""
    cwd = tmp_path_factory.mktemp("retrieval")
    (cwd / "world").symlink_to(demo_root)
    small = ("grid.x=[-24,24,24]", "grid.y=[-24,24,24]", "grid.z=[-2,4,3]")
    build_store(demo_root, cwd / "targets.zarr", "outputs={tokens: {}}", *small)
    arguments = (
        "pretrain",
        "--objective",
        "pop3d",
        "--store",
        "targets.zarr",
        "--run-dir",
        "runs/a",
    )
    run(*arguments, *options("pretrain.batch=1"), cwd=cwd)
    vectors = np.random.default_rng(0).normal(size=(2, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    Texts(vectors, [*ASKED], [0, 1], [*ASKED], "made up").save(cwd / "texts.safetensors")
    store, nusc = open_store(str(cwd / "targets.zarr")), tables(demo_root)
    folder = cwd / "benchmark"
    (folder / "annotations").mkdir(parents=True)
    (folder / "matching_points").mkdir()
    lines = []
    for i in range(len(store)):
        if store.split(i) != "mini_val":
            continue
        token = store.token(i)
        xyz, categories = raw(nusc, demo_root, token)
        rows = [row for row, *_ in seen_by(store, i, xyz[::40])]
        np.save(folder / f"matching_points/{token}.npy", 40 * np.array(rows))
        for n, (text, begins) in enumerate(ASKED.items()):
            true = np.array([category.startswith(begins) for category in categories])
            np.save(folder / f"annotations/{token}-{n}.npy", true[:, None])  # as theirs: squeezed
            names = f"annotations/{token}-{n}.npy;matching_points/{token}.npy"
            lines.append(f"{token};val;{names};{text}\n")
    (folder / "retrieval_anns_val.csv").write_text("".join(lines))
    return cwd


def measured(cwd, *more, code=0):
    asked = ("world", "benchmark", "--run-dir", "runs/a", "--texts", "texts.safetensors", *more)
    with chdir(cwd):
        result = CliRunner().invoke(main, asked)
    assert result.exit_code == code, result.output
    return result.output


def by_loops(viewer, texts, nusc, root, query):
    """The three average precisions of a sentence."""
    store, network = viewer.store, viewer.network
    (i,) = (i for i in range(len(store)) if store.token(i) == query.token)
    xyz, categories = raw(nusc, root, query.token)
    true = np.array([category.startswith(ASKED[query.text]) for category in categories])
    vector = texts.embeddings[list(ASKED).index(query.text)]
    place = [((z + 2) / 2 - 0.5, (x + 24) / 2 - 0.5, (y + 24) / 2 - 0.5) for x, y, z in xyz]
    place, sample = torch.tensor(place).float(), torch.zeros(len(place), dtype=torch.int64)
    dataset, head = frames_for(viewer.job, network, [i], ("images",)), network.objective.head
    features = predict(
        network,
        dataset.collate([dataset[0]]),
        lambda bev: head.features_at(head.open(bev), sample, place),
    )
    scores, frame, pairs = features.numpy() @ vector, store.frame(i), seen_by(store, i, xyz)
    looked_up = np.array([naive_token(frame, *pair[1:]) for pair in pairs]) @ vector
    seen = np.array([pair[0] for pair in pairs])
    return [
        naive_ap(true, scores),
        naive_ap(true[query.visible], scores[query.visible]),
        naive_ap(true[seen], looked_up),
    ]


def test_it_is_what_loops_find(workplace, demo_root):
    said = measured(workplace)
    found = json.loads((workplace / "runs/a/retrieval-val.json").read_text())
    queries = read_queries(workplace / "benchmark", "val")
    assert found["asked"] == found["sentences"] == len(queries) == 4
    assert "NOT COMPARABLE" not in said and "24.1" in said

    chosen = Run(workplace / "runs/a")
    with chdir(workplace):
        viewer = open_viewer(Job.of_run(chosen), chosen, torch.device("cpu"))
    nusc = tables(demo_root)
    texts = Texts.load(workplace / "texts.safetensors")
    wanted = [by_loops(viewer, texts, nusc, demo_root, query) for query in queries]
    mean = np.mean(wanted, axis=0)
    assert len({*mean.round(3)}) == 3
    ours = [found[name] for name in ("mAP", "mAP visible", "looked up")]
    np.testing.assert_allclose(ours, mean, atol=0.02)  # returns at an image's edge, ties


def test_sentences_of_other_frames_are_counted(workplace):
    table = workplace / "benchmark/retrieval_anns_test.csv"
    lines = (workplace / "benchmark/retrieval_anns_val.csv").read_text().splitlines()
    table.write_text("\n".join([*lines[:2], f"elsewhere;{lines[2].split(';', 1)[1]}"]))
    said = measured(workplace, "--split", "test")
    assert "NOT COMPARABLE: the store lacks the keyframes of 1 of 3 sentences" in said
    assert "mean of 2" in said
    table.write_text("\n".join(f"elsewhere;{line.split(';', 1)[1]}" for line in lines))
    said = measured(workplace, "--split", "test", code=1)
    assert "has none of the 1 keyframes" in said


def test_another_worlds_files_are_refused(workplace, demo_root, tmp_path):
    """Scenes of the same names, other keyframes."""
    other = tmp_path / "other"
    shutil.copytree(demo_root / "v1.0-mini", other / "v1.0-mini")
    for entry in demo_root.iterdir():
        if entry.name != "v1.0-mini":
            (other / entry.name).symlink_to(entry)
    query = read_queries(workplace / "benchmark", "val")[0]
    for table in (other / "v1.0-mini").glob("*.json"):
        table.write_text(table.read_text().replace(query.token, query.token[::-1]))
    asked = (str(other), "benchmark", "--run-dir", "runs/a", "--texts", "texts.safetensors")
    with chdir(workplace):
        result = CliRunner().invoke(main, asked)
    assert result.exit_code == 1
    assert "is not what" in result.output and "it lacks 1 of 2 keyframes" in result.output


def test_a_frame_that_failed_is_none_of_the_store_s(workplace, tmp_path):
    store = shutil.copytree(workplace / "targets.zarr", tmp_path / "failed.zarr")
    found = open_store(str(store))
    queries = read_queries(workplace / "benchmark", "val")
    (i,) = (i for i in range(len(found)) if found.token(i) == queries[0].token)
    found.per_frame["n_voxels"][i] = FAILED
    records = records_of(found, workplace / "world", queries)
    asked = [query.token for _, theirs in records.values() for query in theirs]
    assert asked == [query.token for query in queries if query.token != queries[0].token] != []


def test_what_does_not_fit_is_said(workplace, tmp_path):
    assert "name --clip DIR or --texts FILE" in measured(workplace, "--clip", "x", code=2)
    assert "download_retrieval_benchmark.sh" in measured(workplace, "--split", "train", code=1)
    (query, *_) = read_queries(workplace / "benchmark", "val")
    good, some = np.array([0, 1]), np.array([1])

    def said(true, visible, line="t;val;true.npy;visible.npy;a car"):
        np.save(tmp_path / "true.npy", true, allow_pickle=True)
        np.save(tmp_path / "visible.npy", visible)
        (tmp_path / "retrieval_anns_val.csv").write_text(line)
        with pytest.raises(StoreError) as raised:
            read_queries(tmp_path, "val")
        return str(raised.value)

    assert "line 1: should be token;split;file;file;sentence" in said(good, some, "a;b")
    assert "should hold 0 and 1" in said(np.array([0, 2]), some)
    assert "should hold 0 and 1, a 1 at least" in said(np.array([0, 0]), some)
    assert "numbers of no return" in said(good, np.array([2]))
    assert "not a list of such numbers" in said(good, np.array([True, False]))
    assert "Python objects" in said(np.array([{}]), some)
    assert "it lies elsewhere" in said(good, some, "t;val;../true.npy;visible.npy;a car")
    assert "has no sentence" in said(good, some, "")
    folder = tmp_path / "short"
    folder.mkdir()
    np.save(folder / "true.npy", good)
    np.save(folder / "visible.npy", some)
    text = next(iter(ASKED))
    line = f"{query.token};val;true.npy;visible.npy;{text}"
    (folder / "retrieval_anns_val.csv").write_text(line)
    asked = ("world", str(folder), "--run-dir", "runs/a", "--texts", "texts.safetensors")
    with chdir(workplace):
        result = CliRunner().invoke(main, asked)
    assert result.exit_code == 1 and "is of 2 returns" in result.output
