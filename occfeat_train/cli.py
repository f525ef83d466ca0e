"""The ``occfeat-train`` command: thin shells over ``train``, ``evaluate``, ``export``, ``view``."""

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from occfeat_train import __version__
from occfeat_train.objectives import OBJECTIVES
from occfeat_train.options import (
    PATH,
    names_of,
    plugin_option,
    run_option,
    set_option,
    store_option,
    training_options,
)
from occfeat_train.session import Say, session
from occfeat_train.tasks import TASKS

if TYPE_CHECKING:
    from occfeat_targets.store.reader import TargetStore
    from occfeat_train.rig import Camera
    from occfeat_train.runs.run import Run


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, package_name="occfeat")
def main() -> None:
    """Pretrain and finetune BEV networks from a targets store, which is all they need.

    \b
    occfeat-train pretrain --store targets.zarr
    occfeat-train finetune --fraction 0.01
    occfeat-train evaluate

    On several GPUs: torchrun --nproc-per-node 4 -m occfeat_train pretrain ...
    """


@main.command()
@click.argument("config", default="paper")
def settings(config: str) -> None:
    """Print the settings CONFIG, a file or preset (paper, demo, miniature): all with their
    defaults in paper, to read or to change a copy of."""
    with session() as (_, say):
        from occfeat_targets.store.settings import settings_file

        say(settings_file(config, "occfeat_train").read_text(encoding="utf-8"))


@main.command()
@training_options
@click.option(
    "--objective",
    metavar="NAME",
    help=names_of(OBJECTIVES) + " Short for --set pretrain.objective=...  [default: what the "
    "settings say]",
)
def pretrain(**asked: Any) -> None:
    """Pretrain without labels: predict from images what the store has of lidar and a teacher.

    Ctrl-C saves and stops; --resume goes on, also after a crash.
    """
    _train("pretrain", asked, "finetune --init {} --fraction 0.01")


@main.command()
@training_options
@click.option(
    "--task", metavar="NAME", default=TASKS.names[0], show_default=True, help=names_of(TASKS)
)
@click.option(
    "--fraction",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    show_default=True,
    help="Share of the training labels. 0.01 takes every 100th scene, at least one.",
)
@click.option(
    "--fraction-unit",
    type=click.Choice(["scene", "frame"]),
    default="scene",
    show_default=True,
    help="Whether the fraction is of scenes or of frames.",
)
@click.option(
    "--init",
    metavar="RUN|none",
    help="Pretraining run to start from; none starts from encoder weights alone.  [default: the "
    "newest finished one in runs/]",
)
def finetune(**asked: Any) -> None:
    """Finetune for a task with a share of the labels.

    Epochs, batch and learning rate follow the paper for the share, unless set.
    """
    _train("finetune", asked, "evaluate --run-dir {}")


