"""How long does a training step of a lidar network take, and how much memory? Batch 1, on a frame
of a store that has what the methods learn from; each size and method in a process of its own.

Memory is the process's at its peak, the program itself (0.4 GB) included.
"""

import multiprocessing
import os
import resource
import statistics
import time
from concurrent.futures import ProcessPoolExecutor

import click
import torch

from occfeat_targets.store.reader import open_store
from occfeat_train.config import TrainConfig
from occfeat_train.network import build_network, frames_for, prepare
from occfeat_train.optimiser import make_optimiser
from occfeat_train.runs.job import Job

SIZES = ("12-64", "48-256", "48-384", "48-768")
METHODS = ("scalr", "slidr", "also", "lidarseg")
CLICK = {"help_option_names": ["-h", "--help"], "show_default": True}


def job_of(store: str, size: str, method: str) -> Job:
    """A pretraining by a method, or a finetuning for ``lidarseg``, of a network of a size."""
    settings = [f"lidar.size={size}"]
    if method == "lidarseg":
        config = TrainConfig.load(None, settings).for_fraction(1)
        return Job("finetune", store, config, task=method)
    return Job(
        "pretrain", store, TrainConfig.load(None, [*settings, f"pretrain.objective={method}"])
    )


def step(store: str, size: str, method: str, steps: int) -> tuple[int, float, float]:
    """Rows of a frame, the median seconds of a step after a first one, and GB at the peak."""
    job, device = job_of(store, size, method), torch.device("cpu")
    torch.manual_seed(0)
    network, _ = build_network(job, open_store(store), load_weights=False)
    data = frames_for(job, network.train(), [0], network.objective.arrays, training=True)
    inputs, targets = prepare(data.collate([data[0]]), job, network, 0, device)
    counts = network.objective.counts(targets).tolist()
    optimiser = make_optimiser(network, job.plan.optimiser, 1e-4, 0.0)
    seconds = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        optimiser.zero_grad()
        network(inputs, targets, counts, 1.0)[0].backward()
        optimiser.step()
        seconds.append(time.perf_counter() - start)
    memory = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9
    return len(inputs["features"]), statistics.median(seconds[1:]), memory


@click.command(help=__doc__, context_settings=CLICK)
@click.option("--store", metavar="PATH|URL", default="targets.zarr")
@click.option("--size", "sizes", multiple=True, default=SIZES, help="Repeatable.")
@click.option("--method", "methods", type=click.Choice(METHODS), multiple=True, default=METHODS)
@click.option("--steps", type=click.IntRange(1), default=3, help="After a first one.")
def main(store: str, sizes: tuple[str, ...], methods: tuple[str, ...], steps: int) -> None:
    """Print a row for each size and method; ``--help`` is the module's docstring."""
    click.echo(
        f"{os.cpu_count()} cores, torch {torch.__version__}, {torch.get_num_threads()} threads"
    )
    click.echo(f"{'size':8} {'method':9} {'rows':>7} {'s a step':>9} {'GB':>6}")
    for size in sizes:
        for method in methods:
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(1, context) as pool:
                rows, seconds, memory = pool.submit(step, store, size, method, steps).result()
            click.echo(f"{size:8} {method:9} {rows:7} {seconds:9.2f} {memory:6.2f}")


if __name__ == "__main__":
    main()
