"""Around every command: processes that train together, who speaks, and what becomes of errors."""

import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from occfeat_train.distributed import Process

Say = Callable[[str], None]


@contextmanager
def session() -> Iterator[tuple["Process", Say]]:
    """Join the process group; the main process speaks; known errors become one clear sentence."""
    from occfeat_targets.store.extras import how_to_install
    from occfeat_targets.store.files import StoreError
    from occfeat_targets.store.settings import ConfigError
    from occfeat_train.distributed import ProcessLost, leave, process_group
    from occfeat_train.models.encoder_weights import WeightsError
    from occfeat_train.runs.run import RunError
    from occfeat_train.train import NonFiniteLoss

    lost = False
    try:
        with process_group() as process:
            yield process, click.echo if process.is_main else (lambda _: None)
        return
    except (ConfigError, StoreError, RunError, WeightsError, NonFiniteLoss) as error:
        text = str(error)
        if text.startswith("Caught "):  # from a reading process: torch puts a traceback before it
            text = text.splitlines()[-1].partition("Error: ")[2] or text
        text = f"Error: {text}"
    except ProcessLost as error:
        lost, text = True, f"Error: {error}; go on from the last checkpoint with --resume"
    except Exception as error:
        known = isinstance(error, ModuleNotFoundError) and how_to_install(error)
        text = f"Error: {known}" if known else traceback.format_exc()
    if "WORLD_SIZE" in os.environ:
        leave(text, lost)
    click.echo(text, err=True)
    raise SystemExit(1)
