"""What a network can be finetuned for and evaluated on, each in one file; see ``base``."""

from occfeat_targets.store.registry import Registry

TASKS = Registry(
    "task",
    {
        "vehicle": "occfeat_train.tasks.vehicle:VehicleSegmentation",
        "map": "occfeat_train.tasks.map:MapSegmentation",
        "lidarseg": "occfeat_train.tasks.lidarseg:LidarSegmentation",
        "open-vocabulary": "occfeat_train.tasks.open_vocabulary:OpenVocabulary",
    },
)
