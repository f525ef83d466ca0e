"""Where a run's numbers go besides its own log, through one hook. Nothing is loaded until asked."""

import hashlib
import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from occfeat_targets.store.settings import ConfigError


class Tracker(NamedTuple):
    """What is called with the numbers of a step, and at the end."""

    log: Callable[[int, dict[str, float]], None]
    close: Callable[[], None]


def require_tracker(name: str) -> None:
    """ConfigError: the package of ``run.tracker`` is not installed."""
    if name != "none" and importlib.util.find_spec(name) is None:
        raise ConfigError(f"run.tracker={name} needs the package: pip install {name}")


def open_tracker(name: str, directory: Path, step: int, said: dict[str, Any]) -> Tracker | None:
    """The tracker of a run that is at ``step`` and is described by ``said``; None if it is to have
    none. A resumed run goes on where it was: the directory and time of its making are its name."""
    if name == "none":
        return None
    if name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        board = SummaryWriter(str(directory), purge_step=step + 1)
        return Tracker(lambda at, values: _add_scalars(board, at, values), board.close)
    made = f"{directory.resolve()} {said.get('created')}"
    known_as = f"{directory.name}-{hashlib.sha256(made.encode()).hexdigest()[:8]}"
    module = importlib.import_module(name)
    own = {"id": known_as, "dir": str(directory)} if name == "wandb" else {}
    module.init(project="occfeat", name=known_as, config=said, resume="allow", **own)
    return Tracker(lambda at, values: module.log(values, step=at), module.finish)


def _add_scalars(board: Any, step: int, values: dict[str, float]) -> None:
    for name, value in values.items():
        board.add_scalar(name, value, step)
