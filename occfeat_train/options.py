"""Options that several commands of ``occfeat-train`` have."""

import functools
from collections.abc import Callable
from pathlib import Path

import click

from occfeat_targets.store.registry import Registry

PATH = click.Path(path_type=Path)


def names_of(registry: Registry) -> str:
    """The help of an option that names a thing of a registry."""
    return f"What to learn: {', '.join(registry.names)}, or a plug-in, package.module:Class."


def run_option(help: str) -> Callable:
    """And what the run needs to be followed."""
    run = click.option("--run-dir", "run", type=PATH, help=help)
    return lambda command: run(plugin_option(command))


def training_options(command: Callable) -> Callable:
    """Those of ``pretrain`` and ``finetune``."""
    return functools.reduce(lambda f, option: option(f), reversed(TRAINING_OPTIONS), command)


store_option = click.option(
    "--store",
    metavar="PATH|URL",
    help="Targets store (occfeat-targets build).  [default: targets.zarr, or the run's own]",
)
plugin_option = click.option(
    "--plugin",
    "plugins",
    multiple=True,
    metavar="MODULE:NAME",
    help="A plug-in that the run was made with: run its code. May be repeated.",
)
set_option = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="SECTION.KEY=VALUE",
    help="One setting, over --config; repeatable. occfeat-train settings lists all.",
)
TRAINING_OPTIONS = (
    store_option,
    click.option(
        "--config",
        metavar="FILE.yaml|PRESET",
        help="Settings: a file, or a preset by name (paper, demo, pop3d, scalr, slidr, also, "
        "lidar-demo, miniature).  [default: what the store or the pretraining run asks for, else "
        "paper]",
    ),
    set_option,
    click.option(
        "--tracker",
        type=click.Choice(["tensorboard", "trackio", "wandb"]),
        help="Where the log goes too. Short for --set run.tracker=...",
    ),
    run_option("Run directory.  [default: a new one in runs/, named by the time]"),
    click.option(
        "--resume",
        is_flag=True,
        help="Go on with --run-dir, or with the newest unfinished run of this kind in runs/.",
    ),
)
