"""``occfeat-train report``: what several runs learned, in one HTML file."""

import importlib.util
from collections.abc import Collection, Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any

import torch

from occfeat_targets.store.files import StoreError
from occfeat_targets.store.registry import only_plugins
from occfeat_targets.store.settings import ConfigError
from occfeat_train.evaluate import table
from occfeat_train.report.groups import (
    Group,
    collect,
    log_of,
    result_table,
    seed_of,
    settings_apart,
)
from occfeat_train.report.page import Page
from occfeat_train.report.pictures import Frame, chosen_frames, show_frame
from occfeat_train.runs.job import Job
from occfeat_train.runs.run import Run, RunError, replace
from occfeat_train.view import Viewer, require_place

_COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2")
_HOW = ("epoch", "lr", "gradient_norm", "seconds", "waited", "samples_per_second", "peak_memory_gb")
"""Numbers of the log that say how it ran, not what was learned."""
How = tuple[str | None, int, torch.device, Collection[str]]
"""What pictures are of and how they are made: the arguments of ``write_report`` after ``out``."""


def write_report(
    paths: Sequence[Path],
    out: Path,
    store: str | None,
    n_frames: int,
    device: torch.device,
    plugins: Collection[str] = (),
) -> str:
    """Write the report of runs; returns a sentence about it. Pictures are of ``n_frames`` frames of
    ``store``, or of the runs' own. RunError: one is no run, or ``out`` can't be written;
    ConfigError: plotly is not installed, or a result is of a plug-in that is not among ``plugins``.
    What can't be drawn, since a store or checkpoint is gone or for such a plug-in, is said in the
    report."""
    require_place(out)
    if importlib.util.find_spec("plotly") is None:
        raise ConfigError("a report needs plotly: pip install 'occfeat[report]'")
    groups = collect(paths)
    page = Page(f"occfeat: {sum(len(group.runs) for group in groups)} runs")
    _summary(page, groups, plugins)
    _curves(page, groups)
    _pictures(page, groups, (store, n_frames, device, plugins))
    text = page.html()
    replace(out, lambda part: part.write_text(text, encoding="utf-8"))
    return f"{out}: {sum(len(g.runs) for g in groups)} runs, {len(text) / 1e6:.1f} MB"


def _summary(page: Page, groups: list[Group], plugins: Collection[str]) -> None:
    page.heading("Results")
    if lines := result_table(groups):
        page.text("Mean over seeds ± standard deviation (n - 1).")
        page.table(lines)
        texts = []
        for run, result in (item for group in groups for item in group.results().items()):
            with only_plugins(str(run.path), plugins):
                texts.append(table(result))
        page.pre(texts, "By range and threshold, each run")
    else:
        page.text("None of the runs is a finetuning or was evaluated, so there is no IoU.")
    page.heading("Runs")
    lines = [["runs", "learns", "starts from", "seeds", "directories"]]
    for group in groups:
        seeds = ", ".join(str(seed_of(run)) for run in group.runs)
        where = ", ".join(str(run.path) for run in group.runs)
        lines.append([group.label, group.learns, group.asked["init"], seeds, where])
    page.table(lines)
    if apart := settings_apart(groups):
        page.text("Settings that differ, from the first runs that learn the same:")
        page.table(
            [["from → to", "setting: from -> to"], *([k, "; ".join(v)] for k, v in apart.items())]
        )


def _curves(page: Page, groups: list[Group]) -> None:
    """A figure for each number of the log of what learns the same."""
    for learns in dict.fromkeys(group.learns for group in groups):
        same = [group for group in groups if group.learns == learns]
        logs = {run.path: log_of(run) for group in same for run in group.runs}
        names = dict.fromkeys(name for log in logs.values() for line in log for name in line)
        figures = {name: _curve(name, same, logs) for name in names if name not in ("step", *_HOW)}
        page.heading(f"{learns}: curves")
        page.plots(figures) if figures else page.text("Nothing was logged yet.")