@main.command()
@store_option
@set_option
@run_option("Finetuning run, or with --texts pretraining.  [default: the newest finished one]")
@click.option(
    "--corrupted",
    metavar="FOLDER|URL",
    help="Also on the stores of corrupted images in there (occfeat-targets corrupt).",
)
@click.option(
    "--texts",
    type=PATH,
    help="Of a pretraining that answers to words (pop3d): by these (occfeat-targets text).",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def evaluate(
    run: Path | None, store: str | None, corrupted: str | None, texts: Path | None, **asked: Any
) -> None:
    """IoU of a finetuned network on the validation split.

    At probability 0.5, by distance, and at the best of seven thresholds. Written to result.json
    in the run.

    With --corrupted, IoU by corruption and severity of nuScenes-C, and the share of the clean IoU
    that remains: RR, and mRR over the corruptions. Written to corrupted.json in the run.

    With --texts, of a pretraining, without labels: mIoU of voxels, each the class whose words are
    nearest to its feature; and what the teacher's own features would reach.
    """
    if texts and corrupted:
        raise click.UsageError("--texts is of a pretraining, --corrupted of a finetuning")
    with session() as (process, say):
        from occfeat_targets.store.reader import open_store
        from occfeat_train import evaluate, robustness
        from occfeat_train.runs import resolve
        from occfeat_train.runs.job import Job
        from occfeat_train.runs.run import write_json

        trained = resolve.finished(run, "pretrain" if texts else "finetune")
        job = resolve.changed(Job.of_run(trained, store, asked["plugins"]), asked["overrides"])
        job = resolve.zero_shot(job, texts) if texts else job
        tell = (lambda _: None) if asked["as_json"] else say
        if corrupted:
            result = robustness.evaluate_corrupted(job, trained, process, corrupted, tell)
            text, name = robustness.table(result), "corrupted.json"
        else:
            tell(f"Store: {job.store}")
            result = evaluate.evaluate(job, trained, process)
            text, name = evaluate.table(result), "result.json"
        result["set"] = list(asked["overrides"])
        say(json.dumps(result, indent=1) if asked["as_json"] else text)
        _say_worth(open_store(job.store), tell)
        if process.is_main:
            write_json(trained.path / name, result)


@main.command()
@run_option("Run to export.  [default: the newest finished pretraining in runs/]")
@click.option("--out", type=PATH, help="Directory to make: model.safetensors and model.json.")
@click.option("--onnx", is_flag=True, help="Also model.onnx, for one rig of cameras.")
@click.option(
    "--frame", type=int, help="Whose cameras they are.  [default: the first of validation]"
)
@click.option("--calibration", type=PATH, help="Or a JSON file of cameras: docs/deploy.md.")
@store_option
@click.option("--hub-card", is_flag=True, help="Also README.md, a model card for the hub.")
@click.option("--encoder", type=PATH, help="File to write: the image encoder alone, .safetensors.")
def export(run: Path | None, out: Path | None, encoder: Path | None, **asked: Any) -> None:
    """Write the network of a run for use elsewhere: a finetuning's with its head.

    occfeat_train.export.load_network(DIRECTORY) loads it, load_bev_net without head; model.onnx
    takes images alone, calibration.json says of which cameras.
    """
    if not out and (not encoder or asked["onnx"] or asked["hub_card"]):
        raise click.UsageError("name --out DIRECTORY, or --encoder FILE.safetensors alone")
    if not asked["onnx"] and (asked["frame"] is not None or asked["calibration"]):
        raise click.UsageError("--frame and --calibration are of --onnx: add it")
    with session() as (_, say):
        from occfeat_train import export
        from occfeat_train.runs import resolve

        chosen, plugins = resolve.finished(run, "pretrain"), asked["plugins"]
        if encoder:
            say(f"{encoder}: {export.export_encoder(chosen, encoder, plugins)}")
        if out:
            rig = _rig(chosen, asked) if asked["onnx"] else None
            network = export.export(chosen, out, asked["hub_card"], plugins)
            say(f"{out}: the {network.title} of {chosen.path}")
            if rig:
                from occfeat_train.onnx_file import write_onnx

                write_onnx(network, rig, out)
                say(f"{out}/model.onnx: for {', '.join(camera.name for camera in rig)}")


def _rig(run: "Run", asked: dict[str, Any]) -> "list[Camera]":
    """The cameras that the options of ``export --onnx`` name."""
    from occfeat_train.onnx_file import require_exporter
    from occfeat_train.rig import read_rig, rig_of_frame
    from occfeat_train.runs.job import Job

    require_exporter()
    if file := asked["calibration"]:
        return read_rig(file)
    return rig_of_frame(Job.of_run(run, asked["store"], asked["plugins"]), asked["frame"])


@main.command()
@store_option
@run_option("A run of either kind.  [default: the newest finished one in runs/]")
@click.option(
    "--frame", type=int, help="Frame number in the store.  [default: the first of validation]"
)
@click.option("--scene", metavar="NAME", help="All frames of a scene in turn, as a moving picture.")
@click.option(
    "--colours",
    type=PATH,
    metavar="FILE.json",
    help="Colours of features, as occfeat-targets view made them.  [default: those of the store]",
)
@click.option(
    "--pick",
    "picked",
    metavar="X,Y,Z|CAMERA,U,V",
    help="Show how like the target there all features are, true and predicted.",
)
@click.option(
    "--out",
    type=PATH,
    help="PNG to write; .webp or .mp4 of a scene.  [default: prediction.png, or SCENE.webp]",
)
def view(store: str | None, run: Path | None, **asked: Any) -> None:
    """Draw what a network predicts for one frame, and what it should, to a PNG.

    Seen from above. What is drawn is up to what the network learned. With --scene, all frames
    of a scene, with labels or without.
    """
    with session() as (process, say):
        from occfeat_train import movie, view
        from occfeat_train.runs import resolve
        from occfeat_train.runs.job import Job

        chosen = resolve.finished(run, "pretrain", "finetune")
        job = Job.of_run(chosen, store, asked["plugins"])
        if process.is_main:
            viewer = view.Viewer(job, chosen, process.device, asked["colours"])
            if scene := asked["scene"]:
                out = asked["out"] or Path(f"{scene}.webp")
                n = movie.save_scene(viewer, scene, out)
                say(f"{out}: {n} frames of {scene} as {chosen.path} ({job.title}) sees them")
                return
            out = asked["out"] or Path("prediction.png")
            i = view.save_frame(viewer, asked["frame"], out, asked["picked"])
            say(f"{out}: frame {i} of {job.store} as {chosen.path} ({job.title}) sees it")
            _say_worth(viewer.store, say)


@main.command()
@store_option
@run_option("A pretraining that answers to words.  [default: the newest finished one in runs/]")
@click.option("--text", required=True, help='What to look for, such as "a red car".')
@click.option("--texts", type=PATH, help="File of occfeat-targets text that has it ...")
@click.option(
    "--clip", type=PATH, help="... or the CLIP whose features the store has: a directory."
)
@click.option(
    "--frame", type=int, help="Frame number in the store.  [default: the first of validation]"
)
@click.option("--out", type=PATH, default="query.png", show_default=True, help="PNG to write.")
def query(run: Path | None, store: str | None, text: str, out: Path, **asked: Any) -> None:
    """Where in a frame is what a text says? Draws it in the images and from above.

    Of all voxels that a network takes for occupied, how like their features are to the text: with
    --texts how much more than to any other class of the file, with --clip the cosine.
    """
    if (asked["texts"] is None) == (asked["clip"] is None):
        raise click.UsageError("name --texts FILE or --clip DIR")
    with session() as (process, say):
        from occfeat_train import query
        from occfeat_train.runs import resolve
        from occfeat_train.runs.job import Job

        chosen = resolve.finished(run, "pretrain")
        job = Job.of_run(chosen, store, asked["plugins"])
        if process.is_main:
            viewer = query.open_viewer(job, chosen, process.device)
            texts = query.texts_of(viewer.store, text, asked["texts"], asked["clip"])
            say(query.save_answer(viewer, asked["frame"], text, texts, out))
            _say_worth(viewer.store, say)


@main.command()
@click.argument("runs", nargs=-1, type=PATH, metavar="[RUN...]")
@click.option(
    "--store", metavar="PATH|URL", help="Whose frames are shown.  [default: the runs' own]"
)
@click.option("--frames", default=3, show_default=True, help="How many of validation are shown.")
@click.option("--out", type=PATH, default="report.html", show_default=True, help="File to write.")
@plugin_option
def report(runs: tuple[Path, ...], out: Path, **asked: Any) -> None:
    """Write what the runs RUN..., or all in runs/, learned to one HTML file that needs no network.

    Runs that differ in their seed alone are taken together, and those that they started from are
    added: results with their spread, settings that differ, curves, pictures.
    """
    with session() as (process, say):
        from occfeat_train.report.report import write_report
        from occfeat_train.runs import resolve

        if process.is_main:
            what = asked["store"], asked["frames"], process.device, asked["plugins"]
            say(write_report(runs or resolve.all_runs(), out, *what))


@main.command()
@click.argument("net", type=PATH)
@click.option(
    "--calibration", type=PATH, required=True, help="JSON file of the cameras: docs/deploy.md."
)
@click.option(
    "--images",
    type=PATH,
    multiple=True,
    metavar="FILE",
    help="A camera's image, in their order; repeatable.  [default: the files the JSON names]",
)
@click.option("--out", type=PATH, required=True, help="Directory for prediction.png and .npz.")
@plugin_option
def predict(
    net: Path, calibration: Path, images: tuple[Path, ...], out: Path, plugins: tuple[str, ...]
) -> None:
    """Show what NET, a finetuning run or an exported one, makes of your own images.

    Of any number of cameras, also others than it was trained with.
    """
    with session() as (process, say):
        from occfeat_train.predict import open_network, predict_masks, write_prediction
        from occfeat_train.rig import image_files, read_rig

        cameras, network = read_rig(calibration), open_network(net, plugins)
        files = images or image_files(cameras, calibration)
        seen = predict_masks(network, cameras, files, process.device)
        title = f"{net} ({network.title}) on {len(cameras)} cameras of {calibration}"
        write_prediction(network, seen, out, title)
        say(f"{out}: prediction.png and prediction.npz, {title}")


def _train(kind: str, asked: dict[str, Any], then: str) -> None:
    """Train as the options say, and say how it went and what comes next."""
    with session() as (process, say):
        from occfeat_targets.store.reader import open_store
        from occfeat_train.distributed import from_main
        from occfeat_train.runs import resolve
        from occfeat_train.runs.run import Run, check_same_store
        from occfeat_train.train import train

        if tracker := asked["tracker"]:
            asked["overrides"] = (*asked["overrides"], f"run.tracker={tracker}")
        if resume := asked["resume"]:
            source = click.get_current_context().get_parameter_source
            given = {
                name for name in asked if source(name) is click.core.ParameterSource.COMMANDLINE
            }
            job, path = resolve.resumed(kind, asked, given)
        else:
            job, path = resolve.new_job(kind, asked, say)
        store = open_store(job.store)
        run = Run(Path(from_main(str(path))))  # named by the time, which others may read later
        if resume:
            check_same_store(run.description()["store_identity"], store)
        elif process.is_main:  # which makes it soon after
            run.require_new()
        say(f"Store: {job.store}")
        _say_worth(store, say)
        finished = train(job, run, process, resume)
        say(f"{run.path}: {'finished' if finished else 'stopped'}")
        plugins = "".join(f" {shlex.quote(word)}" for word in job.plugin_options)
        if not finished:
            say(f"Go on with: occfeat-train {kind} --resume --run-dir {run.path}{plugins}")
            raise SystemExit(130)
        say(f"Next: occfeat-train {then.format(run.path)}{plugins}")


def _say_worth(store: "TargetStore", say: Say) -> None:
    """What the numbers and pictures of such a store, or of a demo's, are worth."""
    why = ""
    if store.has_random_teacher:
        why = f"The features of {store.url} come from a RANDOM-WEIGHTS teacher"
    elif store.attrs["source"]["dataset"] == "occfeat demo world":
        why = f"{store.url} is of a demo world, its teacher is {store.attrs['teacher']['name']}"
    if why:
        say(f"{why}: good to see that all runs, not comparable with the paper.")
