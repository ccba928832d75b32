# SPDX-License-Identifier: Apache-2.0
"""One photo edited end to end: read → find → parse → edit → composite.

Each stage is a function from frozen records to a frozen record, so any one can be replaced and the rest kept. `edit`
joins them, measures the outcome and returns an `EditResult`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from faceedit.alignment import PhotoRegion
from faceedit.classification import STARTER, attribute_probabilities, load_classifier
from faceedit.compositing import Composite, paste_back
from faceedit.dyeing import continue_dye
from faceedit.editors.base import AttributeEdit, ComponentSize, EditedFace, Editor, EditRequest, load_editor
from faceedit.errors import UsageError, WeightsError
from faceedit.images import Photo, read_image, write_image
from faceedit.labels import CELEBAMASK_HQ
from faceedit.matting import refine_mask
from faceedit.networks.classifier import AttributeClassifier
from faceedit.networks.resizing import resize
from faceedit.parsing import CROP_PX, AlignedFace, FaceParser, FaceRecord, image_tensor, label_map, load_parser

FEATHER_PX = 3.0
"""Width of the composite's soft edge, in pixels of the aligned crop."""


@dataclass(frozen=True, slots=True, eq=False)
class EditResult:
    """An edited photo with everything needed to judge the edit.

    pixels:             uint8 H×W×3, the photo's own size; byte-identical to the input wherever `region` is 0.
    record:             the aligned, parsed face before the edit.
    face:               the aligned crop after it, 256×256.
    mask, edited_mask:  uint8 label maps of that crop, before and after.
    region:             float32 H×W in [0, 1], the composited region in the photo.
    report:             seed, weights, requested and measured attributes, edited area, seconds (JSON-ready).
    """

    photo: Photo
    pixels: NDArray[np.uint8]
    record: FaceRecord
    face: Image.Image
    mask: NDArray[np.uint8]
    edited_mask: NDArray[np.uint8]
    region: NDArray[np.float32]
    report: dict[str, Any]

    @property
    def image(self) -> Image.Image:
        """The edited photo, same size as the input: pixels alone, RGB."""
        return Image.fromarray(self.pixels)

    @property
    def is_changed(self) -> bool:
        """Whether any pixel differs from the photo's."""
        return not np.array_equal(self.pixels, self.photo.pixels)

    def save(self, path: str | Path) -> None:
        """Write the edited photo in the format of the suffix, with what `faceedit edit` writes: the photo's alpha,
        resolution and camera data, and, if any pixel changed, a note that a trained model made part of it.

        PNG and TIFF keep `pixels` exactly; JPEG and WebP are lossy everywhere.
        Raises: UsageError for a suffix of no format; ImageWriteError.
        """
        write_image(path, self.pixels, self.photo, provenance=self.is_changed)


def read(source: str | Path | Image.Image | NDArray[np.uint8] | Photo) -> Photo:
    """The photo as upright sRGB pixels; a `Photo` passes through."""
    return source if isinstance(source, Photo) else read_image(source)


def find(photo: Photo, parser: FaceParser, index: int = 0) -> AlignedFace:
    """Locate and align face number `index` (0 is the largest)."""
    return parser.find(photo.pixels, index)


def parse(photo: Photo, face: AlignedFace, parser: FaceParser) -> FaceRecord:
    """Parse the aligned face."""
    return parser.parse(photo.pixels, face)


def apply(face: FaceRecord, editor: Editor, request: EditRequest, seed: int = 0) -> EditedFace:
    """Edit the aligned, parsed face."""
    return editor.apply(face, request, seed)


