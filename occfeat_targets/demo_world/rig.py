"""The sensor rig of the demo car: calibration, sensor timing, lidar beams, quaternions.

Calibration is that of one real nuScenes car, rounded to six decimals. Rotations are unit
quaternions ``(w, x, y, z)``; ``ego_T_sensor`` takes points from the sensor frame to the vehicle
frame (x forward, y left, z up; metres). Camera frame: x right, y down, z along the optical axis.
"""

import math
from dataclasses import dataclass

import numpy as np

IMAGE_HW = 900, 1600
KEYFRAME_SECONDS = 0.5


@dataclass(frozen=True)
class Sensor:
    """One calibrated sensor: its place on the car, its intrinsics, its firing time."""

    channel: str
    translation: tuple[float, float, float]  # of ego_T_sensor, metres
    rotation: tuple[float, float, float, float]  # of ego_T_sensor, wxyz
    intrinsics: tuple[float, ...]  # focal, centre_u, centre_v in pixels of 1600x900; lidar: ()
    early_us: int  # microseconds before the keyframe's timestamp at which it fires

    def camera_matrix(self) -> np.ndarray:
        """A camera's K, (3, 3) float64, from camera coordinates to continuous pixels (u, v)."""
        focal, centre_u, centre_v = self.intrinsics
        return np.array([[focal, 0, centre_u], [0, focal, centre_v], [0, 0, 1]], dtype=np.float64)


# Translation (3) and rotation (4) of every sensor.
_POSES = {
    "CAM_FRONT_LEFT": (1.523878, 0.494631, 1.509328, 0.675727, -0.673627, 0.212140, -0.211228),
    "CAM_FRONT": (1.700791, 0.015946, 1.510958, 0.499802, -0.503032, 0.499780, -0.497371),
    "CAM_FRONT_RIGHT": (1.550848, -0.493405, 1.495748, 0.206035, -0.202694, 0.682451, -0.671361),
    "CAM_BACK_LEFT": (1.035691, 0.484795, 1.590970, 0.692419, -0.703162, -0.116483, 0.112033),
    "CAM_BACK": (0.028326, 0.003451, 1.579103, 0.503787, -0.497402, -0.494185, 0.504550),
    "CAM_BACK_RIGHT": (1.014878, -0.480568, 1.562395, 0.122810, -0.132401, -0.700431, 0.690496),
    "LIDAR_TOP": (0.943713, 0.0, 1.840230, 0.707796, -0.006492, 0.010646, -0.706307),
}
# Intrinsics (3) of every camera, and by how many microseconds it fires before the lidar.
_CAMERAS = {
    "CAM_FRONT_LEFT": ((1272.597947, 826.615493, 479.751654), 43107),
    "CAM_FRONT": ((1266.417203, 816.267020, 491.507066), 35491),
    "CAM_FRONT_RIGHT": ((1260.847445, 807.968245, 495.334427), 27612),
    "CAM_BACK_LEFT": ((1256.741481, 792.112574, 492.775747), 528),
    "CAM_BACK": ((809.220991, 829.219600, 481.778424), 10426),
    "CAM_BACK_RIGHT": ((1259.513741, 807.252905, 501.195799), 20058),
}
SENSORS = tuple(
    Sensor(channel, pose[:3], pose[3:], *_CAMERAS.get(channel, ((), 0)))
    for channel, pose in _POSES.items()
)
CAMERAS, LIDAR_SENSOR = SENSORS[:-1], SENSORS[-1]

LIDAR_BEAMS = 32
LIDAR_COLUMNS = 1084
LIDAR_MAX_RANGE = 100.0
LIDAR_RANGE_NOISE = 0.01


def quaternion_from_euler(yaw: float, pitch: float = 0.0, roll: float = 0.0) -> list[float]:
    """Quaternion wxyz of R = Rz(yaw) Ry(pitch) Rx(roll); angles in radians."""
    cy, sy = math.cos(yaw / 2), math.sin(yaw / 2)
    cp, sp = math.cos(pitch / 2), math.sin(pitch / 2)
    cr, sr = math.cos(roll / 2), math.sin(roll / 2)
    return [
        cr * cp * cy + sr * sp * sy,
        sr * cp * cy - cr * sp * sy,
        cr * sp * cy + sr * cp * sy,
        cr * cp * sy - sr * sp * cy,
    ]
