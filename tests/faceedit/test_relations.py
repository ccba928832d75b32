# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from faceedit.attributes import CELEBA, MAGGAN, MASKFACEGAN_GLOBAL, MASKFACEGAN_LOCAL
from faceedit.errors import UnknownAttributeError, UnknownNameError, UsageError
from faceedit.labels import CELEBAMASK_HQ, CELEBAMASK_HQ_ZLL, HELEN, MASKFACEGAN, convert_soft
from faceedit.relations import (
    MASKFACEGAN_REGIONS,
    Relations,
    influence_mask,
    mask_guided_conditioning,
    maskfacegan_region,
    preserve_mask,
    related_parts,
    relation_matrices,
)

# Column sums of the published relations, in zllrunning order; transcribed apart from the tables they check.
COLUMN_SUMS = (
    (0, 9, 5, 5, 3, 3, 1, 2, 2, 1, 3, 3, 5, 4, 3, 0, 0, 7, 0),
    (1, 7, 5, 5, 3, 3, 1, 3, 3, 1, 3, 3, 5, 4, 3, 0, 0, 6, 0),
)
ROW_SUMS = ((1, 4, 1, 1, 1, 3, 7, 14, 4, 2, 4, 1, 13), (5, 3, 1, 1, 1, 2, 6, 13, 4, 2, 4, 1, 13))


def soft_mask(count: int = 2, size_px: int = 8, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 19, size_px, size_px, generator=generator, dtype=dtype).mul(3).softmax(1)


def difference(**changes: float) -> torch.Tensor:
    vector = torch.zeros(2, 13)
    for name, value in changes.items():
        vector[:, MAGGAN.index(name)] = value
    return vector


def test_matrices_match_the_published_sums():
    for matrix, columns, rows in zip(relation_matrices(CELEBAMASK_HQ_ZLL), COLUMN_SUMS, ROW_SUMS, strict=True):
        assert matrix.shape == (13, 19)
        assert tuple(matrix.sum(0).int().tolist()) == columns
        assert tuple(matrix.sum(1).int().tolist()) == rows
        assert matrix.sum() == 56
        assert set(matrix.unique().tolist()) == {0.0, 1.0}


def test_papers_own_examples():
    assert related_parts("Bald") == ({"hair"}, {"background", "skin", "l_ear", "r_ear", "ear_r"})
    assert related_parts("Pale_Skin") == ({"skin"}, {"skin"})
    assert related_parts("Blond_Hair") == ({"hair"}, {"hair"})


@pytest.mark.parametrize("preset", ["paper", "natural"])
def test_accessories_are_never_editable(preset):
    for matrix in relation_matrices(preset=preset):
        assert matrix[:, [CELEBAMASK_HQ.id(part) for part in ("hat", "cloth", "neck_l")]].sum() == 0
        assert (matrix.sum(1) > 0).all()
    plus, minus = relation_matrices(preset="paper")
    assert plus[:, 0].sum() == 0
    assert minus[:, 0].nonzero().flatten().tolist() == [MAGGAN.index("Bald")]


def test_natural_adds_exactly_what_it_says():
    added = {}
    for name in MAGGAN:
        pairs = zip(related_parts(name, "natural"), related_parts(name), strict=True)
        extra = tuple(natural - paper for natural, paper in pairs)
        assert all(
            paper <= natural for natural, paper in zip(related_parts(name, "natural"), related_parts(name), strict=True)
        )
        if any(extra):
            added[name] = extra
    skin_tone, temples = {"nose", "l_ear", "r_ear", "neck"}, {"hair", "l_ear", "r_ear"}
    assert added == {
        "Pale_Skin": (skin_tone, skin_tone),
        "Bangs": (set(), {"skin"}),
        "Eyeglasses": (temples, temples | {"skin"}),
        "Male": (set(), {"background"}),
    }


def test_graded_tells_where_a_change_starts_and_lets_it_reach_as_far():
    """Raising Mouth_Slightly_Open paints the lips 1 and the skin around them 0.5; both may change."""
    natural, graded = relation_matrices(preset="natural"), relation_matrices(preset="graded")
    for sign, whole in zip(graded, natural, strict=True):
        assert torch.equal((sign > 0).float(), whole)
        assert set(sign.unique().tolist()) == {0.0, 0.5, 1.0}
        assert (sign == 1).any(dim=1).all()  # every attribute has a part that it starts from
    mask, asked = soft_mask(), difference(Mouth_Slightly_Open=1)
    row = graded.plus[MAGGAN.index("Mouth_Slightly_Open")]
    assert row[CELEBAMASK_HQ.id("u_lip")] == 1
    assert row[CELEBAMASK_HQ.id("skin")] == 0.5
    painted = mask_guided_conditioning(asked, mask, graded)[:, MAGGAN.index("Mouth_Slightly_Open")]
    torch.testing.assert_close(painted, torch.einsum("k,nkhw->nhw", row.to(mask), mask))
    torch.testing.assert_close(influence_mask(asked, mask, graded), influence_mask(asked, mask, natural))


