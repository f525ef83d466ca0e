"""POP-3D's retrieval benchmark: does a network find, among a frame's lidar returns, those that a
sentence is true of?

\b
python pipelines/retrieval.py /data/sets/nuscenes retrieval_benchmark --clip clip-vit-base-patch16

Each return's score is the product of its predicted feature, as it is, and the sentence's vector;
what counts is the average precision of each sentence, and the mean over sentences: mAP, of all
returns and of the visible ones alone. Where the store has tokens, the teacher's own features are
looked up beside: of each visible return and camera, which needs no network.

BENCHMARK is what POP-3D's download_retrieval_benchmark.sh unpacks, DATAROOT what the store was
built from. Written to retrieval-SPLIT.json in the run. A store is of
one split of the benchmark: val and train are of v1.0-trainval, test is of v1.0-test.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from occfeat_targets.store.files import StoreError
from occfeat_targets.store.schema import FAILED
from occfeat_targets.store.settings import ConfigError
from occfeat_train.options import PATH, run_option, store_option
from occfeat_train.session import session

if TYPE_CHECKING:
    from occfeat_targets.sources.base import FrameRecord
    from occfeat_targets.store.reader import TargetStore
    from occfeat_targets.store.texts import Texts
    from occfeat_train.view import Viewer

PUBLISHED = {"train": (15.3, 15.6, 13.5), "val": (24.1, 24.7, 18.7), "test": (12.6, 13.6, 12.0)}
"""mAP of POP-3D, the same of visible returns, and MaskCLIP's of those, in per cent, by split
(POP3D ``README.md``)."""
COLUMNS = ("mAP", "mAP visible", "looked up")


@dataclass(frozen=True)
class Query:
    """A sentence, and the returns of a keyframe that it is true of."""

    token: str
    """The keyframe's."""
    split: str
    text: str
    true: np.ndarray
    """bool (P,), of the returns of the keyframe's lidar file in its order."""
    visible: np.ndarray
    """int64 (M,), numbers of returns that a camera sees; again for each further one."""


def read_queries(folder: Path, split: str) -> list[Query]:
    """Of ``retrieval_anns_SPLIT.csv``: lines ``token;split;file of true;file of visible;text``, the
    files numpy's (POP3D's ``RetrievalDataset``). StoreError: one is not so, or missing."""
    table = folder / f"retrieval_anns_{split}.csv"
    try:
        lines = table.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise StoreError(
            f"{table} cannot be read ({error!s:.200}): BENCHMARK is the folder that POP-3D's "
            "download_retrieval_benchmark.sh unpacks"
        ) from error
    queries = []
    for n, line in enumerate(lines, 1):
        cells = line.strip().split(";", 4)
        if len(cells) != 5:
            raise StoreError(f"{table}, line {n}: should be token;split;file;file;sentence")
        token, of, true, visible, text = cells
        true = _numbers(folder, true, f"{table}, line {n}", "biuf")
        visible = _numbers(folder, visible, f"{table}, line {n}", "iu")
        if not np.isin(true, (0, 1)).all() or not true.any():
            raise StoreError(f"{table}, line {n}: {cells[2]} should hold 0 and 1, a 1 at least")
        if len(visible) and not 0 <= visible.min() <= visible.max() < len(true):
            raise StoreError(f"{table}, line {n}: {cells[3]} has numbers of no return")
        queries.append(Query(token, of, text, true.astype(bool), visible.astype(np.int64)))
    if not queries:
        raise StoreError(f"{table} has no sentence")
    return queries


def _numbers(folder: Path, name: str, where: str, kinds: str) -> np.ndarray:
    """The numbers (K,), of some kinds of dtype, of a file in a folder."""
    path = folder / name
    try:
        if not path.resolve().is_relative_to(folder.resolve()):
            raise ValueError("it lies elsewhere")
        # Mapped, since a damaged size would be asked of memory; and never unpickled.
        found = np.atleast_1d(np.array(np.lib.format.open_memmap(path, mode="r")).squeeze())
        if found.ndim != 1 or found.dtype.kind not in kinds:
            raise ValueError(f"it holds {found.dtype} {found.shape}, not a list of such numbers")
    except Exception as error:  # whatever numpy makes of a damaged header
        raise StoreError(f"{where}: {path} is of no use: {error!s:.200}") from error
    return found


