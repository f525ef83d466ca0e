"""A network for one rig of cameras as an ONNX file, of operations that TensorRT has too."""

import importlib.util
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from occfeat_train.export import ExportedNetwork
from occfeat_train.rig import Camera, calibration, write_rig
from occfeat_train.runs.run import RunError, replace, write_json


class FixedNetwork(nn.Module):
    """An exported network whose cameras are constants; ``image_hw`` is the (H, W) of its images,
    ``names`` those of its outputs."""

    def __init__(self, network: ExportedNetwork, cameras: Sequence[Camera]):
        super().__init__()
        height, width = self.image_hw = tuple(network.description["model"]["image_size"])
        feature_hw = -(-height // 8), -(-width // 8)
        K, cam_T_ego = calibration(cameras, self.image_hw)
        self.network = network
        self.lift = network.bev_net.lift.fixed(K, cam_T_ego, self.image_hw, feature_hw)
        self.images = torch.zeros(1, len(cameras), 3, height, width)
        with torch.inference_mode():
            self.names = tuple(self._predict(self.images))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """What :class:`ExportedNetwork` returns, in the order of ``names``, for images
        (1, N, 3, H, W), RGB in 0..1, in the order of the cameras."""
        return tuple(self._predict(images).values())

    def _predict(self, images: Tensor) -> dict[str, Tensor]:
        net = self.network.bev_net
        volume = self.lift(net.encoder(images[0])[None])
        return self.network.predict(net.decoder(net.compressor(volume)))


def require_exporter() -> None:
    """RunError: what writes ONNX files is not installed."""
    if not all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript")):
        raise RunError("--onnx needs onnx and onnxscript: pip install 'occfeat[export]'")


def write_onnx(network: ExportedNetwork, cameras: Sequence[Camera], directory: Path) -> None:
    """Write ``model.onnx``, ``images`` to the network's outputs for these cameras, and
    ``calibration.json``, which says what they are. RunError: see :func:`require_exporter`; or the
    network does not look through cameras."""
    require_exporter()
    fixed = FixedNetwork(network.require_cameras(), cameras).eval()
    # It warns of what neither of us uses.
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    names: Any = {"input_names": ["images"], "output_names": list(fixed.names)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        program = torch.onnx.export(fixed, (fixed.images,), dynamo=True, verbose=False, **names)
    assert program is not None
    replace(directory / "model.onnx", lambda part: program.save(part, external_data=False))
    write_json(directory / "calibration.json", write_rig(cameras))
