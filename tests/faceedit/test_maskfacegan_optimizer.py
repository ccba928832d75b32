# SPDX-License-Identifier: Apache-2.0
"""The optimisation's mechanics: what acts when, a batch as if each edit ran alone, observers, numbers that break."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

import pytest
import torch
from support.standin_networks import SIZE_PX, ColourClassifier, ColourParser, portrait, standins
from torch import Tensor, nn

from faceedit.errors import UnknownAttributeError, UsageError
from faceedit.maskfacegan import optimizer
from faceedit.maskfacegan.config import MaskFaceGANConfig
from faceedit.maskfacegan.graph import WARM_UP, GraphedIteration
from faceedit.maskfacegan.masks import MissingRegionError
from faceedit.maskfacegan.networks import AttributeJudge, Networks, RegionParser, _means, in_precision, mean_latent
from faceedit.maskfacegan.optimizer import optimize
from faceedit.maskfacegan.outcome import EditCancelledError, EditOutcome, OptimizationError, Progress
from faceedit.maskfacegan.plan import EditPlan, make_plan
from faceedit.networks.stylegan2 import StyleGAN2Config, StyleGAN2Generator

SHORT = MaskFaceGANConfig(
    latent_steps=10,
    semantic_start=4,
    dynamic_stop=7,
    noise_start=8,
    encoder_start=2,
    latent_rate=0.02,
    mean_samples=0,
    noise_steps=3,
)
SMILE = make_plan({"Smiling": 1})


def run(networks: Networks, plans: Sequence[EditPlan] = (SMILE,), config: MaskFaceGANConfig = SHORT, **options: object):
    source = options.pop("source", None)
    return optimize(networks, portrait(count=len(plans)) if source is None else source, plans, config, **options)


def one(
    networks: Networks, plan: EditPlan = SMILE, config: MaskFaceGANConfig = SHORT, **options: object
) -> EditOutcome:
    (outcome,) = run(networks, [plan], config, **options)
    assert isinstance(outcome, EditOutcome), outcome
    return outcome


def observed(plan: EditPlan, config: MaskFaceGANConfig = SHORT, **options: object) -> list[Progress]:
    seen: list[Progress] = []
    run(standins(), [plan], config, observe=seen.append, every=1, **options)
    return [progress for progress in seen if progress.stage in ("latent", "noise")]


def small_stylegan2(seed: int = 0, size_px: int = 16) -> Networks:
    """A real generator of 16 px, with a parser and a classifier of colours."""
    torch.manual_seed(seed)
    generator = StyleGAN2Generator(
        StyleGAN2Config(size_px=size_px, channel_base=128, channel_max=8, z_width=8, w_width=8, mapping_layers=2)
    )
    for name, parameter in generator.named_parameters():
        if name.endswith("strength"):
            nn.init.constant_(parameter, 0.2)
    return Networks(
        generator,
        RegionParser(ColourParser(), SIZE_PX),
        AttributeJudge(ColourClassifier()),
        features=standins().features,
    )


# The schedule, as it acts


def test_terms_act_when_the_schedule_says() -> None:
    seen = [(p.stage, p.iteration, tuple(p.losses)) for p in observed(make_plan({"Blond_Hair": 1}))]
    assert seen[:4] == [("latent", i, ("appearance",)) for i in range(4)]
    assert seen[4:10] == [("latent", i, ("appearance", "semantics", "shape")) for i in range(4, 10)]
    assert seen[10:] == [("noise", i, ("appearance", "noise")) for i in range(3)]
    sized = observed(make_plan({}, component="mouth", scale=1.5))
    assert [tuple(p.losses) for p in sized[3:5]] == [("appearance",), ("appearance", "size")]


def test_noise_is_zero_until_the_masks_are_frozen() -> None:
    networks = standins()
    one(networks)
    # Eight iterations without, two of the latent stage and three of the noise stage with maps, and the final image.
    assert networks.generator.synthesis.noise_was == ["zero"] * 8 + ["maps"] * 6


@pytest.mark.parametrize(
    ("plan", "with_gradient", "without"),
    [
        (SMILE, 0, 1 + 3),  # the input, then one forward for each iteration whose masks follow
        (make_plan({"Blond_Hair": 1}), 6, 1),
        (make_plan({}, component="mouth", scale=1.5), 6, 1),
        (make_plan({"Blond_Hair": 1}, component="mouth", scale=1.5), 6, 1),
        (make_plan({"Wavy_Hair": 1}), 6, 1 + 1),  # and the final image, for the blend
        (make_plan({"Male": 1}), 0, 1),
    ],
)
def test_one_parser_pass_an_iteration(plan: EditPlan, with_gradient: int, without: int) -> None:
    networks = standins()
    one(networks, plan)
    calls = networks.parser.network.calls
    assert (calls.count(True), calls.count(False)) == (with_gradient, without)


def test_adam_starts_anew_when_semantics_join(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[float] = []
    adam = torch.optim.Adam

    def counting(tensors: object, lr: float, **options: object) -> torch.optim.Adam:
        made.append(lr)
        return adam(tensors, lr=lr, **options)

    monkeypatch.setattr(torch.optim, "Adam", counting)
    one(standins())
    assert made == [0.02, 0.02, 0.1]
    made.clear()
    one(standins(), make_plan({"Male": 1}))
    assert made == [0.02, 0.1]


def test_masks_follow_only_in_their_iterations() -> None:
    frozen = one(standins(), config=replace(SHORT, dynamic_stop=4))
    still = one(standins(), make_plan({"Smiling": 1}, config=replace(SHORT, dynamic=False)))
    assert torch.equal(frozen.ws, still.ws)
    assert not torch.equal(one(standins()).ws, frozen.ws)


def test_a_given_or_encoded_start_skips_ahead() -> None:
    start = torch.full((1, 2, 48), 0.1)
    given = observed(SMILE, start=start)
    assert given[0].iteration == SHORT.encoder_start
    assert given[0].total == 8 + 3
    networks = replace(standins(), encoder=lambda image: start.expand(len(image), -1, -1))
    encoded = one(networks, config=replace(SHORT, start="encoder"))
    assert torch.equal(encoded.ws, one(standins(), start=start).ws)
    assert encoded.iterations == {"latent": 8, "noise": 3}
    assert one(networks, make_plan({"Male": 1})).iterations["latent"] == 8
    assert one(networks).iterations["latent"] == 10
    with pytest.raises(UsageError, match="must have an encoder"):
        one(standins(), config=replace(SHORT, start="encoder"))


def test_no_noise_stage_is_allowed() -> None:
    outcome = one(standins(), config=replace(SHORT, noise_steps=0))
    assert "noise" not in outcome.losses
    assert outcome.iterations["noise"] == 0
    clean = standins()
    one(clean, config=replace(SHORT, noise_steps=0, noise_start=10))
    assert set(clean.generator.synthesis.noise_was) == {"zero"}


def test_an_outcome_is_synthesised_again_from_its_code_and_maps() -> None:
    networks = small_stylegan2()
    for noise_start in (8, 10):  # with maps, and without any
        found = one(networks, config=replace(SHORT, noise_steps=0, noise_start=noise_start))
        again = networks.generator.synthesis(found.ws, noise=found.noise)
        torch.testing.assert_close(again, found.generated, atol=1e-5, rtol=1e-5)
        assert any(bool(noise_map.any()) for noise_map in found.noise) == (noise_start == 8)


def test_losses_fall() -> None:
    config = replace(SHORT, latent_steps=60, semantic_start=30, dynamic_stop=40, noise_start=40, noise_steps=20)
    seen = observed(SMILE, config)
    at = {(p.stage, p.iteration): p.losses for p in seen}
    assert at["latent", 29]["appearance"] < 0.2 * at["latent", 0]["appearance"]
    assert at["latent", 39]["semantics"] < at["latent", 30]["semantics"]
    assert at["noise", 19]["appearance"] < at["noise", 0]["appearance"]


# Batches


MIXED = [
    make_plan({"Smiling": 1}),
    make_plan({"Blond_Hair": 1, "Smiling": 0}),
    make_plan({"Male": 0}),
    make_plan({"Wavy_Hair": 1}, keep=["Black_Hair"]),
    make_plan({"Smiling": 0.5}, component="mouth", scale=1.5),
]


def test_a_batch_gives_what_each_edit_gives_alone() -> None:
    """Bit for bit: the stand-ins work on each sample by itself, and so do all terms, Adam and the blend."""
    source = torch.cat([portrait(seed) for seed in range(len(MIXED))])
    together = run(standins(), MIXED, source=source)
    for i, plan in enumerate(MIXED):
        alone, batched = one(standins(), plan, source=source[i : i + 1]), together[i]
        assert isinstance(batched, EditOutcome)
        for name in ("ws", "generated", "blend", "image"):
            assert torch.equal(getattr(batched, name), getattr(alone, name)), (i, name)
        assert all(torch.equal(a, b) for a, b in zip(batched.noise, alone.noise, strict=True))
        assert batched.losses == alone.losses


def test_splitting_a_batch_changes_nothing() -> None:
    source = portrait(1).expand(len(MIXED), -1, -1, -1)
    whole, split = (run(standins(), MIXED, source=source, batch=batch) for batch in (8, 1))
    assert all(torch.equal(a.image, b.image) for a, b in zip(whole, split, strict=True))


def test_a_batch_through_stylegan2_is_alone_up_to_rounding() -> None:
    """Matrix products and convolutions may sum in another order for another batch: fp32 rounding, which Adam's division
    by the root of small squares enlarges. 1e-4 of the image's range is a hundredth of a grey level."""
    networks = small_stylegan2()
    source = torch.cat([portrait(seed) for seed in range(3)])
    plans = [MIXED[0], MIXED[1], MIXED[0]]
    config = replace(SHORT, latent_rate=1e-3)
    together = run(networks, plans, config, source=source)
    for i, plan in enumerate(plans):
        alone = one(networks, plan, config, source=source[i : i + 1])
        torch.testing.assert_close(together[i].generated, alone.generated, rtol=0, atol=1e-4)


