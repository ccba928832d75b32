# SPDX-License-Identifier: Apache-2.0
"""A soft face parse drawn with ellipses under a known similarity transform, and its true landmarks."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from faceedit.labels import CELEBAMASK_HQ

# part: (centre x, y, half width, half height) in units of the eye distance, origin between the eyes, y down;
# later parts cover earlier ones.
_PARTS = {
    "hair": (0.0, -0.3, 1.35, 1.5),
    "neck": (0.0, 1.9, 0.5, 0.7),
    "skin": (0.0, 0.35, 1.0, 1.35),
    "r_brow": (-0.5, -0.3, 0.3, 0.06),
    "l_brow": (0.5, -0.3, 0.3, 0.06),
    "r_eye": (-0.5, 0.0, 0.2, 0.09),
    "l_eye": (0.5, 0.0, 0.2, 0.09),
    "nose": (0.0, 0.4, 0.24, 0.36),
    "u_lip": (0.0, 1.02, 0.4, 0.12),
    "l_lip": (0.0, 1.1, 0.4, 0.12),
    "mouth": (0.0, 1.06, 0.3, 0.04),
}
_GLASSES = {"left": (-0.5, 0.02, 0.36, 0.25), "right": (0.5, 0.02, 0.36, 0.25)}
_NOSE_TIP_Y = 0.04 + 0.78 * 0.72


def face_parse(
    size: int = 256,
    eye_distance: float = 51.0,
    angle_deg: float = 0.0,
    centre: tuple[float, float] = (128.0, 118.0),
    hidden: Collection[str] = (),
    sunglasses: bool = False,
    softness: float = 1.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Soft mask (19,S,S) float32 and true landmarks (5,2). softness is the width of an edge in pixels."""
    turn = np.radians(angle_deg)
    axis = eye_distance * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    y, x = np.mgrid[:size, :size]
    local = (np.stack([x, y], -1) - np.array(centre)) @ np.linalg.inv(axis).T
    mask = np.zeros((19, size, size), np.float32)
    mask[0] = 1
    shapes = [(part, shape) for part, shape in _PARTS.items() if part not in hidden]
    if sunglasses:
        shapes += [("eye_g", shape) for shape in _GLASSES.values()]
    for part, (cx, cy, rx, ry) in shapes:
        u, v = (local[..., 0] - cx) / rx, (local[..., 1] - cy) / ry
        radius = np.hypot(u, v)
        # First-order signed distance of an ellipse, in pixels.
        distance = radius * (radius - 1) / np.maximum(np.hypot(u / rx, v / ry), 1e-6) * eye_distance
        cover = np.clip(0.5 - distance / softness, 0, 1).astype(np.float32)
        mask *= 1 - cover
        mask[CELEBAMASK_HQ.id(part)] += cover
    points = np.array([(-0.5, 0), (0.5, 0), (0, _NOSE_TIP_Y), (-0.4, 1.06), (0.4, 1.06)])
    return mask, points @ axis.T + np.array(centre)
