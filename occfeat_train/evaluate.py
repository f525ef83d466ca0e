"""Evaluation of a finetuned network: IoU over a whole split, from whole-number counts."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from tqdm import tqdm

from occfeat_targets.schema import open_store
from occfeat_train import runs
from occfeat_train.augment import draw, network_inputs
from occfeat_train.config import NO_AUGMENT
from occfeat_train.data import EvalSampler, FrameDataset, make_loader, select_frames
from occfeat_train.distributed import Process, pick_precision
from occfeat_train.jobs import Job, build_network, require_same_tensors, split_names
from occfeat_train.metrics import HEADLINE, RANGES_M, THRESHOLDS, IoUCounter, iou
from occfeat_train.objectives import Network
from occfeat_train.runs import Run, RunError

_BATCH = 4


def evaluate(job: Job, run: Run, process: Process) -> dict[str, Any]:
    """IoU of a finetuned run on the evaluation split of the job's store.

    Processes take every ``world``-th frame, none twice, and their counts are summed.

    Raises:
        RunError: the run is not a finetuning, or of another grid. StoreError: nothing to
            evaluate on.
    """
    if job.kind != "finetune":
        raise RunError(f"{run.path} is a pretraining: finetune it first, then evaluate that run")
    store = open_store(job.store)
    runs.check_same_grid(run, store)
    splits = split_names(job.config.data.eval_split, "val")
    frames = select_frames(store, splits, 1.0, "frame")
    network = build_network(job, store, load_weights=False)[0].to(process.device)
    state, position = run.load()
    require_same_tensors(network.state_dict(), state["network"], str(run.path))
    network.load_state_dict(state["network"])
    loader = make_loader(
        FrameDataset(job.store, frames, ("images", "vehicle", "vehicle_visible")),
        EvalSampler(len(frames), _BATCH, process.rank, process.world),
        job.config.data.workers,
        job.config.data.start_method,
        pin_memory=process.device.type == "cuda",
    )
    counter = IoUCounter(store.grid, process.device)
    for batch in tqdm(loader, unit="batch", desc="evaluate", disable=not process.is_main):
        batch = {name: values.to(process.device) for name, values in batch.items()}
        probability = predict(network, batch, job, process.device)
        counter.add(probability, batch["vehicle"], batch["vehicle_visible"])
    return {
        "run": str(run.path),
        "step": position["step"],
        "finished": position["finished"],
        "store": job.store,
        "splits": sorted({store.split(i) for i in frames}),
        "frames": len(frames),
        "fraction": job.fraction,
        "init": job.init,
        "vehicle": summary(counter.counts()),
    }


def predict(
    network: Network, batch: dict[str, torch.Tensor], job: Job, device: torch.device
) -> torch.Tensor:
    """Vehicle probabilities (B, X, Y), float32, of a collated batch; nothing augmented."""
    network.eval()
    draws = draw(NO_AUGMENT, 0, 0, batch["frame"], batch["K"].shape[1])
    dtype, _ = pick_precision(job.config.run.precision, device)
    with torch.inference_mode():
        # Geometry stays in float32: half a pixel would be lost in bfloat16.
        inputs = network_inputs(batch, draws, job.config.model.image_size, 0.0)
        seen = {name: inputs[name] for name in ("images", "K", "cam_T_bev")}  # nothing is mirrored
        with torch.autocast(device.type, dtype, dtype != torch.float32):
            predicted = network.objective.head(network.bev_net(**seen))
    return predicted["mask"].float().sigmoid()


def summary(counts: torch.Tensor) -> dict[str, Any]:
    """What is reported of :meth:`IoUCounter.counts`: IoU in per cent (None where undefined)."""
    result: dict[str, Any] = {}
    for name, cells in zip(("visible", "all"), counts, strict=True):
        rings = _ring_names()
        result[name] = {
            "iou": _percent(cells.sum(0)[HEADLINE]),
            "by_range": {r: _percent(c[HEADLINE]) for r, c in zip(rings, cells, strict=True)},
            "by_threshold": {
                str(t): _percent(c) for t, c in zip(THRESHOLDS, cells.sum(0), strict=True)
            },
            "true_positive, false_positive, false_negative": cells.sum(0)[HEADLINE].tolist(),
        }
    return result


def table(result: dict[str, Any]) -> str:
    """A result as text for people."""
    header = (
        f"{result['run']} (step {result['step']}"
        f"{'' if result['finished'] else ', NOT FINISHED'}) on {result['frames']} frames of "
        f"{', '.join(result['splits'])}: vehicle IoU in per cent at probability 0.5"
    )
    columns = ["cells", "all ranges", *_ring_names(), "best threshold"]
    lines = [columns]
    labels = {"visible": "visible (as Simple-BEV)", "all": "all"}
    for name, label in labels.items():
        values = result["vehicle"][name]
        threshold, best = max(
            values["by_threshold"].items(), key=lambda item: item[1] if item[1] is not None else -1
        )
        cells = [values["iou"], *values["by_range"].values()]
        lines.append([label, *map(_text, cells), f"{_text(best)} at {threshold}"])
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
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


def _percent(counts: torch.Tensor) -> float | None:
    value = iou(counts).item()
    return None if value != value else round(100 * value, 2)


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
