"""Recipes: one small YAML file per row of the paper's tables, and the presets they start from.

A preset (``reproduce_NAME.yaml``) says which training settings all rows start from; a recipe
(``recipes/TABLE/NN-NAME.yaml``) what its row sets over them, as ``--set`` would, and what the paper
reports.
"""

from fnmatch import fnmatch
from pathlib import Path

from pydantic import Field, field_validator

from occfeat_targets.store.settings import ConfigError, Settings
from occfeat_train.tasks import TASKS

HERE = Path(__file__).parent
TABLES = tuple(sorted(path.name for path in (HERE / "recipes").iterdir()))
"""``1`` to ``4`` are the paper's, ``c`` is nuScenes-C (its Figure 4), and
``variants`` what it leaves for later; the others are of the methods around it."""
PRESETS = sorted(path.stem.removeprefix("reproduce_") for path in HERE.glob("reproduce_*.yaml"))


class Recipe(Settings):
    """One row of a table."""

    label: str
    set: tuple[str, ...] = ()
    """Settings of both stages."""
    pretrain: tuple[str, ...] | None = None
    """More settings of the pretraining; None: there is none."""
    finetune: tuple[str, ...] = ()
    """More settings of the finetuning."""
    finetune_by_fraction: dict[float, tuple[str, ...]] = Field(default_factory=dict)
    """Still more, by label fraction."""
    pretrain_store: str = ""
    """A store of ``stores.yaml`` to pretrain on; empty: the main one."""
    finetune_store: str = ""
    paper: dict[str, dict[float, float | None]] = Field(default_factory=dict)
    """Task -> label fraction -> the paper's IoU, None if it is unknown. Of a task that nothing is
    finetuned for, the pretraining is evaluated, and the fraction is 1."""

    @field_validator("paper")
    @classmethod
    def _by_task(cls, paper: dict[str, dict]) -> dict[str, dict]:
        for task in paper:
            TASKS(task)
        return paper


class Preset(Settings):
    """What all rows have in common, and which of them there are."""

    targets: str = "nuscenes"
    """The preset of ``occfeat_targets`` that its store is built with."""
    train: str = "paper"
    """The preset of ``occfeat_train`` that rows start from."""
    store: str = "targets.zarr"
    texts: str = ""
    """File of ``occfeat-targets text``, for what is evaluated by words."""
    seeds: int = 1
    jobs: int = 1
    """Runs at the same time."""
    rows: tuple[str, ...] = ("*",)
    """Patterns of recipe names."""
    tasks: tuple[str, ...] = TASKS.names
    fractions: dict[float, float] = Field(default_factory=dict)
    """Stand-ins for the paper's label fractions; those not named stay as they are."""


def load_recipes(table: str, rows: tuple[str, ...]) -> dict[str, Recipe]:
    """Recipes of a table by name, in its order: those that any of ``rows`` names, by number or by a
    pattern such as ``bevformer-*``.

    Raises:
        ConfigError: there is none of that name, or a recipe holds something impossible.
    """
    names = {p: p.stem.partition("-")[2] for p in sorted((HERE / "recipes" / table).iterdir())}
    chosen: set[Path] = set()
    for row in rows:
        found = {p for p in names if fnmatch(names[p], row) or p.name.startswith(f"{row:0>2}-")}
        if not found:
            known = ", ".join(names.values())
            raise ConfigError(f"table {table} has no row {row!r}; its rows are {known}")
        chosen |= found
    return {name: Recipe.load(path) for path, name in names.items() if path in chosen}
