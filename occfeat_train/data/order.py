"""Which frames of a store, and in which order each process reads them."""

from collections.abc import Iterator
from fractions import Fraction
from typing import Literal

import numpy as np

from occfeat_targets.store.files import StoreError
from occfeat_targets.store.reader import TargetStore
from occfeat_targets.store.schema import FAILED


def split_names(name: str, role: str) -> tuple[str, ...]:
    """Splits to use for ``train`` or ``val``: a store holds those of one nuScenes version."""
    return (role, f"mini_{role}") if name == "auto" else (name,)


def select_frames(
    store: TargetStore,
    splits: tuple[str, ...],
    fraction: str | float = 1,
    unit: Literal["scene", "frame"] = "scene",
) -> list[int]:
    """Frames of some splits that did not fail in the build, or a fraction of their labels.

    Of n scenes in table order, scene i (from 0) stays iff floor((i + 1) f) > floor(i f): for
    f = 1/k every k-th, the rule of SLidR and ALSO (1 % of 700 scenes: the 100th, 200th, ...
    700th). If none stays, the first does.

    ``splits`` are names as in the store's attribute of that name; ``fraction`` in (0, 1], a decimal
    number or text, so that 0.1 means exactly 1/10; ``unit`` is what it counts: scenes having frames
    in the splits, or frames.

    Returns frame numbers, ascending.

    Raises ValueError: a fraction outside of (0, 1] or an unknown unit; StoreError: nothing is left.
    """
    share = Fraction(str(fraction))
    if not 0 < share <= 1:
        raise ValueError(f"the label fraction must be above 0 and at most 1, got {fraction}")
    if unit not in ("scene", "frame"):
        raise ValueError(f"the fraction's unit must be 'scene' or 'frame', got {unit!r}")
    names, table = store.attrs["splits"], store.per_frame
    wanted = [k for k, name in enumerate(names) if name in splits]
    frames = np.flatnonzero(np.isin(table["split"], wanted))
    scene = table["scene"][frames]  # in the order of attribute `scenes`, the table's
    if unit == "scene":
        frames = frames[np.isin(scene, _every_kth(np.unique(scene), share))]
    else:
        frames = _every_kth(frames, share)
    frames = frames[table["n_voxels"][frames] != FAILED]
    if not len(frames):
        said = f"no usable frames of {', '.join(splits)}; its splits are: {', '.join(names)}"
        raise StoreError(f"{store.url} has {said}")
    return frames.tolist()


def _every_kth(items: np.ndarray, share: Fraction) -> np.ndarray:
    """Those i with floor((i + 1) share) > floor(i share), or the first."""
    top, bottom = share.as_integer_ratio()
    kept = [i for i in range(len(items)) if (i + 1) * top // bottom > i * top // bottom]
    return items[kept or [0]] if len(items) else items


def frame_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The shuffle of an epoch: int64 (n,), a permutation of 0..n-1 that never changes. Sorts
    Philox's raw output, which numpy promises never to change; not so ``Generator.permutation``."""
    bits = np.random.Philox(np.random.SeedSequence([seed, epoch]))
    return np.argsort(bits.random_raw(n), kind="stable")


class ShardSampler:
    """The batches of positions that one rank trains on in an epoch; a batch sampler. Of epoch e,
    ``e * n`` is added to each, so that a dataset can draw other numbers in each.

    All ranks walk through the same shuffled order in global batches of ``batch`` frames, of which
    each takes its own slice: what a global batch holds does not depend on the number of ranks.
    What does not fill a last global batch is left out, until the next epoch's order.

    ``n`` is the dataset's length; ``seed`` of the shuffle, not negative; ``rank`` is this process
    among ``world``. ValueError: the ranks can't share a batch evenly, or n is less than one batch.
    """

    def __init__(self, n: int, batch: int, seed: int, rank: int = 0, world: int = 1):
        if batch < 1 or batch % world:
            raise ValueError(f"a global batch of {batch} frames cannot be shared by {world} ranks")
        if n < batch:
            raise ValueError(f"{n} frames do not fill one global batch of {batch}")
        self.n, self.batch, self.seed, self.rank, self.world = n, batch, seed, rank, world
        self.set_epoch(0)

    def set_epoch(self, epoch: int, done: int = 0) -> None:
        """What the next ``iter()`` yields: that epoch's batches after the first ``done``."""
        self.epoch, self.done = epoch, done

    def __len__(self) -> int:
        """Batches that the next ``iter()`` yields."""
        return max(0, self.n // self.batch - self.done)

    def __iter__(self) -> Iterator[list[int]]:
        batches = self.n // self.batch
        order = frame_order(self.n, self.seed, self.epoch)[: batches * self.batch]
        order = order + self.epoch * self.n
        return iter(order.reshape(batches, self.world, -1)[self.done :, self.rank].tolist())


def eval_batches(n: int, batch: int, rank: int = 0, world: int = 1) -> list[list[int]]:
    """Positions rank, rank + world, ... below n, in order, ``batch`` at a time. The ranks together
    read each position exactly once: nothing is padded or left out."""
    mine = range(rank, n, world)
    return [list(mine[i : i + batch]) for i in range(0, len(mine), batch)]
