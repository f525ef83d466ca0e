"""How fast is the target build, and where does the time go? All figures from one run.

    python pipelines/bench_targets.py                 # demo world, random teacher, about 10 minutes
    python pipelines/bench_targets.py --frames 20     # quick, but starting up weighs more
    python pipelines/bench_targets.py --dataroot /data/nuscenes --teacher facebook/dinov2-small

Prints frames/s of the whole build as a user runs it (start-up included), of the teacher alone on
the same images with all cores, of every stage on one core, worker memory, and what planning and
scheduling 34,149 frames costs. Machines are noisy: compare figures of one run only.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import psutil
import torch
import zarr

from occfeat_targets import frame_targets as ft
from occfeat_targets import writer
from occfeat_targets.cluster import executor
from occfeat_targets.config import TargetsConfig, load_config
from occfeat_targets.labels import map_masks, vehicle_boxes, vehicle_masks
from occfeat_targets.map_layers import load_map
from occfeat_targets.nuscenes_source import load_source
from occfeat_targets.records import FrameRecord, Source
from occfeat_targets.sampling import camera_bits, quantise, sample_mean, see
from occfeat_targets.teacher import dense_features, load_teacher

TRAINVAL_KEYFRAMES = 34_149


@click.command()
@click.option("--frames", default=96, show_default=True)
@click.option("--dataroot", type=click.Path(path_type=Path), help="Default: a new demo world.")
@click.option("--teacher", default="random:0", show_default=True)
def main(frames: int, dataroot: Path | None, teacher: str) -> None:
    """Print the benchmark."""
    with tempfile.TemporaryDirectory() as scratch:
        if dataroot is None:
            dataroot = Path(scratch) / "demo-world"
            scenes, version = (4, "v1.0-mini")
            command = ["demo-data", dataroot, "--scenes", scenes, "--version", version]
            _occfeat_targets(*command, "--samples", -(-frames // scenes))
        config = load_config(None, [f"teacher.name={teacher}", "block_frames=4"])
        records = load_source(dataroot, None, config).records[:frames]
        print(
            f"{os.cpu_count()} cores, torch {torch.__version__}, {_device()}, {len(records)} frames"
        )
        stages(records[:12], config)
        whole_build(dataroot, Path(scratch) / "targets.zarr", config, records)
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=spawn) as fresh:  # to see its memory alone
            fresh.submit(planning, records[0], scratch).result()


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"


def _occfeat_targets(*arguments: object) -> None:
    subprocess.run(_command(*arguments), check=True)


def _command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "occfeat_targets.cli", *map(str, arguments)]


def stages(records: list[FrameRecord], config: TargetsConfig) -> None:
    """Milliseconds per frame of each stage, on one thread."""
    torch.set_num_threads(1)
    teacher = load_teacher(config.teacher)
    spent: dict[str, float] = {}

    def timed(name: str, function, *arguments):
        start = time.perf_counter()
        result = function(*arguments)
        spent[name] = spent.get(name, 0.0) + time.perf_counter() - start
        return result

    for i, record in enumerate(records):
        if i == 1:
            spent.clear()  # the first frame warmed everything up
        xyz, intensity = timed("read lidar", ft.read_lidar, record, config.lidar.near_m)
        index = timed("voxelise", config.grid.occupied, xyz)
        images, _ = timed("decode, resize, encode", ft.camera_images, record, config)
        hw = np.array(record.image_hw)
        centres = config.grid.centres(index)
        position, valid = timed("project", see, centres, record.K, record.cam_T_ego, hw)
        size = config.teacher.input_size
        features = timed("teacher", dense_features, teacher, images, size)
        mean = timed("sample", sample_mean, features, position, valid)
        timed("quantise", quantise, mean)
        timed("camera bits", camera_bits, valid)
        boxes = vehicle_boxes(record.boxes)
        timed("vehicle masks", vehicle_masks, boxes, config.grid)
        if record.map_path:
            layers, width = load_map(record.map_path), config.labels.divider_width_m
            timed("map masks", map_masks, layers, record.global_T_ego, width, config.grid)
        timed("pack points", ft.pack_points, xyz, intensity, config.grid)
    with tempfile.TemporaryDirectory() as scratch:
        spent["write"] = _time_writing(records, config, teacher, scratch) * (len(records) - 1)
    total = sum(spent.values())
    print(f"\n{'stage (1 thread)':<24}{'ms/frame':>10}{'share':>8}")
    for name, seconds in spent.items():
        print(f"{name:<24}{1e3 * seconds / (len(records) - 1):>10.2f}{seconds / total:>8.1%}")


def _time_writing(records, config, teacher, scratch) -> float:
    """Seconds per frame to write one block's arrays and marker."""
    records = records[: config.block_frames]
    url = f"{scratch}/targets.zarr"
    writer.begin(url, config, _source(records), overwrite=False)
    about = writer.describe_teacher(config)
    writer.set_teacher(url, config, about)
    (job,) = writer.plan(url, config, records, about, skip=False)
    frame = ft.frame_targets(records[0], config, teacher)
    start = time.perf_counter()
    group = zarr.open_group(url, mode="r+")
    writer._write_arrays(group, job, [frame] * len(records))
    writer._write_marker(job, [frame] * len(records), {})
    return (time.perf_counter() - start) / len(records)


def _source(records: list[FrameRecord]) -> Source:
    scenes = tuple(dict.fromkeys(record.scene for record in records))
    splits = tuple(dict.fromkeys(record.split for record in records))
    return Source(records, "benchmark", "v1.0-mini", "", scenes, splits, bool(records[0].map_path))