def records_of(
    store: TargetStore, dataroot: Path, queries: list[Query]
) -> dict[int, tuple[FrameRecord, list[Query]]]:
    """By frame of the store, its keyframe in the dataroot, and what is asked of it. StoreError: the
    store has none of them; ConfigError: the dataroot can't be read, or is of other keyframes."""
    from occfeat_targets.build import read_dataset
    from occfeat_targets.config import TargetsConfig

    asked: dict[str, list[Query]] = {}
    for query in queries:
        asked.setdefault(query.token, []).append(query)
    sound = np.flatnonzero(store.per_frame["n_voxels"] != FAILED).tolist()
    numbers = {store.token(i): i for i in sound if store.token(i) in asked}
    if not numbers:
        raise StoreError(
            f"{store.url} has none of the {len(asked)} keyframes that the sentences are of: build "
            "it of their split, or choose another one, --split"
        )
    config = TargetsConfig.of(store.attrs["config"])
    scenes = tuple(sorted({store.scene(i) for i in numbers.values()}))
    config = config.with_(
        frames=config.frames.with_(scenes=scenes, limit=None),
        lidar=config.lidar.with_(sweeps=1),
        map=config.map.with_(mode="never"),
    )
    try:
        records = read_dataset(dataroot, store.attrs["source"]["version"], config).records
    except ValueError as error:
        raise ConfigError(f"{error}") from error
    found = {numbers[r.token]: (r, asked[r.token]) for r in records if r.token in numbers}
    if lost := len(numbers) - len(found):
        raise ConfigError(
            f"{dataroot} is not what {store.url} was built from: it lacks {lost} of "
            f"{len(numbers)} keyframes"
        )
    return found


def returns_in_ego(record: FrameRecord) -> np.ndarray:
    """All returns of a keyframe's lidar file, float32 (P, 3), metres, ego; ConfigError: it is
    missing or damaged."""
    from occfeat_targets.sources import SOURCES

    try:
        found = SOURCES(record.source)().read_lidar(Path(record.sweep_paths[0]))
        if not np.isfinite(found).all():
            raise ValueError(f"{record.sweep_paths[0]} holds numbers that are not finite")
    except ValueError as error:
        raise ConfigError(f"{record}: {error}") from error
    pose = record.ego_T_sweep[0]
    return (found[:, :3] @ pose[:3, :3].T + pose[:3, 3]).astype(np.float32)


def score(
    viewer: Viewer, i: int, xyz: np.ndarray, query: Query, vector: np.ndarray
) -> list[float | None]:
    """Average precision in per cent of a sentence in frame i, by its vector (C,): of all returns
    (P, 3) in ego, of the visible ones, and of pairs of a return and a camera by the teacher's own
    features; None if the store has no tokens. A return beyond the grid has the feature at its
    border (POP-3D moves it there)."""
    import torch
    from sklearn.metrics import average_precision_score

    from occfeat_train.evaluate import predict
    from occfeat_train.network import frames_for
    from occfeat_train.objectives.pairs import sample_tokens, seen_from

    network, store, grid = viewer.network, viewer.store, viewer.store.grid
    tokens = ("tokens", "token_scale") if "tokens" in store.specs else ()
    dataset = frames_for(viewer.job, network, [i], ("images", *tokens))
    batch = {k: v.to(viewer.device) for k, v in dataset.collate([dataset[0]]).items()}
    head: Any = network.objective.head
    place = torch.from_numpy((xyz - grid.lower) / grid.cell_size - 0.5)[:, [2, 0, 1]]
    place = place.float().to(viewer.device)
    sample = torch.zeros(len(xyz), dtype=torch.int64, device=viewer.device)
    features = predict(network, batch, lambda bev: head.features_at(head.open(bev), sample, place))
    scores = features.float().cpu().numpy() @ vector
    found = [(query.true, scores), (query.true[query.visible], scores[query.visible])]
    if tokens:
        points, everywhere = torch.from_numpy(xyz).to(viewer.device), sample[:, None] == 0
        image_hw = tuple(store.attrs["config"]["images"]["size"])
        pairs = seen_from(points, sample, batch, image_hw, everywhere)
        theirs = sample_tokens(batch["tokens"], batch["token_scale"], pairs.image, pairs.place)
        found.append((query.true[pairs.row.cpu().numpy()], theirs.cpu().numpy() @ vector))
    # What no return is true of, visible ones say, counts as 0, as in scikit-learn with a warning.
    each = [float(100 * average_precision_score(t, s)) if t.any() else 0.0 for t, s in found]
    return [*each, None][:3]