def test_stylegan2_moves_towards_the_image() -> None:
    config = replace(SHORT, latent_steps=40, semantic_start=30, dynamic_stop=30, noise_start=40, latent_rate=0.05)
    seen: list[Progress] = []
    run(small_stylegan2(), [SMILE], config, observe=seen.append, every=1)
    losses = [p.losses["appearance"].item() for p in seen if p.stage == "latent"]
    assert losses[29] < 0.7 * losses[0]


@pytest.mark.parametrize("networks", [standins, small_stylegan2])
def test_same_seed_same_bits(networks: object) -> None:
    first, again, other = (one(networks(), seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.image, again.image)
    assert not torch.equal(first.image, other.image)


def test_bfloat16_is_near_float32() -> None:
    source = up(portrait(), 64)
    full, half = (
        one(small_stylegan2(size_px=64), config=replace(SHORT, precision=precision), source=source)
        for precision in ("float32", "bfloat16")
    )
    difference = (full.generated - half.generated).abs().mean() / full.generated.std()
    assert 0 < difference < 0.05
    assert full.ws.dtype == half.ws.dtype == torch.float32


def up(image: Tensor, side: int) -> Tensor:
    return torch.nn.functional.interpolate(image, (side, side))


def test_networks_are_left_as_they_were() -> None:
    networks = small_stylegan2()
    before = {name: value.clone() for name, value in networks.generator.state_dict().items()}
    one(networks, config=replace(SHORT, precision="bfloat16"))
    assert all(torch.equal(value, before[name]) for name, value in networks.generator.state_dict().items())
    assert networks.generator.synthesis.precision == networks.generator.config.precision
    assert all(p.grad is None for p in networks.generator.parameters())


def test_overlapping_edits_keep_their_own_precision() -> None:
    networks = small_stylegan2()
    own = networks.generator.synthesis.precision
    first, second = (in_precision(networks, "bfloat16") for _ in range(2))
    running, also = first.__enter__(), second.__enter__()
    first.__exit__(None, None, None)
    assert also.generator.synthesis.precision.dtype == running.generator.synthesis.precision.dtype == "bfloat16"
    assert networks.generator.synthesis.precision == own
    second.__exit__(None, None, None)
    assert networks.generator.synthesis.precision == own
    assert running.generator.mapping is networks.generator.mapping


def test_the_mean_follows_the_weights_and_is_forgotten_with_them() -> None:
    mapping = small_stylegan2().generator.mapping
    before = mean_latent(mapping, 100)
    assert mean_latent(mapping, 100) is before
    mapping.load_state_dict({name: 2 * value for name, value in mapping.state_dict().items()})
    after = mean_latent(mapping, 100)
    torch.testing.assert_close(after, mapping.estimate_average(100))
    assert not torch.allclose(after, before)
    assert len(_means[mapping]) == 1
    known = len(_means)
    del mapping
    gc.collect()
    assert len(_means) == known - 1


# Observers


def test_progress_comes_every_k_iterations_and_at_the_end_of_a_stage() -> None:
    seen: list[Progress] = []
    outcome = one(standins(), observe=seen.append, every=4)
    assert torch.equal(seen[-1].image, outcome.image)
    assert [(p.stage, p.iteration) for p in seen] == [
        ("source", 0), ("latent", 0), ("latent", 4), ("latent", 8), ("latent", 9), ("noise", 0), ("noise", 2),
        ("blend", 0),
    ]  # fmt: skip
    assert [p.done for p in seen] == [0, 1, 5, 9, 10, 11, 13, 13]
    assert {p.total for p in seen} == {13}
    assert all(p.image.shape == (1, 3, SIZE_PX, SIZE_PX) for p in seen)
    assert torch.equal(seen[0].image, portrait())
    assert not torch.equal(seen[1].image, seen[2].image)


def test_progress_names_the_edits_of_its_batch() -> None:
    seen: list[Progress] = []
    run(standins(), MIXED, observe=seen.append, every=1000)
    assert {p.edits for p in seen} == {(0, 1, 3, 4), (2,)}


def test_cancelling_stops_at_once() -> None:
    seen: list[Progress] = []
    with pytest.raises(EditCancelledError, match="after 6 of 13 iterations"):
        one(standins(), observe=seen.append, every=1, should_stop=lambda: len(seen) == 7)


# Numbers that break


class Breaking(nn.Module):
    """A synthesis whose n-th call gives NaN in the first sample; wraps the stand-in's."""

    def __init__(self, inner: nn.Module, call: int) -> None:
        super().__init__()
        self.inner, self.call, self.calls = inner, call, 0

    def forward(self, ws: Tensor, noise: object) -> Tensor:
        self.calls += 1
        image = self.inner(ws, noise)
        if self.calls == self.call:
            factor = torch.ones(len(image), 1, 1, 1)
            factor[0] = torch.nan
            image = image * factor
        return image


def breaking(call: int) -> Networks:
    networks = standins()
    networks.generator.synthesis = Breaking(networks.generator.synthesis, call)
    return networks


def test_nan_in_the_latent_stage_is_an_error_of_that_edit_alone() -> None:
    plans = [make_plan({"Smiling": 1}), make_plan({"Blond_Hair": 1})]
    lost, kept = run(breaking(6), plans)
    assert isinstance(lost, OptimizationError)
    assert "Smiling at iteration 5" in str(lost)
    assert len(str(lost).splitlines()) == 1
    assert torch.equal(kept.image, run(standins(), plans)[1].image)


def test_nan_in_the_noise_stage_is_recorded_and_the_last_finite_state_kept() -> None:
    outcome = one(breaking(12))
    assert outcome.held_from == 1
    assert outcome.image.isfinite().all()
    shorter = one(standins(), config=replace(SHORT, noise_steps=1))
    for held, expected in zip(outcome.noise, shorter.noise, strict=True):
        torch.testing.assert_close(held, expected, rtol=1e-5, atol=1e-5)
    assert one(standins()).held_from == -1


def test_nan_at_the_very_end_is_an_error() -> None:
    (outcome,) = run(breaking(14))
    assert isinstance(outcome, OptimizationError)
    assert "generated image must be finite" in str(outcome)


# Refusals


def test_sizes_are_checked() -> None:
    with pytest.raises(UsageError, match="at the generator's size"):
        run(standins(), source=torch.zeros(1, 3, 8, 8))
    with pytest.raises(UsageError, match="one image a plan"):
        run(standins(), [SMILE, SMILE], source=portrait())
    wrong = replace(standins(), encoder=lambda image: torch.zeros(1, 18, 512))
    with pytest.raises(UsageError, match="the encoder must give codes"):
        run(wrong, config=replace(SHORT, start="encoder"))
    with pytest.raises(UsageError, match="start must give codes"):
        run(standins(), start=torch.zeros(1, 18, 512))


def test_unknown_attributes_and_missing_regions_are_refused_before_anything_runs() -> None:
    networks = standins()
    with pytest.raises(UnknownAttributeError, match="Straight_Hair"):
        run(networks, [make_plan({"Straight_Hair": 1})])
    bald = portrait()
    bald[:, 1] = -9
    with pytest.raises(MissingRegionError, match="hair must be in the picture"):
        run(networks, [make_plan({"Wavy_Hair": 1})], source=bald)
    with pytest.raises(UsageError, match="feature network"):
        run(replace(networks, features=None), [make_plan({"Male": 1})])
    assert networks.generator.synthesis.noise_was == []


def test_the_last_edit_is_checked_before_the_first_one_runs() -> None:
    networks, seen = standins(), []
    source = portrait(count=3)
    source[2, 1] = -9  # bald
    wavy = make_plan({"Wavy_Hair": 1})
    with pytest.raises(MissingRegionError, match="hair must be in the picture"):
        run(networks, [wavy] * 3, source=source, batch=1, observe=seen.append)
    with pytest.raises(UnknownAttributeError, match="Straight_Hair"):
        run(networks, [SMILE, make_plan({"Straight_Hair": 1})], batch=1, observe=seen.append)
    with pytest.raises(UsageError, match="feature network"):
        run(replace(networks, features=None), [SMILE, make_plan({"Male": 1})], observe=seen.append)
    with pytest.raises(UsageError, match='start "encoder" must have an encoder'):
        run(replace(networks, encoder=None), [SMILE], replace(SHORT, start="encoder"), observe=seen.append)
    assert seen == []
    assert networks.generator.synthesis.noise_was == []


# CUDA graphs


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_captured_iterations_are_the_same() -> None:
    plain, graphed = (
        one(on_cuda(small_stylegan2()), config=replace(SHORT, cuda_graph=graph), source=portrait().cuda())
        for graph in (False, True)
    )
    torch.testing.assert_close(plain.generated, graphed.generated, rtol=0, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_classifier_beside_the_parser_gives_what_it_gives_before_it(
    precision: Literal["float32", "bfloat16"], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(SHORT, cuda_graph=True, precision=precision)
    beside = one(on_cuda(small_stylegan2()), config=config, source=portrait().cuda())
    monkeypatch.setattr(optimizer._Run, "_aside", lambda run, work: partial(lambda result: result, work()))
    before = one(on_cuda(small_stylegan2()), config=config, source=portrait().cuda())
    torch.testing.assert_close(beside.generated, before.generated, rtol=0, atol=1e-3)


def on_cuda(networks: Networks) -> Networks:
    networks.generator.cuda()
    networks.parser.network.cuda()
    networks.classifier.network.cuda()
    return networks


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_graph_replays_what_it_captured() -> None:
    total = torch.zeros((), device="cuda")

    def count() -> None:
        total.add_(1)

    iterate = GraphedIteration(count, total.device)
    for _ in range(WARM_UP + 4):
        iterate()
    assert total.item() == WARM_UP + 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_what_reads_back_cannot_be_captured() -> None:
    total = torch.zeros((), device="cuda")
    iterate = GraphedIteration(lambda: total.add_(1).item(), total.device)
    for _ in range(WARM_UP):
        iterate()
    with pytest.raises(OptimizationError, match="cuda_graph=False"):
        iterate()
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert (total + 1).item() == WARM_UP + 1
