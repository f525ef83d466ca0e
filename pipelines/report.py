"""What a reproduction measured beside what the paper reports: text, CSV and a figure."""

import csv
import statistics
import textwrap
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

from occfeat_pipelines.experiments import Experiment
from occfeat_train.tasks.base import as_columns, as_text


@dataclass
class Cell:
    """One number of a table; IoU in per cent."""

    row: str
    column: str
    paper: float | None = None
    """None if the paper does not say, or we could not read it."""
    teacher: str = ""
    """Whose features the row learned; empty without a pretraining."""
    protocol: str = ""
    """Under which IoU is measured."""
    ours: list[float] = field(default_factory=list)
    """One per seed that is finished."""
    texts: str = ""
    """What made the texts that it was evaluated by; empty without any."""

    @property
    def mean(self) -> float | None:
        """Over seeds, None as long as there is none."""
        return statistics.fmean(self.ours) if self.ours else None

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds (n - 1), None for fewer than two."""
        return statistics.stdev(self.ours) if len(self.ours) > 1 else None


def cells(experiments: list[Experiment], corrupted: str | None) -> list[Cell]:
    """The table: a cell per recipe and column, with the values of the seeds that are done."""
    found: dict[tuple[str, str], Cell] = {}
    for e in experiments:
        for column, value in e.scores(corrupted).items():
            paper = None if corrupted or column in e.beside else e.paper
            protocol = e.beside.get(column, e.protocol).partition(",")[0]
            cell = Cell(e.label, column, paper, e.teacher, protocol, texts=e.texts())
            cell = found.setdefault((e.recipe, column), cell)
            if value is not None:
                cell.ours.append(value)
    return [cell for cell in found.values() if cell.ours or not corrupted]


def write(table: list[Cell], path: Path) -> None:
    """Print a table, and put it beside the runs as CSV and figure."""
    print(f"{text(table)}\n\n{caption(table)}")
    if lines := paired(table):
        print(f"\n{as_columns(lines, left=4)}")
    write_csv(table, path.with_suffix(".csv"))
    draw(table, path.name, path.with_suffix(".png"))
    print(f"\n{path}.csv and .png")


def caption(table: list[Cell]) -> str:
    """Whose features the rows learned: random weights must not pass for DINOv2. Under which
    protocols IoU was measured; and by which texts, for which stand-ins must not pass."""
    said = {"teacher": {c.teacher for c in table}, "IoU protocol": {c.protocol for c in table}}
    if texts := {c.texts for c in table} - {""}:
        said["texts"] = texts
    return "; ".join(f"{k}: {', '.join(sorted(v - {''})) or 'none'}" for k, v in said.items())


def text(table: list[Cell]) -> str:
    """A line per number: the protocol of ours, the paper's, ours as mean ± standard deviation
    (seeds), difference."""
    lines = [["row", "column", "protocol", "paper", "ours", "difference"]]
    for cell in table:
        ours, difference = as_text(cell.mean), "-"
        if cell.spread is not None:
            ours += f" ± {cell.spread:.1f}"
        if cell.ours:
            ours += f" ({len(cell.ours)})"
        if cell.mean is not None and cell.paper is not None:
            difference = f"{cell.mean - cell.paper:+.1f}"
        what = [cell.row, cell.column, cell.protocol]
        lines.append([*what, as_text(cell.paper), ours, difference])
    return as_columns(lines, left=3)


def paired(table: list[Cell]) -> list[list[str]]:
    """Lines that compare rows seed by seed, which share frames and first weights: the difference in
    points of IoU, how many seeds it is above 0 for, and p of a two-sided paired t-test. Empty with
    fewer than three seeds."""
    from scipy.stats import ttest_rel

    lines = [["column", "protocol", "row", "less row", "difference", "above 0", "p"]]
    for a, b in combinations(table, 2):
        if a.column == b.column and len(a.ours) == len(b.ours) > 2:
            found = [after - before for before, after in zip(a.ours, b.ours, strict=True)]
            if not any(found):  # of what no training decides
                continue
            mean, spread = statistics.fmean(found), statistics.stdev(found)
            above = f"{sum(value > 0 for value in found)} of {len(found)}"
            p = ttest_rel(b.ours, a.ours).pvalue
            difference = f"{mean:+.1f} ± {spread:.1f}"
            lines.append([a.column, a.protocol, b.row, a.row, difference, above, f"{p:.3f}"])
    return lines if len(lines) > 1 else []


def write_csv(table: list[Cell], path: Path) -> None:
    """The same, with the value of each seed."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        heading = ["row", "column", "protocol", "paper", "mean", "std", "seeds", "values"]
        writer.writerow([*heading, "teacher"])
        for c in table:
            numbers = ["" if v is None else f"{v:.2f}" for v in (c.paper, c.mean, c.spread)]
            values = " ".join(f"{v:.2f}" for v in c.ours)
            what = [c.row, c.column, c.protocol]
            writer.writerow([*what, *numbers, len(c.ours), values, c.teacher])


def draw(table: list[Cell], title: str, path: Path) -> None:
    """Bars like the paper's Figure 1: a panel per column, a bar per row; nothing for no cell."""
    if not table:
        return
    from matplotlib.figure import Figure

    columns, rows = ([*dict.fromkeys(getattr(c, k) for c in table)] for k in ("column", "row"))
    size = (2.5 + 2.8 * len(columns), 1.4 + 0.35 * len(rows))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for cell in table:
        axis, y = axes[columns.index(cell.column)], rows.index(cell.row)
        if cell.mean is not None:
            axis.barh(y, cell.mean, color=f"C{y % 10}", alpha=0.6, xerr=cell.spread, capsize=3)
            axis.plot(cell.ours, [y] * len(cell.ours), "k.", markersize=4)
        if cell.paper is not None:
            axis.plot(cell.paper, y, "wD", markeredgecolor="black", clip_on=False)
    for axis, column in zip(axes, columns, strict=True):
        protocols = dict.fromkeys(c.protocol for c in table if c.column == column)
        label = f"IoU ({', '.join(protocols)}), %"
        axis.set(title=textwrap.fill(column, 26), xlabel=label, xlim=(0, None))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(rows)), rows)
    axes[0].invert_yaxis()
    figure.suptitle(textwrap.fill(f"{title}, {caption(table)}", int(9 * size[0])))
    figure.supxlabel("bars: mean ± standard deviation; dots: seeds; diamonds: the paper", size=8)
    figure.savefig(path, dpi=120)