def measure(
    viewer: Viewer,
    frames: dict[int, tuple[FrameRecord, list[Query]]],
    vectors: dict[str, np.ndarray],
) -> list[list]:
    """``[query, *score(...)]`` of what is asked of frames, by the vectors of sentences. Raises as
    :func:`returns_in_ego`; ConfigError: a sentence is not of as many returns as the file."""
    from tqdm import tqdm

    rows = []
    for i, (record, queries) in tqdm(frames.items(), unit="frame", leave=None):
        xyz = returns_in_ego(record)
        for query in queries:
            if len(xyz) != len(query.true):
                raise ConfigError(
                    f"{record}: {query.text!r:.100} is of {len(query.true)} returns, "
                    f"{record.sweep_paths[0]} has {len(xyz)}"
                )
            rows.append([query, *score(viewer, i, xyz, query, vectors[query.text])])
    return rows


def as_table(rows: list[list], n: int, split: str, source: str) -> tuple[str, dict[str, Any]]:
    """What was found for ``n`` asked sentences, for people, and for ``retrieval-SPLIT.json``."""
    from occfeat_train.tasks.base import as_columns, as_text

    columns = zip(*(row[1:] for row in rows), strict=True)
    means = [None if None in column else float(np.mean(column)) for column in columns]
    theirs = PUBLISHED.get(split, (None,) * 3)
    head = ["sentence", *COLUMNS]
    each = [[query.text, *map(as_text, found)] for query, *found in rows]
    mean = [[f"mean of {len(rows)}", *map(as_text, means)]]
    published = [["published, POP-3D; MaskCLIP", *map(as_text, theirs)]]
    text = as_columns([head, *each, *mean, *published])
    text = f"Average precision in per cent over returns, split {split}; {source}\n{text}"
    if lost := n - len(rows):
        text += f"\nNOT COMPARABLE: the store lacks the keyframes of {lost} of {n} sentences"
    result = {"split": split, "texts": source, "asked": n, "sentences": len(rows)}
    return text, result | dict(zip(COLUMNS, means, strict=True))


def texts_of(sentences: list[str], clip: Path | None, file: Path | None) -> Texts:
    """Sentences as vectors: by a CLIP's directory, each in POP-3D's templates, or of a file.
    Raises as ``texts.embed`` and ``Texts.load`` do."""
    from occfeat_targets.store.texts import Texts
    from occfeat_targets.texts import VOCABULARY, embed, read_vocabulary

    if clip is None:
        return Texts.load(Path(str(file)))
    classes = {sentence: [sentence] for sentence in sentences}
    return embed(read_vocabulary(VOCABULARY).with_(classes=classes), clip)


@click.command(help=__doc__, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("dataroot", type=PATH)
@click.argument("benchmark", type=PATH)
@run_option("A pretraining that answers to words.  [default: the newest finished one in runs/]")
@store_option
@click.option("--split", type=click.Choice([*PUBLISHED]), default="val", show_default=True)
@click.option("--clip", type=PATH, help="The CLIP whose features the store has: a directory.")
@click.option("--texts", type=PATH, help="Or a file of occfeat-targets text with the sentences.")
def main(dataroot: Path, benchmark: Path, run: Path | None, split: str, **asked: Any) -> None:
    """See the module's docstring."""
    if (asked["texts"] is None) == (asked["clip"] is None):
        raise click.UsageError("name --clip DIR or --texts FILE")
    with session() as (process, say):
        from occfeat_targets.store.registry import only_plugins
        from occfeat_train.query import open_viewer
        from occfeat_train.runs import resolve
        from occfeat_train.runs.job import Job
        from occfeat_train.runs.run import write_json

        queries = read_queries(benchmark, split)
        chosen = resolve.finished(run, "pretrain")
        job = Job.of_run(chosen, asked["store"], asked["plugins"])
        if not process.is_main:
            return
        viewer = open_viewer(job, chosen, process.device)
        with only_plugins(viewer.store.url, asked["plugins"]):
            frames = records_of(viewer.store, dataroot, queries)
            sentences = [query.text for _, theirs in frames.values() for query in theirs]
            texts = texts_of(sentences, asked["clip"], asked["texts"])
            texts.require_space_of(viewer.store)
            vectors = {text: texts.embeddings[texts.find(text)[0]] for text in sentences}
            rows = measure(viewer, frames, vectors)
        text, result = as_table(rows, len(queries), split, texts.source)
        say(text)
        write_json(chosen.path / f"retrieval-{split}.json", result)


if __name__ == "__main__":
    main()
