"""How fast is the target build, and where does the time go? All figures from one run.

Prints milliseconds per frame of every stage on one core; and frames/s of the whole build as a user
runs it (start-up included) and of the teacher alone on the same images with all cores, with the
workers' memory. Needs the extra ``targets``.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import click
import psutil
import torch

from occfeat_pipelines.benchmark import DEVICE, SPAWN, peak_memory, say_machine
from occfeat_targets import writer
from occfeat_targets.build import read_dataset
from occfeat_targets.config import TargetsConfig
from occfeat_targets.demo_world import make_demo_world
from occfeat_targets.frame import layout_of, make_outputs
from occfeat_targets.images import decode_jpeg, resize
from occfeat_targets.outputs.base import FrameInputs
from occfeat_targets.sources.base import Dataset, FrameRecord
from occfeat_targets.teachers import load_teacher
from occfeat_targets.teachers.base import dense_features
from occfeat_train.tasks.base import as_columns


@click.command(help=__doc__, context_settings={"show_default": True})
@click.option("--frames", default=96, help="With few, starting up weighs more.")
@click.option("--dataroot", type=click.Path(path_type=Path), help="Default: a new demo world.")
@click.option("--teacher", default="random:0", help="As in occfeat-targets build.")
def main(frames: int, dataroot: Path | None, teacher: str) -> None:
    """Print the benchmark."""
    say_machine()
    with tempfile.TemporaryDirectory() as scratch:
        if dataroot is None:
            dataroot = Path(scratch) / "demo-world"
            make_demo_world(dataroot, scenes=4, samples=-(-frames // 4))
        settings = [f"teacher.name={teacher}", "block_frames=4", f"frames.limit={frames}"]
        config = TargetsConfig.load(None, settings)
        dataset = read_dataset(dataroot, None, config)
        stages(dataset, config, f"{scratch}/stages.zarr")
        command = [sys.executable, "-m", "occfeat_targets.cli", "build", str(dataroot)]
        command += [f"{scratch}/targets.zarr"]
        for text in settings:
            command += ["--set", text]
        whole_build(command, dataset.records, config)


def stages(dataset: Dataset, config: TargetsConfig, url: str) -> None:
    """Milliseconds per frame of each stage, on one thread, of the first block of frames."""
    torch.set_num_threads(1)
    teacher, size = load_teacher(config.teacher), config.teacher.input_size
    layout = layout_of(config, vars(dataset), teacher.dim)
    outputs, spent = make_outputs(config, layout), {}
    writer.begin(url, config, dataset, overwrite=True)
    about = writer.describe_teacher(config)
    writer.set_teacher(url, config, about)
    job = writer.plan(url, config, dataset.records, about, skip=False)[0]

    def timed(name: str, function: Any, *arguments: Any) -> Any:
        start = time.perf_counter()
        result = function(*arguments)
        spent[name] = spent.get(name, 0.0) + time.perf_counter() - start
        return result

    def one_frame(record: FrameRecord) -> dict[str, Any]:
        inputs = FrameInputs(record, layout, config.lidar.near_m, teacher, size)
        for name in ("lidar", "voxel_index", "images"):
            timed(name.replace("_", " "), getattr, inputs, name)
        small = [timed("resize for the teacher", resize, image, size) for image in inputs.images]
        inputs.feature_maps = timed("teacher", dense_features, teacher, small, size)
        arrays = {}
        for output in outputs:
            arrays |= timed(f"output: {type(output).__name__}", output.compute, inputs)
        return arrays

    one_frame(job.records[0])  # warms everything up
    spent.clear()
    frames = [one_frame(record) for record in job.records]
    timed("write", writer.write_frames, job, outputs, frames, {})
    lines, total = [["stage (1 thread)", "ms/frame", "share"]], sum(spent.values())
    for name, seconds in spent.items():
        lines.append([name, f"{1e3 * seconds / len(frames):.2f}", f"{seconds / total:.1%}"])
    print("\n" + as_columns(lines))


def whole_build(command: list[str], records: list[FrameRecord], config: TargetsConfig) -> None:
    """The build as a user runs it, between two halves of the teacher alone on the same images.

    The halves before and after share whatever the machine's speed does meanwhile.
    """
    before = teacher_alone(records[::2], config)
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        for child in psutil.Process(process.pid).children(recursive=True):
            peak = max(peak, peak_memory(child.pid))
        time.sleep(0.2)
    if process.returncode:
        sys.exit("the build failed")
    build, after = time.perf_counter() - start, teacher_alone(records[1::2], config)
    rows = {"whole build": build} | {name: before[name] + after[name] for name in before}
    lines = [["", "frames/s", "seconds", "the build takes this times"]]
    for name, seconds in rows.items():
        figures = (len(records) / seconds, seconds, build / seconds)
        lines.append([name, *(f"{figure:.3f}" for figure in figures)])
    print(f"\n{as_columns(lines)}\nmost memory of a worker: {peak / 1e9:.2f} GB")


def teacher_alone(records: list[FrameRecord], config: TargetsConfig) -> dict[str, float]:
    """Seconds of forward passes with all cores, in one process and in one per core, which start at
    once: the slowest one's."""
    n, seconds = os.cpu_count() or 1, {}
    for processes, threads in [(1, n)] if DEVICE.type == "cuda" else [(1, n), (n, 1)]:
        with SPAWN.Manager() as manager, ProcessPoolExecutor(processes, SPAWN) as pool:
            gate = manager.Barrier(processes)
            shares = [records[i::processes] for i in range(processes)]
            runs = [pool.submit(forward, share, config, threads, gate) for share in shares]
            name = f"teacher alone, {processes} process(es) of {threads} thread(s)"
            seconds[name] = max(run.result() for run in runs)
    return seconds


def forward(records: list[FrameRecord], config: TargetsConfig, threads: int, gate: Any) -> float:
    """Seconds of forward passes over records whose images are ready in memory."""
    torch.set_num_threads(threads)
    teacher, size = load_teacher(config.teacher), config.teacher.input_size
    images = [[resize(decode_jpeg(Path(p), size), size) for p in r.image_paths] for r in records]
    dense_features(teacher, images[0], size)
    gate.wait()
    start = time.perf_counter()
    for image in images:
        dense_features(teacher, image, size)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
