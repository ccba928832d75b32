# SPDX-License-Identifier: Apache-2.0
"""Face-mesh landmarks of a folder of photos, for the parser recipe's `photo_contours`.

A program by itself, because MediaPipe pins old versions of packages that faceedit shares with it. In an environment of
its own:

    pip install 'mediapipe>=0.10.14,<0.10.22'
    python training/face_mesh.py PHOTOS -o contours.npz

Writes one float32 478×2 array a photo, keyed by its path below PHOTOS ("./x/1.jpg"): x, y in pixels, pixel centres at
integers. Photos without a face are left out. The model ships inside the mediapipe wheel (Apache-2.0); nothing is
downloaded.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description="Write face-mesh landmarks of a folder of photos.")
    parser.add_argument("photos", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()

    import cv2
    import mediapipe
    import numpy as np

    files = sorted(p for p in arguments.photos.rglob("*") if p.suffix.lower() in {".jpg", ".jpeg", ".png"})
    if not files:
        parser.error(f"photos must be a folder of photos, got {arguments.photos}; give one that holds some")
    landmarks: dict[str, Any] = {}
    with mediapipe.solutions.face_mesh.FaceMesh(
        static_image_mode=True, max_num_faces=1, refine_landmarks=True, min_detection_confidence=0.3
    ) as mesh:
        for path in files:
            pixels = cv2.imread(str(path))
            if pixels is None:
                continue
            found = mesh.process(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)).multi_face_landmarks
            if found:
                height, width = pixels.shape[:2]
                points = [(point.x * width - 0.5, point.y * height - 0.5) for point in found[0].landmark]
                landmarks[f"./{path.relative_to(arguments.photos).as_posix()}"] = np.array(points, dtype=np.float32)
    np.savez_compressed(arguments.output, **landmarks)
    print(f"{len(landmarks)} of {len(files)} photos show a face: {arguments.output}")


if __name__ == "__main__":
    main()
