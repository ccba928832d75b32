# SPDX-License-Identifier: Apache-2.0
"""The three stages: latent code, noise maps, blending. Many edits run as one batch and come out as if each ran alone.

Every term is a value per edit and Adam works element by element, so edits do not mix; an edit whose numbers stop being
finite is held at its last finite state and the others go on. An iteration reads nothing back from the device, so it can
be captured in a CUDA graph (`faceedit.maskfacegan.graph`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from faceedit.attributes import check_attribute
from faceedit.errors import UsageError
from faceedit.kernels import alpha_blend, normalize_noise_
from faceedit.maskfacegan import losses
from faceedit.maskfacegan.config import MaskFaceGANConfig
from faceedit.maskfacegan.graph import GraphedIteration
from faceedit.maskfacegan.masks import EditMasks, check_regions
from faceedit.maskfacegan.networks import Networks, encode, in_precision, mean_latent
from faceedit.maskfacegan.noise_maps import NoiseMaps
from faceedit.maskfacegan.outcome import (
    TERMS,
    EditCancelledError,
    EditOutcome,
    Observer,
    OptimizationError,
    Progress,
    Stage,
)
from faceedit.maskfacegan.plan import EditPlan
from faceedit.maskfacegan.schedule import Phase, latent_phases

Terms = dict[str, tuple[float, Tensor]]
"""Weight and value (N) of each term that acts."""


@dataclass
class _State:
    """What the iterations change, in place.

    ws (N,L,W); noise, the maps; image (N,3,S,S), the last I_G; terms, the last values (N) of those that act.
    is_finite (N), which edits are; counter (), iterations of this stage; lost_at (N), when an edit was lost, else -1.
    """

    ws: Tensor
    noise: NoiseMaps
    image: Tensor
    is_finite: Tensor
    counter: Tensor
    lost_at: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)
    optimizer: torch.optim.Optimizer | None = None

    @classmethod
    def of(cls, ws: Tensor, noise: NoiseMaps, image: Tensor) -> _State:
        """The state before the first iteration."""
        device, count = ws.device, ws.shape[0]
        return cls(
            ws,
            noise,
            image,
            torch.ones(count, dtype=torch.bool, device=device),
            torch.zeros((), dtype=torch.int64, device=device),
            torch.full((count,), -1, dtype=torch.int64, device=device),
        )


@torch.inference_mode(False)
def optimize(
    networks: Networks,
    source: Tensor,
    plans: Sequence[EditPlan],
    config: MaskFaceGANConfig | None = None,
    *,
    seed: int = 0,
    start: Tensor | None = None,
    observe: Observer | None = None,
    every: int = 10,
    should_stop: Callable[[], bool] | None = None,
    batch: int = 8,
) -> list[EditOutcome | OptimizationError]:
    """Edit images, one plan for each; pass an image as often as it has edits.

    Args:    source (N,3,S,S) in [-1, 1] at the generator's size; plans, N of them, local and global ones may mix;
             seed, of the noise that every edit starts with; start, latent codes (N,L,W) to start from, as from an
             encoder; observe is called every `every` iterations, after a stage's last one, at the start and at the
             end; should_stop is asked before each iteration; batch, how many edits of one kind run together, for memory
             alone. Modes without gradients, as `torch.inference_mode`, change nothing.
    Returns: outcomes in the order of the plans. One whose latent stage stopped being finite is an OptimizationError in
             the list, to raise or to report; the others are what they are without it. Where only the noise stage did,
             the maps stay at their last finite state and the outcome says since when (`held_from`).
    Raises:  UsageError on sizes, a missing encoder or feature network; MissingRegionError; UnknownAttributeError;
             EditCancelledError.
    """
    config = config or MaskFaceGANConfig()
    _check(networks, source, plans, start)
    # Clones, for a tensor of the caller's inference mode could not be part of what gradients pass through.
    source, start = source.clone().to(networks.device), None if start is None else start.clone()
    groups = [[i for i, plan in enumerate(plans) if plan.is_global == is_global] for is_global in (False, True)]
    chunks = [group[at : at + batch] for group in groups for at in range(0, len(group), batch)]
    outcomes: dict[int, EditOutcome | OptimizationError] = {}
    for chunk in chunks:  # all of them first: what the last one lacks must not cost the work of the others
        _check_networks(networks, [plans[i] for i in chunk], config, has_start=start is not None)
    for chunk in chunks[1:]:  # the first one looks at its own before it begins
        check_regions(_parsed(networks, source[chunk]), [plans[i] for i in chunk], config)
    for chunk in chunks:
        given = None if start is None else start[chunk].to(networks.device)
        with in_precision(networks, config.precision) as running:
            run = _Run(running, source[chunk], [plans[i] for i in chunk], config, seed, given)
            run.edits, run.observe, run.every, run.should_stop = tuple(chunk), observe, max(every, 1), should_stop
            outcomes.update(zip(chunk, run(), strict=True))
    return [outcomes[i] for i in range(len(plans))]


class _Run:
    """Edits of one kind (all local or all global) that run together."""

    edits: tuple[int, ...] = ()
    observe: Observer | None = None
    every = 10
    should_stop: Callable[[], bool] | None = None

    def __init__(
        self,
        networks: Networks,
        source: Tensor,
        plans: Sequence[EditPlan],
        config: MaskFaceGANConfig,
        seed: int,
        start: Tensor | None,
    ) -> None:
        self.networks, self.source, self.plans, self.config = networks, source, plans, config
        self.is_global = plans[0].is_global
        # Captured, it costs no memory of its own; otherwise each of PyTorch's streams would keep what it once used.
        self.side = torch.cuda.Stream(source.device) if source.is_cuda and config.cuda_graph else None
        parsed = _parsed(networks, source)
        check_regions(parsed, plans, config)
        self.masks = EditMasks.of(parsed, plans, source.shape[-1])
        asks = any(plan.attributes for plan in plans)
        self.semantics = losses.Semantics.of(networks.classifier, plans, source, config) if asks else None
        self.perception = self._perception() if self.is_global else None
        self.scales = torch.tensor([plan.scale for plan in plans], device=source.device)
        self.has_shape = any(plan.shape for plan in plans) and config.shape_weight > 0
        self.has_size = any(plan.scale for plan in plans) and config.size_weight > 0
        ws, self.from_mean = self._start(start)
        noise = NoiseMaps(len(plans), networks.generator.config.noise_px, seed, source.device)
        self.state = _State.of(ws, noise, torch.zeros_like(source))
        self.phases = latent_phases(config, is_global=self.is_global, from_mean=self.from_mean)
        self.total = sum(phase.stop - phase.start for phase in self.phases) + config.noise_steps
        self.done = 0

    # Set up

    def _perception(self) -> losses.Perception:
        assert self.networks.features is not None  # _check_networks
        return losses.Perception.of(self.networks.features, self.source)

    def _start(self, start: Tensor | None) -> tuple[Tensor, bool]:
        """The first latent codes (N,L,W), and whether they are the mean."""
        networks, config, generator = self.networks, self.config, self.networks.generator
        if start is not None:
            return start.clone(), False
        wants_encoder = config.start == "encoder" or (self.is_global and networks.encoder is not None)
        if wants_encoder:
            assert networks.encoder is not None  # _check_networks
            ws = encode(networks.encoder, self.source).float().clone()
            _check_codes("the encoder", ws, len(self.plans), generator.config)
            return ws, False
        mean = mean_latent(generator.mapping, config.mean_samples)
        shape = (len(self.plans), generator.config.num_ws, generator.config.w_width)
        return mean.to(self.source).expand(shape).contiguous(), True

    # Stages

    def __call__(self) -> list[EditOutcome | OptimizationError]:
        seconds: dict[str, float] = {}
        self._report("source", 0, self.source)
        with torch.enable_grad():
            self._timed("latent", self._latent_stage, seconds)
            self._timed("noise", self._noise_stage, seconds)
        with torch.no_grad():
            self._timed("blend", self._blend, seconds)
        self._report("blend", 0, self.blended)
        return [self._outcome(row, seconds) for row in range(len(self.plans))]

    def _timed(self, stage: str, run: Callable[[], None], seconds: dict[str, float]) -> None:
        began = time.perf_counter()
        run()
        if self.source.is_cuda:
            torch.cuda.synchronize(self.source.device)
        seconds[stage] = time.perf_counter() - began

    def _latent_stage(self) -> None:
        state, config = self.state, self.config
        state.ws.requires_grad_(True)
        state.counter.fill_(self.phases[0].start)
        for phase in self.phases:
            if state.optimizer is None or phase.restarts:
                state.optimizer = self._adam(state.ws, config.latent_rate)
            state.terms = {}
            self._iterate("latent", partial(self._latent_step, phase), phase.start, phase.stop)
        state.ws.requires_grad_(False)

    def _noise_stage(self) -> None:
        state, config = self.state, self.config
        self.failures = {
            row: self._failure(row) for row in (~state.is_finite).nonzero().flatten().tolist()
        }  # the edit was not made, whatever the noise stage does
        self.last_latent = {name: value.clone() for name, value in state.terms.items()}
        if config.noise_steps == 0:
            return
        values = state.noise.values.requires_grad_(True)
        state.counter.zero_()
        state.optimizer, state.terms = self._adam(values, config.noise_rate), {}
        self._iterate("noise", self._noise_step, 0, config.noise_steps)
        values.requires_grad_(False)

    def _blend(self) -> None:
        """Stage three: I_G of the final state, B, and I' = B ⊙ I_G + (1 - B) ⊙ I (paper, eq. 12)."""
        self.has_noise = self.phases[-1].has_noise or self.config.noise_steps > 0
        self.generated = self._generate(self.state.noise.maps if self.has_noise else "zero")
        self.blend = self.masks.blend
        if any(plan.follows for plan in self.plans):
            self.blend = self.masks.blend_with(self.networks.parser(self.generated))
        self.blended = alpha_blend(self.generated, self.source, self.blend)

    def _failure(self, row: int) -> OptimizationError:
        return OptimizationError(
            f"maskfacegan: the latent stage must stay finite, got NaN or infinity for {_describe(self.plans[row])} at "
            f"iteration {int(self.state.lost_at[row])}; lower latent_rate, use precision float32, or check the weights"
        )

    def _outcome(self, row: int, seconds: Mapping[str, float]) -> EditOutcome | OptimizationError:
        if row in self.failures:
            return self.failures[row]
        one = slice(row, row + 1)
        if not bool(self.generated[one].isfinite().all()):
            return OptimizationError(
                f"maskfacegan: the generated image must be finite, got NaN or infinity for "
                f"{_describe(self.plans[row])}; check the generator's weights"
            )
        state, terms, plan = self.state, self.last_latent | self.state.terms, self.plans[row]
        has = {"semantics": plan.attributes, "shape": plan.shape, "size": plan.component}
        idle = {name for name, asked in has.items() if not asked}  # they act for other edits of the batch
        return EditOutcome(
            image=self.blended[one],
            generated=self.generated[one],
            blend=self.blend[one],
            ws=state.ws[one].detach().clone(),
            noise=tuple(noise_map[one].detach() * float(self.has_noise) for noise_map in state.noise.maps),
            losses={name: float(terms[name][row]) for name in TERMS if name in terms and name not in idle},
            iterations={"latent": self.total - self.config.noise_steps, "noise": self.config.noise_steps},
            seconds=dict(seconds),
            held_from=int(state.lost_at[row]),
        )

    # Iterations

    def _iterate(self, stage: Stage, step: Callable[[], None], start: int, stop: int) -> None:
        graphed = self.config.cuda_graph and self.source.is_cuda
        iterate = GraphedIteration(step, self.source.device) if graphed else step
        for iteration in range(start, stop):
            if self.should_stop is not None and self.should_stop():
                raise EditCancelledError(
                    f"maskfacegan: the edit was cancelled after {self.done} of {self.total} iterations; nothing is kept"
                )
            iterate()
            self.done += 1
            is_last = iteration + 1 == (self.config.noise_steps if stage == "noise" else self.config.latent_steps)
            if iteration % self.every == 0 or is_last:
                self._report(stage, iteration, self.state.image)

    def _report(self, stage: Stage, iteration: int, image: Tensor) -> None:
        if self.observe is None:
            return
        terms = {name: self.state.terms[name].to("cpu", copy=True) for name in TERMS if name in self.state.terms}
        self.observe(Progress(stage, iteration, self.done, self.total, self.edits, terms, image.detach().clone()))

    def _latent_step(self, phase: Phase) -> None:
        state, config, masks = self.state, self.config, self.masks
        image = self._generate(state.noise.maps if phase.has_noise else "zero")
        terms: Terms = {}
        if self.perception is not None:
            terms["perceptual"] = config.perceptual_weight, self.perception(image, masks)
        else:
            terms["appearance"] = config.appearance_weight, losses.appearance(image, self.source, masks)
        if config.spread_weight > 0 and not self.is_global:
            terms["spread"] = config.spread_weight, losses.spread(state.ws)
        parsed: Tensor | None = None
        if phase.is_constrained:
            semantics = None if self.semantics is None else self._aside(partial(self.semantics, image))
            if self.has_shape or self.has_size or phase.updates_masks:
                # One pass, read up to three times. Where no term needs its gradient, it costs a forward alone.
                with nullcontext() if self.has_shape or self.has_size else torch.no_grad():
                    parsed = self.networks.parser(image)
            if semantics is not None:
                terms["semantics"] = config.semantic_weight, semantics()
            if parsed is not None and self.has_shape:
                terms["shape"] = config.shape_weight, losses.shape(parsed, masks)
            if parsed is not None and self.has_size:
                terms["size"] = config.size_weight, losses.size(parsed, masks, self.scales)
        self._descend(image, terms, state.ws, lambda: state.ws.detach().flatten(1).sum(1)[None], _expand_to_codes)
        if phase.updates_masks and parsed is not None:
            masks.relax(parsed.detach())

    def _aside(self, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Begin work whose result is asked for later, by calling what is returned. In a graph both run side by side.

        Neither of the two networks that judge an image fills a GPU. Autograd runs the way back on the same streams.
        """
        if self.side is None:
            result = work()
            return lambda: result
        here, side = torch.cuda.current_stream(self.source.device), self.side
        side.wait_stream(here)
        with torch.cuda.stream(side):
            begun = work()

        def joined() -> Tensor:
            here.wait_stream(side)
            return begun

        return joined

    def _noise_step(self) -> None:
        config, noise = self.config, self.state.noise
        # Twice the same maps: each reader's gradients become one vector, and the two vectors one sum.
        image = self._generate(noise.of(noise.values))
        weight = config.global_noise_appearance_weight if self.is_global else config.appearance_weight
        terms: Terms = {
            "appearance": (weight, losses.appearance(image, self.source, self.masks)),
            "noise": (config.noise_weight, losses.noise(noise.of(noise.values), config)),
        }
        if config.compat:  # behind autograd's back: the backward pass sees other values than the forward pass did
            normalize_noise_(noise.of(noise.values.data))
        self._descend(image, terms, noise.values, noise.sums, noise.expand)
        if not config.compat:
            normalize_noise_(noise.of(noise.values.detach()))

    def _generate(self, noise: Sequence[Tensor] | str) -> Tensor:
        return self.networks.generator.synthesis(self.state.ws, noise=noise)

    def _descend(
        self,
        image: Tensor,
        terms: Terms,
        wanted: Tensor,
        sums: Callable[[], Tensor],
        expand: Callable[[Tensor], Tensor],
    ) -> None:
        """Keep image and terms for observers and take a step of Adam. Edits that are not finite stay where they are.

        sums: of each edit's part of `wanted`, (parts, N); expand: what an edit has (N) for each value of `wanted`.
        """
        state = self.state
        total = torch.stack([weight * term for weight, term in terms.values()]).sum(0)
        (wanted.grad,) = torch.autograd.grad(total.sum(), wanted)
        before = wanted.detach().clone()
        assert state.optimizer is not None
        state.optimizer.step()
        with torch.no_grad():
            state.image.copy_(image)
            for name, (_, term) in terms.items():
                state.terms.setdefault(name, torch.zeros_like(term)).copy_(term)
            state.is_finite &= total.isfinite()
            # A gradient that is not finite shows in what it moved, and that in its sum.
            state.is_finite &= sums().isfinite().all(0)
            now = wanted.detach()
            torch.where(expand(state.is_finite), now, before, out=now)
            newly_lost = ~state.is_finite & (state.lost_at < 0)
            state.lost_at.copy_(torch.where(newly_lost, state.counter, state.lost_at))
            state.counter += 1

    def _adam(self, wanted: Tensor, rate: float) -> torch.optim.Optimizer:
        is_cuda = self.source.is_cuda
        capturable = self.config.cuda_graph and is_cuda
        return torch.optim.Adam([wanted], lr=rate, capturable=capturable, fused=True if is_cuda else None)


def _expand_to_codes(edits: Tensor) -> Tensor:
    return edits[:, None, None]


def _describe(plan: EditPlan) -> str:
    return ", ".join(plan.values) or f"the size of {plan.component}"


def _check(networks: Networks, source: Tensor, plans: Sequence[EditPlan], start: Tensor | None) -> None:
    config = networks.generator.config
    side = config.size_px
    if source.shape != (len(plans), 3, side, side) or not plans:
        raise UsageError(
            f"optimize: source must be ({len(plans)},3,{side},{side}), one image a plan at the generator's size, got "
            f"{tuple(source.shape)}; resize it or load a generator of its size"
        )
    if start is not None:
        _check_codes("start", start, len(plans), config)


@torch.no_grad()
def _parsed(networks: Networks, source: Tensor) -> Tensor:
    return networks.parser(source)


def _check_networks(
    networks: Networks, plans: Sequence[EditPlan], config: MaskFaceGANConfig, *, has_start: bool
) -> None:
    """Raise where edits of one kind need what the networks lack: an attribute, features, an encoder."""
    for plan in plans:
        for name in plan.attributes:
            check_attribute(name, networks.classifier.known)
    if plans[0].is_global and networks.features is None:
        raise UsageError(
            f"maskfacegan: {', '.join(plans[0].values)} edits the whole face and needs a feature network, got "
            "none; install attribute-classifier-starter or pass Networks(features=...)"
        )
    if config.start == "encoder" and networks.encoder is None and not has_start:
        raise UsageError(
            'maskfacegan: start "encoder" must have an encoder, got none; name one in the weights or start '
            'from the "mean"'
        )


def _check_codes(what: str, ws: Tensor, count: int, config: Any) -> None:
    if ws.shape != (count, config.num_ws, config.w_width):
        raise UsageError(
            f"optimize: {what} must give codes ({count},{config.num_ws},{config.w_width}), got {tuple(ws.shape)}; "
            "encode for a generator of this size"
        )
