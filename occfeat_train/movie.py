"""A scene as a trained network sees it: its frames one after another."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from occfeat_targets.store.files import StoreError
from occfeat_targets.store.schema import FAILED
from occfeat_targets.store.settings import did_you_mean
from occfeat_train.runs.run import RunError, replace
from occfeat_train.view import Viewer, require_place


def save_scene(viewer: Viewer, scene: str, out: Path) -> int:
    """Write all frames of a scene as a moving picture at their own pace, .webp or .mp4; returns how
    many. StoreError: there is no such scene, or a frame is damaged; RunError: the file can't be
    written, or ffmpeg, which .mp4 needs, is not installed."""
    require_place(out)
    if out.suffix not in (".webp", ".mp4"):
        raise RunError(f"cannot write {out}: a scene is written as .webp or .mp4")
    if out.suffix == ".mp4" and shutil.which("ffmpeg") is None:
        raise RunError(f"{out} needs ffmpeg, which is not installed: install it, or name a .webp")
    store = viewer.store
    sound = np.flatnonzero(store.per_frame["n_voxels"] != FAILED).tolist()
    frames = [i for i in sound if store.scene(i) == scene]
    if not frames:
        names = store.attrs["scenes"]
        raise StoreError(f"{store.url} has no frame of scene {scene}: {did_you_mean(scene, names)}")
    apart = np.diff(store.per_frame["timestamp_us"][frames])
    ms = int(np.median(apart)) // 1000 if len(apart) else 500
    pictures = _pictures(viewer, frames)
    write = _write_webp if out.suffix == ".webp" else _write_mp4
    replace(out, lambda part: write(part, pictures, max(1, ms)))
    return len(frames)


def _pictures(viewer: Viewer, frames: list[int]) -> Iterator[Image.Image]:
    for i in tqdm(frames, unit="frame", desc="view"):
        figure = viewer.figure(i)
        figure.set_dpi(75)
        figure.canvas.draw()
        yield Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")


def _write_webp(path: Path, pictures: Iterator[Image.Image], ms: int) -> None:
    first = next(pictures)
    looks = {"duration": ms, "loop": 0, "quality": 75, "method": 2}
    first.save(path, "WEBP", save_all=True, append_images=pictures, **looks)


def _write_mp4(path: Path, pictures: Iterator[Image.Image], ms: int) -> None:
    first = next(pictures)
    command = ["ffmpeg", "-y", "-loglevel", "error", "-f", "rawvideo", "-pix_fmt", "rgb24"]
    command += ["-s", f"{first.width}x{first.height}", "-r", f"1000/{ms}", "-i", "-"]
    # The colours and even sizes that players of all kinds want.
    command += ["-vf", "crop=trunc(iw/2)*2:trunc(ih/2)*2", "-pix_fmt", "yuv420p", "-f", "mp4"]
    with subprocess.Popen([*command, str(path)], stdin=subprocess.PIPE) as ffmpeg:
        assert ffmpeg.stdin
        for picture in (first, *pictures):
            ffmpeg.stdin.write(picture.tobytes())
    if ffmpeg.returncode:
        raise RunError(f"ffmpeg could not write {path}: what it said is above")
