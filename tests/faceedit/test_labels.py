# SPDX-License-Identifier: Apache-2.0
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from faceedit.errors import OutOfRangeError, UsageError
from faceedit.labels import (
    CELEBAMASK_HQ,
    CELEBAMASK_HQ_ZLL,
    HELEN,
    MASKFACEGAN,
    SCHEMES,
    LabelScheme,
    conversion_table,
    convert_labels,
    convert_soft,
    flip_labels,
    flip_soft,
    scheme,
)

by_name = pytest.mark.parametrize("labels", SCHEMES, ids=lambda candidate: candidate.name)

# The published permutation from the public BiSeNet parser's channels to MaskGAN order.
ZLL_TO_A = (0, 1, 6, 7, 4, 5, 3, 8, 9, 15, 2, 10, 11, 12, 17, 16, 18, 13, 14)
GATHER_FROM_ZLL = (0, 1, 10, 6, 4, 5, 2, 3, 7, 8, 11, 12, 13, 17, 18, 9, 15, 14, 16)


def random_soft(scheme: LabelScheme, size_px: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(scheme.num_classes)
    return torch.randn(2, scheme.num_classes, size_px, size_px, generator=generator).softmax(1)


@by_name
def test_scheme_is_complete(labels):
    assert len(set(labels.classes)) == labels.num_classes == len(labels.palette)
    assert labels.classes[0] == "background"
    assert labels.palette[0] == (0, 0, 0)
    assert len(set(labels.palette)) == labels.num_classes, "two classes share a colour"
    assert all(0 <= channel <= 255 for colour in labels.palette for channel in colour)
    assert scheme(labels.name) is labels
    assert [labels.id(name) for name in labels.classes] == list(range(labels.num_classes))
    with pytest.raises(dataclasses.FrozenInstanceError):
        labels.name = "other"


def test_published_ids_and_colours():
    assert [s.num_classes for s in SCHEMES] == [19, 19, 11, 9]
    published = {"nose": (2, (76, 153, 0)), "eye_g": (3, (204, 204, 0)), "l_eye": (4, (51, 51, 255)),
                 "u_lip": (11, (255, 255, 0)), "hair": (13, (0, 0, 204)), "ear_r": (15, (0, 204, 204)),
                 "neck": (17, (255, 153, 51)), "cloth": (18, (0, 204, 0))}  # fmt: skip
    for name, (index, colour) in published.items():
        assert CELEBAMASK_HQ.id(name) == index
        assert CELEBAMASK_HQ.palette[index] == colour
        assert CELEBAMASK_HQ_ZLL.palette[CELEBAMASK_HQ_ZLL.id(name)] == colour


def test_zll_order_matches_the_published_permutation():
    assert conversion_table(CELEBAMASK_HQ_ZLL, CELEBAMASK_HQ) == ZLL_TO_A
    soft = random_soft(CELEBAMASK_HQ_ZLL)
    torch.testing.assert_close(
        convert_soft(soft, CELEBAMASK_HQ_ZLL, CELEBAMASK_HQ), soft[:, list(GATHER_FROM_ZLL)], rtol=0, atol=0
    )


@pytest.mark.parametrize("as_array", [False, True], ids=["tensor", "array"])
@pytest.mark.parametrize("dtype", ["int64", "uint8"])
def test_there_and_back_is_the_identity(as_array, dtype):
    labels = torch.arange(19).reshape(1, 1, 19).to(getattr(torch, dtype))
    labels = labels.numpy() if as_array else labels
    there = convert_labels(labels, CELEBAMASK_HQ, CELEBAMASK_HQ_ZLL)
    back = convert_labels(there, CELEBAMASK_HQ_ZLL, CELEBAMASK_HQ)
    assert type(back) is type(labels)
    assert back.dtype == labels.dtype
    assert back.tolist() == labels.tolist()
    assert there.tolist() != labels.tolist()


@by_name
def test_helen_crosses_left_and_right(labels):
    assert CELEBAMASK_HQ.classes[conversion_table(HELEN, CELEBAMASK_HQ)[HELEN.id("image_left_eye")]] == "r_eye"
    assert conversion_table(HELEN, CELEBAMASK_HQ) == (0, 1, 7, 6, 5, 4, 2, 11, 10, 12, 13)
    if labels.num_classes == 19:
        there = conversion_table(labels, HELEN)
        assert there[labels.id("l_brow")] == 3
        assert there[labels.id("r_eye")] == 4
        assert {there[labels.id(part)] for part in ("eye_g", "l_ear", "r_ear")} == {HELEN.id("skin")}
        assert {there[labels.id(part)] for part in ("hat", "ear_r", "neck_l", "neck", "cloth")} == {0}


def test_maskfacegan_joins_parts():
    table = conversion_table(CELEBAMASK_HQ, MASKFACEGAN)
    joined = {name: {i for i in range(19) if table[i] == MASKFACEGAN.id(name)} for name in MASKFACEGAN.classes}
    assert joined == {
        "background": {0, 14}, "mouth": {10, 11, 12}, "eyebrows": {6, 7}, "eyes": {4, 5}, "hair": {13}, "nose": {2},
        "skin": {1, 3}, "ears": {8, 9, 15}, "belowface": {16, 17, 18},
    }  # fmt: skip
    with pytest.raises(UsageError, match="left from right"):
        conversion_table(MASKFACEGAN, CELEBAMASK_HQ)


@pytest.mark.parametrize("src", SCHEMES, ids=lambda candidate: candidate.name)
@pytest.mark.parametrize("dst", SCHEMES, ids=lambda candidate: candidate.name)
def test_soft_and_hard_conversion_agree(src, dst):
    if src == MASKFACEGAN and dst != MASKFACEGAN:
        with pytest.raises(UsageError):
            convert_soft(random_soft(src), src, dst)
        return
    soft = random_soft(src)
    out = convert_soft(soft, src, dst)
    assert out.shape == (2, dst.num_classes, 6, 6)
    torch.testing.assert_close(out.sum(1), torch.ones(2, 6, 6))
    labels = soft.argmax(1)
    one_hot = torch.nn.functional.one_hot(labels, src.num_classes).permute(0, 3, 1, 2).float()
    assert torch.equal(convert_soft(one_hot, src, dst).argmax(1), convert_labels(labels, src, dst))


@by_name
def test_flip_twice_is_the_identity(labels):
    soft = random_soft(labels)
    hard = soft.argmax(1)
    assert torch.equal(flip_soft(flip_soft(soft, labels), labels), soft)
    assert torch.equal(flip_labels(flip_labels(hard, labels), labels), hard)
    assert torch.equal(flip_soft(soft, labels).argmax(1), flip_labels(hard, labels))
    assert np.array_equal(flip_labels(hard.numpy(), labels), flip_labels(hard, labels).numpy())


@pytest.mark.parametrize("other", [CELEBAMASK_HQ_ZLL, HELEN, MASKFACEGAN], ids=lambda candidate: candidate.name)
def test_flip_commutes_with_conversion(other):
    soft = random_soft(CELEBAMASK_HQ)
    flipped_first = convert_soft(flip_soft(soft, CELEBAMASK_HQ), CELEBAMASK_HQ, other)
    torch.testing.assert_close(flipped_first, flip_soft(convert_soft(soft, CELEBAMASK_HQ, other), other))


def test_flip_swaps_the_published_pairs():
    permutation = CELEBAMASK_HQ.flip_permutation
    assert {i for i in range(19) if permutation[i] != i} == {4, 5, 6, 7, 8, 9}
    labels = torch.tensor([[4, 0, 0, 13]])
    assert flip_labels(labels).tolist() == [[13, 0, 0, 5]]


def test_colours_and_png_palette():
    labels = torch.tensor([[0, 13], [10, 18]])
    assert CELEBAMASK_HQ.colorize(labels).tolist() == [[[0, 0, 0], [0, 0, 204]], [[102, 204, 0], [0, 204, 0]]]
    assert CELEBAMASK_HQ.colorize(labels).dtype == np.uint8
    palette = CELEBAMASK_HQ.png_palette()
    assert len(palette) == 768
    assert palette[13 * 3 : 14 * 3] == [0, 0, 204]


def test_convert_soft_differentiates():
    soft = random_soft(CELEBAMASK_HQ, 2).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda m: convert_soft(m, CELEBAMASK_HQ, MASKFACEGAN), (soft,))


