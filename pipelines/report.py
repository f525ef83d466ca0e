"""What a reproduction measured beside what the paper reports: text, CSV and a figure."""

from __future__ import annotations

import csv
import io
import statistics
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Cell:
    """One number of a table."""

    row: str
    column: str
    paper: float | None
    """In per cent, like all IoU here; None if the paper does not say, or we could not read it."""
    ours: tuple[float, ...]
    """One per seed that is finished."""

    @property
    def mean(self) -> float | None:
        """Over seeds, None as long as there is none."""
        return statistics.fmean(self.ours) if self.ours else None

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds (n - 1), None for fewer than two."""
        return statistics.stdev(self.ours) if len(self.ours) > 1 else None


def as_text(cells: list[Cell]) -> str:
    """A line per number: the paper's, ours as mean ± standard deviation (seeds), difference."""
    lines = [("row", "column", "paper", "ours", "difference")]
    for cell in cells:
        ours = "-" if cell.mean is None else f"{cell.mean:.1f}"
        if cell.spread is not None:
            ours += f" ± {cell.spread:.1f}"
        if cell.ours:
            ours += f" ({len(cell.ours)})"
        paper = "-" if cell.paper is None else f"{cell.paper:.1f}"
        both = cell.mean is not None and cell.paper is not None
        difference = f"{cell.mean - cell.paper:+.1f}" if both else "-"
        lines.append((cell.row, cell.column, paper, ours, difference))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    justify = (str.ljust, str.ljust, str.rjust, str.rjust, str.rjust)
    rows = [
        "  ".join(f(text, w) for f, text, w in zip(justify, line, widths, strict=True)).rstrip()
        for line in lines
    ]
    return "\n".join(rows)


def as_csv(cells: list[Cell]) -> str:
    """The same, with the value of each seed."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["row", "column", "paper", "mean", "std", "seeds", "values"])
    for c in cells:
        numbers = ["" if v is None else f"{v:.2f}" for v in (c.paper, c.mean, c.spread)]
        values = " ".join(f"{v:.2f}" for v in c.ours)
        writer.writerow([c.row, c.column, *numbers, len(c.ours), values])
    return out.getvalue()


def draw(cells: list[Cell], title: str, path: Path) -> None:
    """Bars like the paper's Figure 1: a panel per column, a bar per row.

    Bars are means over seeds with their standard deviation, dots the seeds; diamonds are the
    paper's numbers. Nothing is drawn without any cell.
    """
    if not cells:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    columns = list(dict.fromkeys(cell.column for cell in cells))
    rows = list(dict.fromkeys(cell.row for cell in cells))
    height = 1.4 + 0.35 * len(rows)
    figure, axes = plt.subplots(
        1, len(columns), figsize=(2.5 + 2.8 * len(columns), height), sharey=True, squeeze=False
    )
    colours = plt.get_cmap("tab10")(np.arange(len(rows)) % 10)
    for axis, column in zip(axes[0], columns, strict=True):
        for cell in (c for c in cells if c.column == column):
            y = rows.index(cell.row)
            if cell.mean is not None:
                axis.barh(y, cell.mean, color=colours[y], alpha=0.6, xerr=cell.spread, capsize=3)
                axis.plot(cell.ours, [y] * len(cell.ours), "k.", markersize=4)
            if cell.paper is not None:
                axis.plot(cell.paper, y, "wD", markeredgecolor="black", clip_on=False)
        axis.set_title(column, fontsize=10)
        axis.set_xlabel("IoU, %")
        axis.set_xlim(left=0)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_yticks(range(len(rows)), rows)
    axes[0, 0].invert_yaxis()
    figure.suptitle(title, fontsize=11)
    figure.supxlabel(
        "bars: mean ± standard deviation; dots: seeds; diamonds: the paper", fontsize=8
    )
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
