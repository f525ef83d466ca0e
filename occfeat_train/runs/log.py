"""What a run says while it runs: a progress bar, one JSON line per logged step, a tracker."""

import json
import math
from pathlib import Path

from tqdm import tqdm

from occfeat_train.runs.run import Run, replace, writing
from occfeat_train.runs.trackers import open_tracker


class RunLog:
    """The log of one run; on processes other than the main one it is silent."""

    def __init__(self, directory: Path, active: bool, total: int, step: int, tracker: str):
        """Start, or go on at ``step``: lines after it, of a killed run, are dropped."""
        self.active = active
        self.path = Path(directory) / "log.jsonl"
        self.tracker = None
        if active:
            self._go_on(step, tracker)
        looks = {"unit": "step", "dynamic_ncols": True, "disable": not active}
        self.bar = tqdm(total=total, initial=step, **looks)

    def _go_on(self, step: int, tracker: str) -> None:
        text = self.path.read_text(errors="replace") if self.path.exists() else ""
        lines = text.splitlines(keepends=True)
        kept = [line for line in lines if _step(line) <= step]
        replace(self.path, lambda part: part.write_text("".join(kept)))
        said = Run(self.path.parent).description() if tracker != "none" else {}
        self.tracker = open_tracker(tracker, self.path.parent, step, said)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Log one step's numbers."""
        if not self.active:
            return
        # Gradients may overflow in float16, and JSON has no infinity.
        plain = {k: v if math.isfinite(v) else None for k, v in values.items()}
        with writing(self.path), self.path.open("a") as file:
            file.write(json.dumps({"step": step, **plain}) + "\n")
        if self.tracker:
            self.tracker.log(step, values)

    def show(self, done: int, of: int, losses: dict[str, float]) -> None:
        """Move the bar by a step, of an epoch after ``done`` others; ``losses`` it shows if any."""
        self.bar.set_description(f"epoch {done + 1}/{of}", refresh=False)
        self.bar.update()
        if losses:
            self.bar.set_postfix({k: f"{v:.4g}" for k, v in losses.items()})

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if self.active:
            tqdm.write(text)

    def close(self) -> None:
        """End the bar and the tracker."""
        self.bar.close()
        if self.tracker:
            self.tracker.close()


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")  # the half-written line of a killed run
