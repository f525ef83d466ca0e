"""The ``occfeat-train`` command."""

from __future__ import annotations

import click

from occfeat_train import __version__


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, package_name="occfeat")
def main() -> None:
    """Pretrain and finetune BEV networks from a targets store.

    This version has no training commands yet: it builds, checks and shows targets
    (occfeat-targets).
    """
