"""What a store holds, as a plain dict and as text."""

from typing import Any

import numpy as np

from occfeat_targets.store.files import find
from occfeat_targets.store.lease import writer_of
from occfeat_targets.store.reader import TargetStore, open_store
from occfeat_targets.store.schema import FAILED, MARKERS


def summarise(url: str) -> dict[str, Any]:
    """What a store holds, finished or not. Raises StoreError if there is no readable store."""
    store = open_store(url, allow_incomplete=True)
    attrs, sizes = store.attrs, find(url)
    keys = ("teacher", "source", "cameras", "config", "software")
    summary = {
        "store": str(url),
        "complete": bool(attrs["complete"]),
        "frames": len(store),
        "bytes": sum(sizes.values()),
        "files": len(sizes),
        **{key: attrs.get(key) for key in keys},
    }
    if not attrs["complete"]:
        size = attrs["config"]["block_frames"]
        done = sum(name.endswith(".json") for name in find(url, MARKERS))
        blocks = {"blocks": -(-len(store) // size), "blocks_done": done}
        return summary | blocks | {"writer": writer_of(url)}
    splits: dict[str, list[str]] = {}  # to the scene of each frame
    for i in range(len(store)):
        splits.setdefault(store.split(i), []).append(store.scene(i))
    return summary | {
        "splits": {s: {"frames": len(f), "scenes": len({*f})} for s, f in sorted(splits.items())},
        "map_classes": attrs["map_classes"],
        "failed": attrs["failed"],
        "voxels_per_frame": _voxels(store),
    }


def _voxels(store: TargetStore) -> dict[str, Any]:
    counts = store.per_frame["n_voxels"]
    done = counts[counts != FAILED]
    if not len(done):
        return {"min": 0, "median": 0.0, "max": 0, "histogram": {}}
    numbers, edges = np.histogram(done, bins=min(8, len(np.unique(done))))
    bins = zip(edges[:-1].astype(int), edges[1:].astype(int), numbers.tolist(), strict=True)
    return {
        "min": int(done.min()),
        "median": float(np.median(done)),
        "max": int(done.max()),
        "histogram": {f"{low}-{high}": n for low, high, n in bins},
    }


def counted(n: int, noun: str) -> str:
    """As ``1 frame``, ``2 frames``."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def as_text(summary: dict[str, Any]) -> str:
    """The summary as lines to read."""
    images, source = summary["config"]["images"], summary["source"]
    rows: list[tuple[str, object]] = [
        ("store", summary["store"]),
        ("state", _state(summary)),
        ("frames", summary["frames"]),
        ("size", f"{summary['bytes'] / 1e6:.1f} MB in {counted(summary['files'], 'file')}"),
        ("source", f"{source['dataset']} {source['version']}"),
        *_teacher_rows(summary["teacher"]),
    ]
    if images["corruption"] != "none":
        seed = images.get("corruption_seed")
        rows.append(("images", f"CORRUPTED: {images['corruption']}, seed {seed}"))
    if "blocks" in summary:
        rows.append(("blocks", f"{summary['blocks_done']} of {summary['blocks']} done"))
    for name, split in summary.get("splits", {}).items():
        frames, scenes = counted(split["frames"], "frame"), counted(split["scenes"], "scene")
        rows.append((name, f"{frames} of {scenes}"))
    if voxels := summary.get("voxels_per_frame"):
        rows.append(("voxels/frame", "min {min}, median {median:g}, max {max}".format_map(voxels)))
        most = max(voxels["histogram"].values(), default=1)
        for label, n in voxels["histogram"].items():
            rows.append(("", f"{label:>13} {'#' * round(30 * n / most)} {n}"))
        rows.append(("map classes", ", ".join(summary["map_classes"]) or "none"))
        rows += [("failed", message) for message in summary["failed"].values()]
    rows += [(key.replace("_", " "), _words(value)) for key, value in summary["config"].items()]
    return "\n".join(f"{name:<13} {value}" for name, value in rows)


def _state(summary: dict[str, Any]) -> str:
    if summary["complete"]:
        return "complete"
    writer = summary["writer"]
    return f"{writer} is building it now" if writer else "unfinished: run its build again"


def _teacher_rows(teacher: dict[str, Any] | None) -> list[tuple[str, object]]:
    if teacher is None:
        return [("teacher", "not yet known")]
    if teacher["dim"] == 0:
        return [("teacher", "none: the store has no features")]
    rows = [("teacher", f"{teacher['name']}  weights {teacher['weights']}")]
    if teacher["weights"].startswith("random"):
        rows.append(("", "RANDOM WEIGHTS: these are not DINOv2 features"))
    details = {
        key: teacher.get(key) for key in ("architecture", "layer", "input_size", "precision")
    }
    return [*rows, ("", _words(details))]


def _words(value: object) -> str:
    """A setting for people: ``sweeps 1, near m 2.2``, ``252 x 448``; lists that choose nothing mean
    ``all``."""
    if isinstance(value, dict):
        said = (f"{key.replace('_', ' ')} {_words(inner)}" for key, inner in value.items())
        return ", ".join(said) or "none"
    if isinstance(value, list):
        return (" x " if len(value) == 2 else " ").join(map(_words, value)) or "all"
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    return str(value)
