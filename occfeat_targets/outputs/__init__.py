"""What is stored: one module each, everything about it. ``base`` says what an output must offer."""

from occfeat_targets.store.registry import Registry

OUTPUTS = Registry(
    "output",
    {
        "calibration": "occfeat_targets.outputs.calibration:Calibration",
        "images": "occfeat_targets.outputs.images:Images",
        "voxels": "occfeat_targets.outputs.voxels:Voxels",
        "map": "occfeat_targets.outputs.map:Map",
        "points": "occfeat_targets.outputs.points:Points",
        "boxes": "occfeat_targets.outputs.boxes:Boxes",
        "map_devkit": "occfeat_targets.outputs.map_devkit:MapDevkit",
        "tokens": "occfeat_targets.outputs.tokens:Tokens",
        "lidarseg": "occfeat_targets.outputs.lidarseg:Lidarseg",
        "superpixels": "occfeat_targets.outputs.superpixels:Superpixels",
    },
)
"""In the order in which they are drawn over each other. All but :data:`OPTIONAL` are in every store
(``map`` if the dataset has one), with the settings of the section of their name."""
OPTIONAL = ("map_devkit", "tokens", "lidarseg", "superpixels")
"""In a store if the settings' ``outputs`` names them."""