def composite(photo: Photo, face: FaceRecord, edited: EditedFace, parser: FaceParser | None = None) -> Composite:
    """Add what the edit changed to the photo, at the photo's resolution and inside the edit's region only.

    Hair ends in strands that a crop of 256 pixels cannot resolve, so a region with hair in it is first refined against
    the photo itself, unless the hair goes; other regions keep the parse's own soft edge, feathered. With a parser, an
    edit that dyes hair goes on outside its square (`faceedit.dyeing`).
    Raises: WeightsError for an edit with infinity or NaN in it, which no pixel can show.
    """
    _check_finite(edited)
    side = edited.before.shape[-1]
    alignment = edited.alignment or face.alignment.resized(side)
    region = np.ascontiguousarray(resize(edited.region, side)[0, 0].float().cpu().numpy())
    detail = None
    if "hair" in edited.parts and edited.refine:
        mask = np.ascontiguousarray(edited.region[0, 0].float().cpu().numpy())
        coarse = (edited.alignment or face.alignment).resized(mask.shape[0]).unwarp_soft(mask)
        refined = refine_mask(photo.pixels[coarse.slices()], coarse.values)
        detail = PhotoRegion(refined, coarse.box, coarse.photo_size)
    before, after = _crop_array(edited.before), _crop_array(edited.after)
    opacity = None if edited.opacity is None else edited.opacity[0, 0].float().cpu().numpy()
    feather_px = FEATHER_PX * side / CROP_PX
    done = paste_back(photo.pixels, before, after, alignment, region, feather_px, detail, opacity)
    return continue_dye(done, photo.pixels, face, edited, parser) if edited.dyes and parser is not None else done


def _check_finite(edited: EditedFace) -> None:
    for name in ("before", "after", "region", "opacity"):
        plane: Tensor | None = getattr(edited, name)
        if plane is not None and not plane.isfinite().all():
            lost = float((~plane.isfinite()).float().mean())
            raise WeightsError(
                f"composite: {name} of the edited face must be finite, got infinity or NaN in {lost:.2%} of it; check "
                "the editor's weights, or compute in float32"
            )


def _crop_array(crop: Tensor) -> NDArray[np.float32]:
    """1×3×S×S to float32 S×S×3, same range."""
    return np.ascontiguousarray(crop[0].permute(1, 2, 0).float().cpu().numpy())


def edit(
    photo: str | Path | Image.Image | NDArray[np.uint8] | Photo,
    attributes: Mapping[str, float] | None = None,
    *,
    request: EditRequest | None = None,
    editor: Editor | str = "maggan",
    weights: str | Path = "starter",
    parser: FaceParser | None = None,
    classifier: AttributeClassifier | None = None,
    face: int = 0,
    seed: int = 0,
    device: str = "cpu",
) -> EditResult:
    """Edit one face of a photo.

    Args:    photo a path, PIL image, uint8 array H×W×3 or a `Photo`; attributes name -> intensity in [0, 1], short for
             request=AttributeEdit(attributes); editor a loaded editor, or a name that is loaded with `weights` on
             `device`; parser and classifier default to the bundled ones; face 0 is the largest, 1 the next.
    Returns: EditResult; its image equals the input byte for byte outside the composited region.
    Raises:  UsageError and its kin for a wrong request; ImageReadError, NoFaceError, FaceTooSmallError,
             FaceCutOffError, WeightsError otherwise. Same seed, machine and number of threads: same
             bytes on the CPU.
    """
    wanted = _one_request(attributes, request)
    loaded = load_editor(editor, weights, device) if isinstance(editor, str) else editor
    where = str(loaded.device)
    parser = parser if parser is not None else load_parser(where)
    classifier = classifier if classifier is not None else load_classifier(where)

    seconds: dict[str, float] = {}
    with _timed(seconds, "read"):
        source = read(photo)
    with _timed(seconds, "find"):
        aligned = find(source, parser, face)
    with _timed(seconds, "parse"):
        record = parse(source, aligned, parser)
    with _timed(seconds, "edit"):
        edited = apply(record, loaded, wanted, seed)
    with _timed(seconds, "composite"):
        composited = composite(source, record, edited, parser)
        pixels, region = composited.pixels, composited.mask()
    with _timed(seconds, "measure"):
        edited_crop = image_tensor(record.alignment.warp_image(pixels))
        edited_labels = label_map(parser.parse_crop(edited_crop))
        measured = _measure(classifier, record.crop, edited_crop)

    report = {
        "photo": {
            "name": source.name,
            "width": pixels.shape[1],
            "height": pixels.shape[0],
            "notes": list(source.notes),
        },
        "face": {
            "index": int(face),
            "landmarks": record.landmarks.round(2).tolist(),
            "eye_distance_px": round(float(np.linalg.norm(record.landmarks[1] - record.landmarks[0])), 2),
        },
        "editor": loaded.name,
        "weights": {
            "editor": loaded.weights,
            "parser": parser.weights,
            "classifier": _classifier_name(classifier, where),
        },
        "seed": int(seed),
        "device": where,
        "requested": _described(wanted),
        "keep": _kept(wanted),
        "applied_difference": {name: round(float(value), 4) for name, value in edited.requested.items()},
        "measured": measured,
        "region": {
            "parts": list(edited.parts),
            "area_px": int((region > 0).sum()),
            "share_of_photo": round(float((region > 0).mean()), 6),
            "changed_px": int((pixels != source.pixels).any(-1).sum()),
        },
        "seconds": {stage: round(value, 4) for stage, value in seconds.items()},
    }
    if edited.details:
        report["details"] = dict(edited.details)
    return EditResult(
        photo=source,
        pixels=pixels,
        record=record,
        face=Image.fromarray(record.alignment.warp_image(pixels)),
        mask=record.labels,
        edited_mask=edited_labels,
        region=region,
        report=report,
    )