def whole_build(dataroot: Path, store: Path, config: TargetsConfig, records: list) -> None:
    """The build as a user runs it, between two halves of the teacher alone on the same images.

    The halves before and after share whatever the machine's speed does meanwhile.
    """
    alone = _teacher_alone(records[::2], config)
    flags = ["--teacher", config.teacher.name, "--set", f"block_frames={config.block_frames}"]
    command = _command("build", dataroot, store, *flags, "--limit", len(records))
    start, cpu = time.perf_counter(), _cpu_seconds()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    first, peak = _watch(process, store / "build" / "blocks")
    build, build_cpu = time.perf_counter() - start, _cpu_seconds() - cpu
    for name, (seconds, cpu) in _teacher_alone(records[1::2], config).items():
        alone[name] = (alone[name][0] + seconds, alone[name][1] + cpu)
    frames = len(records)
    print(f"\n{'':<26}{'frames/s':>9}{'wall s':>9}{'CPU s':>9}")
    print(f"{'whole build':<26}{frames / build:>9.3f}{build:>9.1f}{build_cpu:>9.1f}")
    for name, (seconds, cpu) in alone.items():
        print(f"{'teacher alone, ' + name:<26}{frames / seconds:>9.3f}{seconds:>9.1f}{cpu:>9.1f}")
        print(f"{'  build / this':<26}{'':>9}{build / seconds:>9.3f}{build_cpu / cpu:>9.3f}")
    print(f"{'first block done after':<26}{first:>9.1f} s")
    print(f"{'worker peak memory':<26}{peak / 1e9:>9.2f} GB")


def _cpu_seconds() -> float:
    """User and system time of this process's ended children and theirs."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _peak_memory(pid: int) -> int:
    """Bytes; 0 for a process that has ended. Unlike ru_maxrss, free of what its parent used."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return 1024 * int(status.split("VmHWM:")[1].split()[0]) if "VmHWM:" in status else 0


def _teacher_alone(records: list[FrameRecord], config: TargetsConfig) -> dict[str, tuple]:
    """Wall and CPU seconds of forward passes with all cores, in one process and in one per core."""
    n = os.cpu_count()
    modes = {f"1 process, {n} threads": (1, n)}
    if not torch.cuda.is_available():
        modes[f"{n} processes, 1 thread"] = (n, 1)
    return {name: _teacher_processes(records, config, *mode) for name, mode in modes.items()}


def _watch(process: subprocess.Popen, markers: Path) -> tuple[float, float]:
    """Seconds to the first finished block, and the highest peak memory of any worker (bytes)."""
    start, first, peak = time.perf_counter(), 0.0, 0
    while process.poll() is None:
        for child in psutil.Process(process.pid).children(recursive=True):
            peak = max(peak, _peak_memory(child.pid))
        if not first and markers.is_dir() and any(markers.iterdir()):
            first = time.perf_counter() - start
        time.sleep(0.2)
    if process.returncode:
        sys.exit("the build failed")
    return first, peak


def _run_teacher(records: list[FrameRecord], config: TargetsConfig, threads: int, gate) -> tuple:
    """Wall and CPU seconds of forward passes over records whose images are ready in memory."""
    torch.set_num_threads(threads)
    teacher = load_teacher(config.teacher)
    images = [ft.camera_images(record, config)[0] for record in records]
    dense_features(teacher, images[0], config.teacher.input_size)
    gate.wait()
    start, cpu = time.perf_counter(), time.process_time()
    for image in images:
        dense_features(teacher, image, config.teacher.input_size)
    return time.perf_counter() - start, time.process_time() - cpu


def _teacher_processes(
    records: list[FrameRecord], config: TargetsConfig, processes: int, threads: int
) -> tuple[float, float]:
    """Processes share the frames and start at once; the slowest one's wall, everyone's CPU."""
    spawn = multiprocessing.get_context("spawn")
    with spawn.Manager() as manager, ProcessPoolExecutor(processes, mp_context=spawn) as pool:
        gate = manager.Barrier(processes)
        runs = [
            pool.submit(_run_teacher, records[i::processes], config, threads, gate)
            for i in range(processes)
        ]
        wall, cpu = zip(*(run.result() for run in runs), strict=True)
        return max(wall), sum(cpu)


def _nothing(job) -> int:
    return len(job.records)


def planning(record: FrameRecord, scratch: str) -> None:
    """Client time and memory to plan all of trainval, and the scheduler's share per frame."""
    config = load_config(None, ["teacher.name=random:0"])
    records = [
        # Own arrays for every record, as a real dataset has.
        replace(record, token=f"{i:032x}", K=record.K.copy(), cam_T_ego=record.cam_T_ego.copy())
        for i in range(TRAINVAL_KEYFRAMES)
    ]
    url = f"{scratch}/planning.zarr"
    start = time.perf_counter()
    source = _source(records)
    writer.begin(url, config, source, overwrite=True)
    teacher = {"name": "none", "dim": 384}
    writer.set_teacher(url, config, teacher)
    jobs = writer.plan(url, config, records, teacher, skip=False)
    seconds = time.perf_counter() - start
    start = time.perf_counter()
    writer._record_arrays(config, source)
    arrays = time.perf_counter() - start
    with executor(workers=os.cpu_count()) as cluster:
        cluster.everywhere(abs, 1)
        start = time.perf_counter()
        done = sum(result for _, result in cluster.run(_nothing, iter(jobs)))
        share = (time.perf_counter() - start) / done
    peak = _peak_memory(os.getpid()) / 1e9
    print(f"\nplanning {done} frames ({len(jobs)} blocks)")
    print(f"{'plan':<24}{seconds:>8.2f} s")
    print(f"{'per-frame arrays':<24}{arrays:>8.2f} s")
    print(f"{'client peak memory':<24}{peak:>8.2f} GB")
    print(f"{'scheduler':<24}{1e3 * share:>8.3f} ms/frame")


if __name__ == "__main__":
    main()
