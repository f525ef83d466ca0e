"""Runs side by side: which differ in their seed alone, what they measured, how others differ."""

import json
import statistics
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

from occfeat_targets.store.settings import differences
from occfeat_train.runs.run import Run, RunError
from occfeat_train.tasks.base import as_text

_ASKED = ("kind", "task", "fraction", "fraction_unit", "config", "store_identity")


@dataclass
class Group:
    """Runs that were asked the same, but for their seed."""

    asked: dict[str, Any]
    """Of their ``run.json``, without the seed; ``init`` is likewise of the run started from."""
    runs: list[Run] = field(default_factory=list)
    label: str = ""
    """What their names have in common."""

    @property
    def kind(self) -> str:
        """``pretrain`` or ``finetune``."""
        return self.asked["kind"]

    @property
    def learns(self) -> str:
        """For people, such as ``occfeat pretraining``."""
        if self.asked["task"]:
            return f"{self.asked['task']} finetuning"
        return f"{self.asked['config']['pretrain']['objective']} pretraining"

    def results(self) -> dict[Run, dict[str, Any]]:
        """``result.json`` of the runs that were evaluated, since it names protocols."""
        paths = {run: run.path / "result.json" for run in self.runs}
        found = {run: json.loads(p.read_text()) for run, p in paths.items() if p.exists()}
        return {run: said for run, said in found.items() if "protocol" in said["headline"]}


def collect(paths: Sequence[Path]) -> list[Group]:
    """The runs of directories, and those they started from, if they are still there, in groups:
    pretrainings first. RunError: one of ``paths`` is no run."""
    runs = [Run(path) for path in paths]
    started_from = [Run(Path(init)) for run in runs if (init := run.description()["init"])]
    for run in started_from:
        with suppress(RunError):
            run.description()
            runs.append(run)
    runs = list({run.path.resolve(): run for run in reversed(runs)}.values())[::-1]
    groups: dict[str, Group] = {}
    for run in runs:
        asked = _asked(run)
        group = groups.setdefault(json.dumps(asked, sort_keys=True), Group(asked))
        group.runs.append(run)
    found = sorted(groups.values(), key=lambda group: group.kind != "pretrain")
    _name(found)
    for group in found:
        init = group.asked["init"]
        key = json.dumps(init, sort_keys=True)
        group.asked["init"] = groups[key].label if key in groups else str(init or "none")
    return found


def seed_of(run: Run) -> int:
    """Of a run."""
    return run.description()["config"]["run"]["seed"]


def _asked(run: Run) -> dict[str, Any]:
    said = run.description()
    asked = {key: said[key] for key in _ASKED}
    asked["config"]["run"].pop("seed")
    asked["init"] = said["init"]
    with suppress(RunError):
        asked["init"] = said["init"] and _asked(Run(Path(said["init"])))
    return asked


def _name(groups: list[Group]) -> None:
    """Labels: the beginning that the names of a group share, or the first name if not unique."""
    for group in groups:
        names = [run.path.name for run in group.runs]
        shared = _shared_start(names).rstrip("0123456789").rstrip("-_.")
        group.label = shared if len(names) > 1 and shared else names[0]
    labels = [group.label for group in groups]
    for group in groups:
        if labels.count(group.label) > 1:
            group.label = group.runs[0].path.name


def _shared_start(names: list[str]) -> str:
    same = takewhile(lambda letters: len({*letters}) == 1, zip(*names, strict=False))
    return "".join(letters[0] for letters in same)


def log_of(run: Run) -> list[dict[str, Any]]:
    """The lines of a run's log that are whole."""
    lines: list[dict[str, Any]] = []
    with suppress(OSError):
        for line in (run.path / "log.jsonl").read_text(errors="replace").splitlines():
            with suppress(ValueError):
                lines.append(json.loads(line))
    return lines


def result_table(groups: list[Group]) -> list[list[str]]:
    """A line for each group of finetunings, or of what was evaluated without one, the first the
    heading: what it was, and its IoU over seeds with the protocol as ``evaluate`` says it."""
    heading = ["runs", "starts from", "share of labels", "IoU, %", "by seed", "protocol"]
    lines = []
    for group in groups:
        asked, results = group.asked, group.results()
        if group.kind == "pretrain" and not results:
            continue
        values = {seed_of(run): result["headline"]["iou"] for run, result in results.items()}
        known = [value for value in values.values() if value is not None]
        mean = as_text(statistics.fmean(known) if known else None)
        if len(known) > 1:
            mean += f" ± {statistics.stdev(known):.1f}"
        by_seed = ", ".join(f"{as_text(value)} (seed {seed})" for seed, value in values.items())
        protocols = dict.fromkeys(map(_protocol, results.values()))
        share = f"{100 * asked['fraction']:g} % of {asked['fraction_unit']}s"
        share = share if group.kind == "finetune" else "none"
        said = (
            "; ".join(protocols)
            or f"not evaluated: occfeat-train evaluate --run-dir {group.runs[0].path}"
        )
        lines.append([group.label, asked["init"], share, mean, by_seed, said])
    return [heading, *lines] if lines else []


def _protocol(result: dict[str, Any]) -> str:
    unfinished = "" if result["finished"] else f", NOT FINISHED: step {result['step']}"
    counted = result.get("counted", " at probability 0.5")  # older results have no other
    return (
        f"{result['task']} IoU{counted}, {result['headline']['name']}, "
        f"{result['frames']} frames of {', '.join(result['splits'])}{unfinished}"
    )


def settings_apart(groups: list[Group]) -> dict[str, list[str]]:
    """By ``A and B``, how the settings of B differ from those of A, the first group that learns the
    same; or the first of its kind."""
    apart: dict[str, list[str]] = {}
    for i, group in enumerate(groups):
        before = [other for other in groups[:i] if other.kind == group.kind]
        same = [other for other in before if other.learns == group.learns]
        for first in (same or before)[:1]:
            lines = differences(first.asked, group.asked)
            apart[f"{first.label} → {group.label}"] = lines
    return apart
