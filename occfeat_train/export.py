"""A trained network as two files that anyone can load: safetensors and JSON."""

import json
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import zarr
from huggingface_hub import ModelHubMixin, snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from occfeat_targets.store.grid import VoxelGrid
from occfeat_targets.store.reader import TargetStore
from occfeat_targets.store.registry import only_plugins
from occfeat_train.config import TrainConfig
from occfeat_train.model_card import model_card, title_of
from occfeat_train.models.bev_net import BEVNet
from occfeat_train.models.encoder_weights import published_weights
from occfeat_train.network import backbone_state, load_same_tensors
from occfeat_train.objectives import OBJECTIVES
from occfeat_train.runs.run import Run, RunError, replace, write_json
from occfeat_train.sensors import SENSORS
from occfeat_train.sensors.base import Sensor
from occfeat_train.tasks import TASKS
from occfeat_train.tasks.base import Task

FORMAT = "occfeat-bev-net"
WEIGHTS, DESCRIPTION, CARD = "model.safetensors", "model.json", "README.md"
_OF_STORE = ("grid", "cameras", "box_classes", "vehicle_classes", "map_classes", "teacher")


class ExportedNetwork(nn.Module, ModelHubMixin):
    """A trained backbone and, if it was finetuned, its task, in evaluation mode.

    ``description`` is what ``model.json`` says. ConfigError, KeyError: that names no network.
    ``push_to_hub``, ``save_pretrained`` and ``from_pretrained`` are those of huggingface_hub.
    """

    bev_net: BEVNet
    """The backbone, if it looks through cameras."""

    def __init__(self, description: dict[str, Any]):
        super().__init__()
        self.description = description
        self._hub_mixin_config = None  # else its config.json would say the same a second time
        kind = SENSORS(description.get("sensor", "camera"))
        self.sensor: Sensor = kind(TrainConfig.of({kind.section: description[kind.section]}))
        backbone = self.sensor.backbone(VoxelGrid.from_dict(description["grid"]))
        self.add_module(self.sensor.backbone_name, backbone)
        self.objective: Task | None = None
        if name := description.get("task"):
            task = TASKS(name)
            settings = task.Settings.of(description["settings"], f"tasks.{name}")
            channels = self.sensor.channels
            self.objective = task(settings, _store_of(description), channels, False)
        self.eval()

    def forward(self, *inputs: Tensor, **named: Tensor) -> Any:
        """What its task predicts; ``bev`` features (B, C, X, Y), or ``rows`` (R, C) of lidar, if it
        has none. Arguments are those of its backbone's: :meth:`BEVNet.forward`, images, K and
        cam_T_ego; or ``WaffleIron.forward``."""
        return self.predict(self.get_submodule(self.sensor.backbone_name)(*inputs, **named))

    def predict(self, features: Tensor) -> Any:
        """What its task makes of features; themselves if it has none."""
        if self.objective:
            return self.objective.predict(features)
        return {"bev" if self.sensor.section == "model" else "rows": features}

    def require_cameras(self) -> Self:
        """Itself. RunError: it looks through another sensor."""
        if self.sensor.section != "model":
            raise RunError(f"a {self.title} does not look through cameras: this is not for it")
        return self

    @classmethod
    def of_run(cls, run: Run, plugins: Collection[str] = ()) -> Self:
        """The network of a run's newest checkpoint. RunError: it has none, or one of another
        network; ConfigError: its settings are not of this version of occfeat, or name a plug-in
        that is not among ``plugins``."""
        state, position = run.load()
        try:
            with only_plugins(str(run.path), plugins):
                network = cls(_describe(run, position))
        except (LookupError, TypeError) as error:
            raise RunError(f"{run.path} is of another version of occfeat: {error!r}") from error
        theirs = state["network"]
        if network.objective is None:
            prefix = f"{network.sensor.backbone_name}."
            theirs = {k: v for k, v in theirs.items() if k.startswith(prefix)}
        load_same_tensors(network, theirs, run.path)
        return network

    @property
    def title(self) -> str:
        """For people, such as ``vehicle network``."""
        return title_of(self.description)

    def write(self, directory: Path) -> None:
        """``model.safetensors`` and ``model.json``; of a backbone alone by that one's names."""
        state, name = self.state_dict(), self.sensor.backbone_name
        weights = state if self.objective else backbone_state(state, name)
        plain = save({k: v.contiguous() for k, v in weights.items()})
        # Not by save_file: it lets nobody else read the file, whatever the umask.
        replace(directory / WEIGHTS, lambda part: part.write_bytes(plain))
        write_json(directory / DESCRIPTION, self.description)

    def write_card(self, directory: Path) -> None:
        """``README.md``, the hub's model card."""
        (directory / CARD).write_text(model_card(self.description), encoding="utf-8")

    def _save_pretrained(self, save_directory: Path) -> None:
        self.write(save_directory)
        self.write_card(save_directory)

    @classmethod
    def from_pretrained(  # pyright: ignore
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        plugins: Collection[str] = (),
        **options: Any,
    ) -> Self:
        """The network in a directory, or of a hub id, ``options`` being ``snapshot_download``'s.
        Raises and ``plugins`` as :func:`load_network`."""
        directory = Path(pretrained_model_name_or_path)
        if not directory.is_dir():
            files = [WEIGHTS, DESCRIPTION]
            name = str(pretrained_model_name_or_path)
            directory = Path(snapshot_download(name, allow_patterns=files, **options))
        description, weights = _read(directory)
        try:
            with only_plugins(str(directory), plugins):
                network = cls(description)
        except (LookupError, TypeError) as error:
            raise RunError(f"{directory}/{DESCRIPTION} is damaged: {error!r}") from error
        if network.objective is None:
            prefix = network.sensor.backbone_name
            weights = {f"{prefix}.{name}": tensor for name, tensor in weights.items()}
        load_same_tensors(network, weights, directory)
        return network


