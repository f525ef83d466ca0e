"""Evaluation of a finetuned network over a whole split, by its task's own meters: one for each of
the protocols that it is counted under, in one pass over the frames."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from tqdm import tqdm

from occfeat_targets.store.reader import open_store
from occfeat_train.augment import NO_AUGMENT, draw, network_inputs
from occfeat_train.data.dataset import FrameDataset
from occfeat_train.data.order import eval_batches, select_frames, split_names
from occfeat_train.data.workers import make_loader
from occfeat_train.distributed import Process, pick_precision
from occfeat_train.network import Network, trained_network
from occfeat_train.objectives.base import Batch
from occfeat_train.runs.job import Job
from occfeat_train.runs.run import Run, RunError
from occfeat_train.tasks import TASKS
from occfeat_train.tasks.base import Task, as_columns

_BATCH = 4


def evaluate(job: Job, run: Run, process: Process) -> dict[str, Any]:
    """What a finetuned run's task measures on the evaluation split of the job's store, for
    ``result.json``; ``rows`` and ``headline`` are of :func:`measure`.

    Processes take every ``world``-th frame, none twice, and their counts are summed. Raises
    RunError: the run is not a finetuning, or of another grid; StoreError: nothing to evaluate on,
    or the store lacks what the run learned.
    """
    if job.task is None:
        raise RunError(f"{run.path} is a pretraining: finetune it first, then evaluate that run")
    store = open_store(job.store)
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
        **measured,
    }


def measure(
    job: Job, network: Network, frames: Sequence[int], process: Process, protocols: Sequence[str]
) -> dict[str, Any]:
    """What the meters of a network's task say of frames of the job's store: ``rows`` of
    ``tasks.base.Meter.result`` under each protocol, named ``PROTOCOL, ROW``; and the ``headline``
    of the one that the task learned, which must be among them, with its ``protocol``."""
    task, data = cast(Task, network.objective), job.config.data
    dataset = FrameDataset(job.store, frames, ("images", *task.eval_arrays))
    batches = eval_batches(len(frames), _BATCH, process.rank, process.world)
    on_gpu = process.device.type == "cuda"
    loader = make_loader(dataset, batches, data.workers, data.start_method, pin_memory=on_gpu)
    meters = {protocol: task.meter(process.device, protocol) for protocol in protocols}
    looks = {"unit": "batch", "leave": None, "disable": not process.is_main}
    for batch in tqdm(loader, desc="evaluate", **looks):
        batch = {name: values.to(process.device) for name, values in batch.items()}
        bev_frames = [task.bev_frame(batch, protocol) for protocol in protocols]
        predicted = _predict(network, batch, job, task.predict, bev_frames)
        for meter, theirs in zip(meters.values(), predicted, strict=True):
            meter.add(batch, theirs)
    results = {protocol: meter.result() for protocol, meter in meters.items()}
    rows = {f"{p}, {row}": said for p, r in results.items() for row, said in r["rows"].items()}
    headline = results[task.protocol]["headline"]
    name = f"{task.protocol}, {headline['name']}"
    return {"rows": rows, "headline": headline | {"name": name, "protocol": task.protocol}}


def predict(network: Network, batch: Batch, job: Job, head: Callable[[torch.Tensor], Any]) -> Any:
    """What ``head`` makes of BEV features (B, C, X, Y) of a batch on the device, not augmented, in
    the BEV frame of what the network learned."""
    return _predict(network, batch, job, head, [network.objective.frame(batch)])[0]


def _predict(
    network: Network,
    batch: Batch,
    job: Job,
    head: Callable[[torch.Tensor], Any],
    frames: Sequence[torch.Tensor | None],
) -> list[Any]:
    """The same in each of some BEV frames, see :meth:`Objective.frame`."""
    network.eval()
    device = batch["images"].device
    draws = draw(NO_AUGMENT, 0, 0, batch["frame"], batch["K"].shape[1])
    dtype, _ = pick_precision(job.config.run.precision, device)
    with torch.inference_mode():
        # Geometry stays in float32: half a pixel would be lost in bfloat16.
        inputs = network_inputs(batch, draws, job.config.model.image_size, 0.0)
        images, K, net, poses = inputs["images"], inputs["K"], network.bev_net, {}
        for frame in frames:  # several may be ego, whose BEV is then made once
            pose = inputs["cam_T_bev"] if frame is None else batch["cam_T_ego"] @ frame[:, None]
            poses[id(frame)] = pose
        *_, H, W = images.shape
        with torch.autocast(device.type, dtype, dtype != torch.float32):
            features = net.encode(images)  # nothing is mirrored
            found = {k: head(net.see(features, K, pose, (H, W))) for k, pose in poses.items()}
        return [found[id(frame)] for frame in frames]


def table(result: dict[str, Any]) -> str:
    """A result as text for people."""
    header = f"{where(result)}: {result['task']} IoU in per cent at probability 0.5"
    return f"{header}\n\n{as_columns(TASKS(result['task']).table(result['rows']))}"


def where(result: dict[str, Any]) -> str:
    """Of which network and frames a result is."""
    return (
        f"{result['run']} (step {result['step']}{'' if result['finished'] else ', NOT FINISHED'}) "
        f"on {result['frames']} frames of {', '.join(result['splits'])}"
    )
