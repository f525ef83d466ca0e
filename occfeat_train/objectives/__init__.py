"""What a network can be pretrained on, each in one file; ``base`` says what an objective is."""

from occfeat_targets.store.registry import Registry

OBJECTIVES = Registry(
    "objective",
    {
        "occfeat": "occfeat_train.objectives.occfeat:OccFeat",
        "img-also": "occfeat_train.objectives.img_also:ImgAlso",
        "pop3d": "occfeat_train.objectives.pop3d:Pop3d",
        "scalr": "occfeat_train.objectives.scalr:ScaLR",
        "slidr": "occfeat_train.objectives.slidr:SLidR",
        "also": "occfeat_train.objectives.also:Also",
    },
)
