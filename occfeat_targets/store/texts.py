"""Texts as vectors in the space of a teacher's features: by them voxels answer to words."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from occfeat_targets.store.files import StoreError
from occfeat_targets.store.reader import TargetStore
from occfeat_targets.store.settings import ConfigError, Settings, did_you_mean


class _Said(Settings):
    """What the file says beside its vectors."""

    prompts: list[str] = Field(min_length=1)
    class_names: list[str] = Field(min_length=1)
    classes: list[int]
    source: str
    teacher: str


@dataclass(frozen=True)
class Texts:
    """T prompts, each of a class, as unit vectors."""

    embeddings: np.ndarray
    """float32 (T, C), of length 1."""
    prompts: Sequence[str]
    classes: Sequence[int]
    """Of each prompt, its number in ``class_names``."""
    class_names: Sequence[str]
    source: str
    """What made them, for people. Stand-ins, which are of no text, say so."""
    teacher: str = ""
    """Weights of the teacher in whose space they are, as stores name them; empty: not known."""

    def save(self, path: Path) -> None:
        """Write as safetensors, whole or not at all."""
        said = {k: v for k, v in vars(self).items() if k != "embeddings"}
        part = path.with_name(path.name + ".part")
        part.write_bytes(save({"embeddings": self.embeddings}, {"texts": json.dumps(said)}))
        os.replace(part, path)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Inverse of :meth:`save`. StoreError: no such file, or not of texts."""
        try:
            with safe_open(path, "numpy") as file:
                said = _Said.of(json.loads((file.metadata() or {})["texts"]), "texts")
                found = file.get_tensor("embeddings")
            lengths = np.linalg.norm(found.astype(np.float64), axis=1)
            sound = (
                found.dtype == np.float32
                and len(found) == len(said.prompts) == len(said.classes)
                and np.allclose(lengths, 1, atol=1e-3)
                and {*said.classes} == {*range(len(said.class_names))}
            )
            if not sound:
                raise ValueError("its vectors and prompts do not fit together")
        except FileNotFoundError:
            raise StoreError(f"{path}: no such file (make one: occfeat-targets text)") from None
        except (SafetensorError, KeyError, ValueError, TypeError, OSError, RecursionError) as error:
            raise StoreError(f"{path} is not of occfeat-targets text: {error!s:.200}") from error
        return cls(found, **{name: getattr(said, name) for name in _Said.model_fields})

    def require_space_of(self, store: TargetStore) -> None:
        """StoreError: they are in another space than a store's features."""
        theirs = store.attrs["teacher"]
        if self.embeddings.shape[1] != theirs["dim"]:
            raise StoreError(
                f"texts of {self.embeddings.shape[1]} numbers and features of {theirs['dim']} "
                f"({store.url}, teacher {theirs['name']}) are of two spaces: build the store with "
                "the CLIP whose texts these are, or make others, occfeat-targets text"
            )
        if self.teacher and self.teacher != theirs["weights"]:
            raise StoreError(
                f"{self.source}, but {store.url} has features of another teacher: make others, "
                "occfeat-targets text"
            )

    def find(self, text: str) -> list[int]:
        """Rows of ``embeddings`` that a text names: its own, or those of a class. ConfigError:
        there is none."""
        if text in self.prompts:
            return [list(self.prompts).index(text)]
        if text in self.class_names:
            number = list(self.class_names).index(text)
            return [row for row, c in enumerate(self.classes) if c == number]
        known = did_you_mean(text, [*self.class_names, *self.prompts])
        raise ConfigError(f"there is no text {text!r:.200} ({known})")

    def likeness(self, text: str, unit: np.ndarray) -> np.ndarray:
        """How much more features of length 1, (V, C), are like a text than like those of other
        classes: float (V,), the greatest cosine with it less the greatest with one of them;
        above 0 for a class where a voxel is given that class. The cosine where there is no other
        class. ConfigError as of :meth:`find`."""
        rows = self.find(text)
        others = np.array(self.classes) != self.classes[rows[0]]
        cosine = unit @ self.embeddings.T
        best = cosine[:, rows].max(axis=1)
        return best - cosine[:, others].max(axis=1) if others.any() else best
