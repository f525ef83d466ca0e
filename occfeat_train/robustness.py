"""Evaluation on corrupted images (nuScenes-C): IoU by corruption and severity, and what remains.

RoboBEV's resilience rate with IoU in place of its NDS: RR = sum of the IoU of the three severities
/ (3 · clean IoU), mRR = its mean over the corruptions. The paper gives the mean IoU alone.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from occfeat_targets.store.files import StoreError, absolute, filesystem
from occfeat_targets.store.reader import TargetStore, open_store
from occfeat_targets.store.schema import CORRUPTIONS, SEVERITIES
from occfeat_targets.store.settings import differences
from occfeat_train.data.order import select_frames, split_names
from occfeat_train.distributed import Process
from occfeat_train.evaluate import evaluate, where
from occfeat_train.runs.job import Job
from occfeat_train.runs.run import Run
from occfeat_train.tasks.base import as_columns, as_text

Scores = dict[str, dict[str, float | None]]
"""Corruption to severity to IoU, per cent."""


def evaluate_corrupted(
    job: Job, run: Run, process: Process, folder: str, say: Callable[[str], None]
) -> dict[str, Any]:
    """IoU of a finetuned run on the job's store and on corrupted ones of the same frames.

    ``folder`` is the directory or URL of the latter (``occfeat-targets corrupt``); ``say`` gets a
    line before each store.

    Returns for ``corrupted.json``: ``clean`` (the clean store's result), ``iou`` (corruption and
    severity to IoU in per cent), ``mean`` and ``RR`` (per cent) of complete corruptions, ``mRR``
    over those, ``missing`` (corruptions, or single severities of them).

    Raises RunError and StoreError as :func:`evaluate`; or a store is not of the clean one's frames.
    """
    folder = absolute(folder)
    found = find_corrupted(folder)
    clean = open_store(job.store)
    for store in found.values():  # all before the first hour is spent
        _require_same_frames(store, clean, job.config.data.eval_split)
    say(f"clean: {job.store}")
    result = evaluate(job, run, process)
    scores: Scores = {}
    for name, store in found.items():
        say(f"{name}: {store.url}")
        corruption, _, severity = name.partition("-")
        corrupted = evaluate(replace(job, store=store.url), run, process)
        scores.setdefault(corruption, {})[severity] = headline(corrupted)
    return {"clean": result, "corrupted": folder} | summary(headline(result), scores)


def find_corrupted(folder: str) -> dict[str, TargetStore]:
    """The finished stores of corrupted images in a folder by what their settings say they are.

    In the order of ``CORRUPTIONS``, then ``SEVERITIES``. Unfinished ones are left out. Raises
    StoreError: there are none, or two of the same corruption, or something is no store.
    """
    fs, path = filesystem(folder)
    paths = fs.ls(path, detail=False) if fs.exists(path) else []
    found: dict[str, TargetStore] = {}
    for path in sorted(path for path in paths if path.endswith(".zarr")):
        url = absolute(fs.unstrip_protocol(path))
        store = open_store(url, allow_incomplete=True)
        name = store.attrs["config"]["images"].get("corruption", "none")
        if name == "none" or not store.attrs["complete"]:
            continue
        if name in found:
            raise StoreError(f"{found[name].url} and {url} are both of {name}: move one away")
        found[name] = store
    if not found:
        how = f"make them with occfeat-targets corrupt DATAROOT STORE {folder}"
        raise StoreError(f"{folder} holds no finished stores of corrupted images: {how}")
    order = [f"{corruption}-{severity}" for corruption in CORRUPTIONS for severity in SEVERITIES]
    return {name: found[name] for name in order if name in found}


def headline(result: dict[str, Any]) -> float | None:
    """The one IoU of a result, in per cent."""
    return result["headline"]["iou"]


def summary(clean: float | None, scores: Scores) -> dict[str, Any]:
    """Mean IoU and RR by corruption, and mRR, in per cent as ``clean`` is; None where undefined.
    Corruptions that lack a severity have no mean and do not count in mRR."""
    means, rates = {}, {}
    for corruption, by_severity in scores.items():
        values = [v for s in SEVERITIES if (v := by_severity.get(s)) is not None]
        if len(values) < len(SEVERITIES):
            continue
        means[corruption] = round(sum(values) / len(values), 2)
        if clean:
            rates[corruption] = round(100 * sum(values) / (len(values) * clean), 2)
    missing = []
    for corruption in CORRUPTIONS:
        absent = [s for s in SEVERITIES if s not in scores.get(corruption, {})]
        all_absent = len(absent) == len(SEVERITIES)
        missing += [corruption] if all_absent else [f"{corruption}-{s}" for s in absent]
    return {
        "iou": scores,
        "mean": means,
        "RR": rates,
        "mRR": round(sum(rates.values()) / len(rates), 2) if rates else None,
        "missing": missing,
    }


def table(result: dict[str, Any]) -> str:
    """A result as text for people."""
    clean = result["clean"]
    said = f"{where(clean)}: {clean['task']} IoU, {clean['headline']['name']}, in per cent at "
    heading = ["", *SEVERITIES, "mean", "RR"]
    cells = [heading, ["clean", *[""] * len(SEVERITIES), as_text(headline(clean)), ""]]
    for corruption, by_severity in result["iou"].items():
        row = [by_severity.get(severity) for severity in SEVERITIES]
        row += [result["mean"].get(corruption), result["RR"].get(corruption)]
        cells.append([corruption, *map(as_text, row)])
    mean = f"mRR over {len(result['RR'])} of {len(CORRUPTIONS)} corruptions: "
    lines = [said + "probability 0.5", "", as_columns(cells), mean + as_text(result["mRR"])]
    if result["missing"]:
        lines.append(f"missing: {', '.join(result['missing'])}")
    return "\n".join(lines)


def _require_same_frames(store: TargetStore, clean: TargetStore, eval_split: str) -> None:
    splits = split_names(eval_split, "val")
    tokens = [[s.token(i) for i in select_frames(s, splits)] for s in (store, clean)]
    if tokens[0] != tokens[1]:
        raise StoreError(
            f"{store.url} has {len(tokens[0])} frames of {', '.join(splits)}, {clean.url} "
            f"{len(tokens[1])}, and not the same: make it from that store with occfeat-targets "
            "corrupt, or name the one it was made from with --store"
        )
    # Another size or quality would pass for an effect of the corruption.
    images = [s.attrs["config"]["images"] for s in (clean, store)]
    ours, theirs = ({key: made[key] for key in ("size", "quality")} for made in images)
    if changed := differences(ours, theirs):
        raise StoreError(f"{store.url} has other images than {clean.url}: {'; '.join(changed)}")
