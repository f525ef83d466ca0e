"""The ``occfeat-targets`` command: a dataset to a targets store.

Commands are thin: they parse, call one function and turn errors into one message. What they need is
imported where it is used: ``--help`` stays quick.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from occfeat_targets import __version__
from occfeat_targets.options import (
    EXIT_SKIPPED,
    PATH,
    cluster_options,
    dataroot_argument,
    on_error_option,
    plugin_option,
    settings_options,
    store_argument,
)

if TYPE_CHECKING:
    from occfeat_targets.config import TargetsConfig

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130
CONTEXT = {"show_default": True, "help_option_names": ["-h", "--help"], "max_content_width": 100}


@contextlib.contextmanager
def _one_message() -> Iterator[None]:
    """Expected errors of work become one message and exit status 1; the rest are bugs and raise."""
    from occfeat_targets.build import BuildStopped
    from occfeat_targets.cluster import ClusterError
    from occfeat_targets.store.extras import how_to_install
    from occfeat_targets.store.files import StoreError
    from occfeat_targets.teachers.base import TeacherError

    try:
        yield
    except ModuleNotFoundError as error:
        if (text := how_to_install(error)) is None:
            raise
        click.secho(f"Error: {text}", fg="red", err=True)
        sys.exit(EXIT_FAILED)
    except (BuildStopped, ClusterError, StoreError, TeacherError, ValueError, OSError) as error:
        click.secho(f"Error: {error}", fg="red", err=True)
        sys.exit(EXIT_FAILED)
    except KeyboardInterrupt:
        click.echo("\ninterrupted; run the same command again to continue", err=True)
        sys.exit(EXIT_INTERRUPTED)


@click.group(context_settings=CONTEXT)
@click.version_option(__version__, package_name="occfeat")
def main() -> None:
    """Make OccFeat pretraining targets: lidar occupancy + image features per voxel, in Zarr."""


@main.command("demo-data")
@click.argument("out", type=PATH)
@click.option("--scenes", default=4, help="Number of scenes, 2 or more.")
@click.option("--samples", default=10, help="Keyframes per scene.")
@click.option("--seed", default=0, help="Same seed, same bytes.")
@click.option(
    "--version",
    type=click.Choice(["v1.0-mini", "v1.0-trainval"]),
    default="v1.0-mini",
    help="Whose scene names and splits to use; mini has room for 10 scenes.",
)
@click.option("--workers", type=int, help="Processes; default: one per core.")
def demo_data(out: Path, **options: Any) -> None:
    """Render a synthetic drive in nuScenes format to the directory OUT.

    Streets, buildings, vehicles and pedestrians seen by the real rig's six cameras and lidar,
    with boxes and map. nuscenes-devkit loads it unchanged. Run again to continue.
    """
    from occfeat_targets.demo_world import make_demo_world

    with _one_message():
        make_demo_world(out, **options)


@main.command()
@dataroot_argument
@store_argument
@settings_options
@click.option(
    "--teacher",
    help="DINOv2 hub id or local directory, random:SEED (no DINOv2 features!), a plug-in "
    "package.module:factory on PYTHONPATH, or none (no features). Default: facebook/dinov2-small.",
)
@click.option(
    "--precision",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    help="Of the teacher. auto: float32 on CPU, bfloat16 on CUDA.",
)
@click.option("--scene", "scenes", multiple=True, help="Only this scene. May be repeated.")
@click.option("--limit", type=int, help="Only the first so many keyframes.")
@cluster_options
@on_error_option
@click.option("--overwrite", is_flag=True, help="Delete the targets store that is there first.")
def build(dataroot: Path, store: str, overwrite: bool, on_error: str, **options: Any) -> None:
    """Build the targets store STORE from the dataset in DATAROOT.

    nuScenes is recognised; for another dataset name its reader, --set source=module:Name.

    STORE is a directory or a URL that fsspec opens (s3://…). Killed or failed builds continue
    where they were when the same command is run again (without --overwrite).
    """
    from occfeat_targets import build as building
    from occfeat_targets.cluster import executor
    from occfeat_targets.info import counted
    from occfeat_targets.store.files import absolute
    from occfeat_targets.writer import is_complete

    with _one_message():
        settings, store = _settings(options), absolute(store)
        if settings.teacher.name.startswith("random:"):
            click.echo(
                f"Note: teacher {settings.teacher.name} has random weights; these are not DINOv2 "
                "features (fine for trying things out, useless for results)"
            )
        dataset = building.prepare(dataroot, store, options["version"], settings, overwrite)
        if not dataset.map_classes and settings.map.mode == "auto":
            click.echo("Note: this dataset has no map, so no map labels are stored")
        n = counted(len(dataset.records), "frame")
        if is_complete(store) and not overwrite:
            click.echo(f"{store} is complete: {n}, nothing to do")
            return
        with executor(options["workers"], options["threads"], options["scheduler"]) as where:
            skip = on_error == "skip"
            failed = building.build(store, settings, dataset, where, skip, overwrite)
    click.echo(f"{store}: {n}, {len(failed)} failed")
    _leave_out(failed.values())


def _settings(options: dict[str, Any]) -> TargetsConfig:
    """By the options of a command; those with a name of their own go over ``--set``."""
    from occfeat_targets.config import TargetsConfig
    from occfeat_targets.store.settings import settings_file

    keys = {"teacher": "teacher.name", "precision": "teacher.precision"}
    keys |= {"limit": "frames.limit", "scenes": "frames.scenes"}
    given = [flag for flag in keys if options.get(flag) not in (None, ())]
    chosen = [f"{keys[flag]}={json.dumps(options[flag])}" for flag in given]
    path = settings_file(options["config"], "occfeat_targets")
    return TargetsConfig.load(path, [*options["overrides"], *chosen])


def _leave_out(messages: Collection[str]) -> None:
    for message in messages:
        click.secho(f"  left out: {message}", fg="yellow", err=True)
    if messages:
        sys.exit(EXIT_SKIPPED)


@main.command()
@dataroot_argument
@store_argument
@click.argument("out")
@click.option("--split", help="Whose frames. Default: val or mini_val, which STORE has.")
@click.option(
    "--only",
    multiple=True,
    metavar="NAME",
    help="Only this one, such as fog-easy. May be repeated. Default: all 24.",
)
@plugin_option
@cluster_options
@on_error_option
def corrupt(dataroot: Path, store: str, out: str, on_error: str, **options: Any) -> None:
    """Build the validation split of STORE again with corrupted images: nuScenes-C.

    DATAROOT is what STORE was built from. RoboBEV's eight corruptions, each easy, mid and hard:
    camera_crash, frame_lost, motion_blur, color_quant, brightness, low_light, fog, snow. Each
    becomes a store OUT/NAME-SEVERITY.zarr with the settings and labels of STORE, but no features,
    to evaluate on:

    \b
    occfeat-targets corrupt DATAROOT targets.zarr corrupted
    occfeat-train evaluate --corrupted corrupted

    Run it again to continue; what is complete is left alone. For other random numbers build one
    by one: occfeat-targets build --set images.corruption=fog-easy --set images.corruption_seed=1.
    """
    from occfeat_targets.build import build_corrupted, read_split
    from occfeat_targets.cluster import executor
    from occfeat_targets.corruptions import CORRUPTED
    from occfeat_targets.store.files import absolute
    from occfeat_targets.store.registry import only_plugins

    names = options["only"] or CORRUPTED
    with _one_message(), only_plugins(store, options["plugins"]):
        if unknown := [name for name in names if name not in CORRUPTED]:
            raise ValueError(f"no corruption {unknown[0]}; there are {', '.join(CORRUPTED)}")
        config, dataset = read_split(dataroot, store, options["split"])
        out, skip = absolute(out), on_error == "skip"
        with executor(options["workers"], options["threads"], options["scheduler"]) as where:
            failed = build_corrupted(config, dataset, out, names, where, skip, click.echo)
    _leave_out([f"{place}: {message}" for place, message in failed.items()])


@main.command()
@click.argument("config", default="nuscenes")
def settings(config: str) -> None:
    """Print the settings CONFIG, a file or preset: to read, or to change a copy of.

    \b
    occfeat-targets settings > mine.yaml
    occfeat-targets build DATAROOT STORE --config mine.yaml
    """
    from occfeat_targets.store.settings import settings_file

    with _one_message():
        text = settings_file(config, "occfeat_targets").read_text(encoding="utf-8")
    click.echo(text, nl=False)


@main.command()
@click.argument("out", type=PATH)
@click.option("--clip", type=PATH, help="Directory of a CLIP, with its tokenizer's files.")
@click.option(
    "--vocabulary",
    type=PATH,
    help="JSON file of templates and prompts by class. Default: POP-3D's, of nuScenes' 16 classes.",
)
@click.option(
    "--stand-in",
    metavar="STORE",
    help="Instead of texts: what STORE's training frames look like by class.",
)
def text(out: Path, clip: Path | None, vocabulary: Path | None, stand_in: str | None) -> None:
    """Write to OUT a vocabulary's prompts as vectors of a CLIP, to ask voxels by.

    \b
    occfeat-targets text texts.safetensors --clip clip-vit-base-patch16
    """
    from occfeat_targets import texts

    if (clip is None) == (stand_in is None) or (stand_in and vocabulary):
        raise click.UsageError(
            "name --clip DIR, with a --vocabulary or without, or --stand-in STORE"
        )
    with _one_message():
        if clip:
            made = texts.embed(texts.read_vocabulary(vocabulary or texts.VOCABULARY), clip)
        else:
            made = texts.stand_in(str(stand_in))
        made.save(out)
    classes = len(made.class_names)
    click.echo(f"{out}: {len(made.prompts)} prompts, {classes} classes; {made.source}")


@main.command()
@dataroot_argument
@settings_options
def check(dataroot: Path, **options: Any) -> None:
    """Check DATAROOT without building: files, sizes, JPEG headers, calibration.

    build does the same before it starts.
    """
    from occfeat_targets.build import check_records, read_dataset
    from occfeat_targets.info import counted

    with _one_message():
        settings = _settings(options)
        dataset = read_dataset(dataroot, options["version"], settings)
        check_records(dataset, settings)
    scenes = counted(len({record.scene for record in dataset.records}), "scene")
    keyframes = counted(len(dataset.records), "keyframe")
    click.echo(f"{dataroot}: {dataset.version}, {scenes}, {keyframes}: ok")


@main.command()
@store_argument
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
def info(store: str, as_json: bool) -> None:
    """Show what STORE holds: frames, splits, voxels a frame, bytes, teacher, config."""
    from occfeat_targets.info import as_text, summarise

    with _one_message():
        summary = summarise(store)
    click.echo(json.dumps(summary, indent=2) if as_json else as_text(summary))


@main.command()
@store_argument
@click.option(
    "--quick",
    is_flag=True,
    help="Look for lost, added and truncated files alone, and read only what describes the arrays. "
    "Does not find changed bytes in them, or frames that contradict themselves.",
)
@click.option("--recompute", default=0, metavar="K", help="Also recompute K random frames.")
@click.option("--dataroot", type=PATH, help="Where from; needed for --recompute.")
@click.option("--seed", default=0, help="Which random frames.")
@plugin_option
def verify(store: str, quick: bool, recompute: int, plugins: tuple[str, ...], **how: Any) -> None:
    """Re-read every frame of STORE and check that it is sound and consistent."""
    from occfeat_targets.info import counted
    from occfeat_targets.store.registry import only_plugins
    from occfeat_targets.verify import recompute_frames, verify_store

    if recompute and not how["dataroot"]:
        raise click.UsageError("--recompute needs --dataroot")
    with _one_message(), only_plugins(store, plugins):
        n_frames, problems = verify_store(store, quick)
        if recompute and not problems:
            problems += recompute_frames(store, count=recompute, **how)
    for problem in problems:
        click.secho(f"  {problem}", fg="red", err=True)
    looked = "looked at" if quick else "read"
    again = f", {min(recompute, n_frames)} recomputed" if recompute and not problems else ""
    frames, found = counted(n_frames, "frame"), counted(len(problems), "problem")
    click.echo(f"{store}: {frames} {looked}{again}, {found}")
    sys.exit(EXIT_FAILED if problems else 0)


@main.command()
@store_argument
@click.option("--frame", default=0, help="Index of the frame.")
@click.option("--out", type=PATH, help="Default: view-FRAME.png.")
@click.option(
    "--colours",
    type=PATH,
    metavar="FILE.json",
    help="What colour a feature has: made for STORE if it is not there, else as it says. For other "
    "stores of the same teacher. Default: those of STORE.",
)
@click.option(
    "--pick",
    metavar="X,Y,Z|CAMERA,U,V",
    help="Show how like the feature there all others are: at a place, metres in ego, or under a "
    "pixel of a stored image.",
)
@plugin_option
def view(
    store: str,
    frame: int,
    out: Path | None,
    plugins: tuple[str, ...],
    **options: Any,
) -> None:
    """Draw one frame of STORE to a PNG: the cameras with the voxels, and the BEV."""
    from occfeat_targets.store.registry import only_plugins
    from occfeat_targets.view import draw_frame

    out = out or Path(f"view-{frame}.png")
    with _one_message(), only_plugins(store, plugins):
        draw_frame(store, frame, out, options["colours"], options["pick"])
    click.echo(f"wrote {out}")


if __name__ == "__main__":
    main()
