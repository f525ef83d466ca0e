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
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import zarr

from occfeat_targets.store.files import locked
from occfeat_targets.store.reader import SEAL, TargetStore, seal
from occfeat_targets.store.settings import differences
from occfeat_train import __version__
from occfeat_train.distributed import note

FORMAT = "occfeat-run"
KEEP = 2
"""Checkpoints kept: the newest, and one more in case a disk loses that."""
T = TypeVar("T")


class RunError(RuntimeError):
    """A run or checkpoint is missing, foreign, damaged or does not fit, or can't be written."""


class DamagedError(RunError):
    """What a run says of itself, or all of its checkpoints, can't be read."""


class Run:
    """One run directory."""

    def __init__(self, path: Path):
        self.path = Path(path)

    def require_new(self) -> None:
        """Refuse a directory that holds something, by a RunError. What a run left that was killed
        at its very start, a lock and a ``run.json`` that says nothing, is nothing."""
        try:
            held = {path.name for path in self.path.iterdir()} - {"lock", "run.json.part"}
        except FileNotFoundError:
            return
        except NotADirectoryError:
            raise RunError(f"{self.path} is a file: choose another --run-dir") from None
        if held == {"run.json"}:
            try:
                self.description()
            except DamagedError:
                return
        if held:
            raise RunError(
                f"{self.path} is not empty: choose another --run-dir, or --resume this one"
            )

    def create(self, description: dict) -> None:
        """Make the directory and its ``run.json``; RunError as :meth:`require_new`."""
        self.path.mkdir(parents=True, exist_ok=True)
        self.require_new()
        self._describe({"format": FORMAT, **description})

    def description(self) -> dict:
        """What ``run.json`` says, or RunError: there is no run here; DamagedError: there was."""
        try:
            return _read_sealed(self.path / "run.json")
        except OSError as error:
            raise RunError(f"{self.path} is not a run of occfeat-train: {error}") from error
        except (ValueError, RecursionError) as error:
            copies = [f"put a copy of {path.name} in its place" for path in self.checkpoints()[:1]]
            todo = copies or ["train anew, in another --run-dir"]
            raise DamagedError(f"{self.path}/run.json is damaged ({error}): {todo[0]}") from error

    def set_epochs(self, kind: str, epochs: int) -> None:
        """Change how long it is to train."""
        said = self.description()
        if said["config"][kind]["epochs"] != epochs:
            said["config"][kind]["epochs"] = epochs
            self._describe(said)

    def _describe(self, said: dict) -> None:
        write_json(self.path / "run.json", said | {SEAL: seal(said)})

    def checkpoints(self) -> list[Path]:
        """JSON files of whole checkpoints, newest first."""
        return sorted(self.path.glob("checkpoint-*.json"), reverse=True)

    def position(self) -> dict:
        """``train.Position`` of the newest checkpoint; RunError: there is none, DamagedError: none
        can be read."""
        return self._newest(lambda marker: _read_sealed(marker)["position"])[0]

    def is_finished(self) -> bool:
        """Whether training came to its end."""
        return bool(self.checkpoints()) and self.position()["finished"]

    def save(self, state: dict[str, Any], position: dict) -> None:
        """Write a checkpoint, then remove all but it and those before it, :data:`KEEP` together.
        RunError: the disk is full, say; older checkpoints are left."""
        name = f"checkpoint-{position['step']:08d}"
        replace(self.path / f"{name}.pt", lambda part: torch.save(state, part))
        said = self.description() | {"versions": versions(), "position": position}
        write_json(self.path / f"{name}.json", said | {SEAL: seal(said)})
        # Later ones were damaged: training had gone on from them.
        kept = [path.stem for path in self.checkpoints() if path.stem <= name][:KEEP]
        for suffix in (".json", ".pt"):  # first the marker: a .pt without it counts for nothing
            for path in self.path.glob(f"checkpoint-*{suffix}"):
                if path.stem not in kept:
                    path.unlink()
        for path in self.path.glob("*.part"):
            path.unlink()

    def locked(self) -> AbstractContextManager[None]:
        """Keep others from training the same run at the same time. RunError: see ``locked``."""
        return locked(self.path / "lock", RunError, f"is training {self.path}")

    def load(self) -> tuple[dict[str, Any], dict]:
        """State (on the CPU) and position of the newest checkpoint that is whole, with a note to
        the user of those that are not; unpickles nothing but tensors. RunError: there is none,
        DamagedError: none can be read."""
        loaded, damaged = self._newest(_load_checkpoint)
        for error in damaged:
            note(f"{error}; the checkpoint before it is taken, of step {loaded[1]['step']}")
        return loaded

    def _newest(self, read: Callable[[Path], T]) -> tuple[T, list[DamagedError]]:
        """What ``read`` makes of the newest checkpoint's JSON file that it can read, and why it
        could not read those after it."""
        damaged = []
        for marker in self.checkpoints():
            try:
                return read(marker), damaged
            except Exception as error:  # torch raises many kinds for a damaged file
                reason = (str(error).splitlines() or [repr(error)])[0]
                damaged.append(DamagedError(f"{marker.with_suffix('.pt')} is damaged ({reason})"))
        if damaged:
            raise DamagedError(f"{damaged[0]}, and there is no whole one before it: train anew")
        raise RunError(f"{self.path} has no checkpoint: --resume it, or train anew")


