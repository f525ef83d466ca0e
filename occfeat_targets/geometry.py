"""Rigid transforms and the pinhole projection, in float64. ``a_T_b`` is a 4x4 matrix that takes
points from frame b to frame a: ``a_T_c = a_T_b @ b_T_c``. Camera frames are OpenCV's: x right, y
down, z forward. Pixels are continuous: the image covers [0, W) x [0, H) in (u, v)."""

import numpy as np


def inverse_rigid(a_T_b: np.ndarray) -> np.ndarray:
    """Inverse of rigid transforms (..., 4, 4): ``[R | t]`` becomes ``[R' | -R't]``."""
    rotation_t = np.swapaxes(a_T_b[..., :3, :3], -1, -2)
    b_T_a = np.zeros_like(a_T_b)
    b_T_a[..., :3, :3] = rotation_t
    b_T_a[..., :3, 3:] = -rotation_t @ a_T_b[..., :3, 3:]
    b_T_a[..., 3, 3] = 1.0
    return b_T_a


def rotation_matrices(wxyz: np.ndarray) -> np.ndarray:
    """Rotation matrices (..., 3, 3) of quaternions (..., 4) in nuScenes' order w, x, y, z, which
    are normalised first, as pyquaternion does; a zero quaternion gives NaN."""
    q = np.asarray(wxyz, dtype=np.float64)
    with np.errstate(invalid="ignore"):
        q = q / np.linalg.norm(q, axis=-1, keepdims=True)
    w, v = q[..., 0, None, None], q[..., 1:]
    x, y, z = np.moveaxis(v, -1, 0)
    zero = np.zeros_like(x)
    cross = np.stack([zero, -z, y, z, zero, -x, -y, x, zero], axis=-1).reshape(*x.shape, 3, 3)
    # Rodrigues' formula: R = (w^2 - v.v) I + 2 v v' + 2 w [v]x
    scalar = w**2 - (v * v).sum(axis=-1)[..., None, None]
    return scalar * np.eye(3) + 2 * v[..., :, None] * v[..., None, :] + 2 * w * cross


def rigid(wxyz: np.ndarray, translation: np.ndarray) -> np.ndarray:
    """Transforms (..., 4, 4), float64, from quaternions (..., 4) and translations (..., 3) in m."""
    translation = np.asarray(translation, dtype=np.float64)
    a_T_b = np.zeros((*translation.shape[:-1], 4, 4))
    a_T_b[..., :3, :3] = rotation_matrices(wxyz)
    a_T_b[..., :3, 3] = translation
    a_T_b[..., 3, 3] = 1.0
    return a_T_b


def transform(a_T_b: np.ndarray, xyz_b: np.ndarray) -> np.ndarray:
    """Points (..., M, 3) of frame b in frame a, for ``a_T_b`` (..., 4, 4); float64."""
    rotation_t = np.swapaxes(a_T_b[..., :3, :3], -1, -2)
    return xyz_b.astype(np.float64) @ rotation_t + a_T_b[..., None, :3, 3]


def yaw(a_T_b: np.ndarray) -> np.ndarray:
    """Heading (...,) of frame b's x axis in frame a's x-y plane, radians, for (..., 4, 4)."""
    return np.arctan2(a_T_b[..., 1, 0], a_T_b[..., 0, 0])


def scale_intrinsics(K: np.ndarray, from_hw: tuple[int, int], to_hw: tuple[int, int]) -> np.ndarray:
    """Intrinsics (..., 3, 3) of an image resized from (H, W) to (H', W'), in continuous pixels."""
    scale = np.array([to_hw[1] / from_hw[1], to_hw[0] / from_hw[0], 1.0])
    return K * scale[:, None]


def project(
    K: np.ndarray, cam_T_ego: np.ndarray, xyz_ego: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Ego points (M, 3), metres, in every camera: ``(uv, depth)``, float64 (N, M, 2) continuous
    pixels (meaningless where depth <= 0) and (N, M) metres along the optical axis. ``K`` is
    float64 (N, 3, 3), ``cam_T_ego`` (N, 4, 4), each at its camera's own exposure time."""
    xyz_cam = transform(cam_T_ego, xyz_ego[None])
    depth = xyz_cam[..., 2]
    uvw = xyz_cam @ np.swapaxes(K, -1, -2)
    with np.errstate(divide="ignore", invalid="ignore"):
        return uvw[..., :2] / uvw[..., 2:], depth


def in_image(uv: np.ndarray, depth: np.ndarray, hw: tuple[int, int]) -> np.ndarray:
    """Valid projections, bool (N, M): depth > 0 and inside [0, W) x [0, H)."""
    return (depth > 0) & ((uv >= 0) & (uv < hw[::-1])).all(axis=-1)
