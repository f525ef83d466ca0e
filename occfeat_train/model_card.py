"""The model card of an exported network: what it is, what it learned from, under which licence."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

_PAPER = "https://arxiv.org/abs/2404.14027"
_NUSCENES = "[nuScenes](https://www.nuscenes.org/terms-of-use)"


def title_of(description: dict[str, Any]) -> str:
    """For people, such as ``vehicle network``."""
    kind = "lidar" if "lidar" in description else "BEV"
    return f"{description['task']} network" if description.get("task") else f"{kind} network"


def model_card(said: dict[str, Any]) -> str:
    """Markdown with the hub's metadata before it, of what ``model.json`` says."""
    licence, data = _data(said["store"]["source"] or {})
    axes = (f"{axis} {low:g} to {high:g} m in {n}" for axis, (low, high, n) in said["grid"].items())
    grid = f"cells {', '.join(axes)}"
    inputs, what = "images, K, cam_T_ego", "RGB in 0..1 (B, N, 3, H, W); K of these"
    subject, tags = "cameras to bird's-eye view", ["bird's-eye-view"]
    if lidar := said.get("lidar"):
        inputs, what = "features, neighbours, cells, n_rows", "see occfeat_train.data.cloud"
        subject, tags = "features of lidar points", ["lidar"]
        reach = " x ".join(f"{2 * reach:g}" for reach in lidar["reach_m"])
        network = f"WaffleIron {lidar['size']}, cells of {lidar['cell_m']:g} m in {reach} m"
    else:
        model, (height, width) = said["model"], said["model"]["image_size"]
        network = f"{model['lift']}, {model['encoder']}, images of {height} x {width}, {grid}"
    facts = {
        "Network": network,
        "Data": data,
        "Store": f"records sha256 {said['store']['records_sha256']}, "
        f"{said['store']['n_frames']} frames",
        "Pretraining": _pretraining(said),
        "Protocol": _protocol(said),
        "Metric": _metric(said),
        "Seed": f"{said['seed']}, step {said['position']['step']}"
        + ("" if said["position"]["finished"] else ", NOT FINISHED"),
    }
    lines = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    tags += ["autonomous-driving", "occfeat"]
    header = ModelCardData(library_name="occfeat", tags=tags, license=licence)
    return str(
        ModelCard(
            f"---\n{header.to_yaml()}\n---\n\n"
            f"# {title_of(said)}: {subject}\n\n"
            f"Trained with occfeat, an open implementation of [OccFeat]({_PAPER}).\n\n"
            f"| | |\n|---|---|\n{lines}\n\n"
            "```python\n"
            "from occfeat_train.export import ExportedNetwork\n\n"
            'network = ExportedNetwork.from_pretrained("THIS REPOSITORY OR DIRECTORY")\n'
            f"predicted = network({inputs})  # {what}\n"
            "```\n"
        )
    )


def _data(source: dict[str, Any]) -> tuple[str | None, str]:
    """The licence of weights trained on a dataset, and a sentence about it."""
    name = source.get("dataset", "unknown: the run does not say")
    version = f" {source['version']}" if source.get("version") else ""
    if name == "nuScenes":
        rule = f"{_NUSCENES}, CC BY-NC-SA 4.0: not for commercial use"
        return "cc-by-nc-sa-4.0", f"{name}{version}; {rule}"
    if name == "occfeat demo world":
        return None, f"{name}{version}, rendered: it shows that all runs, no more"
    return None, f"{name}{version}; its licence holds for these weights too"


def _pretraining(said: dict[str, Any]) -> str:
    if not said["pretraining"]:
        weights = Path(said["model"]["encoder_weights"] if "model" in said else "random")
        return f"none; encoder weights: {weights.name if weights.is_absolute() else weights}"
    teacher = said["teacher"]
    if str(teacher.get("weights", "")).startswith("random"):
        return f"{said['pretraining']}; teacher of RANDOM weights ({teacher.get('architecture')})"
    return f"{said['pretraining']}; teacher {teacher.get('name')} ({teacher.get('weights')})"


def _protocol(said: dict[str, Any]) -> str:
    if not said.get("task"):
        return "pretraining without labels; no head"
    share = f"{100 * said['fraction']:g} % of training {said['fraction_unit']}s"
    labels = said["settings"].get("protocol")
    by = f" ({labels})" if labels else ""
    return f"finetuned for {said['task']} with the labels{by} of {share}"


def _metric(said: dict[str, Any]) -> str:
    if not (result := said.get("result")):
        return "not measured"
    headline, where = result["headline"], ", ".join(result["splits"])
    value = "undefined" if headline["iou"] is None else f"{headline['iou']} %"
    counted = result.get("counted", " at probability 0.5")
    return f"IoU {value}, {headline['name']}, {result['frames']} frames of {where}{counted}"
