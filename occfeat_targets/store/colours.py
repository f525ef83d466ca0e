"""Features as colours, for pictures: of one basis, the same colour means the same everywhere."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar, Protocol, Self

import numpy as np

from occfeat_targets.store.files import StoreError
from occfeat_targets.store.grid import VoxelGrid
from occfeat_targets.store.reader import TargetStore
from occfeat_targets.store.schema import FAILED, dequantise

_FRAMES, _VOXELS = 8, 1000
"""Frames that a basis is fitted on, spread over the store, and voxels of each at most."""


class Paint(Protocol):
    """How features become colours."""

    title: ClassVar[str]

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """RGB float (V, 3) in 0..1 of features float (V, C); grey where one is zero."""
        ...


@dataclass(frozen=True)
class Colours:
    """The first three principal components of features' directions as red, green and blue."""

    teacher: str
    """Weights of the teacher whose features these are, as the store names them."""
    mean: np.ndarray
    """(C,), of unit vectors."""
    components: np.ndarray
    """(C, 3), columns."""
    low: np.ndarray
    """(3,), where each colour is 0: the 2nd percentile."""
    high: np.ndarray
    """(3,), where it is 1: the 98th."""
    title: ClassVar[str] = "features (PCA)"

    @classmethod
    def fit(cls, features: np.ndarray, teacher: str = "") -> Self:
        """By features float (V, C). If fewer than three are not zero, all is grey."""
        _, unit = directions(features)
        components, low, high = np.zeros((unit.shape[1], 3)), np.full(3, -0.5), np.full(3, 0.5)
        if len(unit) < 3:
            return cls(teacher, np.zeros(unit.shape[1]), components, low, high)
        mean = unit.mean(axis=0)
        centred = unit - mean
        found = np.linalg.eigh(centred.T @ centred)[1][:, :-4:-1]
        # A component's sign is free, and libraries differ: its largest entry is positive.
        found = found * np.sign(found[np.abs(found).argmax(axis=0), np.arange(found.shape[1])])
        components[:, : found.shape[1]] = found
        low, high = np.percentile(centred @ components, [2, 98], axis=0)
        return cls(teacher, mean, components, low, high)

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """See :class:`Paint`."""
        seen, unit = directions(features)
        colours = np.full((len(features), 3), 0.5)
        projected = (unit - self.mean) @ self.components
        span = np.maximum(self.high - self.low, 1e-9)
        colours[seen] = np.clip((projected - self.low) / span, 0, 1)
        return colours

    def save(self, path: Path) -> None:
        """Write as JSON, whole or not at all."""
        values = {k: v if k == "teacher" else v.tolist() for k, v in asdict(self).items()}
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps(values) + "\n")
        os.replace(part, path)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Inverse of :meth:`save`. StoreError: no such file, or not of colours."""
        try:
            said = json.loads(path.read_text())
            teacher = str(said.pop("teacher"))
            arrays = {name: np.array(values, dtype=np.float64) for name, values in said.items()}
            colours = cls(teacher, **arrays)
            shapes = [colours.components.shape, colours.low.shape, colours.high.shape]
            finite = all(np.isfinite(values).all() for values in arrays.values())
            if shapes != [(len(colours.mean), 3), (3,), (3,)] or not finite:
                raise ValueError("shapes or numbers are wrong")
        except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as e:
            raise StoreError(
                f"{path} holds no colours ({e!s:.100}): name one that --colours made, or a new one"
            ) from e
        return colours


def store_colours(store: TargetStore, path: Path | None = None) -> Colours:
    """The colours of a file, else fitted on a few frames of the store, always the same ones, and
    saved there if a path is given. StoreError: the file holds none, or those of another teacher."""
    teacher, dim = store.attrs["teacher"]["weights"], store.attrs["teacher"]["dim"]
    if path and path.exists():
        colours = Colours.load(path)
        if dim and (colours.teacher, len(colours.mean)) != (teacher, dim):
            raise StoreError(
                f"the colours in {path} are of teacher weights {colours.teacher:.40}, {store.url} "
                f"has features of {teacher:.40}: name another file"
            )
        return colours
    sound = np.flatnonzero(store.per_frame["n_voxels"] != FAILED) if dim else np.zeros(0, int)
    chosen = sound[np.linspace(0, len(sound) - 1, min(_FRAMES, len(sound))).astype(int)]
    rng, parts = np.random.default_rng(0), [np.zeros((0, dim))]
    for i in chosen.tolist():
        frame = store.read(i, ("features", "feature_scale"))
        seen = np.flatnonzero(frame["feature_scale"])
        rows = rng.choice(seen, min(_VOXELS, len(seen)), replace=False)
        parts.append(dequantise(frame["features"][rows], frame["feature_scale"][rows]))
    colours = Colours.fit(np.concatenate(parts), teacher)
    if path:
        colours.save(path)
    return colours


def from_above(grid: VoxelGrid, index: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """The highest of voxels, ascending flat indices (V,), in each column, by its colour (V, 3): RGB
    float (X, Y, 3), black where there is none."""
    picture = np.zeros((*grid.bev_shape, 3))
    _, x, y = np.unravel_index(index.astype(np.int64), grid.shape)
    picture[x, y] = colours  # voxels ascend with height, and the last one of a column stays
    return picture


def directions(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which features (V, C) are not zero, bool (V,), and the unit vectors of those."""
    length = np.linalg.norm(features, axis=1)
    seen = length > 0
    return seen, features[seen] / length[seen, None]