def _curve(name: str, groups: list[Group], logs: dict[Path, list[dict[str, Any]]]) -> Any:
    """One number over the steps: a colour for each group, a line for each seed."""
    from plotly.graph_objects import Figure, Scatter

    figure = Figure(layout={"template": "none", "margin": dict(l=50, r=10, t=10, b=40)})
    for g, group in enumerate(groups):
        for n, run in enumerate(group.runs):
            lines = [line for line in logs[run.path] if name in line]
            figure.add_trace(
                Scatter(
                    x=[line["step"] for line in lines],
                    y=[line[name] for line in lines],
                    name="<br>".join(wrap(group.label, 40)),  # a phone is as wide
                    legendgroup=group.label,
                    showlegend=n == 0,
                    mode="lines",
                    line={"color": _COLOURS[g % len(_COLOURS)], "width": 1.5},
                    hovertemplate=f"seed {seed_of(run)}, step %{{x}}: %{{y:.4g}}",
                )
            )
    figure.update_layout(
        xaxis={"title": {"text": "step", "standoff": 4}},
        legend={"orientation": "h", "y": -0.25, "yanchor": "top", "font": {"size": 11}},
    )
    return figure


def _pictures(page: Page, groups: list[Group], how: How) -> None:
    """Frames of each store, as the first run of each group that can be drawn sees them."""
    page.heading("Frames")
    frames: dict[tuple[str, int], Frame] = {}
    for group in groups:
        run = next((run for run in group.runs if run.checkpoints()), group.runs[0])
        try:
            _look(frames, run, f"{group.label} (seed {seed_of(run)})", how)
        except (RunError, StoreError, ConfigError) as error:
            page.text(f"No pictures of {group.label}: {error}", note=True)
    page.text(
        "From above, forward is up and left is left. One colour scale from 0 (black) to 1 for what "
        "is a probability; features have the same colours everywhere."
    )
    for frame in frames.values():
        page.heading(frame.title, 3)
        page.images("cameras", frame.cameras)
        for title, uris in frame.maps.items():
            page.heading(title, 3)
            page.images("maps", uris)
    if frames:
        first = next(iter(frames.values()))
        page.heading("Voxels, to turn")
        page.text(f"{first.title}. Drag to turn, pinch or scroll to come nearer.")
        page.plots({"Choose what is shown at the top left": _volume_figure(first)}, tall=True)


def _look(frames: dict[tuple[str, int], Frame], run: Run, label: str, how: How) -> None:
    """Add what a run sees to the frames of its store."""
    url, n_frames, device, plugins = how
    viewer = Viewer(Job.of_run(run, url, plugins), run, device)
    for i in chosen_frames(viewer, n_frames):
        key = (viewer.job.store, i)
        if key not in frames:
            frames[key] = show_frame(viewer.store, i)
        frames[key].add(label, viewer.look(i), viewer.store.grid)


def _volume_figure(frame: Frame) -> Any:
    """The voxels of a frame: what is true, and what each run predicts, one at a time."""
    from plotly.graph_objects import Figure, Scatter3d

    labels, n = [*frame.volumes], len(frame.volumes)
    figure = Figure(layout={"template": "none", "margin": dict(l=0, r=0, t=70, b=0)})
    for k, (_, trace) in enumerate(frame.volumes.values()):
        figure.add_trace(trace.update(visible=k == 0))
    ego = {"color": "#1090ff", "width": 8}
    figure.add_trace(Scatter3d(x=[0, 5], y=[0, 0], z=[0, 0], mode="lines", line=ego, name="ego"))
    buttons = [
        {
            "label": label,
            "method": "update",
            "args": [{"visible": [j == k for j in range(n)] + [True]}, {"title.text": text}],
        }
        for k, (label, text) in enumerate((key, frame.volumes[key][0]) for key in labels)
    ]
    axis = {"showspikes": False}
    figure.update_layout(
        title={"text": frame.volumes["target"][0], "font": {"size": 12}, "x": 0.02, "y": 0.985},
        updatemenus=[
            {"buttons": buttons, "x": 0, "y": 1.0, "xanchor": "left", "yanchor": "bottom"}
        ],
        scene={
            "aspectmode": "data",
            "xaxis": axis | {"title": {"text": "x, forward (m)"}},
            "yaxis": axis | {"title": {"text": "y, left (m)"}},
            "zaxis": axis | {"title": {"text": "z"}},
            "camera": {"eye": {"x": -1.6, "y": -1.0, "z": 1.4}},
        },
        showlegend=False,
    )
    return figure
