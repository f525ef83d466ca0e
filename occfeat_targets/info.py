"""What a store holds, as a plain dict and as text."""

from __future__ import annotations

from collections import Counter

import numpy as np

from occfeat_targets.store.files import filesystem, find
from occfeat_targets.store.reader import open_store
from occfeat_targets.store.schema import FAILED


def summarise(url: str) -> dict:
    """Frames, splits, voxel counts, bytes, teacher and config of a store, finished or not.

    Raises:
        StoreError: there is no readable store.
    """
    store = open_store(url, allow_incomplete=True)
    attrs = store.attrs
    fs, path = filesystem(url)
    summary = {
        "store": str(url),
        "complete": bool(attrs["complete"]),
        "frames": attrs["n_frames"],
        "bytes": fs.du(path),
        "files": len(find(url)),
        "teacher": attrs.get("teacher"),
        "source": attrs["source"],
        "config": attrs["config"],
        "software": attrs["software"],
    }
    if not attrs["complete"]:
        size = attrs["config"]["block_frames"]
        summary["blocks"] = -(-attrs["n_frames"] // size)
        summary["blocks_done"] = len([f for f in find(url, "build/blocks") if ".partial" not in f])
        return summary
    counts = store.per_frame["n_voxels"]
    done = counts[counts != FAILED]
    splits = Counter(store.split(i) for i in range(len(store)))
    scenes = {name: set() for name in splits}
    for i in range(len(store)):
        scenes[store.split(i)].add(store.scene(i))
    edges = np.histogram_bin_edges(done, bins=min(8, max(1, len(np.unique(done)))))
    summary |= {
        "splits": {
            name: {"frames": n, "scenes": len(scenes[name])} for name, n in sorted(splits.items())
        },
        "map_classes": attrs["map_classes"],
        "failed": attrs["failed"],
        "voxels_per_frame": {
            "min": int(done.min(initial=2**31 - 1)) if len(done) else 0,
            "median": float(np.median(done)) if len(done) else 0.0,
            "max": int(done.max(initial=0)),
            "histogram": {
                f"{int(lo)}-{int(hi)}": int(n)
                for lo, hi, n in zip(
                    edges[:-1], edges[1:], np.histogram(done, bins=edges)[0], strict=True
                )
            },
        },
    }
    return summary


def as_text(summary: dict) -> str:
    """The summary as lines to read."""
    teacher = summary["teacher"] or {}
    weights = teacher.get("weights", "not yet known")
    random = weights.startswith("random")
    rows = [
        ("store", summary["store"]),
        ("state", "complete" if summary["complete"] else "unfinished: run its build again"),
        ("frames", summary["frames"]),
        ("size", f"{summary['bytes'] / 1e6:.1f} MB in {summary['files']} files"),
        ("source", " ".join(str(v) for k, v in summary["source"].items() if k != "reader")),
        ("teacher", f"{teacher.get('name')}  weights {weights}"),
    ]
    if weights == "none" and teacher["dim"] == 0:
        rows[-1] = ("teacher", "none: the store has no features")
    if random:
        rows.append(("", "RANDOM WEIGHTS: these are not DINOv2 features"))
    if teacher.get("dim"):
        details = (f"{key}={teacher[key]}" for key in ("layer", "input_size", "precision"))
        rows.append(("", ", ".join(details)))
    corruption = summary["config"]["images"].get("corruption", "none")
    if corruption != "none":
        seed = summary["config"]["images"]["corruption_seed"]
        rows.append(("images", f"CORRUPTED: {corruption}, seed {seed}"))
    if "blocks" in summary:
        rows.append(("blocks", f"{summary['blocks_done']} of {summary['blocks']} done"))
    for name, split in summary.get("splits", {}).items():
        rows.append((name, f"{split['frames']} frames of {split['scenes']} scene(s)"))
    if "voxels_per_frame" in summary:
        voxels = summary["voxels_per_frame"]
        rows.append(
            (
                "voxels/frame",
                f"min {voxels['min']}, median {voxels['median']:g}, max {voxels['max']}",
            )
        )
        most = max(voxels["histogram"].values(), default=1) or 1
        for label, n in voxels["histogram"].items():
            rows.append(("", f"{label:>13} {'#' * round(30 * n / most)} {n}"))
        rows.append(("map classes", ", ".join(summary["map_classes"]) or "none"))
        for message in summary["failed"].values():
            rows.append(("failed", message))
    for section, values in summary["config"].items():
        rows.append((section, values))
    return "\n".join(f"{name:<13} {value}" for name, value in rows)
