"""Recipes: one small YAML file per row of the paper's tables, and the presets they start from.

A preset (``reproduce_NAME.yaml``) says which training settings all rows start from; a recipe
(``recipes/TABLE/NN-NAME.yaml``) what its row sets over them, as ``--set`` would, and what the paper
reports.
"""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

from pydantic import Field, field_validator

from occfeat_targets.store.settings import ConfigError, Settings, did_you_mean, read_yaml
from occfeat_train.tasks import TASKS

HERE = Path(__file__).parent
TABLES = tuple(sorted(path.name for path in (HERE / "recipes").iterdir()))
"""``1`` to ``4`` are the paper's, ``c`` is nuScenes-C (its Figure 4), and
``variants`` what it leaves for later."""


class Recipe(Settings):
    """One row of a table."""

    label: str
    set: tuple[str, ...] = ()
    """Settings of both stages."""
    pretrain: tuple[str, ...] | None = None
    """More settings of the pretraining; None: there is none."""
    finetune: tuple[str, ...] = ()
    """More settings of the finetuning."""
    pretrain_store: str = ""
    """A store of ``stores.yaml`` to pretrain on; empty: the main one."""
    finetune_store: str = ""
    paper: dict[str, dict[float, float | None]] = Field(default_factory=dict)
    """Task -> label fraction -> the paper's IoU, None if it is unknown."""

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
    seeds: int = 1
    jobs: int = 1
    """Runs at the same time."""
    rows: tuple[str, ...] = ("*",)
    """Patterns of recipe names."""
    tasks: tuple[str, ...] = TASKS.names
    fractions: dict[float, float] = Field(default_factory=dict)
    """Stand-ins for the paper's label fractions; those not named stay as they are."""


def load_preset(name: str) -> Preset:
    """The preset of a name.

    Raises:
        ConfigError: there is none, or it holds something impossible.
    """
    return Preset.load(HERE / f"reproduce_{name}.yaml")


def load_recipes(table: str, rows: tuple[str, ...]) -> dict[str, Recipe]:
    """Recipes of a table by name, in its order: those that any pattern matches.

    Args:
        table: one of :data:`TABLES`.
        rows: patterns such as ``bevformer-*``; a row's number counts as its name too.

    Raises:
        ConfigError: a pattern matches nothing, or a recipe holds something impossible.
    """
    paths = sorted((HERE / "recipes" / table).glob("*.yaml"))
    numbered = [(path, *path.stem.split("-", 1)) for path in paths]
    for row in rows:
        if not any(_matches(row, number, name) for _, number, name in numbered):
            known = ", ".join(name for _, _, name in numbered)
            raise ConfigError(f"table {table} has no row {row!r}; its rows are {known}")
    return {
        name: Recipe.load(path)
        for path, number, name in numbered
        if any(_matches(row, number, name) for row in rows)
    }


def store_settings(name: str) -> tuple[str, ...]:
    """What is set over the main store's settings to build a store of ``stores.yaml``.

    Raises:
        ConfigError: it has no such store.
    """
    stores = read_yaml(HERE / "stores.yaml")
    if name not in stores:
        raise ConfigError(f"no store {name!r}; {did_you_mean(name, tuple(stores))}")
    return tuple(stores[name])


def _matches(row: str, number: str, name: str) -> bool:
    return fnmatch(name, row) or row == str(int(number))
