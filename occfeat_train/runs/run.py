"""Run directories: what a run is, and its checkpoints.

    runs/pretrain-20260102-030405/
        run.json                    kind, store, settings, versions
        log.jsonl                   one line per logged step
        checkpoint-00001234.pt      weights, optimiser, schedule
        checkpoint-00001234.json    run.json and the position; written last: it marks the .pt whole
        result.json                 evaluation of a finetuned network
        corrupted.json              the same on corrupted images

Every file is written beside its place and renamed, so a kill leaves the last good one.
"""

import json
import os
import platform
import time
import zipfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr

from occfeat_targets.store.files import locked
from occfeat_targets.store.reader import TargetStore
from occfeat_targets.store.settings import differences
from occfeat_train import __version__

FORMAT = "occfeat-run"
KEEP = 2
"""Checkpoints kept: the newest, and one more in case a disk loses that."""


class RunError(RuntimeError):
    """A run or checkpoint is missing, foreign, damaged or does not fit."""


class Run:
    """One run directory."""

    def __init__(self, path: Path):
        self.path = Path(path)

    def require_new(self) -> None:
        """Refuse a directory that holds something, by a RunError."""
        if self.path.exists() and any(self.path.iterdir()):
            raise RunError(
                f"{self.path} is not empty: choose another --run-dir, or --resume this one"
            )

    def create(self, description: dict) -> None:
        """Make the directory and its ``run.json``, or RunError: another run was a moment faster."""
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            (self.path / "run.json").open("x").close()
        except FileExistsError:
            raise RunError(f"{self.path} was just taken by another run") from None
        write_json(self.path / "run.json", {"format": FORMAT, **description})

    def description(self) -> dict:
        """What ``run.json`` says, or RunError: there is no run here."""
        try:
            description = json.loads((self.path / "run.json").read_text())
        except (OSError, ValueError, RecursionError) as error:
            raise RunError(f"{self.path} is not a run of occfeat-train: {error}") from error
        if not isinstance(description, dict) or description.get("format") != FORMAT:
            raise RunError(f"{self.path}/run.json was not written by occfeat-train")
        return description

    def checkpoints(self) -> list[Path]:
        """JSON files of whole checkpoints, newest first."""
        return sorted(self.path.glob("checkpoint-*.json"), reverse=True)

    def position(self) -> dict:
        """``train.Position`` of the newest checkpoint, or RunError: none is there, or damaged."""
        path = self._newest_checkpoint()
        try:
            return json.loads(path.read_text())["position"]
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise RunError(f"{path} is damaged: delete it and {path.stem}.pt") from error

    def is_finished(self) -> bool:
        """Whether training came to its end."""
        return bool(self.checkpoints()) and self.position()["finished"]

    def save(self, state: dict[str, Any], position: dict) -> None:
        """Write a checkpoint, then remove all but the newest :data:`KEEP`."""
        name = f"checkpoint-{position['step']:08d}"
        replace(self.path / f"{name}.pt", lambda part: torch.save(state, part))
        said = self.description() | {"versions": versions(), "position": position}
        write_json(self.path / f"{name}.json", said)
        for old in self.checkpoints()[KEEP:]:
            old.unlink()  # first the marker: a .pt without it counts for nothing
        kept = {path.stem for path in self.checkpoints()}
        litter = [p for p in self.path.glob("checkpoint-*.pt") if p.stem not in kept]
        for path in (*litter, *self.path.glob("*.part")):
            path.unlink()

    def locked(self) -> AbstractContextManager[None]:
        """Keep others from training the same run at the same time. RunError: see ``locked``."""
        return locked(self.path / "lock", RunError(f"another process is training {self.path}"))

    def load(self) -> tuple[dict[str, Any], dict]:
        """State (on the CPU) and position of the newest checkpoint; unpickles nothing but tensors.
        RunError: there is none, or its file can't be read."""
        marker = self._newest_checkpoint()
        path = marker.with_suffix(".pt")
        try:
            with zipfile.ZipFile(path) as file:  # torch does not look at its checksums
                if damaged := file.testzip():
                    raise ValueError(f"{damaged} does not match its checksum")
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many kinds for a damaged file
            reason = (str(error).splitlines() or [repr(error)])[0]
            raise RunError(
                f"{path} is damaged ({reason}): delete it and {marker.name} to use the "
                "checkpoint before"
            ) from error
        return state, self.position()

    def _newest_checkpoint(self) -> Path:
        if found := self.checkpoints():
            return found[0]
        raise RunError(f"{self.path} has no checkpoint: --resume it, or train anew")


def identity(store: TargetStore) -> dict:
    """What makes a store this store: its frames, which of them failed, grid, teacher, settings."""
    keys = (
        *("format_version", "records_sha256", "n_frames", "grid", "teacher", "cameras"),
        *("box_classes", "vehicle_classes", "map_classes"),
    )
    said = {k: store.attrs.get(k) for k in keys}
    said |= {k: store.attrs["config"][k] for k in ("images", "lidar", "boxes", "map", "outputs")}
    return said | {"failed": sorted(map(int, store.attrs["failed"]))}


def check_same_store(stored: dict, store: TargetStore) -> None:
    """Refuse to resume on other targets, by a RunError that names what differs."""
    if changed := "; ".join(differences(stored, identity(store))):
        raise RunError(f"{store.url} is not the store this run was started on; {changed}")


def check_same_grid(run: Run, store: TargetStore) -> None:
    """Refuse weights of a network for another voxel grid, by a RunError that names both."""
    grid = run.description()["store_identity"]["grid"]
    if grid != store.attrs["grid"]:
        raise RunError(
            f"the network of {run.path} is for the grid {grid}, the store {store.url} has "
            f"{store.attrs['grid']}: use a store of that grid"
        )


def versions() -> dict[str, str]:
    """Of occfeat and what decides its numbers."""
    libraries = {module.__name__: module.__version__ for module in (torch, np, zarr)}
    return {"occfeat": __version__, **libraries, "python": platform.python_version()}


def timestamp() -> str:
    """Local time as ``20260102-030405``, for names."""
    return time.strftime("%Y%m%d-%H%M%S")


def write_json(path: Path, value: dict) -> None:
    """Write indented JSON atomically."""
    replace(path, lambda part: part.write_text(json.dumps(value, indent=1) + "\n"))


def replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file beside its place, then put it there."""
    part = path.with_name(path.name + ".part")
    write(part)
    with part.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(part, path)
