# SPDX-License-Identifier: Apache-2.0
"""The `maggan` task: MagGAN (Wei et al. 2020) trained on counterfactual pairs and unlabelled photos.

What differs from the paper, and why:

* Synthetic pairs have a true result, so an L1 term inside the influence region joins the paper's losses
  (`losses.edit`; 0 gives the paper). Outside it the paper's L_mre holds, and L_rec holds for the empty edit.
* Photos have no true result and no labels. All of them take part in L_rec, and their random edits in L_mre; their edits
  take part in the adversarial and attribute losses only when a classifier supplies source attributes. With one,
  `batch.transplants` adds edits of photos whose result is known (`faceedit.training.transplants`).
* `losses.features` compares pairs also in the features of `feature_network`, as a perceptual loss does: L1 hardly sees
  a wrinkle or the edge of a frame. That network must not be the judge of the evaluation.
* `losses.pairs` asks a patch critic at full size whether a pair's edit is the true one (`training/pair_critic.py`).
* On a small machine the critic may run on every `adversarial.every`-th step and on smaller images than the generator's
  (`critic.input_px`); on the steps between, the generator has the other losses only. `every: 1, critic_steps: 5` and a
  critic of the generator's size are the paper's schedule.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from faceedit.attributes import MAGGAN, resolve_conflicts
from faceedit.maskfacegan.perceptual import StageFeatures
from faceedit.networks.maggan import (
    EditLayers,
    MagGANConfig,
    MagGANDiscriminator,
    MagGANDiscriminatorConfig,
    MagGANGenerator,
)
from faceedit.networks.pair_critic import PairCritic, PairCriticConfig
from faceedit.networks.resizing import resize
from faceedit.relations import influence_mask, mask_guided_conditioning
from faceedit.training import cache, losses
from faceedit.training.classifier import PlacementConfig, place_at_random
from faceedit.training.config import AdamConfig, Recipe, require, require_float32_weights
from faceedit.training.data import (
    AugmentConfig,
    PairConfig,
    SyntheticConfig,
    SyntheticPortraits,
    ask_for_what_is_there,
    is_sure,
    sample_pairs,
)
from faceedit.training.evaluation import classify_with, evaluate_editor
from faceedit.training.pair_critic import (
    PENALTY_EVERY,
    pair_critic_loss,
    pair_critic_penalty,
    pair_generator_loss,
)
from faceedit.training.photos import PhotosConfig, UnlabelledPhotos
from faceedit.training.sheets import image_sheet
from faceedit.training.task import Report, Task, TrainingContext, start_from
from faceedit.training.transplants import TransplantConfig, Transplants

_SHEET_EDITS = ("Blond_Hair", "Black_Hair", "Pale_Skin", "Bushy_Eyebrows", "Mouth_Slightly_Open", "Eyeglasses")


@dataclass(frozen=True, slots=True)
class BatchConfig:
    """Images of one step. `transplants` are pairs of photos beside the synthetic `pairs`; `copies` of all sources are
    reconstructed; of the photos, `photo_edits` are edited and the others reconstructed."""

    pairs: int = 8
    transplants: int = 0
    copies: int = 2
    photos: int = 4
    photo_edits: int = 2

    def __post_init__(self) -> None:
        require(self.pairs > 0, "batch.pairs", "positive", self.pairs)
        require(self.transplants >= 0, "batch.transplants", "0 or more", self.transplants)
        require(0 <= self.copies <= self.pairs, "batch.copies", "at most batch.pairs", self.copies)
        require(0 <= self.photo_edits <= self.photos, "batch.photo_edits", "at most batch.photos", self.photo_edits)


@dataclass(frozen=True, slots=True)
class LossConfig:
    """Weights of the terms (MagGAN eqs. 3 and 6 to 10). `edit`, `moved` and `opacity` are this project's. The first two
    are means over the influence region, and over those of its pixels that the true edit changes, there as a share of
    that change: bushy brows change few pixels of a region that holds all skin, and without `moved` the mean over the
    region is smallest when nothing is done. `faint` is the squared error as a share of the squared change of edits that
    change little: of an aged face the folds, of which `moved` sees little beside the tint of all the skin. `detail` is
    `moved` of what is finer than five pixels. `opacity` is the price of hiding the input, a mean over the image:
    without it a layered output would repaint hair that only needs another colour. `features` is `moved` in feature
    space, and `classes` what classifiers make of the edits, photos' included: the critic sees half the size at most.
    `pairs` is what the pair critic makes of the pairs' edits; above 0 that critic is trained on every step, with
    `pair_penalty` on its slopes, and the generator hears it from `adversarial.start_step` on."""

    adversarial: float = 1.0
    reconstruction: float = 100.0
    attributes: float = 10.0
    preserve: float = 100.0
    edit: float = 100.0
    moved: float = 0.0
    faint: float = 0.0
    detail: float = 0.0
    features: float = 0.0
    classes: float = 0.0
    pairs: float = 0.0
    pair_penalty: float = 0.003
    opacity: float = 0.0
    gradient_penalty: float = 10.0
    critic_attributes: float = 1.0


@dataclass(frozen=True, slots=True)
class AdversarialConfig:
    """When the critic takes part: from `start_step`, on every `every`-th step, `critic_steps` updates each time."""

    start_step: int = 0
    every: int = 1
    critic_steps: int = 5

    def __post_init__(self) -> None:
        require(self.every > 0, "adversarial.every", "positive", self.every)
        require(self.critic_steps > 0, "adversarial.critic_steps", "positive", self.critic_steps)


@dataclass(frozen=True, slots=True)
class MagGANRecipe(Recipe):
    """A `task: maggan` recipe. `photo_classifier` names weights that estimate the photos' source attributes;
    `feature_network` those of an attribute classifier (not the judge) whose features `losses.features` compares;
    `class_networks` those of classifiers whose logits `losses.classes` asks for, one of them a step (none given: the
    feature network's). Without them neither term takes part. One alone is soon pleased by patterns that no other sees;
    `initial_weights` continues from an exported or registered generator (critic and optimisers start anew); one with a
    residual output can be continued with a layered one."""

    network: MagGANConfig = field(default_factory=MagGANConfig)
    critic: MagGANDiscriminatorConfig = field(default_factory=MagGANDiscriminatorConfig)
    pair_critic: PairCriticConfig = field(default_factory=PairCriticConfig)
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)
    pairs: PairConfig = field(default_factory=PairConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    photos: PhotosConfig | None = None
    photo_classifier: str | None = None
    transplants: TransplantConfig = field(default_factory=TransplantConfig)
    feature_network: str | None = None
    class_networks: tuple[str, ...] = ()
    class_views: PlacementConfig = field(default_factory=PlacementConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    losses: LossConfig = field(default_factory=LossConfig)
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    generator_adam: AdamConfig = field(default_factory=AdamConfig)
    critic_adam: AdamConfig = field(default_factory=AdamConfig)
    pair_critic_adam: AdamConfig = field(default_factory=AdamConfig)
    validation_people: int = 24
    validation_classifier: str | None = None
    initial_weights: str | None = None

    def __post_init__(self) -> None:
        size = self.network.size_px
        require(
            self.synthetic.size_px == size, "synthetic.size_px", f"network.size_px = {size}", self.synthetic.size_px
        )
        require(self.critic.size_px <= size, "critic size", f"at most network.size_px = {size}", self.critic.size_px)
        if self.photos is not None:
            require(self.photos.size_px == size, "photos.size_px", f"network.size_px = {size}", self.photos.size_px)
        require(
            self.synthetic.variants > 0, "synthetic.variants", "positive (pairs need them)", self.synthetic.variants
        )
        if self.batch.transplants:
            known = self.photos is not None and self.photo_classifier is not None
            require(known, "batch.transplants", "0 without photos and photo_classifier", self.batch.transplants)
        asked = self.losses.classes > 0 or not self.class_networks
        require(asked, "losses.classes", "positive where class_networks are given", self.losses.classes)
        judge = self.validation_classifier
        require(judge is None or judge not in self.class_networks, "class_networks", "other than the judge", judge)
        require(self.validation_people > 0, "validation_people", "positive", self.validation_people)
        require_float32_weights(self.trainer)


class MagGANTask(Task[MagGANRecipe]):
    """Networks "generator" (averaged, exported), "critic" and, where `losses.pairs` asks for it, "pair_critic"."""

    recipe_class = MagGANRecipe

    def __init__(self, recipe: MagGANRecipe, context: TrainingContext) -> None:
        super().__init__(recipe, context)
        self.data, self.validation, photos = _load_data(recipe, lambda line: None)
        self.photos = None if photos is None else photos.split()[0]
        self.photo_attributes = self._estimate_attributes()
        self.transplants = None
        if recipe.batch.transplants and self.photos is not None and self.photo_attributes is not None:
            self.transplants = Transplants(self.photos, self.data, self.photo_attributes, recipe.transplants)
        self.features = self.classes = None
        if recipe.feature_network is not None:
            network = _load_classifier(recipe.feature_network, context.device)
            if recipe.losses.features:
                self.features = StageFeatures(network.features, network.config.size_px)
        asked = recipe.class_networks or tuple(filter(None, [recipe.feature_network]))
        if recipe.losses.classes and asked:
            self.classes = _Classes(asked, recipe.class_views, context.device)
        self.classify = None
        if recipe.validation_classifier is not None:
            judge = _load_classifier(recipe.validation_classifier, context.device)
            self.classify = classify_with(judge, judge.config.attributes, judge.config.size_px)
        generator = MagGANGenerator(recipe.network)
        start_from(generator, recipe.initial_weights, may_lack="detail")
        self.relations = generator.relations  # on the CPU, where batches are made, maybe by forked processes
        self.generator = context.add_network("generator", generator, recipe.generator_adam, average=True)
        self.critic = context.add_network("critic", MagGANDiscriminator(recipe.critic), recipe.critic_adam)
        self.bare_critic = cast(MagGANDiscriminator, context.networks["critic"])
        self.pair_critic: nn.Module | None = None
        if recipe.losses.pairs:
            size, stages = recipe.network.size_px, recipe.pair_critic.stages
            require(size % 2**stages == 0, "pair_critic.stages", f"few enough to halve {size} px", stages)
            network = PairCritic(recipe.pair_critic)
            self.pair_critic = context.add_network("pair_critic", network, recipe.pair_critic_adam)

    @classmethod
    def prepare(cls, recipe: MagGANRecipe, *, report: Report = print) -> None:
        _load_data(recipe, report)

    def batch(self, step: int) -> dict[str, Tensor]:
        return self._draw("batch", step)

    def training_step(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        schedule = self.recipe.adversarial
        adversarial = step >= schedule.start_step and (step - schedule.start_step) % schedule.every == 0
        scalars: dict[str, Tensor] = {}
        if adversarial:
            for extra in range(schedule.critic_steps - 1):
                fresh = self.context.to_device(self._draw(f"critic {extra}", step))
                with torch.no_grad():
                    made = self._generate(fresh).image
                self._train_critic(fresh, made, step, extra)
        made, opacity = self._generate(batch)
        if adversarial:
            scalars |= self._train_critic(batch, made.detach(), step, schedule.critic_steps)
        if self.pair_critic is not None:
            scalars["pair_critic"] = self._train_pair_critic(batch, made, step)
        loss, parts = self._generator_loss(batch, made, adversarial, step)
        if self.recipe.losses.opacity:
            parts["opacity"] = opacity.mean()
            loss = loss + self.recipe.losses.opacity * parts["opacity"]
            parts["opacity"] = parts["opacity"].detach()
        self.context.minimise("generator", loss)
        return {**scalars, **parts, "generator": loss.detach()}

    def _draw(self, stream: str, step: int) -> dict[str, Tensor]:
        """Pairs under their own names; photos as `photo`, `photo_mask`, `photo_difference`, and what is known."""
        recipe = self.recipe
        generator = self.context.generator(stream, step)
        batch = sample_pairs(self.data, recipe.batch.pairs, generator, recipe.pairs, recipe.augment, self.relations)
        if self.transplants is not None:
            more = self.transplants.sample(recipe.batch.transplants, generator, recipe.augment, self.relations)
            batch = {name: torch.cat([values, more[name]]) for name, values in batch.items()}
        if recipe.pairs.idle_share:
            batch = ask_for_what_is_there(batch, recipe.pairs.idle_share, generator, self.relations)
        if self.photos is not None and recipe.batch.photos:
            photos = self.photos.sample(recipe.batch.photos, generator, recipe.augment)
            batch["photo"], batch["photo_mask"] = photos["image"], photos["mask"]
            count = recipe.batch.photo_edits
            known = None if self.photo_attributes is None else self.photo_attributes[photos["position"][:count]]
            batch |= photo_edits(count, known, generator)
        return batch

    def _generate(self, batch: dict[str, Tensor]) -> EditLayers:
        """One pass over everything: pair edits, pair copies, photo edits, photo copies."""
        images, masks, differences = self._inputs(batch)
        made = self.generator(images, differences, masks, with_opacity=True)
        return EditLayers(made.image.float(), made.opacity.float())

    def _inputs(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        copies = self.recipe.batch.copies
        difference = batch["difference"]
        images, masks = [batch["source"], batch["source"][:copies]], [batch["mask"], batch["mask"][:copies]]
        differences = [difference, torch.zeros_like(difference[:copies])]
        if "photo" in batch:
            images.append(batch["photo"])
            masks.append(batch["photo_mask"])
            asked = batch["photo_difference"]
            differences += [asked, asked.new_zeros(len(batch["photo"]) - len(asked), asked.shape[1])]
        return torch.cat(images), torch.cat(masks), torch.cat(differences)

    def _generator_loss(
        self, batch: dict[str, Tensor], made: Tensor, adversarial: bool, step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        weights = self.recipe.losses
        pairs, edited = len(batch["source"]), self._edited_rows(batch, len(made))
        images, masks, differences = self._inputs(batch)
        copied = ~edited
        moved = batch["influence"] * losses.moved_pixels(batch["source"], batch["target"])
        preserve = 1 - influence_mask(differences[edited], masks[edited], self.relations)
        parts = {
            "edit": losses.region_l1(made[:pairs], batch["target"], batch["influence"]),
            "moved": losses.region_l1(made[:pairs], batch["target"], moved, batch["source"]),
            "preserve": losses.masked_l1(made[edited], images[edited], preserve),
        }
        if weights.faint:
            pictures = made[:pairs], batch["target"], batch["source"]
            parts["faint"] = losses.faint_squared_share(*pictures, batch["influence"])
        if weights.detail:
            pictures = made[:pairs], batch["target"], batch["source"]
            parts["detail"] = losses.detail_share(*pictures, batch["influence"])
        if self.features is not None:
            parts["features"] = self._feature_distance(batch, made[:pairs])
        if self.classes is not None:
            drawn = self.context.generator("class views", step)
            with self.context.fabric.autocast():
                logits = self.classes(self._edits(batch, made), drawn)
            parts["classes"] = losses.attribute_bce(logits.float(), *self._wanted(batch))
        if self.pair_critic is not None and step >= self.recipe.adversarial.start_step:
            drawn = self.context.generator("pairs", step)
            # The bare critic, as below.
            bare = self.context.networks["pair_critic"]
            with self.context.fabric.autocast():
                parts["pairs"] = pair_generator_loss(bare, batch, made[:pairs], self._pair_condition(batch), drawn)
        if copied.any():
            parts["reconstruction"] = (made[copied] - images[copied]).abs().mean()
        total = sum(getattr(weights, name) * value for name, value in parts.items())
        if adversarial:
            _, _, views = self._judged(batch, made)
            # The bare critic: its weights get no update here, so its gradients need no synchronisation either.
            with self.context.fabric.autocast():
                judgements = self.bare_critic(views)
            attributes, known = self._wanted(batch)
            adversarial_terms, class_terms = [], []
            for level, judgement in enumerate(judgements):
                repeats = 1 if level == 0 else self.recipe.critic.crops
                adversarial_terms.append(losses.wgan_generator_loss(judgement.critic.float()))
                wanted, certain = attributes.repeat(repeats, 1), known.repeat(repeats, 1)
                class_terms.append(losses.attribute_bce(judgement.logits.float(), wanted, certain))
            parts["adversarial"] = torch.stack(adversarial_terms).mean()
            parts["attributes"] = torch.stack(class_terms).mean()
            total = total + weights.adversarial * parts["adversarial"] + weights.attributes * parts["attributes"]
        return cast(Tensor, total), {name: value.detach() for name, value in parts.items()}

    def _feature_distance(self, batch: dict[str, Tensor], made: Tensor) -> Tensor:
        """What the pairs' edits miss of the true change, in features; see `losses.feature_share`."""
        assert self.features is not None
        with self.context.fabric.autocast():
            found = self.features(made)
            with torch.no_grad():
                before, after = (self.features(batch[name]) for name in ("source", "target"))
        return losses.feature_share(found, after, before)

    def _edited_rows(self, batch: dict[str, Tensor], count: int) -> Tensor:
        """Which rows of the generator's batch are edits (the others are copies)."""
        edited = torch.zeros(count, dtype=torch.bool)
        edited[: len(batch["source"])] = True
        if "photo" in batch:
            start = len(batch["source"]) + self.recipe.batch.copies
            edited[start : start + len(batch["photo_difference"])] = True
        return edited

    def _judged(self, batch: dict[str, Tensor], made: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the critic sees, at its own size: real images, their attributes, and edits.

        Real and made hold the same mix of drawings and photos, or the critic would only learn to tell those apart.
        """
        real, attributes = [batch["target"]], [batch["target_attributes"]]
        if "photo_attributes" in batch:
            real.append(batch["photo"][: len(batch["photo_attributes"])])
            attributes.append(batch["photo_attributes"])
        size = self.recipe.critic.size_px
        return resize(torch.cat(real), size), torch.cat(attributes), resize(self._edits(batch, made), size)

    def _edits(self, batch: dict[str, Tensor], made: Tensor) -> Tensor:
        """The edits among what was made whose attributes are known: of pairs, then of photos that were classified."""
        pairs = len(batch["source"])
        if "photo_attributes" not in batch:
            return made[:pairs]
        start = pairs + self.recipe.batch.copies
        return torch.cat([made[:pairs], made[start : start + len(batch["photo_attributes"])]])

    def _wanted(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Target attributes of `_edits` and which of them are known (1) or a guess (0)."""
        wanted = [batch["target_attributes"]]
        known = [torch.ones_like(wanted[0])]
        if "photo_attributes" in batch:
            wanted.append(batch["photo_target_attributes"])
            known.append(batch["photo_known"])
        return torch.cat(wanted), torch.cat(known)

    def _train_critic(self, batch: dict[str, Tensor], made: Tensor, step: int, part: int) -> dict[str, Tensor]:
        weights = self.recipe.losses
        real, attributes, edits = self._judged(batch, made)
        generator = self.context.generator(f"critic views {part}", step)
        seen_real, seen_made = (self.bare_critic.views(x, generator) for x in (real, edits))
        terms: dict[str, list[Tensor]] = {"wasserstein": [], "penalty": [], "critic_attributes": []}
        judged_real, judged_made = self.critic(real), self.critic(edits)
        for level, net in enumerate(self.bare_critic.levels):
            of_real, of_made = judged_real[level], judged_made[level]
            terms["wasserstein"].append(losses.wgan_critic_loss(of_real.critic.float(), of_made.critic.float()))
            labels = attributes.repeat(1 if level == 0 else self.recipe.critic.crops, 1)
            terms["critic_attributes"].append(losses.attribute_bce(of_real.logits.float(), labels))
            # In float32 and on the bare network: half precision loses the second-order term.
            ends = (seen_real[level].float(), seen_made[level].float())
            terms["penalty"].append(losses.gradient_penalty(_critic_of(net), *ends, generator))
        means = {name: torch.stack(values).mean() for name, values in terms.items()}
        loss = (
            means["wasserstein"]
            + weights.gradient_penalty * means["penalty"]
            + weights.critic_attributes * means["critic_attributes"]
        )
        self.context.minimise("critic", loss)
        return {name: value.detach() for name, value in means.items()}

    def _train_pair_critic(self, batch: dict[str, Tensor], made: Tensor, step: int) -> Tensor:
        assert self.pair_critic is not None
        drawn = self.context.generator("pair critic", step)
        edits = made[: len(batch["source"])]
        condition = self._pair_condition(batch)
        with self.context.fabric.autocast():
            loss = pair_critic_loss(self.pair_critic, batch, edits, condition, drawn)
        total = loss
        if step % PENALTY_EVERY == 0:
            # In float32 and on the bare network, as for the other critic.
            slopes = pair_critic_penalty(self.context.networks["pair_critic"], batch, edits, condition, drawn)
            total = loss + self.recipe.losses.pair_penalty * PENALTY_EVERY * slopes
        self.context.minimise("pair_critic", total)
        return loss.detach()

    def _pair_condition(self, batch: dict[str, Tensor]) -> Tensor:
        """What is asked of each pair and where, P×13×s×s, at the size at which the pair critic reads it."""
        half = resize(batch["mask"], self.recipe.network.size_px // 2)
        return mask_guided_conditioning(batch["difference"], half, self.relations)

    def _estimate_attributes(self) -> Tensor | None:
        """Probabilities N×13 of the photos' attributes, or None when no classifier is named."""
        if self.photos is None or self.recipe.photo_classifier is None:
            return None
        network = _load_classifier(self.recipe.photo_classifier, self.context.device)
        classify = classify_with(network, network.config.attributes, network.config.size_px)
        rows = range(len(self.photos))
        parts = []
        for start in range(0, len(rows), 32):
            positions = list(rows[start : start + 32])
            image, _ = self.photos.read(positions, np.zeros(len(positions), dtype=bool))
            parts.append(classify(image).cpu())
        return torch.cat(parts)

    def _edit(self, image: Tensor, difference: Tensor, mask: Tensor) -> Tensor:
        device = self.context.device
        with torch.no_grad(), self.context.fabric.autocast():
            made = self.context.best("generator").eval()(image.to(device), difference.to(device), mask.to(device))
        return made.float().cpu()

    def sample_sheet(self) -> Tensor:
        """Rows: six synthetic people, then up to ten photos. Columns: source, copy, six single edits."""
        people = min(6, len(self.validation))
        images = cache.unpack_image(self.validation.images[:people, 0])
        masks = cache.unpack_mask(self.validation.masks[:people, 0])
        if self.photos is not None:
            positions = np.linspace(0, len(self.photos) - 1, min(10, len(self.photos))).astype(int).tolist()
            photos, photo_masks = self.photos.read(positions, np.zeros(len(positions), dtype=bool))
            images, masks = torch.cat([images, photos]), torch.cat([masks, photo_masks])
        nothing = torch.zeros(len(images), len(MAGGAN))
        columns = [images, self._edit(images, nothing, masks)]
        for name in _SHEET_EDITS:
            asked = nothing.clone()
            asked[:, MAGGAN.index(name)] = 1
            columns.append(self._edit(images, asked, masks))
        return image_sheet(columns)

    def validate(self) -> dict[str, float]:
        return evaluate_editor(self._edit, self.validation, self.classify).scalars()

    def export(self, path: Path, metrics: dict[str, float]) -> None:
        photos = "" if self.photos is None else f", {len(self.photos)} unlabelled photos"
        self.write_weights(
            path,
            "maggan",
            self.recipe.network,
            self.context.best("generator"),
            training_data=f"families of {len(self.data)} synthetic people{photos}",
            label_scheme=self.recipe.network.label_scheme,
            attributes=MAGGAN,
            metrics=metrics,
        )


class _Classes:
    """Logits (N,13) of images N×3×S×S by one of some frozen classifiers that know MagGAN's attributes, drawn for each
    call, of images that are turned, moved and blurred at random: what many of them see from many places is seen by a
    classifier that is not among them too."""

    def __init__(self, weights: tuple[str, ...], views: PlacementConfig, device: torch.device) -> None:
        self.views = views
        self.networks: list[tuple[Any, list[int]]] = []
        for name in weights:
            network = _load_classifier(name, device)
            known = network.config.attributes
            missing = [attribute for attribute in MAGGAN if attribute not in known]
            wanted = f"classifiers of MagGAN's attributes ({missing} are missing from {name})"
            require(not missing, "class_networks or feature_network", wanted, known)
            columns = [known.index(attribute) for attribute in MAGGAN]
            self.networks.append((network.eval().requires_grad_(False), columns))

    def __call__(self, image: Tensor, generator: torch.Generator) -> Tensor:
        network, columns = self.networks[int(torch.randint(len(self.networks), (), generator=generator))]
        seen = place_at_random(image, self.views, generator)
        return network(resize(seen, network.config.size_px))[:, columns]


def _critic_of(level: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: level(x).critic


def photo_edits(count: int, attributes: Tensor | None, generator: torch.Generator) -> dict[str, Tensor]:
    """Random single-attribute edits for photos.

    Args:    attributes count×13 probabilities, or None when nothing is known of the photos.
    Returns: photo_difference count×13; with attributes also photo_attributes (the probabilities),
             photo_target_attributes, and photo_known, 1 where the target is sure.
    """
    column = torch.randint(len(MAGGAN), (count,), generator=generator)
    asked = F.one_hot(column, len(MAGGAN)).float()
    if attributes is None:
        sign = torch.randint(2, (count, 1), generator=generator).float() * 2 - 1
        return {"photo_difference": asked * sign}
    present = (attributes > 0.5).float()
    target = torch.where(asked > 0, 1 - present, present)
    for row in range(count):
        if target[row, column[row]] > 0.5:
            target[row] = resolve_conflicts(target[row], MAGGAN[int(column[row])])
    sure = is_sure(attributes).float()
    return {
        "photo_difference": target - present,
        "photo_attributes": attributes,
        "photo_target_attributes": target,
        "photo_known": torch.maximum(sure, asked),
    }


def _load_data(
    recipe: MagGANRecipe, report: Report
) -> tuple[SyntheticPortraits, SyntheticPortraits, UnlabelledPhotos | None]:
    data = SyntheticPortraits(recipe.synthetic, "train", report)
    every = replace(recipe.synthetic, people=recipe.validation_people, variants=len(MAGGAN), attributes=MAGGAN)
    validation = SyntheticPortraits(replace(every, tinted_share=0.0, seed_offset=0), "validation", report)
    photos = None if recipe.photos is None else UnlabelledPhotos(recipe.photos, report=report)
    return data, validation, photos


def _load_classifier(weights: str, device: torch.device) -> Any:
    from faceedit.registry import load_network

    return load_network(weights, device, kind="attribute-classifier")