def test_rejects_unknown_names():
    with pytest.raises(UsageError, match="u_lip"):
        CELEBAMASK_HQ.id("upper_lip")
    with pytest.raises(UsageError, match="celebamask-hq"):
        scheme("celebamask")


@by_name
def test_rejects_ids_outside_the_scheme(labels):
    for bad in (-1, labels.num_classes):
        with pytest.raises(OutOfRangeError, match=labels.name):
            flip_labels(torch.tensor([[0, bad]]), labels)
        with pytest.raises(OutOfRangeError, match=labels.name):
            labels.colorize(np.array([[bad]]))


def test_rejects_wrong_types_and_shapes():
    with pytest.raises(TypeError, match="integer"):
        convert_labels(torch.zeros(2, 2), CELEBAMASK_HQ, HELEN)
    with pytest.raises(TypeError, match="integer"):
        convert_labels(np.zeros((2, 2)), CELEBAMASK_HQ, HELEN)
    with pytest.raises(ValueError, match=r"\(…,19,H,W\)"):
        convert_soft(random_soft(HELEN), CELEBAMASK_HQ, HELEN)


def test_the_documented_table_is_true():
    text = (Path(__file__).parents[2] / "docs" / "conventions.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    rows = [row for row in rows if len(row) == 7 and row[0].isdigit()]
    assert [(int(row[0]), row[1]) for row in rows] == list(enumerate(CELEBAMASK_HQ.classes))
    for index, name, _, colour, zll, helen, maskfacegan in rows:
        assert tuple(map(int, colour.split(","))) == CELEBAMASK_HQ.palette[int(index)]
        assert int(zll) == CELEBAMASK_HQ_ZLL.id(name)
        assert HELEN.id(helen) == conversion_table(CELEBAMASK_HQ, HELEN)[int(index)]
        assert MASKFACEGAN.id(maskfacegan) == conversion_table(CELEBAMASK_HQ, MASKFACEGAN)[int(index)]
