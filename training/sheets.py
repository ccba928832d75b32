# SPDX-License-Identifier: Apache-2.0
"""Sample sheets: grids of images for a person to look at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from faceedit.atomic import replacing


def image_sheet(columns: Sequence[Tensor], gap_px: int = 2) -> Tensor:
    """Lay image batches side by side: one row a sample, one column a batch.

    Args:    columns of N×3×H×W or N×1×H×W float in [-1, 1], all of one N and size (a single channel is drawn grey).
    Returns: uint8 H'×W'×3, with white gaps.
    """
    if not columns or len({tuple(column.shape[i] for i in (0, 2, 3)) for column in columns}) != 1:
        shapes = [tuple(column.shape) for column in columns]
        raise ValueError(f"image_sheet: columns must share N, H and W, got {shapes}; resize them first")
    cells = torch.stack([column.detach().float().cpu().expand(-1, 3, -1, -1) for column in columns], dim=1)
    cells = torch.nn.functional.pad(cells, (0, gap_px, 0, gap_px), value=1.0)
    rows, across, _, height, width = cells.shape
    flat = cells.permute(0, 3, 1, 4, 2).reshape(rows * height, across * width, 3)
    return ((flat.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def write_png(path: Path, pixels: Tensor) -> None:
    """Write uint8 H×W×3 pixels; the file appears only when complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        Image.fromarray(np.ascontiguousarray(pixels.numpy())).save(file, format="PNG")
