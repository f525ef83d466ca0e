"""Arguments and options that several commands of ``occfeat-targets`` have."""

import functools
from collections.abc import Callable
from pathlib import Path

import click

EXIT_SKIPPED = 3
"""The store is finished, but some frames were left out (``--on-error skip``)."""
PATH = click.Path(path_type=Path)
dataroot_argument = click.argument("dataroot", type=PATH)
store_argument = click.argument("store")


def together(*options: Callable) -> Callable:
    """Several options as one decorator."""
    return lambda command: functools.reduce(lambda f, option: option(f), reversed(options), command)


settings_options = together(
    click.option(
        "--version",
        help="Dataset version, such as v1.0-mini. Needed only if the dataroot holds several.",
    ),
    click.option(
        "--config",
        default="nuscenes",
        metavar="FILE.yaml|PRESET",
        help="Settings: a file, or a preset by name (nuscenes, lidar, pop3d, demo). nuscenes lists "
        "all of them: occfeat-targets settings.",
    ),
    click.option(
        "--set",
        "overrides",
        multiple=True,
        metavar="KEY=VALUE",
        help="One setting, such as lidar.sweeps=3 or frames.splits=[mini_train]. May be repeated.",
    ),
)
cluster_options = together(
    click.option(
        "--workers",
        type=click.IntRange(min=0),
        help="Worker processes. Default: one per GPU, else one per core. 0: in this process.",
    ),
    click.option("--threads", type=click.IntRange(min=1), help="Tasks at a time in each worker."),
    click.option("--scheduler", metavar="tcp://HOST:PORT", help="Use a running Dask scheduler."),
)
plugin_option = click.option(
    "--plugin",
    "plugins",
    multiple=True,
    metavar="MODULE:NAME",
    help="A plug-in that STORE was made with: run its code. May be repeated.",
)
on_error_option = click.option(
    "--on-error",
    type=click.Choice(["stop", "skip"]),
    default="stop",
    help=f"A frame fails: stop after the running blocks, or leave it out (exit {EXIT_SKIPPED}).",
)
