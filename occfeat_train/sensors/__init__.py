"""What a network looks through, each in one file; ``base`` says what a sensor is."""

from occfeat_targets.store.registry import Registry

SENSORS = Registry(
    "sensor",
    {
        "camera": "occfeat_train.sensors.camera:Camera",
        "lidar": "occfeat_train.sensors.lidar:Lidar",
    },
)
