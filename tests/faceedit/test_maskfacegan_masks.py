# SPDX-License-Identifier: Apache-2.0
"""Masks and loss terms against examples worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from support.standin_networks import ATTRIBUTES, ColourClassifier, ColourFeatures, standins
from torch import Tensor, nn

from faceedit.errors import UnknownAttributeError, WeightsError
from faceedit.labels import CELEBAMASK_HQ, CELEBAMASK_HQ_ZLL, MASKFACEGAN
from faceedit.maskfacegan import losses
from faceedit.maskfacegan.config import PRESETS, MaskFaceGANConfig
from faceedit.maskfacegan.masks import EditMasks, MissingRegionError, check_regions, portion
from faceedit.maskfacegan.networks import AttributeJudge, RegionParser, in_precision
from faceedit.maskfacegan.perceptual import StageFeatures, lpips_vgg16, masked_lpips
from faceedit.maskfacegan.plan import EditPlan, make_plan
from faceedit.networks.resizing import resize

CONFIG = MaskFaceGANConfig()


def parse(**shares: float) -> Tensor:
    """(1,9,1,2) with these probabilities in the first pixel and pure background in the second."""
    mask = torch.zeros(1, 9, 1, 2)
    mask[0, 0, 0, 1] = 1
    for label, share in shares.items():
        mask[0, MASKFACEGAN.id(label), 0, 0] = share
    return mask


def masks_of(plan: EditPlan, **shares: float) -> EditMasks:
    return EditMasks.of(parse(**shares).expand(-1, -1, 2, -1), [plan], 2)


def first(mask: Tensor) -> float:
    return round(mask[0, 0, 0, 0].item(), 6)


def test_a_mouth_edit_keeps_skin_and_blends_both() -> None:
    masks = masks_of(make_plan({"Smiling": 1}), skin=0.7, mouth=0.2, hair=0.1)
    assert (first(masks.appearance), first(masks.released), first(masks.blend)) == (0.7, 0.0, 0.9)
    assert masks.outline.abs().max() == 0
    assert masks.blend[0, 0, 0, 1] == 0


def test_what_the_target_covers_is_released() -> None:
    masks = masks_of(make_plan({"Smiling": 1}), skin=0.7, mouth=0.2, hair=0.1)
    masks.relax(parse(skin=0.5, mouth=0.4, hair=0.1).expand(-1, -1, 2, -1))
    assert first(masks.released) == 0.4
    image, source = torch.ones(1, 3, 2, 2), torch.zeros(1, 3, 2, 2)
    # Two of four pixels weigh clamp(0.7 - 0.4, 0, 1); a quarter turns [-1, 1] into the paper's [0, 1].
    assert losses.appearance(image, source, masks).item() == pytest.approx(0.25 * 0.3 * 2 / 4)
    masks.relax(parse(mouth=0.9).expand(-1, -1, 2, -1))
    assert losses.appearance(image, source, masks).item() == 0


def test_colour_holds_the_outline_and_shape_lets_it_grow() -> None:
    grown = parse(hair=0.6, ears=0.1).expand(-1, -1, 2, -1)
    colour = masks_of(make_plan({"Blond_Hair": 1}), hair=0.5, ears=0.2)
    colour.relax(grown)
    assert first(colour.outline) == 0.5
    shape = masks_of(make_plan({"Wavy_Hair": 1}), hair=0.2, ears=0.1)
    assert first(shape.outline) == pytest.approx(0.3)
    shape.relax(grown)
    assert first(shape.outline) == 1.0
    shape.relax(parse(hair=0.1).expand(-1, -1, 2, -1))
    assert first(shape.outline) == pytest.approx(0.4)
    assert losses.shape(parse(hair=0.1).expand(-1, -1, 2, -1), shape).item() == pytest.approx(0.5 * 0.3**2)


def test_masks_that_do_not_follow_stay() -> None:
    masks = masks_of(make_plan({"Smiling": 1}, config=MaskFaceGANConfig(dynamic=False)), skin=0.7, mouth=0.3)
    masks.relax(parse(mouth=1.0).expand(-1, -1, 2, -1))
    assert masks.released.abs().max() == 0


def test_hair_shape_is_blended_where_the_generated_hair_is() -> None:
    made = parse(hair=0.6).expand(-1, -1, 2, -1)
    expected = {"default": 0.1 + 0.05 + 0.6, "code": 0.1 + 0.05 + 0.3}
    for name, config in PRESETS.items():
        masks = masks_of(make_plan({"Wavy_Hair": 1}, config=config), skin=0.1, ears=0.05, hair=0.3)
        assert first(masks.blend_with(made)) == pytest.approx(expected.get(name, expected["default"]))


def test_masks_are_brought_to_the_images_size() -> None:
    masks = EditMasks.of(parse(skin=1.0).expand(-1, -1, 2, -1), [make_plan({"Blond_Hair": 1})], 4)
    assert masks.appearance.shape == masks.released.shape == masks.blend.shape == (1, 1, 4, 4)
    assert masks.outline.shape == (1, 1, 2, 2)
    torch.testing.assert_close(masks.appearance[0, 0, 0], torch.tensor([1.0, 0.75, 0.25, 0.0]))


@pytest.mark.parametrize(
    ("plan", "shares", "words"),
    [
        (make_plan({"Wavy_Hair": 1}), {"skin": 1.0}, "hair must be in the picture to edit Wavy_Hair"),
        (make_plan({}, component="eyes", scale=2.0), {"skin": 1.0}, "eyes must be .* the size of eyes"),
        (make_plan({"Male": 1}), {"hair": 1.0}, "skin must be"),
    ],
)
def test_a_missing_region_is_an_error(plan: EditPlan, shares: Mapping[str, float], words: str) -> None:
    with pytest.raises(MissingRegionError, match=words):
        check_regions(parse(**shares), [plan], CONFIG)
    check_regions(parse(**dict.fromkeys(MASKFACEGAN.classes, 0.1)), [plan], CONFIG)


def test_size_is_the_divergence_of_shares() -> None:
    masks = masks_of(make_plan({}, component="mouth", scale=0.5), mouth=0.8)
    assert masks.portion.item() == pytest.approx(0.4)
    made, scales = parse(mouth=0.6).expand(-1, -1, 2, -1), torch.tensor([0.5])
    expected = 0.2 * math.log(0.2 / 0.3) + 0.8 * math.log(0.8 / 0.7)
    assert losses.size(made, masks, scales).item() == pytest.approx(expected, rel=1e-5)
    assert losses.size(made, masks, torch.zeros(1)).item() == 0
    assert portion(made, masks.component).item() == pytest.approx(0.3)


def test_semantics_average_over_each_edits_own_attributes() -> None:
    judge = AttributeJudge(ColourClassifier())
    image = 0.3 * torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    plans = [make_plan({"Smiling": 1, "Blond_Hair": 0}), make_plan({"Wavy_Hair": 0.5})]
    probabilities = judge(image).sigmoid()

    def kl(y: float, p: float) -> float:
        return y * math.log(y / p) + (1 - y) * math.log((1 - y) / (1 - p))

    smiling, blond, wavy = (
        probabilities[:, ATTRIBUTES.index(n)].tolist() for n in ("Smiling", "Blond_Hair", "Wavy_Hair")
    )
    expected = [(kl(0.95, smiling[0]) + kl(0.05, blond[0])) / 2, kl(0.5, wavy[1])]
    semantics = losses.Semantics.of(judge, plans, image, CONFIG)
    assert semantics(image).tolist() == pytest.approx(expected, rel=1e-4)
    assert semantics.judge.names == ("Smiling", "Blond_Hair", "Wavy_Hair")


def test_what_is_kept_is_the_classifiers_decision_on_the_input() -> None:
    image = torch.zeros(1, 3, 16, 16)  # Smiling has logit 5 there, Wavy_Hair 0, Black_Hair -1
    plan = make_plan({"Wavy_Hair": 1}, keep=["Smiling", "Black_Hair"])
    semantics = losses.Semantics.of(AttributeJudge(ColourClassifier()), [plan], image, CONFIG)
    torch.testing.assert_close(semantics.targets, torch.tensor([[0.95, 0.95, 0.05]]))


def test_the_classifier_is_pruned_and_refuses_what_it_does_not_know() -> None:
    network = ColourClassifier()
    judge = AttributeJudge(network)
    assert judge.select(["Male"])(torch.zeros(1, 3, 8, 8)).shape == (1, 1)
    assert network.selected == [("Male",)]
    with pytest.raises(UnknownAttributeError, match="Wavy_Hair"):
        judge.select(["Straight_Hair"])


def test_a_classifier_that_cannot_be_pruned_gives_the_same_logits() -> None:
    network = ColourClassifier()
    network.select = None  # type: ignore[assignment]
    image = torch.rand(1, 3, 8, 8)
    names = ["Male", "Smiling"]
    torch.testing.assert_close(
        AttributeJudge(network).select(names)(image), AttributeJudge(ColourClassifier(tuple(names)))(image)
    )


def test_a_parser_of_another_scheme_is_converted_or_refused() -> None:
    network = nn.Conv2d(3, 19, 1)
    image = torch.rand(1, 3, 6, 6)
    regions = RegionParser(network, 6, CELEBAMASK_HQ)(image)
    torch.testing.assert_close(regions.sum(1), torch.ones(1, 6, 6))
    lips = network(image).softmax(1)[:, [CELEBAMASK_HQ.id(part) for part in ("mouth", "u_lip", "l_lip")]].sum(1)
    torch.testing.assert_close(regions[:, MASKFACEGAN.id("mouth")], lips)
    with pytest.raises(WeightsError, match="9 classes of maskfacegan"):
        RegionParser(network, 6, MASKFACEGAN)(image)


def test_the_scheme_is_the_one_the_parser_names() -> None:
    network = nn.Conv2d(3, 19, 1)
    for config, expected in (
        (SimpleNamespace(num_classes=19), CELEBAMASK_HQ),
        (SimpleNamespace(num_classes=19, label_scheme=CELEBAMASK_HQ_ZLL.name), CELEBAMASK_HQ_ZLL),
        (SimpleNamespace(num_classes=9), MASKFACEGAN),
    ):
        network.config = config
        assert RegionParser(network).scheme == expected
    network.config, network.header = SimpleNamespace(num_classes=19), SimpleNamespace(label_scheme="celebamask-hq-zll")
    assert RegionParser(network).scheme == CELEBAMASK_HQ_ZLL  # where only the file's header says so
    network.header = SimpleNamespace(label_scheme="helen")
    with pytest.raises(WeightsError, match="the 11 classes of helen, which its file names, got 19"):
        RegionParser(network)
    network.config, network.header = SimpleNamespace(num_classes=11), SimpleNamespace(label_scheme="")
    with pytest.raises(WeightsError, match="got 11"):
        RegionParser(network)


def test_resizing_averages_downwards() -> None:
    image = torch.arange(16.0).view(1, 1, 4, 4)
    torch.testing.assert_close(resize(image, 2), torch.tensor([[[[2.5, 4.5], [10.5, 12.5]]]]))
    assert resize(image, 4) is image
    assert resize(image, 8).shape == (1, 1, 8, 8)


# Perceptual


def test_masked_lpips_counts_inside_the_mask_alone() -> None:
    generator = torch.Generator().manual_seed(2)
    a, b = (torch.rand(1, 3, 4, 4, generator=generator) + 0.1 for _ in range(2))
    features, mask = ColourFeatures(), torch.zeros(1, 1, 4, 4)
    mask[..., :2] = 1
    inside = b.clone()
    inside[..., 2:] = a[..., 2:]
    expected = masked_lpips(features, inside, features(a), mask)
    torch.testing.assert_close(masked_lpips(features, b, features(a), mask), expected)
    assert expected > 0
    assert masked_lpips(features, a, features(a), mask) == 0

    def unit(x: Tensor) -> Tensor:
        return x / x.square().sum(1, keepdim=True).sqrt()

    fine = ((unit(inside) - unit(a)).square().mean(1) * mask[:, 0]).mean()
    coarse = (unit(features(inside)[1]) - unit(features(a)[1])).square().mean(1)[..., :1].sum() / 4
    torch.testing.assert_close(expected[0], fine + coarse)


def test_stage_features_are_what_enters_the_pools() -> None:
    layers = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 5, 1), nn.MaxPool2d(2)
    )
    image = torch.rand(1, 3, 16, 16)
    maps = StageFeatures(layers, size_px=8)(image)
    assert [tuple(m.shape) for m in maps] == [(1, 4, 8, 8), (1, 5, 4, 4)]
    torch.testing.assert_close(maps[0], layers[:2](resize(image, 8)))


def test_lpips_proper_is_made_of_own_copies() -> None:
    from torchvision.models.vgg import cfgs, make_layers

    layers = make_layers(cfgs["D"])
    widths = (64, 128, 256, 512, 512)
    heads = {f"lin{i}.model.1.weight": torch.rand(1, width, 1, 1) for i, width in enumerate(widths)}
    features = lpips_vgg16({f"features.{k}": v for k, v in layers.state_dict().items()}, heads)
    image = torch.rand(1, 3, 32, 32)
    maps = features(image)
    assert [m.shape[1] for m in maps] == list(widths)
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    scaled = (image - shift.view(1, 3, 1, 1)) / scale.view(1, 3, 1, 1)
    torch.testing.assert_close(maps[0], layers[:4](scaled))
    mask = torch.ones(1, 1, 32, 32)
    made = masked_lpips(features, image.flip(-1), maps, mask)
    units = [
        (m / m.norm(dim=1, keepdim=True), n / n.norm(dim=1, keepdim=True))
        for m, n in zip(maps, features(image.flip(-1)), strict=True)
    ]
    expected = sum(((a - b).square() * heads[f"lin{i}.model.1.weight"]).sum(1).mean() for i, (a, b) in enumerate(units))
    torch.testing.assert_close(made[0], expected, rtol=1e-4, atol=1e-6)


# Precision


def test_half_precision_is_of_copies_and_leaves_outputs_in_fp32() -> None:
    networks, image = standins(), torch.rand(1, 3, 16, 16)
    networks = replace(networks, parser=RegionParser(nn.Conv2d(3, 9, 1), 16))
    with in_precision(networks, "bfloat16") as half:
        assert half.generator.synthesis.precision.dtype == "bfloat16"
        assert networks.generator.synthesis.precision == "as loaded"
        rough = half.parser(image)
        assert half.classifier.select(["Smiling"]).is_half
        assert rough.dtype == half.classifier(image).dtype == torch.float32
    assert networks.generator.synthesis.precision == "as loaded"
    error = (rough - networks.parser(image)).abs().max()
    assert 0 < error < 0.01  # eight bits of a logit near 1
