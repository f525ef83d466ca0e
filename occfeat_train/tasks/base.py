"""What a downstream task is: an objective that can be evaluated."""

from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from occfeat_targets.store.settings import Settings
from occfeat_train.objectives.base import Batch, Objective


class Meter(Protocol):
    """Counts over a split what a network got right by one protocol; of all processes together."""

    def add(self, batch: Batch, predicted: Any) -> None:
        """Count a batch and what :meth:`Task.predict` made of it."""

    def result(self) -> dict[str, Any]:
        """For ``result.json``, summed over all processes, which all call it: ``rows``, name to
        numbers in per cent; ``headline``, ``{"name": ..., "iou": ...}`` of the task, the IoU None
        where undefined."""
        ...


class Task(Objective):
    """Base of all tasks, found by name in ``tasks.TASKS`` (``--task``). As an objective, with
    settings from the section ``tasks.NAME``, and the following."""

    eval_arrays: tuple[str, ...]
    """The store's arrays that its meters compare with."""
    counted: str = " at probability 0.5"
    """Where a class begins to be predicted, as the end of a sentence."""
    finetuned: ClassVar[bool] = True
    """False: evaluation alone, of a pretraining whose ``zero_shot`` it is."""
    beside: ClassVar[dict[str, str]] = {}
    """Rows of a result that belong beside its headline in a table, by their names there."""
    protocols: tuple[str, ...] = ("ego",)
    """By name, the rules of what is where and what counts: it is evaluated under each."""

    @property
    def protocol(self) -> str:
        """The one that it learns and whose IoU is the one of a result."""
        return self.protocol_of(self.settings)

    @classmethod
    def protocol_of(cls, settings: Settings) -> str:
        """That of its settings; the first, if they say none."""
        return getattr(settings, "protocol", cls.protocols[0])

    def bev_frame(self, batch: Batch, protocol: str) -> Tensor | None:
        """In which BEV frame a protocol counts: ``ego_T_bev`` float32 (B, 4, 4) on the device, or
        None, ego itself. In training, of a batch that has ``seed``, that may be a random one."""
        return None

    def frame(self, batch: Batch) -> Tensor | None:
        """That of the protocol it learns."""
        return self.bev_frame(batch, self.protocol)

    def predict(self, bev: Tensor) -> Any:
        """What its head makes of BEV features (B, C, X, Y) that nothing augmented."""
        return self.head(bev)

    def meter(self, device: torch.device, protocol: str) -> Meter:
        """A meter that has counted nothing, for predictions in the protocol's BEV frame."""
        raise NotImplementedError

    def remarks(self) -> dict[str, Any]:
        """What else a result must say."""
        return {}

    @classmethod
    def table(cls, rows: dict[str, Any]) -> list[list[str]]:
        """``rows`` of a result, named ``PROTOCOL, ROW``, as lines of cells for people, the first
        the heading."""
        raise NotImplementedError


def as_columns(lines: list[list[str]], left: int = 1) -> str:
    """Cells (the first line is the heading) as a table: the first ``left`` columns to the left."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = [
        [cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(pairs)]
        for pairs in (zip(line, widths, strict=True) for line in lines)
    ]
    return "\n".join("  ".join(row) for row in rows)


def as_text(value: float | None) -> str:
    """A number in per cent for people."""
    return "-" if value is None else f"{value:.1f}"
