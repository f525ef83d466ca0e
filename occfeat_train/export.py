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
from occfeat_train.model_card import model_card, title_of
from occfeat_train.models.bev_net import BEVNet, ModelSettings
from occfeat_train.models.encoder_weights import published_weights
from occfeat_train.network import bev_net_state, load_same_tensors
from occfeat_train.runs.run import Run, RunError, replace, write_json
from occfeat_train.tasks import TASKS
from occfeat_train.tasks.base import Task

FORMAT = "occfeat-bev-net"
WEIGHTS, DESCRIPTION, CARD = "model.safetensors", "model.json", "README.md"
_OF_STORE = ("grid", "cameras", "box_classes", "vehicle_classes", "map_classes", "teacher")


class ExportedNetwork(nn.Module, ModelHubMixin):
    """A trained BEV network and, if it was finetuned, its task, in evaluation mode.

    ``description`` is what ``model.json`` says. ConfigError, KeyError: that names no network.
    ``push_to_hub``, ``save_pretrained`` and ``from_pretrained`` are those of huggingface_hub.
    """

    def __init__(self, description: dict[str, Any]):
        super().__init__()
        self.description = description
        self._hub_mixin_config = None  # else its config.json would say the same a second time
        model = ModelSettings.of(description["model"], "model")
        self.bev_net = BEVNet(model, VoxelGrid.from_dict(description["grid"]))
        self.objective: Task | None = None
        if name := description.get("task"):
            task = TASKS(name)
            settings = task.Settings.of(description["settings"], f"tasks.{name}")
            self.objective = task(settings, _store_of(description), model.channels, False)
        self.eval()

    def forward(self, images: Tensor, K: Tensor, cam_T_ego: Tensor) -> dict[str, Any]:
        """What its task predicts, by name; ``bev`` features (B, C, X, Y) if it has none.
        Arguments are those of :meth:`BEVNet.forward`."""
        return self.predict(self.bev_net(images, K, cam_T_ego))

    def predict(self, bev: Tensor) -> dict[str, Any]:
        """What its task makes of BEV features; ``bev`` themselves if it has none."""
        return self.objective.predict(bev) if self.objective else {"bev": bev}

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
            theirs = {k: v for k, v in theirs.items() if k.startswith("bev_net.")}
        load_same_tensors(network, theirs, run.path)
        return network

    @property
    def title(self) -> str:
        """For people, such as ``vehicle network``."""
        return title_of(self.description)

    def write(self, directory: Path) -> None:
        """``model.safetensors`` and ``model.json``; of a BEV network alone by that one's names."""
        state = self.state_dict()
        weights = state if self.objective else bev_net_state(state)
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
            weights = {f"bev_net.{name}": tensor for name, tensor in weights.items()}
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
    encoder = ExportedNetwork.of_run(run, plugins).bev_net.encoder
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
        network = ExportedNetwork(description | {"task": None}).bev_net
    load_same_tensors(network, bev_net_state(weights) or weights, directory)
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
    description = {"format": FORMAT, "kind": said["kind"], "model": config["model"]}
    description |= {name: store[name] for name in _OF_STORE}
    description |= {"stored_image_size": store["images"]["size"]}
    if task := said["task"]:
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
            return {name: result[name] for name in ("splits", "frames", "headline", "rows")}
    return None


def _store_of(description: dict[str, Any]) -> TargetStore:
    """What a task asks of a store to make its head: attributes, and no arrays."""
    attributes: Any = {name: description[name] for name in _OF_STORE} | {"arrays": {}}
    return TargetStore("the exported network", zarr.group(store={}, attributes=attributes))