def identity(store: TargetStore) -> dict:
    """What makes a store this store: its frames, which of them failed, grid, teacher, settings."""
    keys = (
        *("format_version", "records_sha256", "n_frames", "grid", "teacher", "cameras"),
        *("box_classes", "vehicle_classes", "map_classes"),
    )
    said = {k: store.attrs.get(k) for k in keys}
    said |= {k: store.attrs["config"][k] for k in ("images", "lidar", "boxes", "map", "outputs")}
    if "lidarseg_classes" in store.attrs:
        said["lidarseg_classes"] = store.attrs["lidarseg_classes"]
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


def check_same_teacher(run: Run, store: TargetStore) -> None:
    """Refuse a network that learned another teacher's features than a store's, by a RunError."""
    learned, stored = run.description()["store_identity"]["teacher"], store.attrs["teacher"]
    if learned["weights"] != stored["weights"]:
        raise RunError(
            f"{run.path} learned features of {learned['name']}, weights {learned['weights']:.16}; "
            f"{store.url} has those of {stored['name']}, weights {stored['weights']:.16}: use a "
            "store of the same teacher"
        )


def versions() -> dict[str, str]:
    """Of occfeat and what decides its numbers."""
    libraries = {module.__name__: module.__version__ for module in (torch, np, zarr)}
    return {"occfeat": __version__, **libraries, "python": platform.python_version()}


def _read_sealed(path: Path) -> dict:
    """JSON that was written with its checksum (runs of older versions have none). OSError,
    ValueError, RecursionError: it can't be read; RunError: it is of another program."""
    said = json.loads(path.read_text())
    if not isinstance(said, dict) or (SEAL not in said and said.get("format") != FORMAT):
        raise RunError(f"{path} was not written by occfeat-train")
    sealed = said.pop(SEAL, None)
    if sealed not in (None, seal(said)):
        raise ValueError("it does not match its checksum")
    return said


def _load_checkpoint(marker: Path) -> tuple[dict[str, Any], dict]:
    """State and position; raises whatever a damaged file leads to."""
    position, path = _read_sealed(marker)["position"], marker.with_suffix(".pt")
    with zipfile.ZipFile(path) as file:  # torch does not look at its checksums
        if damaged := file.testzip():
            raise ValueError(f"{damaged} does not match its checksum")
    return torch.load(path, map_location="cpu", weights_only=True), position


def timestamp() -> str:
    """Local time as ``20260102-030405``, for names."""
    return time.strftime("%Y%m%d-%H%M%S")


def write_json(path: Path, value: dict) -> None:
    """Write indented JSON atomically."""
    replace(path, lambda part: part.write_text(json.dumps(value, indent=1) + "\n"))


def replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file beside its place, then put it there. RunError, and what was there stays."""
    part = path.with_name(path.name + ".part")
    with writing(path):
        try:
            write(part)
            with part.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise RunError if the disk does not take what the ``with`` block writes to a file."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # the latter is torch's
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise RunError(
            f"cannot write {path}: {reason}; what was there is left as it was: make room, then "
            "go on (a training with --resume)"
        ) from error