def export(
    run: Run, out: Path, card: bool = False, plugins: Collection[str] = ()
) -> ExportedNetwork:
    """Write ``model.safetensors`` and ``model.json`` of a run's network: a finetuning's with its
    head, a pretraining's without; with ``card`` also ``README.md``. RunError: ``out`` exists;
    others, and ``plugins``, as :meth:`ExportedNetwork.of_run`."""
    if out.exists():
        raise RunError(f"{out} exists already: choose another --out")
    network = ExportedNetwork.of_run(run, plugins)
    out.mkdir(parents=True)
    network.write(out)
    if card:
        network.write_card(out)
    return network


def export_encoder(run: Run, out: Path, plugins: Collection[str] = ()) -> str:
    """Write the backbone of a run's image encoder by the names that others know it by; returns
    whose names. RunError: ``out`` exists or can't be written; others, and ``plugins``, as
    :meth:`ExportedNetwork.of_run`."""
    if out.exists() or out.suffix != ".safetensors" or not out.parent.is_dir():
        raise RunError(f"cannot write {out}: name a new .safetensors in a directory that exists")
    encoder = ExportedNetwork.of_run(run, plugins).require_cameras().bev_net.encoder
    label, weights = published_weights(encoder)
    replace(out, lambda part: part.write_bytes(save(weights)))
    return f"{encoder.name} of {run.path} by the names of {label}"


def load_network(directory: str | Path, plugins: Collection[str] = ()) -> ExportedNetwork:
    """An exported network. RunError: none, or its files don't fit together; ConfigError: it names a
    plug-in, whose code this would run, that is not among ``plugins``."""
    if not Path(directory).is_dir():
        raise RunError(f"{directory} holds no exported network: it is no directory")
    return ExportedNetwork.from_pretrained(directory, plugins=plugins)


def load_bev_net(directory: str | Path, plugins: Collection[str] = ()) -> BEVNet:
    """The BEV network of an exported one, without head, in evaluation mode; raises as above."""
    directory = Path(directory)
    description, weights = _read(directory)
    with only_plugins(str(directory), plugins):
        network = ExportedNetwork(description | {"task": None}).require_cameras().bev_net
    load_same_tensors(network, backbone_state(weights, "bev_net") or weights, directory)
    return network


def _read(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        description = json.loads((directory / DESCRIPTION).read_text())
        weights = load_file(directory / WEIGHTS)
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise RunError(f"{directory} holds no exported network: {error}") from error
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise RunError(f"{directory}/{DESCRIPTION} was not written by occfeat-train export")
    return description, weights


def _describe(run: Run, position: dict[str, Any]) -> dict[str, Any]:
    """For ``model.json``: what the network is, what it learned from, and how well."""
    said = run.description()
    store, config = said["store_identity"], said["config"]
    task = said["task"]
    learns = TASKS(task) if task else OBJECTIVES(config["pretrain"]["objective"])
    section = SENSORS(learns.sensor).section
    description = {"format": FORMAT, "kind": said["kind"], section: config[section]}
    description |= {"sensor": learns.sensor} if learns.sensor != "camera" else {}
    description |= {name: store[name] for name in _OF_STORE}
    if "lidarseg_classes" in store:
        description["lidarseg_classes"] = store["lidarseg_classes"]
    description |= {"stored_image_size": store["images"]["size"]}
    if task:
        description |= {"task": task, "settings": config["tasks"].get(task, {})}
        description |= {"result": _result(run, position)}
        description |= {name: said[name] for name in ("fraction", "fraction_unit")}
    return description | {
        "pretraining": _pretraining(said),
        "seed": config["run"]["seed"],
        "store": {"source": said.get("source")}
        | {name: store[name] for name in ("records_sha256", "n_frames", "format_version")},
        "versions": said["versions"],
        "position": position,
    }


def _pretraining(said: dict[str, Any]) -> str | None:
    """The objective of a pretraining, or of that which a finetuning started from, if any."""
    if said["task"] and not said["init"]:
        return None
    try:
        pretraining = Run(Path(said["init"])).description() if said["task"] else said
    except RunError:
        return "unknown, its run is gone"
    return pretraining["config"]["pretrain"]["objective"]


def _result(run: Run, position: dict[str, Any]) -> dict[str, Any] | None:
    """What ``evaluate`` measured of this very checkpoint, without paths; None if it did not, or
    did before it named protocols."""
    with suppress(OSError, ValueError, LookupError, TypeError):
        result = json.loads((run.path / "result.json").read_text())
        if result["step"] == position["step"] and result["headline"]["protocol"]:
            names = ("splits", "frames", "headline", "rows", "counted")
            return {name: result[name] for name in names if name in result}
    return None


def _store_of(description: dict[str, Any]) -> TargetStore:
    """What a task asks of a store to make its head: attributes, and no arrays."""
    attributes: Any = {name: description[name] for name in _OF_STORE} | {"arrays": {}}
    attributes |= {"lidarseg_classes": description.get("lidarseg_classes", [])}
    return TargetStore("the exported network", zarr.group(store={}, attributes=attributes))