def test_columns_follow_the_scheme():
    vector = difference(Blond_Hair=1, Pale_Skin=-1)
    mask = soft_mask()
    zll = convert_soft(mask, CELEBAMASK_HQ, CELEBAMASK_HQ_ZLL)
    torch.testing.assert_close(
        influence_mask(vector, zll, relation_matrices(CELEBAMASK_HQ_ZLL)), influence_mask(vector, mask)
    )


def test_no_change_preserves_everything_exactly():
    assert torch.equal(preserve_mask(difference(), soft_mask()), torch.ones(2, 1, 8, 8))
    assert not mask_guided_conditioning(difference(), soft_mask()).any()


def test_all_parts_preserve_nothing():
    everything = Relations(torch.ones(13, 19), torch.ones(13, 19))
    kept = preserve_mask(difference(Male=1), soft_mask(), everything)
    torch.testing.assert_close(kept, torch.zeros(2, 1, 8, 8), rtol=0, atol=1e-6)


def test_influence_is_the_union_of_the_parts():
    mask = soft_mask()
    expected = mask[:, [CELEBAMASK_HQ.id("hair")]] + mask[:, [CELEBAMASK_HQ.id("skin")]]
    torch.testing.assert_close(influence_mask(difference(Blond_Hair=1, Brown_Hair=-1, Pale_Skin=0.3), mask), expected)


def test_sign_chooses_the_matrix():
    labels = torch.zeros(1, 2, 2, dtype=torch.long)
    labels[0, 0, 0] = CELEBAMASK_HQ.id("hair")
    mask = torch.nn.functional.one_hot(labels, 19).permute(0, 3, 1, 2).float()
    assert influence_mask(difference(Bald=1)[:1], mask).flatten().tolist() == [1, 0, 0, 0]
    assert influence_mask(difference(Bald=-1)[:1], mask).flatten().tolist() == [0, 1, 1, 1]


def test_conditioning_with_all_ones_is_the_tiled_vector():
    vector = difference(Bald=1, Young=-0.5, Male=1.5)
    everything = Relations(torch.ones(13, 19), torch.ones(13, 19))
    tiled = vector[:, :, None, None].expand(-1, -1, 8, 8)
    torch.testing.assert_close(mask_guided_conditioning(vector, soft_mask(), everything), tiled)


def test_conditioning_scales_with_intensity_and_commutes_with_pooling():
    mask, pool = soft_mask(), torch.nn.AvgPool2d(2)
    full = mask_guided_conditioning(difference(Bangs=-1, Young=1), mask)
    torch.testing.assert_close(mask_guided_conditioning(difference(Bangs=-0.5, Young=0.5), mask), full / 2)
    torch.testing.assert_close(mask_guided_conditioning(difference(Bangs=-1, Young=1), pool(mask)), pool(full))


def test_dilation_grows_the_region():
    mask = torch.zeros(2, 19, 9, 9)
    mask[:, 0] = 1
    mask[:, 0, 4, 4], mask[:, CELEBAMASK_HQ.id("hair"), 4, 4] = 0, 1
    region = influence_mask(difference(Blond_Hair=1), mask, dilate_px=2)
    assert region[0].sum() == 25
    assert region[0, 0, 2:7, 2:7].all()
    assert mask_guided_conditioning(difference(Blond_Hair=-1), mask, dilate_px=1).sum() == -18
    with pytest.raises(ValueError, match="dilate_px"):
        influence_mask(difference(), mask, dilate_px=-1)


def test_masks_differentiate():
    vector = difference(Bangs=-1, Young=1).double()
    mask = soft_mask(size_px=2, dtype=torch.float64).mul(0.9).requires_grad_()
    assert torch.autograd.gradcheck(lambda m: preserve_mask(vector, m), (mask,))
    assert torch.autograd.gradcheck(lambda m: mask_guided_conditioning(vector, m), (mask,))


def test_rejects_mistakes():
    with pytest.raises(UnknownAttributeError, match="Blond_Hair"):
        related_parts("Blond")
    with pytest.raises(UnknownNameError, match="natural"):
        relation_matrices(preset="naturel")
    with pytest.raises(UsageError, match="helen"):
        relation_matrices(HELEN)
    with pytest.raises(ValueError, match=r"\(N,13\)"):
        influence_mask(torch.zeros(2, 40), soft_mask())
    with pytest.raises(ValueError, match=r"\(2,19,H,W\)"):
        mask_guided_conditioning(difference(), soft_mask(count=3))


def test_maskfacegan_regions():
    assert set(MASKFACEGAN_REGIONS) == {*MASKFACEGAN_LOCAL, "Big_Lips"}
    for name in CELEBA:
        rule = maskfacegan_region(name)
        assert {*rule.target, *rule.appearance} <= set(MASKFACEGAN.classes)
        assert rule.is_global == (name not in MASKFACEGAN_REGIONS)
        assert rule.shape_weight == (0.5 if rule.target == ("hair",) else 0)
    assert maskfacegan_region("Smiling").target == ("mouth",)
    assert maskfacegan_region("Wavy_Hair").updates_shape
    assert maskfacegan_region("Wavy_Hair").appearance == ("ears",)
    assert not maskfacegan_region("Gray_Hair").updates_shape
    for name in MASKFACEGAN_GLOBAL:
        assert set(maskfacegan_region(name).appearance) == set(MASKFACEGAN.classes) - {"background"}
