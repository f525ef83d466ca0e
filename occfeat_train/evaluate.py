"""Evaluation of a finetuned network: IoU over a whole split, from whole-number counts."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from tqdm import tqdm

from occfeat_targets.store.schema import open_store
from occfeat_train.augment import draw, network_inputs
from occfeat_train.config import NO_AUGMENT
from occfeat_train.data import EvalSampler, FrameDataset, make_loader, select_frames
from occfeat_train.distributed import Process, pick_precision
from occfeat_train.jobs import Job, split_names, trained_network
from occfeat_train.metrics import HEADLINE, RANGES_M, THRESHOLDS, IoUCounter, iou
from occfeat_train.objectives import Network
from occfeat_train.runs import Run, RunError

_BATCH = 4


def evaluate(job: Job, run: Run, process: Process) -> dict[str, Any]:
    """IoU of a finetuned run on the evaluation split of the job's store.

    Processes take every ``world``-th frame, none twice, and their counts are summed.

    Raises:
        RunError: the run is not a finetuning, or of another grid. StoreError: nothing to
            evaluate on, or no map for a run that learned it.
    """
    if job.kind != "finetune":
        raise RunError(f"{run.path} is a pretraining: finetune it first, then evaluate that run")
    store = open_store(job.store)
    splits = split_names(job.config.data.eval_split, "val")
    frames = select_frames(store, splits, 1.0, "frame")
    network, position = trained_network(job, run, store)
    network.to(process.device)
    objective = network.objective
    loader = make_loader(
        FrameDataset(job.store, frames, ("images", *objective.eval_arrays)),
        EvalSampler(len(frames), _BATCH, process.rank, process.world),
        job.config.data.workers,
        job.config.data.start_method,
        pin_memory=process.device.type == "cuda",
    )
    counter = IoUCounter(store.grid, process.device, len(objective.classes))
    for batch in tqdm(loader, unit="batch", desc="evaluate", disable=not process.is_main):
        batch = {name: values.to(process.device) for name, values in batch.items()}
        probability = predict(network, batch, job, process.device)["mask"].float().sigmoid()
        target, visible = objective.truth(batch)
        counter.add(probability.view_as(target), target, visible)
    return {
        "run": str(run.path),
        "step": position["step"],
        "finished": position["finished"],
        "store": job.store,
        "splits": sorted({store.split(i) for i in frames}),
        "frames": len(frames),
        "fraction": job.fraction,
        "init": job.init,
        "task": job.task,
        job.task: summary(counter.counts(), objective.classes),
    }


def predict(
    network: Network,
    batch: dict[str, torch.Tensor],
    job: Job,
    device: torch.device,
    *wanted: torch.Tensor,
) -> Any:
    """What the network's head predicts of a collated batch, nothing augmented; masks as logits.

    ``wanted`` goes to the head after the BEV features: OccFeat's takes the voxels whose features
    to predict.
    """
    network.eval()
    draws = draw(NO_AUGMENT, 0, 0, batch["frame"], batch["K"].shape[1])
    dtype, _ = pick_precision(job.config.run.precision, device)
    with torch.inference_mode():
        # Geometry stays in float32: half a pixel would be lost in bfloat16.
        inputs = network_inputs(batch, draws, job.config.model.image_size, 0.0)
        seen = {name: inputs[name] for name in ("images", "K", "cam_T_bev")}  # nothing is mirrored
        with torch.autocast(device.type, dtype, dtype != torch.float32):
            return network.objective.head(network.bev_net(**seen), *wanted)


def summary(counts: torch.Tensor, classes: tuple[str, ...]) -> dict[str, Any]:
    """What is reported of :meth:`IoUCounter.counts`: IoU in per cent, None where undefined.

    One class has a row ``visible`` and a row ``all``, by which cells count. Of several classes
    each has a row for all cells, and ``mean`` is over those that are defined; its best is
    BEVFusion's mean over classes of the maximum over thresholds.
    """
    names = ("visible", "all") if len(classes) == 1 else classes
    counts = counts[0] if len(classes) == 1 else counts[:, 1]
    by_range, by_threshold = iou(counts[:, :, HEADLINE]), iou(counts.sum(dim=1))
    best, at = by_threshold.nan_to_num(-1).max(dim=1)
    best = torch.where(best < 0, torch.nan, best)
    result = {}
    for name, row, *values, i in zip(
        names, counts, by_range, by_threshold, best, at.tolist(), strict=True
    ):
        result[name] = _row(*values, None if values[-1].isnan() else THRESHOLDS[i])
        headline = row.sum(dim=0)[HEADLINE].tolist()
        result[name]["true_positive, false_positive, false_negative"] = headline
    if len(classes) > 1:
        result["mean"] = _row(*(values.nanmean(dim=0) for values in (by_range, by_threshold, best)))
    return result


def _row(
    by_range: torch.Tensor,
    by_threshold: torch.Tensor,
    best: torch.Tensor,
    best_threshold: float | None = None,
) -> dict[str, Any]:
    """One row of a summary from IoU as float64: (R,) at 0.5, (T,), and a number."""
    return {
        "iou": _percent(by_threshold[HEADLINE]),
        "by_range": dict(zip(_ring_names(), map(_percent, by_range), strict=True)),
        "by_threshold": dict(zip(map(str, THRESHOLDS), map(_percent, by_threshold), strict=True)),
        "best": {"iou": _percent(best), "threshold": best_threshold},
    }


def table(result: dict[str, Any]) -> str:
    """A result as text for people."""
    task = result["task"]
    header = (
        f"{result['run']} (step {result['step']}"
        f"{'' if result['finished'] else ', NOT FINISHED'}) on {result['frames']} frames of "
        f"{', '.join(result['splits'])}: {task} IoU in per cent at probability 0.5"
    )
    first = "cells" if task == "vehicle" else "class"
    lines = [[first, "all ranges", *_ring_names(), "best threshold"]]
    for name, values in result[task].items():
        label = "visible (as Simple-BEV)" if name == "visible" else name
        best, threshold = values["best"]["iou"], values["best"]["threshold"]
        at = "" if threshold is None else f" at {threshold}"
        cells = [values["iou"], *values["by_range"].values()]
        lines.append([label, *map(_text, cells), _text(best) + at])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    return "\n".join([header, "", *rows])


def _ring_names() -> list[str]:
    edges = [f"{edge:g}" for edge in (0, *RANGES_M)]
    inner = [f"{a}-{b} m" for a, b in pairwise(edges)]
    return [*inner, f"> {edges[-1]} m"]


def _percent(value: torch.Tensor) -> float | None:
    return None if value.isnan() else round(100 * value.item(), 2)


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
