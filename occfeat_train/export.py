"""A trained BEV network as two files that anyone can load: safetensors and JSON."""

import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save

from occfeat_targets.store.grid import VoxelGrid
from occfeat_train.models.bev_net import BEVNet, ModelSettings
from occfeat_train.network import bev_net_state, load_same_tensors
from occfeat_train.runs.run import Run, RunError, replace, write_json

FORMAT = "occfeat-bev-net"


def export(run: Run, out: Path) -> None:
    """Write ``model.safetensors`` and ``model.json`` of a run's BEV network, without its head, or
    RunError: the run has no checkpoint, or ``out`` exists."""
    if out.exists():
        raise RunError(f"{out} exists already: choose another --out")
    state, position = run.load()
    description = run.description()
    weights = {k: v.contiguous() for k, v in bev_net_state(state["network"]).items()}
    out.mkdir(parents=True)
    # Not by save_file: it lets nobody else read the file, whatever the umask.
    replace(out / "model.safetensors", lambda part: part.write_bytes(save(weights)))
    said = {name: description["store_identity"][name] for name in ("grid", "teacher")}
    said |= {name: description[name] for name in ("kind", "versions")}
    said |= {"format": FORMAT, "model": description["config"]["model"], "position": position}
    write_json(out / "model.json", said)


def load_bev_net(directory: str | Path) -> BEVNet:
    """The exported network, in evaluation mode. RunError: none, or its files don't fit together."""
    directory = Path(directory)
    try:
        description = json.loads((directory / "model.json").read_text())
        weights = load_file(directory / "model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise RunError(f"{directory} holds no exported network: {error}") from error
    if description.get("format") != FORMAT:
        raise RunError(f"{directory}/model.json was not written by occfeat-train export")
    model = ModelSettings.of(description["model"], "model")
    network = BEVNet(model, VoxelGrid.from_dict(description["grid"]))
    load_same_tensors(network, weights, directory)
    return network.eval()
