"""How fast is it, and what do its tricks buy? Compare figures of one run only: machines are noisy.

\b
stages   a profile of the target build's functions, on one core
build    the whole target build as a user runs it (start-up included) beside the teacher alone on
         the same images with all cores; memory is that of the largest process waited for
loader   the loader of a pretraining (features, voxels, camera bits, images; global shuffle) beside
         one that only preads the very same bytes and decodes the same stored JPEGs, and one that
         decodes and resizes the dataset's original images instead; the page cache is warm
lifting  beside Simple-BEV's dense form, at the paper's size (224x400 images, the store's grid,
         batch 1, 128 channels)
head     the pretraining's, beside the paper's dense form, likewise
steps    of a pretraining with EfficientNet-B0 at batch 1, or 16 with a GPU: images/s, the share
         spent waiting for data, and what the teacher in the loop would add, measured by itself

The first two, and the original images, need the extra ``targets``.
"""

import multiprocessing
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from cProfile import Profile
from functools import partial
from importlib.util import find_spec
from itertools import repeat
from pathlib import Path
from pstats import Stats
from types import SimpleNamespace
from typing import Any

import click
import numpy as np
import torch
from PIL import Image
from torch.utils.benchmark import Timer
from torch.utils.data import DataLoader

from occfeat_pipelines.bench_baselines import BarePread, DenseHead, DenseLift, OriginalImages
from occfeat_targets import writer
from occfeat_targets.build import read_dataset
from occfeat_targets.config import TargetsConfig
from occfeat_targets.images import decode_jpeg, resize
from occfeat_targets.sources.base import Dataset, FrameRecord
from occfeat_targets.store.reader import TargetStore, open_store
from occfeat_targets.teachers import shared_teacher
from occfeat_targets.teachers.base import dense_features
from occfeat_train.config import TrainConfig
from occfeat_train.data.dataset import FrameDataset
from occfeat_train.data.order import ShardSampler
from occfeat_train.data.workers import make_loader
from occfeat_train.distributed import Process
from occfeat_train.models.lifts.simplebev import SimpleBEVLift
from occfeat_train.objectives.occfeat import OccFeatHead
from occfeat_train.runs.job import Job
from occfeat_train.runs.run import versions
from occfeat_train.tasks.base import as_columns
from occfeat_train.train import Trainer

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SPAWN = multiprocessing.get_context("spawn")
ARRAYS = ("images", "voxel_index", "features", "feature_cameras")
"""What a pretraining reads."""
CONFIG = TrainConfig.load(None, ["model.encoder_weights=random", "run.log_every=1"])
CHANNELS, IMAGE_HW, STRIDE = CONFIG.model.channels, CONFIG.model.image_size, 8
Figures = tuple[float, ...]
"""What was measured, in units that :func:`compare` is told."""


def stages(asked: SimpleNamespace) -> None:
    """Profile a block of frames on one thread: our functions with all they call (``cumtime``, which
    overlaps) and on their own (``tottime``), in seconds. Both include what profiling costs."""
    _, config, dataset = read(asked)
    with tempfile.TemporaryDirectory() as url:
        writer.begin(url, config, dataset, overwrite=True)
        about = writer.describe_teacher(config)
        writer.set_teacher(url, config, about)
        job = writer.plan(url, config, dataset.records, about, skip=False)[0]
        writer.write_block(job)  # warms everything up
        profile = Profile(builtins=False)
        profile.runcall(writer.write_block, job)
    print(f"\n{len(job.records)} frames:")
    Stats(profile).sort_stats("cumulative").print_stats("occfeat_targets")


def read(asked: SimpleNamespace) -> tuple[list[str], TargetsConfig, Dataset]:
    """Settings to build targets, as texts and as such, and what to build them of."""
    settings = [f"teacher.name={asked.teacher}", "block_frames=4", f"frames.limit={asked.frames}"]
    config = TargetsConfig.load(None, settings)
    return settings, config, read_dataset(asked.dataroot, None, config)


def build(asked: SimpleNamespace) -> None:
    """Compare a build with the teacher alone, in one process and in one per core."""
    settings, config, dataset = read(asked)
    n = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "occfeat_targets.cli", "build", "--overwrite"]
        command += [str(asked.dataroot), f"{scratch}/t.zarr", *(f"--set={s}" for s in settings)]
        ways = {"whole build": partial(apart, whole_build, command, len(dataset.records))}
        for processes, threads in [(1, n)] if DEVICE.type == "cuda" else [(1, n), (n, 1)]:
            name = f"teacher alone, processes x threads: {processes} x {threads}"
            task = (teacher_alone, dataset.records, config, processes, threads)
            ways[name] = partial(apart, *task)
        compare("", "frames/s, peak MB of a process", ways, asked.rounds)