def _one_request(attributes: Mapping[str, float] | None, request: EditRequest | None) -> EditRequest:
    if attributes is not None and request is not None:
        raise UsageError(
            "edit: attributes and request must not both be given, got both; put the attributes in the request"
        )
    if request is not None:
        return request
    return AttributeEdit({} if attributes is None else attributes)


def _classifier_name(classifier: AttributeClassifier | None, device: str) -> str | None:
    """What the report calls the network that measured: a network of the caller's own has no name."""
    if classifier is None:
        return None
    return STARTER if classifier is load_classifier(device) else "custom"


def _kept(request: EditRequest) -> list[str]:
    """What the request names as not to change along."""
    attributes = request.attributes if isinstance(request, ComponentSize) else request
    return list(attributes.keep) if isinstance(attributes, AttributeEdit) else []


def _described(request: EditRequest) -> Any:
    """What was asked for, ready for JSON."""
    if isinstance(request, AttributeEdit):
        return dict(request.values)
    if isinstance(request, ComponentSize):
        attributes = {} if request.attributes is None else dict(request.attributes.values)
        return {"component": request.component, "scale": request.scale, **attributes}
    return type(request).__name__


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - start


def _measure(classifier: AttributeClassifier | None, before: Tensor, after: Tensor) -> dict[str, dict[str, float]]:
    """Attribute probabilities of the crop before and after; empty without a classifier."""
    if classifier is None:
        return {}
    return {
        moment: {name: round(value, 4) for name, value in attribute_probabilities(classifier, crop).items()}
        for moment, crop in (("before", before), ("after", after))
    }


def comparison_sheet(result: EditResult) -> NDArray[np.uint8]:
    """before | mask | after of the face, uint8 S×3S×3 at the photo's own resolution (256 <= S <= 768)."""
    native = round(CROP_PX / result.record.alignment.scale)
    closeup = result.record.alignment.resized(min(max(native, CROP_PX), 768))
    before = closeup.warp_image(result.photo.pixels)
    mask = F.interpolate(result.record.mask, size=before.shape[:2], mode="bilinear", align_corners=False)
    return np.concatenate([before, overlay(before, label_map(mask)), closeup.warp_image(result.pixels)], axis=1)


def overlay(pixels: NDArray[np.uint8], labels: NDArray[np.uint8], opacity: float = 0.55) -> NDArray[np.uint8]:
    """The label map's colours over an image of the same size; the background class stays as it is."""
    colours = CELEBAMASK_HQ.colorize(labels).astype(np.float32)
    blended = pixels * (1 - opacity) + colours * opacity
    return np.where((labels > 0)[..., None], blended.round(), pixels).astype(np.uint8)
