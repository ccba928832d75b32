# SPDX-License-Identifier: Apache-2.0
"""Signed distances and the two coordinate systems of a synthetic portrait.

Every function takes broadcastable tensors and returns one of the broadcast shape. Distances are negative inside and
close
to Euclidean near the outline, which is all that a one-pixel antialiased edge needs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

EYE_LINE = -0.044  # y of the eyes in the crop: the FFHQ rule centres it 0.1 of the eye-mouth distance below them
HEAD_RADIUS = 0.62  # radius of the sphere that features slide on when the head turns


@dataclass(frozen=True)
class Grid:
    """Pixel centres of a batch of crops, N×S×S each: `x, y` on the head, `fx, fy` on the turned face."""

    x: Tensor
    y: Tensor
    fx: Tensor
    fy: Tensor
    pixel: Tensor  # N×1×1, size of a pixel in head units

    def alpha(self, distance: Tensor, softness: float = 1.0) -> Tensor:
        """Coverage in [0,1] of the shape with this signed distance; the edge is `softness` pixels wide."""
        return (0.5 - distance / (self.pixel * softness)).clamp(0, 1)


def make_grid(size_px: int, tilt: Tensor, zoom: Tensor, shift: Tensor, yaw: Tensor, pitch: Tensor) -> Grid:
    """Coordinates of the pixel centres under each person's pose; all pose tensors are N×1×1, shift N×1×1×2."""
    line = (torch.arange(size_px, device=tilt.device, dtype=torch.float32) + 0.5) * (2 / size_px) - 1
    px, py = line[None, None, :] - shift[..., 0], line[None, :, None] - shift[..., 1]
    cos, sin = torch.cos(tilt) / zoom, torch.sin(tilt) / zoom
    x, y = cos * px + sin * py, -sin * px + cos * py - EYE_LINE
    ratio = (x / HEAD_RADIUS).clamp(-0.999, 0.999)
    fx = torch.where(x.abs() < 0.95 * HEAD_RADIUS, HEAD_RADIUS * torch.sin(torch.asin(ratio) - yaw), x)
    fy = y - 0.035 * pitch * (1 - ratio**2).clamp(min=0)
    return Grid(x, y, fx, fy, 2 / size_px / zoom)


def to_pixels(
    points: Tensor, size_px: int, tilt: Tensor, zoom: Tensor, shift: Tensor, yaw: Tensor, pitch: Tensor
) -> Tensor:
    """Where points given on the face (N×K×2) land in the crop, in pixels; inverse of the mapping of `make_grid`.

    A pixel centre is at i + 0.5 in this frame, so the value minus one half is an array index.
    """
    tilt, zoom, yaw, pitch = (t.reshape(-1, 1) for t in (tilt, zoom, yaw, pitch))
    x = HEAD_RADIUS * torch.sin(torch.asin((points[..., 0] / HEAD_RADIUS).clamp(-0.999, 0.999)) + yaw)
    y = points[..., 1] + 0.035 * pitch * (1 - (x / HEAD_RADIUS) ** 2).clamp(min=0) + EYE_LINE
    cos, sin = torch.cos(tilt) * zoom, torch.sin(tilt) * zoom
    shift = shift.reshape(-1, 1, 2)
    out = torch.stack([cos * x - sin * y + shift[..., 0], sin * x + cos * y + shift[..., 1]], -1)
    return (out + 1) * (size_px / 2)


def superellipse(x: Tensor, y: Tensor, width: Tensor, height: Tensor, power: Tensor | float = 2.0) -> Tensor:
    """|x/width|^p + |y/height|^p = 1, half-axes width and height."""
    p = power
    radius = ((x / width).abs().clamp(min=1e-4) ** p + (y / height).abs().clamp(min=1e-4) ** p) ** (1 / p)
    return (radius - 1) * torch.minimum(torch.as_tensor(width), torch.as_tensor(height))


def ellipse(x: Tensor, y: Tensor, width: Tensor | float, height: Tensor | float) -> Tensor:
    u, v = x / width, y / height
    r = torch.sqrt(u * u + v * v + 1e-6)
    # dividing by the gradient's length keeps thin ellipses as sharp as round ones
    slope = torch.sqrt((u / width) ** 2 + (v / height) ** 2 + 1e-6) / r
    return (r - 1) / slope


def band(value: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """Distance to the strip low < value < high."""
    return torch.maximum(low - value, value - high)


def segment(x: Tensor, y: Tensor, ax: Tensor, ay: Tensor, bx: Tensor, by: Tensor) -> Tensor:
    """Unsigned distance to the segment a-b."""
    dx, dy = bx - ax, by - ay
    t = (((x - ax) * dx + (y - ay) * dy) / (dx * dx + dy * dy + 1e-8)).clamp(0, 1)
    return torch.sqrt((x - ax - t * dx) ** 2 + (y - ay - t * dy) ** 2 + 1e-9)


def bump(x: Tensor, y: Tensor, width: Tensor | float, height: Tensor | float) -> Tensor:
    """exp(-(x/width)² - (y/height)²)."""
    return torch.exp(-((x / width) ** 2) - (y / height) ** 2)


def smooth(value: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """0 below low, 1 above high, cubic between."""
    t = ((value - low) / (high - low)).clamp(0, 1)
    return t * t * (3 - 2 * t)
