"""How a network does on frames that it does not learn from, while it is trained.

The training does not notice. A network in evaluation mode changes nothing in itself, and what is
random in a step follows from its position, whatever was drawn before.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch

from occfeat_train.augment import NO_AUGMENT
from occfeat_train.data.order import eval_batches
from occfeat_train.data.workers import make_loader
from occfeat_train.distributed import (
    Process,
    all_reduce_sum,
    copy_from_main,
    from_main,
    pick_precision,
)
from occfeat_train.evaluate import measure
from occfeat_train.network import Network, frames_for, prepare
from occfeat_train.runs.job import Job
from occfeat_train.tasks.base import Task


def validate(
    job: Job, network: Network, frames: Sequence[int], process: Process
) -> dict[str, float]:
    """Numbers by name of the network on frames of the job's store, which all processes share: a
    task's IoU under its protocol, in per cent (nan where undefined), else an objective's loss and
    its terms. Leaves it in training mode."""
    # Batch norms learn in each process alone, and it is the main one's that are kept.
    copy_from_main(network.buffers())
    network.eval()
    if job.task:
        protocol = cast(Task, network.objective).protocol
        iou = measure(job, network, frames, process, [protocol])["headline"]["iou"]
        values = {f"{protocol}_IoU": float("nan") if iou is None else iou}
    else:
        values = _loss(job, network, frames, process)
    network.train()
    return values


@torch.no_grad()
def _loss(job: Job, network: Network, frames: Sequence[int], process: Process) -> dict[str, float]:
    """Means over the frames of each one's own, whoever reads it and beside which others."""
    plain = replace(job, config=job.config.with_(augment=NO_AUGMENT))
    dataset = frames_for(job, network, frames, network.objective.arrays)
    alone, data = eval_batches(len(frames), 1, process.rank, process.world), job.config.data
    dtype, _ = pick_precision(job.config.run.precision, process.device)
    sums: Counter[str] = Counter()
    for batch in make_loader(dataset, alone, data.workers, data.start_method, pin_memory=False):
        inputs, targets = prepare(batch, plain, network, 0, process.device)
        counts = network.objective.counts(targets).tolist()
        with torch.autocast(process.device.type, dtype, enabled=dtype != torch.float32):
            loss, terms = network(inputs, targets, counts, 1.0)
        sums.update({name: value.item() for name, value in {"loss": loss, **terms}.items()})
    names = from_main("\n".join(sums)).split("\n")  # a process may have had no frame
    summed = torch.tensor([sums[name] for name in names], device=process.device)
    means = all_reduce_sum(summed) / len(frames)
    return dict(zip(names, means.tolist(), strict=True))
