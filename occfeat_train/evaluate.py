"""Evaluation of a network over a whole split, by its task's own meters: one for each of
the protocols that it is counted under, in one pass over the frames."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from tqdm import tqdm

from occfeat_targets.store.reader import open_store
from occfeat_train.data.order import eval_batches, select_frames, split_names
from occfeat_train.data.workers import make_loader
from occfeat_train.distributed import Process
from occfeat_train.network import Network, frames_for, trained_network
from occfeat_train.objectives.base import Batch
from occfeat_train.runs.job import Job
from occfeat_train.runs.run import Run, RunError, check_same_teacher
from occfeat_train.tasks import TASKS
from occfeat_train.tasks.base import Task, as_columns

_BATCH = 4


def evaluate(job: Job, run: Run, process: Process) -> dict[str, Any]:
    """What the task of a finetuned run, or of a pretraining by words, measures on the evaluation
    split of the job's store, for ``result.json``; ``rows`` and ``headline`` are of :func:`measure`.

    Processes take every ``world``-th frame, none twice, and their counts are summed. Raises
    RunError: the run has no task, or is of another grid or teacher; StoreError: nothing to evaluate
    on, or the store lacks what the run learned.
    """
    if job.task is None:
        words = (
            ", or evaluate it by words, --texts FILE"
            if job.learns.zero_shot(job.own_settings)
            else ""
        )
        raise RunError(
            f"{run.path} is a pretraining: finetune it first, then evaluate that run{words}"
        )
    store = open_store(job.store)
    if job.kind == "pretrain":
        check_same_teacher(run, store)
    frames = select_frames(store, split_names(job.config.data.eval_split, "val"))
    network, position = trained_network(job, run, store)
    protocols = cast(Task, network.objective).protocols
    measured = measure(job, network.to(process.device), frames, process, protocols)
    return {
        "run": str(run.path),
        **{name: position[name] for name in ("step", "finished")},
        "store": job.store,
        "splits": sorted({store.split(i) for i in frames}),
        "frames": len(frames),
        **{name: getattr(job, name) for name in ("fraction", "init", "task")},
        "counted": cast(Task, network.objective).counted,
        **cast(Task, network.objective).remarks(),
        **measured,
    }


def measure(
    job: Job, network: Network, frames: Sequence[int], process: Process, protocols: Sequence[str]
) -> dict[str, Any]:
    """What the meters of a network's task say of frames of the job's store: ``rows`` of
    ``tasks.base.Meter.result`` under each protocol, named ``PROTOCOL, ROW``; and the ``headline``
    of the one that the task learned, which must be among them, with its ``protocol``."""
    task, data = cast(Task, network.objective), job.config.data
    dataset = frames_for(job, network, frames, task.eval_arrays)
    batches = eval_batches(len(frames), _BATCH, process.rank, process.world)
    on_gpu = process.device.type == "cuda"
    loader = make_loader(dataset, batches, data.workers, data.start_method, pin_memory=on_gpu)
    meters = {protocol: task.meter(process.device, protocol) for protocol in protocols}
    looks = {"unit": "batch", "leave": None, "disable": not process.is_main}
    for batch in tqdm(loader, desc="evaluate", **looks):
        batch = {name: values.to(process.device) for name, values in batch.items()}
        bev_frames = [task.bev_frame(batch, protocol) for protocol in protocols]
        predicted = _predict(network, batch, task.predict, bev_frames)
        for meter, theirs in zip(meters.values(), predicted, strict=True):
            meter.add(batch, theirs)
    results = {protocol: meter.result() for protocol, meter in meters.items()}
    rows = {f"{p}, {row}": said for p, r in results.items() for row, said in r["rows"].items()}
    headline = results[task.protocol]["headline"]
    name = f"{task.protocol}, {headline['name']}"
    return {"rows": rows, "headline": headline | {"name": name, "protocol": task.protocol}}


def predict(network: Network, batch: Batch, head: Callable[[torch.Tensor], Any]) -> Any:
    """What ``head`` makes of the features of a batch on the device, not augmented, in the BEV frame
    of what the network learned: (B, C, X, Y) of cameras."""
    return _predict(network, batch, head, [network.objective.frame(batch)])[0]


def _predict(
    network: Network,
    batch: Batch,
    head: Callable[[torch.Tensor], Any],
    frames: Sequence[torch.Tensor | None],
) -> list[Any]:
    """The same in each of some BEV frames, see :meth:`Objective.frame`."""
    network.eval()
    with torch.inference_mode():
        return network.sensor.predict(network.backbone, batch, head, frames)


def table(result: dict[str, Any]) -> str:
    """A result as text for people."""
    task = TASKS(result["task"])
    counted = result.get("counted", task.counted)  # older results have none
    header = f"{where(result)}: {result['task']} IoU in per cent{counted}"
    return f"{header}\n\n{as_columns(task.table(result['rows']))}"


def where(result: dict[str, Any]) -> str:
    """Of which network and frames a result is."""
    return (
        f"{result['run']} (step {result['step']}{'' if result['finished'] else ', NOT FINISHED'}) "
        f"on {result['frames']} frames of {', '.join(result['splits'])}"
    )
