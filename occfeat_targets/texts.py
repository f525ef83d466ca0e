"""The texts of a vocabulary as vectors, by a CLIP's text tower; and what stands in for them where
there is none."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
from pydantic import Field
from tqdm import tqdm

from occfeat_targets.store.files import StoreError
from occfeat_targets.store.pretrained import TextTower
from occfeat_targets.store.reader import TargetStore, open_store
from occfeat_targets.store.schema import FAILED, dequantise
from occfeat_targets.store.semantics import CLASSES, IGNORED, class_numbers, majority
from occfeat_targets.store.settings import ConfigError, Settings
from occfeat_targets.store.texts import Texts

VOCABULARY = Path(__file__).parent / "vocabularies" / "nuscenes.json"
"""The 16 classes of nuScenes-lidarseg in POP-3D's 74 prompts (of its 102, those of a class that
counts), and its 85 templates: CLIP's 80 of ImageNet and five of a scene."""


class Vocabulary(Settings):
    """What to say of which class."""

    templates: list[str] = Field(min_length=1)
    """Sentences, ``{}`` where a prompt stands."""
    classes: dict[str, list[str]] = Field(min_length=1)
    """Prompts by class."""


def read_vocabulary(path: Path) -> Vocabulary:
    """A JSON file of :class:`Vocabulary`. ConfigError: it is none."""
    try:
        found = Vocabulary.of(json.loads(path.read_text(encoding="utf-8")), "")
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is no vocabulary (see docs/pop3d.md): {error!s:.300}") from error
    repeated = Counter(prompt for prompts in found.classes.values() for prompt in prompts)
    if odd := [name for name, prompts in found.classes.items() if not prompts]:
        raise ConfigError(f"{path}: the class {odd[0]!r:.200} has no prompt")
    if odd := [prompt for prompt, n in repeated.items() if n > 1]:
        raise ConfigError(f"{path}: the prompt {odd[0]!r:.200} is there twice")
    if odd := [text for text in found.templates if text.count("{}") != 1]:
        raise ConfigError(f"{path}: the template {odd[0]!r:.200} must have one {{}}")
    return found


def embed(vocabulary: Vocabulary, clip: Path) -> Texts:
    """Each prompt in each template through the text tower of the CLIP in a directory; the mean of
    their unit vectors, again of length 1 (CLIP's ensembling, as in POP-3D's
    ``prompt_engineering.py``). ConfigError: that can't be loaded."""
    tower = TextTower(clip)
    pairs = [(name, prompt) for name, prompts in vocabulary.classes.items() for prompt in prompts]
    vectors = [
        tower.ensemble([template.replace("{}", prompt) for template in vocabulary.templates])
        for _, prompt in tqdm(pairs, desc="texts", unit="prompt", leave=None)
    ]
    names = list(vocabulary.classes)
    return Texts(
        embeddings=np.stack(vectors),
        prompts=[prompt for _, prompt in pairs],
        classes=[names.index(name) for name, _ in pairs],
        class_names=names,
        source=f"text tower of {clip}, {len(vocabulary.templates)} templates",
        teacher=tower.teacher,
    )


def stand_in(url: str) -> Texts:
    """For a store without a CLIP: of each class the mean direction of the teacher's own features in
    the training frames' voxels of that class. No text made them, and they know the labels: good to
    see that all runs, and not what the word zero-shot means. StoreError: the store lacks
    features or classes of returns."""
    store = open_store(url)
    if not store.attrs["teacher"]["dim"] or "lidarseg" not in store.specs:
        raise StoreError(
            f"{url} has no features, or no classes of lidar returns: rebuild it with a teacher and "
            "--set 'outputs={lidarseg: {}}'"
        )
    frames = _training_frames(store)
    sums = np.zeros((len(CLASSES), store.attrs["teacher"]["dim"]))
    for i in tqdm(frames, desc="stand-ins of texts", unit="frame", leave=None):
        add_class_sums(sums, store, i)
    seen = np.flatnonzero(np.linalg.norm(sums, axis=1))
    if not len(seen):
        raise StoreError(f"{url}: no voxel of its training frames has both class and feature")
    directions = sums[seen] / np.linalg.norm(sums[seen], axis=1, keepdims=True)
    names, teacher = [[*CLASSES][c] for c in seen], store.attrs["teacher"]
    return Texts(
        embeddings=directions.astype(np.float32),
        prompts=names,
        classes=list(range(len(names))),
        class_names=names,
        source=f"STAND-INS, no text: mean features of {teacher['name']} by class, "
        f"{len(frames)} training frames",
        teacher=teacher["weights"],
    )


def _training_frames(store: TargetStore) -> list[int]:
    """StoreError: there are none."""
    failed = store.per_frame["n_voxels"] == FAILED
    frames = [i for i in range(len(store)) if store.split(i).endswith("train") and not failed[i]]
    if not frames:
        raise StoreError(f"{store.url} has no training frame")
    return frames


def add_class_sums(sums: np.ndarray, store: TargetStore, i: int) -> None:
    """Add unit features of frame i's voxels to the row of their class in ``sums`` (16, C)."""
    names = ("voxel_index", "features", "feature_scale", "feature_cameras", "points", "lidarseg")
    frame = store.read(i, names)
    xyz_ego = frame["points"][:, :3].astype(np.float64) * store.attrs["point_step_m"]
    index, inside = store.grid.flat_index(xyz_ego)
    classes = class_numbers(store.attrs["lidarseg_classes"])[frame["lidarseg"][inside]]
    row = np.searchsorted(frame["voxel_index"], index)
    row = row.clip(max=len(frame["voxel_index"]) - 1)
    known = frame["voxel_index"][row] == index  # rounding moves a few points out of their voxel
    found = majority(row[known], classes[known], len(frame["voxel_index"]))
    usable = (found != IGNORED) & (frame["feature_cameras"] > 0)
    features = dequantise(frame["features"][usable], frame["feature_scale"][usable])
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    np.add.at(sums, found[usable], features / np.maximum(lengths, 1e-12))
