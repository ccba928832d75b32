# SPDX-License-Identifier: Apache-2.0
"""Who a synthetic portrait shows: every random choice behind one person, drawn before anything is rendered.

A person is a flat table of tensors. Attributes are *switches* in that table, and what a switch would show (the beard
this
person would grow, the tone of their blond hair) is drawn for everyone, whether shown or not. Turning one switch
therefore
changes what it names and nothing else, which is what makes counterfactual pairs pixel-exact outside the edit.

Lengths are in head units: the crop is 2 wide, the eyes are 0.4 apart, y points down, the origin is between the eyes.
Means and spreads of eyes, brows, nose and mouth were set by comparing face-mesh landmarks of rendered people with those
of a thousand photographed adults (docs/synthetic-portraits.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from faceedit.attributes import CELEBA, attribute_index

HAIR_COLOURS = ("Black_Hair", "Brown_Hair", "Blond_Hair", "Gray_Hair", "red")
HAIR_STYLES = ("short", "medium", "long", "up")
HAIR_TEXTURES = ("Straight_Hair", "Wavy_Hair", "curly")

# Mean sRGB of each hair colour and how far a person's own tone strays from it.
_HAIR_TONES = torch.tensor(
    [[0.07, 0.06, 0.06], [0.28, 0.18, 0.11], [0.72, 0.56, 0.34], [0.62, 0.62, 0.62], [0.45, 0.20, 0.09]]
)
_HAIR_SPREAD = torch.tensor([0.045, 0.09, 0.13, 0.15, 0.09])

# Skin from deep to light, roughly the Monk scale in sRGB.
_SKIN_TONES = torch.tensor(
    [
        [0.26, 0.16, 0.11],
        [0.37, 0.24, 0.17],
        [0.50, 0.34, 0.25],
        [0.62, 0.44, 0.33],
        [0.72, 0.53, 0.41],
        [0.80, 0.60, 0.48],
        [0.86, 0.67, 0.56],
        [0.91, 0.74, 0.64],
    ]
)


@dataclass(frozen=True)
class PortraitParameters:
    """A batch of people: name -> tensor whose first dimension is the batch, all on one device."""

    values: dict[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.values[name]

    def __len__(self) -> int:
        return self.values["seed"].shape[0]

    def replace(self, **changes: Tensor) -> PortraitParameters:
        """The same people with some entries changed; an unknown name is a programming error."""
        unknown = changes.keys() - self.values.keys()
        if unknown:
            raise KeyError(f"PortraitParameters.replace: unknown parameters {sorted(unknown)}")
        return PortraitParameters({**self.values, **changes})

    def select(self, index: Tensor | slice) -> PortraitParameters:
        """The people at `index` (a slice, or an int64 / bool tensor)."""
        return PortraitParameters({name: value[index] for name, value in self.values.items()})

    def to(self, device: str | torch.device) -> PortraitParameters:
        return PortraitParameters({name: value.to(device) for name, value in self.values.items()})

    def chunks(self, size: int) -> Iterator[PortraitParameters]:
        for start in range(0, len(self), size):
            yield self.select(slice(start, start + size))


class _Draw:
    """Random columns, one row per person. Each person has a generator, so a person does not depend on the batch."""

    def __init__(self, count: int, seed: int) -> None:
        seeds = torch.arange(count, dtype=torch.int64) + seed * 1_000_003
        self.seeds = seeds
        rows = []
        for s in seeds.tolist():
            generator = torch.Generator().manual_seed(s)
            rows.append(torch.rand(_COLUMNS, generator=generator))
        self._table = torch.stack(rows) if rows else torch.empty(0, _COLUMNS)
        self._next = 0

    def uniform(self, low: float = 0.0, high: float = 1.0, width: int | None = None) -> Tensor:
        take = width or 1
        block = self._table[:, self._next : self._next + take]
        self._next += take
        if block.shape[1] != take:
            raise AssertionError("raise _COLUMNS")
        block = low + (high - low) * block
        return block if width else block[:, 0]

    def normal(self, mean: float, spread: float, width: int | None = None) -> Tensor:
        """A normal draw cut at 2.2 standard deviations, so no face falls apart."""
        u = self.uniform(0.014, 0.986, width)
        return mean + spread * torch.erfinv(2 * u - 1) * 2**0.5

    def chance(self, probability: float | Tensor) -> Tensor:
        return self.uniform() < probability

    def choice(self, weights: Tensor) -> Tensor:
        """Index drawn by `weights` (K,) or (N,K)."""
        cumulative = (weights / weights.sum(-1, keepdim=True)).cumsum(-1)
        return (self.uniform()[:, None] > cumulative).sum(-1).clamp(max=weights.shape[-1] - 1)


_COLUMNS = 256


def sample_parameters(count: int, seed: int, device: str | torch.device = "cpu") -> PortraitParameters:
    """Draw `count` people.

    Person i of `sample_parameters(n, seed)` is the same for every n, and different seeds share nobody
    (for fewer than a million people a seed).

    Args:    count ≥ 0; seed ≥ 0; device for the returned tensors (drawing is on the CPU so that it is the same
    everywhere).
    Returns: PortraitParameters with N = count.
    Raises:  ValueError on a negative count or seed.
    """
    if count < 0 or seed < 0:
        raise ValueError(
            f"sample_parameters: count and seed must be ≥ 0, got {count} and {seed}; pass non-negative numbers"
        )
    d = _Draw(count, seed)
    v: dict[str, Tensor] = {"seed": d.seeds}

    male, old = d.chance(0.5), d.chance(0.36)
    v["Male"], v["Young"] = male, ~old

    # Pose inside the crop: in-plane rotation (rad), zoom, shift, yaw (rad), pitch.
    v["tilt"], v["zoom"] = d.normal(0, 0.07), d.normal(1.0, 0.05)
    v["shift"] = d.normal(0, 0.025, 2)
    v["yaw"], v["pitch"] = d.normal(0, 0.20), d.normal(0, 0.5)

    # Head.
    v["face_width"], v["chin"], v["skull"] = d.normal(0.455, 0.022), d.normal(0.72, 0.045), d.normal(0.70, 0.035)
    v["jaw"], v["cheek"] = d.normal(2.15, 0.18), d.normal(0.0, 1.0)
    v["Chubby"] = d.chance(0.12)
    v["ear_size"], v["ear_out"] = d.normal(1.0, 0.1), d.uniform(0.0, 1.0)
    v["neck_width"] = d.normal(0.262, 0.025)

    # Eyes.
    v["eye_gap"], v["eye_width"] = d.normal(0.2, 0.008), d.normal(0.094, 0.008)
    v["eye_open"], v["eye_slant"] = d.normal(0.034, 0.007), d.normal(0.0, 0.10)
    v["Narrow_Eyes"], v["gaze"] = d.chance(0.12), d.normal(0, 0.25, 2)
    v["iris_hue"], v["iris_light"] = d.uniform(), d.uniform()
    v["Bags_Under_Eyes"], v["eyeshadow"] = d.chance(0.25), d.uniform(0, 1, 4)
    v["lid_crease"] = d.uniform(0.2, 1.0)

    # Brows.
    v["brow_lift"], v["brow_length"] = d.normal(0.094, 0.016), d.normal(0.142, 0.012)
    v["brow_thick"], v["brow_slant"] = d.normal(0.0215, 0.0035), d.normal(-0.02, 0.05)
    v["brow_arch"] = d.normal(0.016, 0.007)
    v["Arched_Eyebrows"], v["Bushy_Eyebrows"] = d.chance(0.2), d.chance(0.22)
    v["brow_dark"] = d.uniform(0.08, 0.95)

    # Nose.
    v["nose_length"], v["nose_width"] = d.normal(0.280, 0.02), d.normal(0.122, 0.010)
    v["nose_bridge"], v["nose_side"] = d.normal(0.042, 0.005), d.normal(0, 0.006)
    v["Big_Nose"], v["Pointy_Nose"] = d.chance(0.15), d.chance(0.2)

    # Mouth.
    v["mouth_y"], v["mouth_width"] = d.normal(0.420, 0.022), d.normal(0.174, 0.017)
    v["lip_upper"], v["lip_lower"] = d.normal(0.027, 0.006), d.normal(0.044, 0.008)
    v["Smiling"] = d.chance(0.55)
    v["smile"], v["frown"] = d.uniform(0.5, 1.0), d.uniform(-0.15, 0.25)
    v["Mouth_Slightly_Open"] = d.chance(torch.where(v["Smiling"], 0.72, 0.22))
    v["open_by"], v["teeth"], v["tongue"] = d.uniform(0.022, 0.080), d.uniform(0.35, 1.0), d.uniform()
    v["Big_Lips"], v["Wearing_Lipstick"] = d.chance(0.18), d.chance(torch.where(male, 0.02, 0.55))
    v["lipstick"] = torch.stack([d.uniform(0.45, 0.8), d.uniform(0.08, 0.35), d.uniform(0.15, 0.4)], -1)
    v["Heavy_Makeup"] = v["Wearing_Lipstick"] & d.chance(0.6)
    v["Rosy_Cheeks"] = d.chance(torch.where(male, 0.1, 0.3))

    # Skin.
    tone = d.uniform(0, len(_SKIN_TONES) - 1.001)
    tone = torch.where(d.chance(0.45), 4.0 + 0.43 * tone, tone)
    v["skin"] = _blend_tone(tone) + d.normal(0, 0.022, 3)
    v["Pale_Skin"] = d.chance(0.1)
    v["pale"] = torch.tensor([0.94, 0.83, 0.78]) + d.normal(0, 0.015, 3)
    v["freckles"], v["gloss"] = d.uniform() * d.chance(0.2), d.uniform(0.0, 0.30)

    # Hair.
    v["Bald"] = d.chance(torch.where(male, 0.16, 0.01))
    v["bald_fringe"] = d.chance(0.55)
    colour = d.choice(torch.tensor([0.29, 0.31, 0.2, 0.14, 0.06]))
    v["hair_colour"] = torch.where(old & d.chance(0.5), torch.full_like(colour, 3), colour)
    v["natural_colour"] = v["hair_colour"]  # of brows and beard, which dyed hair does not change
    tones = _HAIR_TONES + _HAIR_SPREAD[:, None] * d.normal(0, 0.55, 5)[:, :, None]
    v["hair_tones"] = tones + 0.02 * d.normal(0, 1, 15).view(-1, 5, 3)
    style = torch.where(male[:, None], torch.tensor([0.86, 0.09, 0.03, 0.02]), torch.tensor([0.14, 0.28, 0.46, 0.12]))
    v["hair_style"] = d.choice(style)
    v["hair_texture"] = d.choice(torch.tensor([0.5, 0.3, 0.2]))
    v["hair_top"], v["hair_side"] = d.uniform(0.015, 0.13), d.uniform(0.015, 0.085)
    v["hair_volume"] = d.uniform(0.05, 0.22)
    v["hair_end"] = d.uniform(0.0, 1.0)
    v["hairline"], v["hairline_shape"] = d.normal(0.475, 0.05), d.uniform(2.0, 4.2)
    v["Receding_Hairline"] = d.chance(torch.where(male, torch.where(old, 0.45, 0.12), 0.02))
    v["recede"], v["temple"] = d.uniform(0.06, 0.17), d.uniform(0.90, 1.03)
    v["parting"], v["part_depth"] = d.normal(0, 0.13), d.uniform(0.0, 0.07)
    v["Bangs"] = d.chance(torch.where(male, 0.12, 0.3)) & ~v["Receding_Hairline"]
    v["bang_depth"], v["bang_slope"] = d.uniform(0.15, 0.34), d.normal(0, 0.35)
    v["bang_ragged"] = d.uniform(0.01, 0.05)
    v["curtain"] = d.uniform(0.78, 1.02)
    v["over_shoulder"] = d.chance(0.6)
    v["strand_scale"], v["strand_contrast"] = d.uniform(0.6, 1.8), d.uniform(0.12, 0.55)
    v["hair_sheen"], v["hair_side_limit"] = d.uniform(0.0, 0.5), d.uniform(-0.16, 0.10)
    v["Sideburns"] = d.chance(torch.where(male, 0.22, 0.0))

    # Facial hair. `No_Beard` hides all of it but the moustache, as in the attribute list.
    v["No_Beard"] = d.chance(torch.where(male, 0.6, 0.99))
    v["Mustache"] = d.chance(torch.where(male, 0.22, 0.005)) | (male & ~v["No_Beard"] & d.chance(0.4))
    v["beard_kind"] = d.choice(torch.tensor([0.36, 0.26, 0.38]))  # 5 o'clock shadow, goatee, full
    v["beard_density"], v["beard_top"] = d.uniform(0.55, 0.95), d.uniform(0.2, 0.42)
    v["beard_length"], v["mustache_thick"] = d.uniform(0.0, 0.07), d.uniform(0.022, 0.040)
    v["beard_gray"] = d.uniform()

    # Things worn.
    v["Eyeglasses"] = d.chance(0.22)
    v["lens_size"], v["lens_height"] = d.normal(0.145, 0.012), d.normal(0.095, 0.014)
    v["lens_shape"], v["rim"] = d.uniform(2.0, 5.0), d.uniform(0.005, 0.016)
    v["rim_colour"] = d.uniform(0, 1, 3) * d.uniform(0.05, 0.9)[:, None]
    v["lens_tint"], v["lens_glare"] = d.uniform() ** 4, d.uniform(0.0, 0.6)
    v["lens_drop"] = d.normal(0.02, 0.012)
    v["Wearing_Hat"] = d.chance(0.05)
    v["hat_line"], v["hat_height"], v["hat_brim"] = d.uniform(0.30, 0.46), d.uniform(0.1, 0.35), d.uniform(0.0, 0.32)
    v["hat_colour"] = d.uniform(0.03, 0.95, 3)
    v["Wearing_Earrings"] = d.chance(torch.where(male, 0.04, 0.45))
    v["earring_size"], v["earring_colour"] = d.uniform(0.016, 0.042), d.uniform(0.3, 1.0, 3)
    v["Wearing_Necklace"] = d.chance(torch.where(male, 0.04, 0.4))
    v["necklace_drop"], v["necklace_colour"] = d.uniform(0.10, 0.3), d.uniform(0.35, 1.0, 3)
    v["clothes_kind"] = d.choice(torch.tensor([0.45, 0.3, 0.25]))  # jacket, crew neck, open neck
    v["clothes_colour"], v["shirt_colour"] = d.uniform(0.02, 0.9, 3), d.uniform(0.55, 1.0, 3)
    v["clothes_dark"] = d.uniform(0.15, 1.0)
    v["clothes_dark"] = torch.where(d.chance(0.35), d.uniform(0.02, 0.25), v["clothes_dark"])
    # Dark hair on a dark jacket: the border a parser finds hardest.
    worn_hair = v["hair_tones"][torch.arange(count), v["hair_colour"]] * d.uniform(0.6, 1.3)[:, None]
    matching = d.chance(0.15)
    v["clothes_colour"] = torch.where(matching[:, None], worn_hair.clamp(0.02, 0.9), v["clothes_colour"])
    v["clothes_dark"] = torch.where(matching, torch.ones_like(worn_hair[:, 0]), v["clothes_dark"])
    v["Wearing_Necktie"] = (v["clothes_kind"] == 0) & male & d.chance(0.75)
    v["tie_colour"] = d.uniform(0.02, 0.85, 3)
    v["shoulder_y"], v["shoulder_slope"] = d.uniform(0.80, 1.02), d.uniform(0.22, 0.5)
    v["neckline"] = d.uniform(0.05, 0.35)

    # Light and ground.
    v["light"] = torch.stack([d.normal(0, 0.45), d.normal(-0.35, 0.3), d.uniform(0.55, 1.2)], -1)
    v["ambient"], v["exposure"] = d.uniform(0.35, 0.75), d.normal(1.0, 0.09)
    v["warmth"] = d.normal(0, 0.035)
    v["ground"], v["ground_to"] = _muted(d), _muted(d)
    v["ground_dark"], v["ground_angle"] = d.uniform(0.1, 1.0), d.uniform(0, 6.2832)
    v["ground_clutter"], v["ground_noise"] = d.uniform() * d.chance(0.6), d.uniform(0.0, 0.25)
    v["ground_matches_hair"] = d.chance(0.12)
    v["skin_noise"] = d.uniform(0.01, 0.05)
    v["lip_tone"] = d.uniform(0.3, 1.0)  # many lips are hardly redder than the skin around them
    return PortraitParameters(v).to(device)


def _muted(d: _Draw) -> Tensor:
    """A backdrop colour: any hue, mostly of low saturation."""
    colour, gray, saturation = d.uniform(0.02, 0.98, 3), d.uniform(0.02, 0.95), d.uniform(0.1, 0.9)
    return gray[:, None] + saturation[:, None] * (colour - gray[:, None])


def _blend_tone(position: Tensor) -> Tensor:
    low = position.floor().long().clamp(0, len(_SKIN_TONES) - 2)
    part = (position - low)[:, None]
    return _SKIN_TONES[low] * (1 - part) + _SKIN_TONES[low + 1] * part


# CelebA attributes that are a switch of the same name.
_SWITCHES = (
    "Male",
    "Young",
    "Chubby",
    "Narrow_Eyes",
    "Bags_Under_Eyes",
    "Arched_Eyebrows",
    "Bushy_Eyebrows",
    "Big_Nose",
    "Pointy_Nose",
    "Smiling",
    "Mouth_Slightly_Open",
    "Big_Lips",
    "Wearing_Lipstick",
    "Heavy_Makeup",
    "Rosy_Cheeks",
    "Pale_Skin",
    "Bald",
    "Receding_Hairline",
    "Bangs",
    "Sideburns",
    "No_Beard",
    "Mustache",
    "Eyeglasses",
    "Wearing_Hat",
    "Wearing_Earrings",
    "Wearing_Necklace",
    "Wearing_Necktie",
)
_COLOUR_ATTRIBUTES = {"Black_Hair": 0, "Brown_Hair": 1, "Blond_Hair": 2, "Gray_Hair": 3}
_BEARD_ATTRIBUTES = {"5_o_Clock_Shadow": 0, "Goatee": 1}
SUPPORTED_ATTRIBUTES: tuple[str, ...] = tuple(
    name
    for name in CELEBA
    if name
    in {*_SWITCHES, *_COLOUR_ATTRIBUTES, *_BEARD_ATTRIBUTES, "Straight_Hair", "Wavy_Hair", "Double_Chin", "Oval_Face"}
)


def attributes_of(params: PortraitParameters) -> Tensor:
    """CelebA's 40 attributes as shown, (N,40) float in {0,1}; what a portrait cannot show (Attractive, Blurry) is 0.

    Hair colour and texture count only where hair is visible, as an annotator would see it.
    """
    out = torch.zeros(len(params), len(CELEBA), device=params["seed"].device)

    def put(name: str, value: Tensor) -> None:
        out[:, attribute_index(name)] = value.to(out.dtype)

    for name in _SWITCHES:
        put(name, params[name])
    hair = ~params["Bald"]
    for name, index in _COLOUR_ATTRIBUTES.items():
        put(name, hair & (params["hair_colour"] == index))
    put("Straight_Hair", hair & (params["hair_texture"] == 0))
    put("Wavy_Hair", hair & (params["hair_texture"] > 0))
    put("Bangs", hair & params["Bangs"] & ~params["Wearing_Hat"])
    put("Receding_Hairline", hair & params["Receding_Hairline"])
    bearded = ~params["No_Beard"]
    put("5_o_Clock_Shadow", bearded & (params["beard_kind"] == 0))
    put("Goatee", bearded & (params["beard_kind"] == 1))
    put("High_Cheekbones", params["Smiling"])
    put("Double_Chin", params["Chubby"])
    put("Oval_Face", (params["jaw"] < 2.1) & ~params["Chubby"])
    return out


# How a thing looks when `with_attribute` adds it. Not the person's own hidden draw: nothing in their picture tells what
# glasses they would own, so an editor shown a random pair each time could only learn the average of all glasses.
_ADDED: dict[str, dict[str, float | tuple[float, ...]]] = {
    "Eyeglasses": {
        "lens_size": 0.145, "lens_height": 0.095, "lens_shape": 3.0, "rim": 0.0115, "rim_colour": (0.09, 0.08, 0.08),
        "lens_tint": 0.0, "lens_glare": 0.15, "lens_drop": 0.02,
    },
    "Mouth_Slightly_Open": {"open_by": 0.042, "teeth": 0.75, "tongue": 0.3},
    "Bangs": {"bang_depth": 0.26, "bang_slope": 0.0, "bang_ragged": 0.03},
    "Bald": {"bald_fringe": 1.0},
    "Mustache": {"mustache_thick": 0.034},
    "beard": {"beard_kind": 2, "beard_density": 0.85, "beard_top": 0.3, "beard_length": 0.02},
    "Pale_Skin": {"pale": (0.94, 0.83, 0.78)},
}  # fmt: skip


def _as_added(params: PortraitParameters, kind: str, lacking: Tensor) -> PortraitParameters:
    """Give the `lacking` (N bool) the look that `kind` has when it is added."""
    changes = {}
    for name, value in _ADDED.get(kind, {}).items():
        own = params[name]
        look = torch.tensor(value, device=own.device).to(own.dtype).expand_as(own)
        changes[name] = torch.where(lacking.view(-1, *[1] * (own.dim() - 1)), look, own)
    if kind == "beard":  # grey where the person's own hair is
        gray = (params["natural_colour"] == 3).to(params["beard_gray"].dtype)
        changes["beard_gray"] = torch.where(lacking, gray, params["beard_gray"])
    return params.replace(**changes)


def with_attribute(params: PortraitParameters, name: str, value: int) -> PortraitParameters:
    """The same people with one attribute set: a counterfactual.

    Setting an attribute that a person already has returns that person unchanged. What is added has one typical look
    (dark-rimmed glasses, a full beard, the colour's middle tone); what a person has keeps their own. Asking for a hair
    colour or bangs gives a bald person hair; taking a hair colour away gives the person's next natural colour (brown,
    or black from brown).

    Raises: ValueError if `name` is not in SUPPORTED_ATTRIBUTES or `value` is not 0 or 1.
    """
    if name not in SUPPORTED_ATTRIBUTES:
        raise ValueError(
            f"with_attribute: name must be one of {', '.join(SUPPORTED_ATTRIBUTES)}, got {name!r}; pick one of these"
        )
    if value not in (0, 1):
        raise ValueError(f"with_attribute: value must be 0 or 1, got {value!r}; pass 1 to add the attribute")
    everyone = torch.full_like(params["Male"], bool(value))
    if name in _COLOUR_ATTRIBUTES:
        index = _COLOUR_ATTRIBUTES[name]
        current = params["hair_colour"]
        if value:
            bare = torch.zeros_like(params["Bald"])
            return _dyed(params, torch.full_like(current, index)).replace(Bald=bare)
        other = torch.full_like(current, 0 if index == 1 else 1)
        return _dyed(params, torch.where(current == index, other, current))
    if name in ("Straight_Hair", "Wavy_Hair"):
        want_straight = (name == "Straight_Hair") == bool(value)
        texture = params["hair_texture"]
        changed = torch.where(texture > 0, 0, texture) if want_straight else torch.where(texture == 0, 1, texture)
        return params.replace(hair_texture=changed)
    if name in _BEARD_ATTRIBUTES:
        index = _BEARD_ATTRIBUTES[name]
        kind = params["beard_kind"]
        if value:
            grown = _as_added(params, "beard", params["No_Beard"])
            return grown.replace(beard_kind=torch.full_like(kind, index), No_Beard=torch.zeros_like(everyone))
        return params.replace(No_Beard=params["No_Beard"] | (kind == index))
    if value and name in _ADDED:
        params = _as_added(params, name, ~params[name])
    if name == "No_Beard" and not value:
        params = _as_added(params, "beard", params["No_Beard"])
    if name == "Double_Chin":
        return params.replace(Chubby=everyone)
    if name == "Oval_Face":
        return params.replace(jaw=torch.full_like(params["jaw"], 2.0 if value else 2.4))
    if name == "Bald" and value:
        return params.replace(Bald=everyone, Bangs=torch.zeros_like(everyone))
    if name == "Bangs" and value:
        bare = torch.zeros_like(everyone)
        return params.replace(Bangs=everyone, Bald=bare, Receding_Hairline=bare)
    if name == "Receding_Hairline" and value:
        return params.replace(Receding_Hairline=everyone, Bangs=torch.zeros_like(everyone))
    return params.replace(**{name: everyone})


def _dyed(params: PortraitParameters, colour: Tensor) -> PortraitParameters:
    """Hair of another colour (N indices into HAIR_COLOURS), in that colour's middle tone where it changes."""
    tones = params["hair_tones"]
    new = (colour != params["hair_colour"])[:, None] & (torch.arange(5, device=colour.device) == colour[:, None])
    return params.replace(
        hair_colour=colour, hair_tones=torch.where(new[..., None], _HAIR_TONES.to(tones.device), tones)
    )