def whole_build(command: list[str], frames: int) -> Figures:
    """Frames/s of the build as a user runs it, and :func:`most_memory`."""
    start = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    return frames / (time.perf_counter() - start), most_memory()


def teacher_alone(
    records: list[FrameRecord], config: TargetsConfig, processes: int, threads: int
) -> Figures:
    """The same of forward passes alone: frames/s are processes x frames / summed seconds."""
    setup = (records[0], config, threads)  # loads the teacher and warms everything up
    with ProcessPoolExecutor(processes, SPAWN, initializer=forward, initargs=setup) as pool:
        seconds = list(pool.map(forward, records, repeat(config), repeat(threads)))
    return processes * len(records) / sum(seconds), most_memory()


def most_memory() -> float:
    """MB at the peak of the largest process that this one has waited for."""
    return 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6


def forward(record: FrameRecord, config: TargetsConfig, threads: int) -> float:
    """Seconds of a forward pass over a record's images, which are ready in memory."""
    teacher = shared_teacher(config.teacher)
    size = config.teacher.size_for(teacher)
    torch.set_num_threads(threads)
    images = [resize(decode_jpeg(Path(path), size), size) for path in record.image_paths]
    start = time.perf_counter()
    dense_features(teacher, images, size)
    return time.perf_counter() - start


def loader(asked: SimpleNamespace) -> None:
    """Compare loaders."""
    kinds: dict[str, Any] = {"occfeat loader": FrameDataset, "bare pread + JPEG decode": BarePread}
    if find_spec("cv2"):
        paths = [record.image_paths for record in read(asked)[2].records]
        kinds["original images"] = partial(OriginalImages, paths=paths)
    frames, ways = some_frames(open_store(asked.store), asked.frames), {}
    for name, kind in kinds.items():
        dataset, sampler = kind(asked.store, frames, ARRAYS), ShardSampler(len(frames), 4, seed=0)
        batches = make_loader(dataset, sampler, asked.workers, "forkserver", pin_memory=False)
        ways[name] = partial(load, batches)
        load(batches)  # starts the workers
    compare("", "ms a sample", ways, asked.rounds)


def load(batches: DataLoader) -> Figures:
    """Milliseconds that a loader takes for a sample."""
    start = time.perf_counter()
    n = sum(len(batch["frame"]) for batch in batches)
    return (1e3 * (time.perf_counter() - start) / n,)


def some_frames(store: TargetStore, n: int) -> list[int]:
    """Numbers of ``n`` frames that have targets, again from the first if there are fewer."""
    return np.resize(np.flatnonzero(store.per_frame["n_voxels"] > 0), n).tolist()


def one_frame(store: str) -> tuple[TargetStore, dict[str, torch.Tensor]]:
    """An opened store, and a batch of its first frame on the device."""
    opened = open_store(store)
    dataset = FrameDataset(store, some_frames(opened, 1), ARRAYS)
    batch = dataset.collate([dataset[0]])
    return opened, {name: values.to(DEVICE) for name, values in batch.items()}


def forms(asked: SimpleNamespace, part: Callable, makes: tuple[type, ...]) -> None:
    """Compare forms of a part."""
    ways = {make.__name__: partial(apart, part, asked.store, make) for make in makes}
    compare("forward + backward", "ms, peak MB", ways, asked.rounds)


