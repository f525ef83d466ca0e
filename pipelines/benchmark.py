"""What the benchmarks share. Machines are noisy: compare figures of one run only."""

from __future__ import annotations

import multiprocessing
import os
import platform
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from occfeat_targets.store.reader import TargetStore
from occfeat_train.runs.run import versions

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ARRAYS = ("images", "voxel_index", "features", "feature_cameras")
"""What a pretraining reads."""
SPAWN = multiprocessing.get_context("spawn")


def say_machine() -> None:
    """Date, processors and versions."""
    gpu = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "no GPU"
    packages = ", ".join(f"{name} {version}" for name, version in versions().items())
    print(
        f"{time.strftime('%F')}, {os.cpu_count()} cores, {gpu}, {platform.platform()}; {packages}"
    )


def apart(function: Callable, *arguments: Any) -> Any:
    """What a function returns in a process of its own, whose memory peaks are its own."""
    with ProcessPoolExecutor(1, SPAWN) as pool:
        return pool.submit(function, *arguments).result()


def some_frames(store: TargetStore, n: int) -> list[int]:
    """Numbers of ``n`` frames that have targets, again from the first if there are fewer."""
    return np.resize(np.flatnonzero(store.per_frame["n_voxels"] > 0), n).tolist()


def peak_memory(pid: int | str = "self") -> int:
    """Bytes; 0 for a process that has ended. Unlike ru_maxrss, free of what its parent used."""
    try:
        _, _, rest = Path(f"/proc/{pid}/status").read_text().partition("VmHWM:")
    except OSError:
        return 0
    return 1024 * int(rest.split()[0]) if rest else 0
