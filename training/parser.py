# SPDX-License-Identifier: Apache-2.0
"""Train the starter face parser: synthetic portraits under domain randomisation, then its own opinion of real photos.

Synthetic portraits give exact labels under colours, light and cameras that vary more than the world does. Unlabelled
photos join by the mean-teacher method (Tarvainen and Valpola 2017): the averaged network labels a clean crop, and the
network being trained must agree with it on the same crop after a random warp, recolouring, blur and compression. Where
face-mesh landmarks of the photos are given, they overrule the teacher on eyes, brows, nose and lips (contours.py):
without them small errors of the teacher grow, because a student that shares them is rewarded.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from faceedit.labels import CELEBAMASK_HQ
from faceedit.networks.parser import ParserConfig, ParserNet
from faceedit.training import cache
from faceedit.training.config import AdamConfig, require
from faceedit.training.contours import BARE, DRAWN, UNKNOWN
from faceedit.training.degradation import (
    backdrops,
    flare,
    flip_some,
    occlude,
    photograph,
    random_warp,
    recolour_regions,
    replace_background,
    warp_image,
    warp_labels,
)
from faceedit.training.framed_photos import FramedPhotos, framed_photos
from faceedit.training.hair_ends import below_long_hair, could_be_hair, lengthen, long_hair
from faceedit.training.labelled_portraits import LabelledPortraits, labelled_portraits
from faceedit.training.parser_evaluation import header_metrics, parser_scores
from faceedit.training.segmentation import SegmentationRecipe, class_weights, dice_loss, overlay_sheet
from faceedit.training.task import Task, TrainingContext, start_from

# Cross-entropy weight by class: thin parts would otherwise be bought off by hair and ground.
_WEIGHTS = {
    **dict.fromkeys(("l_brow", "r_brow", "l_eye", "r_eye", "mouth", "u_lip", "l_lip", "eye_g"), 1.5),
    **dict.fromkeys(("ear_r", "neck_l"), 1.5),  # 4 found twice as much necklace as there is
}
_FADING = ("l_eye", "r_eye", "l_brow", "r_brow", "nose", "mouth", "u_lip", "l_lip", "l_ear", "r_ear")


@dataclass(frozen=True, slots=True)
class ParserRecipe(SegmentationRecipe):
    """A `task: parser` recipe. `photos` None trains on synthetic portraits alone; `photo_contours` is a file of their
    landmarks, written by training/face_mesh.py. `photo_from` is the share of the run after which photos join;
    `photo_teacher` names weights that label the photos once, instead of the averaged network all along;
    `photo_backdrops` is the share of synthetic portraits that stand before a piece of a photo's background;
    `plain_share` is the share that is left as it was rendered: sharp, in its own colours, upright; photos whose hair
    reaches the mouth by the opinion of `photo_teacher` are drawn `long_hair_weight` times as often as others."""

    network: ParserConfig = field(default_factory=ParserConfig)
    optimizer: AdamConfig = field(
        default_factory=lambda: AdamConfig(rate=1e-3, beta1=0.9, warmup_steps=100, decay_from=0.3)
    )
    photos: Path | None = None
    photo_contours: Path | None = None
    photo_teacher: str | None = None
    photo_batch: int = 6
    photo_weight: float = 1.0
    photo_from: float = 0.3
    photo_backdrops: float = 0.55
    plain_share: float = 0.3
    long_hair_weight: float = 3.0
    confident: float = 0.8

    def __post_init__(self) -> None:
        SegmentationRecipe.__post_init__(self)
        size_px = self.network.size_px
        require(size_px > 0 and size_px % 32 == 0, "network.size_px", "a positive multiple of 32", size_px)
        require(self.photo_batch > 0, "photo_batch", "positive", self.photo_batch)
        require(0 <= self.photo_weight < math.inf, "photo_weight", "0 or more", self.photo_weight)
        require(0 <= self.photo_backdrops <= 1, "photo_backdrops", "in [0, 1]", self.photo_backdrops)
        require(0 <= self.photo_from <= 1, "photo_from", "in [0, 1]", self.photo_from)
        require(0 <= self.plain_share <= 1, "plain_share", "in [0, 1]", self.plain_share)
        require(self.long_hair_weight > 0, "long_hair_weight", "positive", self.long_hair_weight)
        require(0 < self.confident < 1, "confident", "in (0, 1)", self.confident)
        needed = self.photo_contours is None or self.photos is not None
        require(needed, "photos", "the folder that photo_contours belongs to", self.photos)


class ParserTask(Task[ParserRecipe]):
    """Cross-entropy and overlap on synthetic portraits, confidence-weighted consistency on photos."""

    recipe_class = ParserRecipe

    def __init__(self, recipe: ParserRecipe, context: TrainingContext) -> None:
        super().__init__(recipe, context)
        network = ParserNet(recipe.network)
        start_from(network, recipe.initial_weights)
        self.net = context.add_network("parser", network, recipe.optimizer, average=True)
        self.people = _rendered(recipe, "train", recipe.people, _silent)
        self.test = _rendered(recipe, "test", recipe.test_people, _silent)
        self.photos: FramedPhotos | None = None
        self.held_out: FramedPhotos | None = None
        if (framed := _framed(recipe, _silent)) is not None:
            self.photos, self.held_out = framed.split()
            require(len(self.photos) > 0, "photos", "at least two photos with landmarks", len(framed))
        self.taught: np.ndarray | None = None
        if self.photos is not None and recipe.photo_teacher is not None:
            self.taught = _opinions(recipe.photo_teacher, self.photos, context)
        self.photo_weights = torch.ones(0 if self.photos is None else len(self.photos))
        if self.taught is not None:
            hair = torch.from_numpy(self.taught[..., 0] == CELEBAMASK_HQ.id("hair"))
            self.photo_weights[long_hair(hair)] = recipe.long_hair_weight
        self.class_weights = class_weights(CELEBAMASK_HQ, _WEIGHTS).to(context.device)

    @classmethod
    def prepare(cls, recipe: ParserRecipe, *, report: Any = None) -> None:
        _rendered(recipe, "train", recipe.people, report or _silent)
        _rendered(recipe, "test", recipe.test_people, report or _silent)
        _framed(recipe, report or _silent)

    def _photos_join(self, step: int) -> bool:
        return self.photos is not None and step >= self.recipe.photo_from * self.recipe.trainer.steps

    def batch(self, step: int) -> dict[str, Tensor]:
        """Rows of the caches, packed as they lie there; `vary` makes what the network sees."""
        generator = self.context.generator("parser", step)
        rows = torch.randint(len(self.people), (self.recipe.batch,), generator=generator).tolist()
        taken = {"people": _rows(self.people.images, rows), "people_labels": _rows(self.people.labels, rows)}
        if self.photos is not None:
            others = torch.randint(len(self.photos), (len(rows),), generator=generator).tolist()
            taken["grounds"] = _rows(self.photos.crops, others)
        if self._photos_join(step):
            assert self.photos is not None
            drawn = torch.multinomial(self.photo_weights, self.recipe.photo_batch, True, generator=generator)
            rows = drawn.tolist()
            taken |= {"photos": _rows(self.photos.crops, rows), "contours": self.photos.read_contours(rows)}
            if self.taught is not None:
                taken["opinions"] = _rows(self.taught, rows)
        return taken

    def vary(self, taken: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """What the network sees of `batch`, made on the run's device: a GPU would wait for processes that make it.

        Returns: image N×3×S×S in [-1, 1] and its labels N×S×S; of photos the clean crop `photo`, `student`, the same
                 crop warped by `grid` (N×S×S×2) and photographed, `drawn`, its contours warped so, and `soft`, an
                 opinion.
        """
        generator, place = self.context.generator("parser variations", step), self.context.device
        image, labels = flip_some(_light(taken["people"]), generator, taken["people_labels"].long())
        rendered, count, size = (image, labels), len(image), image.shape[-1]
        plain = (torch.rand(count, generator=generator) < self.recipe.plain_share).to(place)[:, None, None]
        grid = flare(count, size, generator, place)
        image, labels = warp_image(image, grid), warp_labels(labels, grid)
        image = recolour_regions(image, labels, generator)
        if "grounds" in taken:
            ground = backdrops(_light(taken["grounds"]), generator)
            chosen = torch.rand(count, generator=generator) < self.recipe.photo_backdrops
            image = replace_background(image, labels, ground, chosen.to(place))
        grid = random_warp(count, size, generator, device=place)
        image, labels = occlude(warp_image(image, grid), warp_labels(labels, grid), generator)
        image = torch.where(plain[:, None], rendered[0], photograph(image, generator))
        varied = {"image": image * 2 - 1, "labels": torch.where(plain, rendered[1], labels)}
        if "photos" in taken:
            maps = [taken["contours"]]
            if "opinions" in taken:
                maps.append(cache.unpack_mask(taken["opinions"]))
            photo, drawn, *soft = flip_some(_light(taken["photos"]), generator, *maps)
            if soft:
                photo, soft[0] = _with_longer_hair(photo, soft[0], generator)
            grid = random_warp(len(photo), size, generator, device=place)
            student = photograph(warp_image(photo, grid), generator)
            varied |= {"photo": photo * 2 - 1, "grid": grid, "student": student * 2 - 1}
            varied["drawn"] = warp_labels(drawn, grid)
            if soft:
                varied["soft"] = soft[0]
        return self.context.to_device(varied)  # channels_last, where asked for

    def training_step(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        self.net.train()
        batch = self.vary(batch, step)
        images = batch["image"]
        if "photo" in batch:
            images = torch.cat([images, batch["student"]])
        logits = self.net(images).float()
        count = len(batch["image"])
        loss = F.cross_entropy(logits[:count].contiguous(), batch["labels"], self.class_weights)
        scalars = {"synthetic": loss.detach()}
        if self.recipe.overlap:
            overlap = dice_loss(logits[:count], batch["labels"])
            loss = loss + self.recipe.overlap * overlap
            scalars["overlap"] = overlap.detach()
        if "photo" in batch:
            consistency, sure = self._consistency(logits[count:], batch)
            loss = loss + self.recipe.photo_weight * consistency
            scalars |= {"photo": consistency.detach(), "sure": sure}
        self.context.minimise("parser", loss, clip_norm=5.0)
        return scalars

    def _consistency(self, logits: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Weighted cross-entropy to the teacher's arg-max where it is sure; returns it and the share that is."""
        with torch.no_grad():
            soft = batch.get("soft")
            if soft is None:
                teacher = self.context.best("parser").eval()
                with self.context.fabric.autocast():
                    soft = teacher(batch["photo"]).float().softmax(1)
            soft = F.grid_sample(soft, batch["grid"], padding_mode="border", align_corners=False)
            clean = warp_image(batch["photo"], batch["grid"])
            target, weight = overrule(*pseudo_labels(soft, self.recipe.confident, clean), soft, batch["drawn"])
        per_pixel = F.cross_entropy(logits.contiguous(), target, reduction="none")
        return (weight * per_pixel).mean(), (weight > 0).float().mean()

    def validate(self) -> dict[str, float]:
        """`parser_scores` on unseen synthetic portraits and, with contours, on the photos that were held out."""
        return parser_scores(self.context.best("parser").eval(), self.test, self.held_out, self.context.device)

    def sample_sheet(self) -> Tensor:
        """Rows of (image, prediction): degraded synthetic people, then photos when there are any."""
        varied = self.vary(self.context.to_device(self.batch(0)), 0)
        images = [varied["image"][:8].cpu()]
        columns = len(images[0])
        if self.photos is not None:
            chosen = np.linspace(0, len(self.photos) - 1, 3 * columns).astype(int).reshape(3, columns)
            images += [self.photos.read(row.tolist()) for row in chosen]
        return overlay_sheet(self.context.best("parser").eval(), images, CELEBAMASK_HQ, self.context.device)

    def export(self, path: Path, metrics: dict[str, float]) -> None:
        data = "synthetic portraits rendered by this project"
        if self.recipe.photos is not None:
            data += "; unlabelled public-domain portrait photographs (self-training)"
        if self.recipe.photo_contours is not None:
            data += ", with eyes, brows, nose and lips drawn from MediaPipe Face Mesh landmarks"
        self.write_weights(
            path,
            "parser",
            self.recipe.network,
            self.context.best("parser"),
            training_data=data,
            label_scheme=CELEBAMASK_HQ.name,
            metrics=header_metrics(metrics),
        )