def lift_with(store: str, make: type[SimpleBEVLift]) -> Figures:
    """Forward and backward of a lift."""
    opened, batch = one_frame(store)
    module = make(opened.grid, CHANNELS).to(DEVICE)
    shape = (*batch["K"].shape[:2], CHANNELS, *(side // STRIDE for side in IMAGE_HW))
    features = torch.randn(shape, device=DEVICE, requires_grad=True)
    cameras = (batch["K"], batch["cam_T_ego"], batch["images"].shape[2:4])

    def run() -> None:
        volume = module(features, *cameras)
        volume.backward(volume.detach())

    return timed(run)


def head_with(store: str, make: type[OccFeatHead]) -> Figures:
    """Forward and backward of a pretraining head and its losses."""
    opened, batch = one_frame(store)
    objective = Job("pretrain", store, CONFIG).objective(opened)
    objective.head = make(CHANNELS, opened.grid.shape[0], opened.attrs["teacher"]["dim"])
    objective.to(DEVICE)
    bev = torch.randn(1, CHANNELS, *opened.grid.bev_shape, device=DEVICE, requires_grad=True)
    targets = objective.targets(batch, torch.zeros(1))
    counts = objective.counts(targets).tolist()
    return timed(lambda: objective(bev, targets, counts, 1.0)[0].backward())


def timed(run: Callable[[], Any]) -> Figures:
    """Milliseconds of ``run``, and MB of memory at its peak above what was there before it."""
    before = peak_memory()
    timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    return 1e3 * timer.timeit(5).mean, (peak_memory() - before) / 1e6


def peak_memory() -> int:
    """Bytes of this process, of the GPU if there is one; 0 where Linux does not say."""
    if DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated()
    # Unlike ru_maxrss this is free of what the parent used.
    _, _, rest = Path("/proc/self/status").read_text().partition("VmHWM:")
    return 1024 * int(rest.split()[0]) if rest else 0


def steps(asked: SimpleNamespace) -> None:
    """Print what a step of a real training takes, the share of it spent waiting for data, and what
    the teacher would add: a step with it in the loop is the sum of these two, measured apart."""
    batch = 16 if DEVICE.type == "cuda" else 1
    data, plan = CONFIG.data.with_(workers=asked.workers), CONFIG.pretrain.with_(batch=batch)
    config = CONFIG.with_(data=data, pretrain=plan)
    trainer = Trainer(Job("pretrain", asked.store, config), Process(0, 1, DEVICE))
    trainer.begin()
    lines: list[dict[str, float]] = []
    run: Any = SimpleNamespace(save=lambda *_: None)
    log: Any = SimpleNamespace(show=lambda *_: None, write=lambda _, line: lines.append(line))
    trainer.fit(run, log, lambda: len(lines) == 9)
    seconds, share = (np.array([line[key] for line in lines[1:]]) for key in ("seconds", "waited"))
    images = batch * len(trainer.store.attrs["cameras"])
    print(
        f"\npretraining at batch {batch}, settings of the paper, {asked.workers} workers: "
        f"{seconds.mean():.2f} s a step, {share @ seconds / seconds.sum():.1%} of it waiting for "
        f"data, {images / seconds.mean():.1f} images/s, peak {peak_memory() / 1e6:.0f} MB"
    )
    settings = TargetsConfig.load(None, [f"teacher.name={asked.teacher}"]).teacher
    threads = torch.get_num_threads()
    teacher = shared_teacher(settings)  # which holds torch to one thread
    height, width = settings.size_for(teacher)
    torch.set_num_threads(threads)
    black = [Image.new("RGB", (width, height))] * len(trainer.store.attrs["cameras"])
    milliseconds, _ = timed(lambda: dense_features(teacher, black, (height, width)))
    print(f"the teacher in the loop would add {batch * milliseconds / 1e3:.2f} s a step")


def apart(function: Callable, *arguments: Any) -> Any:
    """What a function returns in a process of its own, whose memory peaks are its own."""
    with ProcessPoolExecutor(1, SPAWN) as pool:
        return pool.submit(function, *arguments).result()


def compare(title: str, units: str, ways: Mapping[str, Callable[[], Figures]], rounds: int) -> None:
    """Measure ways in turn, and print medians: of each, and of how many times the first's it is."""
    measured = np.array([[way() for way in ways.values()] for _ in range(rounds)])
    times = measured / np.maximum(measured[:, :1], 1e-9)
    lines = [[title, *units.split(", "), *(f"{unit} / first" for unit in units.split(", "))]]
    for name, row in zip(ways, np.median(np.dstack([measured, times]), axis=0), strict=True):
        lines.append([name, *(f"{figure:,.2f}" for figure in row)])
    print("\n" + as_columns(lines))


PARTS = {
    "stages": stages,
    "build": build,
    "loader": loader,
    "lifting": partial(forms, part=lift_with, makes=(SimpleBEVLift, DenseLift)),
    "head": partial(forms, part=head_with, makes=(OccFeatHead, DenseHead)),
    "steps": partial(apart, steps),
}


@click.command(help=__doc__, context_settings={"show_default": True})
@click.argument("parts", nargs=-1, required=True, type=click.Choice([*PARTS]))
@click.option("--dataroot", type=click.Path(path_type=Path), default="demo-world")
@click.option("--teacher", default="random:0", help="As in occfeat-targets build.")
@click.option("--store", default="targets.zarr", help="Of the same, with features; a local path.")
@click.option("--frames", default=96, help="To build or load; with few, starting weighs more.")
@click.option("--workers", default=2, help="Reading processes of a training.")
@click.option("--rounds", default=3, help="Interleaved repetitions; figures are medians.")
def main(parts: list[str], **options: Any) -> None:
    """Print the machine and some parts of the benchmark."""
    gpu = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "no GPU"
    packages = ", ".join(f"{name} {version}" for name, version in versions().items())
    machine = f"{os.cpu_count()} cores, {gpu}, {platform.platform()}"
    print(f"{time.strftime('%F')}, {machine}; {packages}")
    for part in parts:
        try:
            PARTS[part](SimpleNamespace(**options))
        except (ValueError, RuntimeError, OSError) as error:
            raise click.ClickException(f"{part}: {error}") from error


if __name__ == "__main__":
    main()
