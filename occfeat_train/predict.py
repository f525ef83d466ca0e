"""What a network makes of one's own images: of any cameras, without a store or labels."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import torch
from PIL import Image

from occfeat_targets.store.settings import ConfigError, Size
from occfeat_train.augment import NO_AUGMENT, draw, network_inputs
from occfeat_train.export import DESCRIPTION, ExportedNetwork, load_network
from occfeat_train.rig import Camera, calibration
from occfeat_train.runs.run import Run, RunError, replace
from occfeat_train.tasks.masks import MaskTask
from occfeat_train.view import draw_masks


class Seen(NamedTuple):
    """What a network saw and predicts."""

    images: dict[str, np.ndarray]
    """By camera, uint8 (H, W, 3), RGB."""
    masks: dict[str, np.ndarray]
    """By class, probabilities float32 (X, Y)."""


def open_network(path: Path, plugins: Collection[str] = ()) -> ExportedNetwork:
    """That of a run, or an exported one. RunError: neither is there, or it predicts no masks;
    ConfigError: it names a plug-in that is not among ``plugins``."""
    if not (path / "run.json").exists() and not (path / DESCRIPTION).exists():
        raise RunError(f"{path} is neither a run nor an exported network: name one's directory")
    is_run = (path / "run.json").exists()
    network = ExportedNetwork.of_run(Run(path), plugins) if is_run else load_network(path, plugins)
    network.require_cameras()
    if not isinstance(network.objective, MaskTask):
        raise RunError(f"{path} is a {network.title}, which predicts no masks: name a finetuning's")
    return network


def read_images(cameras: Sequence[Camera], files: Sequence[Path], hw: Size) -> np.ndarray:
    """Images of some cameras resized to (H, W) as a build does: uint8 (N, H, W, 3), RGB.

    ConfigError, naming camera and file: one can't be read, or is not of the size that its ``K`` is
    for; or there is not a file for each camera.
    """
    if len(files) != len(cameras):
        names = ", ".join(camera.name for camera in cameras)
        raise ConfigError(f"{len(files)} images for {len(cameras)} cameras: give one each, {names}")
    images = np.empty((len(cameras), *hw, 3), np.uint8)
    for camera, file, image in zip(cameras, files, images, strict=True):
        try:
            opened = Image.open(file)
            if opened.size[::-1] != camera.image_hw:
                wanted = "x".join(map(str, camera.image_hw))
                raise ValueError(f"it is {opened.height}x{opened.width}, its K is for {wanted}")
            resized = opened.convert("RGB").resize((hw[1], hw[0]), Image.Resampling.BILINEAR)
            image[:] = np.asarray(resized)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ConfigError(f"camera {camera.name}: cannot use {file}: {error}") from error
    return images


def predict_masks(
    network: ExportedNetwork, cameras: Sequence[Camera], files: Sequence[Path], device: torch.device
) -> Seen:
    """What a network of :func:`open_network` makes of images as of :func:`read_images`."""
    description, task = network.description, cast(MaskTask, network.objective)
    height, width = description["stored_image_size"]
    images = read_images(cameras, files, (height, width))
    K, cam_T_ego = calibration(cameras, (height, width))
    batch = {"images": torch.from_numpy(images)[None], "K": K, "cam_T_ego": cam_T_ego}
    on_device = {name: values.to(device) for name, values in batch.items()}
    draws = draw(NO_AUGMENT, 0, 0, torch.zeros(1, dtype=torch.int64), len(cameras))
    with torch.inference_mode():
        size = tuple(description["model"]["image_size"])
        inputs = network_inputs(on_device, draws, size, 0.0)
        predicted = network.to(device)(inputs["images"], inputs["K"], inputs["cam_T_bev"])
        masks = task.probability(predicted)[0].cpu().numpy()
    names = [camera.name for camera in cameras]
    return Seen(dict(zip(names, images, strict=True)), dict(zip(task.classes, masks, strict=True)))


def write_prediction(network: ExportedNetwork, seen: Seen, out: Path, title: str) -> None:
    """``prediction.png`` and ``prediction.npz`` in the directory ``out``, which is made.

    The npz has ``probability`` float32 (K, X, Y); ``classes``, names (K,); ``x`` float64 (X,) and
    ``y`` (Y,), the centres of the cells in ego, metres; ``cameras``, names (N,).
    """
    grid = network.bev_net.lift.grid
    x, y = grid.bev_centres()
    arrays = {"probability": np.stack([*seen.masks.values()]), "classes": [*seen.masks]}
    arrays |= {"x": x, "y": y, "cameras": [*seen.images]}
    out.mkdir(parents=True, exist_ok=True)
    figure = draw_masks(title, seen.images, seen.masks, grid)
    replace(out / "prediction.png", lambda part: figure.savefig(part, dpi=75, format="png"))

    def save(part: Path) -> None:
        with part.open("wb") as file:  # by its name, numpy would add an ending
            np.savez_compressed(file, **arrays)

    replace(out / "prediction.npz", save)