def _with_longer_hair(photo: Tensor, soft: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two photos in three with `lengthen`ed hair, over clothes and ground or behind the clothes; soft masks say so."""
    behind, before = ([CELEBAMASK_HQ.id(name) for name in names] for names in (("background",), ("neck", "cloth")))
    labels, count = soft.argmax(1), len(photo)
    chosen, in_front = (torch.rand(count, generator=generator) < share for share in (0.67, 0.75))
    chosen, in_front = (draw.to(photo.device).view(-1, 1, 1) for draw in (chosen, in_front))
    room = torch.isin(labels, torch.tensor(behind, device=photo.device))
    room |= in_front & torch.isin(labels, torch.tensor(before, device=photo.device))
    hair = CELEBAMASK_HQ.id("hair")
    photo, added = lengthen(photo, labels == hair, room & chosen, generator)
    one = F.one_hot(torch.tensor(hair, device=photo.device), soft.shape[1]).to(soft).view(1, -1, 1, 1)
    return photo, torch.where(added[:, None], one, soft)


def _rows(array: NDArray[np.uint8], rows: list[int]) -> Tensor:
    return torch.from_numpy(np.stack([array[row] for row in rows]))


def _light(pixels: Tensor) -> Tensor:
    """uint8 N×S×S×3 to N×3×S×S in [0, 1]."""
    return (cache.unpack_image(pixels) + 1) / 2


@torch.no_grad()
def _opinions(weights: str, photos: FramedPhotos, context: TrainingContext) -> np.ndarray:
    """What exported or registered `weights` say of each photo, averaged with its mirror image, packed N×S×S×3."""
    from faceedit.parsing import FaceParser
    from faceedit.registry import load_network

    teacher = FaceParser(load_network(weights, context.device, kind="parser"), weights)
    with context.fabric.autocast():
        parts = [teacher.parse_crop(cache.unpack_image(photos.crops[k : k + 8])) for k in range(0, len(photos), 8)]
    return np.concatenate([cache.pack_mask(part) for part in parts])


def pseudo_labels(soft: Tensor, confident: float, photo: Tensor) -> tuple[Tensor, Tensor]:
    """Labels N×S×S from a teacher's soft mask N×19×S×S of photos N×3×S×S, and how much each counts, in [0, 1].

    A class that covers much is confident up to its edges, so thin parts would wear away: every round the teacher is a
    little surer that the rim of a brow is skin. Where a thin part has a tenth of the vote, no other class is taught,
    and a thin part is taught from half of the vote on. Nor does anybody teach what is no hair below hair that reaches
    the mouth, unless it has another colour: a teacher that lost its ends, over dark clothes first, would make sure that
    they stay lost.
    """
    confidence, target = soft.max(1)
    thin = torch.zeros(soft.shape[1], dtype=torch.bool, device=soft.device)
    fading = [CELEBAMASK_HQ.id(name) for name in _FADING]
    thin[fading] = True
    is_thin = thin[target]
    contested = (soft[:, fading].sum(1) > 0.1) & ~is_thin
    hair, behind = CELEBAMASK_HQ.id("hair"), [CELEBAMASK_HQ.id(name) for name in ("background", "cloth", "neck")]
    contested |= (soft[:, hair] > 0.2) & torch.isin(target, torch.tensor(behind, device=target.device))
    ends = below_long_hair(target == hair) & could_be_hair(photo, target == hair)
    contested |= ends & torch.isin(target, torch.tensor(behind, device=target.device))
    least = torch.where(is_thin, 0.5, confident)
    weight = ((confidence - least) / (1 - least)).clamp(0, 1)
    return target, torch.where(contested, torch.zeros_like(weight), weight)


def overrule(target: Tensor, weight: Tensor, soft: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
    """Pseudo labels N×S×S and weights with what contours know put in their place.

    Args: soft N×19×S×S, the teacher's; drawn N×S×S as `contour_labels` makes them. A drawn part wins, unless the
          teacher sees something before it (hair over a brow, a microphone before the mouth): then nothing is taught.
          In the bare face a part that should have been drawn is skin; other beliefs (hair, glasses) stand. Around
          vague edges, and outside the face, nothing is taught where the teacher sees a part that contours draw.
    """
    covering = [CELEBAMASK_HQ.id(name) for name in ("hair", "hat", "background", "cloth")]
    covered = soft[:, covering].sum(1) > 0.5
    part, known = drawn < BARE, drawn.amin((1, 2), keepdim=True) < UNKNOWN
    believed = torch.isin(target, torch.tensor([CELEBAMASK_HQ.id(name) for name in DRAWN], device=target.device))
    misplaced, unsaid = believed & (drawn == BARE), believed & (drawn == UNKNOWN) & known
    target = torch.where(part, drawn.clamp(max=soft.shape[1] - 1), target)
    target = torch.where(misplaced, CELEBAMASK_HQ.id("skin"), target)
    weight = torch.where(part, (~covered).to(weight), weight)
    weight = torch.where(misplaced, torch.ones_like(weight), weight)
    return target, torch.where(unsaid, torch.zeros_like(weight), weight)


def _silent(line: str) -> None:
    del line


def _rendered(recipe: ParserRecipe, split: str, people: int, report: Callable[[str], Any]) -> LabelledPortraits:
    return labelled_portraits(split, people, recipe.network.size_px, recipe.cache_dir, report)


def _framed(recipe: ParserRecipe, report: Callable[[str], Any]) -> FramedPhotos | None:
    if recipe.photos is None:
        return None
    return framed_photos(recipe.photos, recipe.photo_contours, recipe.network.size_px, recipe.cache_dir, report)


__all__ = ["ParserRecipe", "ParserTask", "overrule", "pseudo_labels"]
