# SPDX-License-Identifier: Apache-2.0
"""From shapes to a picture: colours, light and texture, laid back to front; the same order gives the label map."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from faceedit.labels import CELEBAMASK_HQ
from faceedit.training.synthetic.geometry import Layers, Person, smile_amount
from faceedit.training.synthetic.parameters import PortraitParameters
from faceedit.training.synthetic.shapes import bump, smooth


@dataclass
class Canvas:
    """A picture N×3×S×S in [0,1] and who covers whom: (class name, coverage) from back to front."""

    image: Tensor
    painted: list[tuple[str, Tensor]]

    def paint(self, label: str | None, alpha: Tensor, colour: Tensor) -> None:
        """Lay `colour` (N×3×S×S or N×3×1×1) over the picture; `label` None changes the look but not the class."""
        self.image = self.image + alpha[:, None] * (colour - self.image)
        if label is not None:
            self.painted.append((label, alpha))

    def soft_mask(self) -> Tensor:
        """Visible share of each class, N×19×S×S, summing to 1."""
        first = self.image[:, 0]
        mask = torch.zeros(first.shape[0], CELEBAMASK_HQ.num_classes, *first.shape[1:], device=first.device)
        left = torch.ones_like(first)
        for label, alpha in reversed(self.painted):
            mask[:, CELEBAMASK_HQ.id(label)] += left * alpha
            left = left * (1 - alpha)
        mask[:, CELEBAMASK_HQ.id("background")] += left
        return mask


def paint_portrait(params: PortraitParameters, layers: Layers, region_tint: Tensor | None = None) -> Canvas:
    """Colour the layers. `region_tint` N×19×3 (domain randomisation) replaces each region's own colour where it is not
    NaN."""
    p = Person(params)
    a, f, g = layers.alpha, layers.fields, layers.grid
    palette = _Palette(params, p, layers, region_tint)
    hair_front = a["hair_front"]

    canvas = Canvas(_background(p, layers, palette), [])
    hair = palette.hair()
    hair_behind = hair * 0.62
    canvas.paint("hair", a["hair_back"], hair_behind)
    neck_shade = 1 - 0.42 * smooth(-f["face_distance"], -0.20, 0.03)[:, None] * p.ambient[:, None]
    neck_shade = neck_shade * (0.80 + 0.28 * smooth(p.neck_width - g.x.abs(), 0.0, 0.16))[:, None]
    canvas.paint("neck", a["neck"], palette.region("neck", palette.skin) * neck_shade * palette.grain(0.6))
    _clothes(canvas, p, layers, palette)
    canvas.paint("neck_l", a["necklace"] * (1 - a["face"]), palette.region("neck_l", _column(p.necklace_colour)))
    canvas.paint("hair", a["hair_shoulder"] * (1 - a["face"]), hair * 0.8)
    for name in ("l_ear", "r_ear"):
        centre = (g.x.abs() - f["face_width"] - 0.01) / 0.03
        hollow = 1 - 0.28 * bump(centre, (g.y - 0.08) / 0.07, 1.0, 1.0)[:, None]
        canvas.paint(
            name,
            a[name],
            palette.region(name, palette.skin * torch.tensor([1.0, 0.93, 0.91]).view(1, 3, 1, 1).to(g.x.device))
            * hollow
            * 0.95,
        )
    canvas.paint(
        "ear_r", a["earrings"], palette.region("ear_r", _column(p.earring_colour)) * (0.8 + 0.4 * palette.sparkle())
    )
    _face(canvas, p, layers, palette)
    canvas.paint("hair", hair_front, hair)
    _brows_over_hair(canvas, layers, palette)
    _glasses(canvas, p, layers, palette)
    fold = 0.75 + 0.35 * smooth(g.y, -1.1, -0.4) - 0.15 * f["hat_brim"]
    canvas.paint("hat", a["hat"], palette.region("hat", _column(p.hat_colour)) * fold[:, None] * palette.grain(1.5))
    tint = torch.stack([1 + p.warmth, torch.ones_like(p.warmth), 1 - p.warmth], 1)[:, :, 0]
    canvas.image = (canvas.image * p.exposure[:, None] * tint[..., None]).clamp(0, 1)
    return canvas


def _column(colour: Tensor) -> Tensor:
    """N×1×1×3 -> N×3×1×1."""
    return colour.permute(0, 3, 1, 2)


class _Palette:
    """Colours of one batch, region tints applied."""

    def __init__(self, params: PortraitParameters, p: Person, layers: Layers, region_tint: Tensor | None) -> None:
        self.params, self.p, self.layers, self.region_tint = params, p, layers, region_tint
        pale = p.Pale_Skin[..., None] if p.Pale_Skin.dim() == 3 else p.Pale_Skin
        # Paler, not painted white: most of the way for light skin, half of it for deep skin.
        skin = p.skin + pale * (0.45 + 0.4 * p.skin.mean(-1, keepdim=True)) * (torch.maximum(p.pale, p.skin) - p.skin)
        ruddy = 1 - 0.04 * (1 - p.Young)[..., None] * torch.tensor([0.0, 1.0, 1.2], device=skin.device)
        self.base_skin = _column((skin * ruddy).clamp(0.03, 0.98))
        self.skin = self.base_skin
        index = params["hair_colour"][:, None, None].expand(-1, 1, 3)
        self.hair_colour = params["hair_tones"].gather(1, index)[:, 0][:, :, None, None].clamp(0.02, 0.95)
        natural = params["natural_colour"][:, None, None].expand(-1, 1, 3)
        self.natural_colour = params["hair_tones"].gather(1, natural)[:, 0][:, :, None, None].clamp(0.02, 0.95)

    def region(self, label: str, own: Tensor) -> Tensor:
        """`own`, or the random colour that replaces it, keeping a little of own's texture."""
        if self.region_tint is None:
            return own
        tint = self.region_tint[:, CELEBAMASK_HQ.id(label)][:, :, None, None]
        brightness = own.mean(1, keepdim=True)
        relative = brightness / brightness.mean((2, 3), keepdim=True).clamp(min=0.02)
        return torch.where(torch.isnan(tint), own, tint * relative.clamp(0.3, 2.0))

    def grain(self, amount: float) -> Tensor:
        g = self.layers.grid
        fine = self.layers.noise.cloud(g.x + 5, g.y + 5, 22.0, 3)
        return 1 + (amount * self.p.skin_noise * fine)[:, None]

    def sparkle(self) -> Tensor:
        g = self.layers.grid
        return self.layers.noise.cloud(g.x + 3, g.y + 9, 40.0, 1)[:, None]

    def hair(self) -> Tensor:
        """Hair N×3×S×S: strands along the flow, sheen across it, darker roots."""
        p, g, f, noise = self.p, self.layers.grid, self.layers.fields, self.layers.noise
        curly, wavy = (p.hair_texture == 2).float(), (p.hair_texture == 1).float()
        across, along = f["strand_across"], f["strand_along"]
        bend = (0.02 * wavy + 0.03 * curly) * torch.sin(along * (18 + 24 * curly) + 6 * noise.cloud(g.x, g.y, 2.0, 0))
        across = across + bend + 0.02 * noise.cloud(g.x + 2, g.y, 3.0, 1)
        scale = p.strand_scale * 46
        fine = noise.sample(across * scale, along * 2.2 + 3, 2)
        locks = noise.sample(across * scale * 0.27, along * 1.4 - 3, 3)
        strands = 0.55 * fine + 0.65 * locks + 0.5 * curly * noise.cloud(g.x + 1, g.y + 1, 16.0, 0)
        light = 1 + p.strand_contrast * strands
        sheen = p.hair_sheen * torch.exp(-(((along - 0.62 - 0.05 * locks) / 0.14) ** 2)) * (1 + 0.6 * fine)
        colour = self.region("hair", self.hair_colour * light.clamp(min=0.2)[:, None])
        shade = (0.75 + 0.35 * f["light"]) * (1 + 0.5 * sheen)
        return colour * shade[:, None] + 0.10 * sheen[:, None]


def _background(p: Person, layers: Layers, palette: _Palette) -> Tensor:
    g, noise = layers.grid, layers.noise
    # The light falls on a head-sized ellipsoid; hair and skin share it.
    nx = (g.x / 0.62).clamp(-0.98, 0.98)
    ny = ((g.y + 0.05) / 0.95).clamp(-0.98, 0.98)
    nz = torch.sqrt((1 - nx**2 - ny**2).clamp(min=0.04))
    direction = p.light / p.light.norm(dim=-1, keepdim=True)
    lit = (nx * direction[..., 0] + ny * direction[..., 1] + nz * direction[..., 2]).clamp(min=0)
    layers.fields["light"] = p.ambient + (1 - p.ambient) * 1.35 * lit

    ramp = (0.5 + 0.5 * (torch.cos(p.ground_angle) * g.x + torch.sin(p.ground_angle) * g.y)).clamp(0, 1)
    ground = _column(p.ground) * (1 - ramp[:, None]) + _column(p.ground_to) * ramp[:, None]
    ground = ground * p.ground_dark[:, None]
    ground = ground + (p.ground_noise * noise.cloud(g.x + 1, g.y - 1, 2.2, 2))[:, None] * 0.5
    stripes = (torch.sin((g.x * 0.8 + g.y * 0.5 * torch.cos(p.ground_angle)) * 14) > 0.2).float()
    blocks = (noise.sample(g.x * 3.1 + 20, g.y * 2.7 + 20, 1) > 0.15).float()
    clutter = torch.where(p.ground_angle > 4.2, stripes, blocks)
    other = _column(p.clothes_colour.flip(-1)) * 0.5 + _column(p.hat_colour) * 0.5
    ground = ground + p.ground_clutter[:, None] * 0.7 * clutter[:, None] * (other - ground)
    match = palette.natural_colour * 0.85 + 0.05 * noise.cloud(g.x, g.y, 1.5, 3)[:, None]
    ground = torch.where(p.ground_matches_hair[:, None] > 0, match.expand_as(ground), ground)
    return palette.region("background", ground.clamp(0, 1))


def _clothes(canvas: Canvas, p: Person, layers: Layers, palette: _Palette) -> None:
    a, g, noise = layers.alpha, layers.grid, layers.noise
    cloth = _column(p.clothes_colour) * p.clothes_dark[:, None]
    folds = (0.85 + 0.15 * noise.cloud(g.x, g.y * 0.4, 6.0, 1) - 0.25 * smooth(g.x.abs(), 0.5, 1.1))[:, None]
    lapel = (
        1
        - 0.35
        * torch.exp(-(((g.x.abs() - 0.12 - 0.34 * (1.35 - g.y).clamp(min=0)) / 0.02) ** 2))
        * (p.clothes_kind == 0).float()
    )[:, None]
    canvas.paint("cloth", a["clothes"], palette.region("cloth", cloth * folds * lapel))
    collar = (0.92 - 0.2 * smooth(0.06 - g.x.abs(), 0.0, 0.06))[:, None]
    canvas.paint("cloth", a["shirt"], _column(p.shirt_colour) * collar)
    stripe = (1 + 0.3 * torch.sign(torch.sin((g.x + g.y) * 70)) * (p.tie_colour[..., 0] > 0.4).float())[:, None]
    canvas.paint("cloth", a["tie"], (_column(p.tie_colour) * stripe).clamp(0, 1))


def _relief(p: Person, layers: Layers, palette: _Palette) -> Tensor:
    """Light on the face from a height field of its bumps, N×S×S around 1."""
    g, f = layers.grid, layers.fields
    width = f["face_width"]
    dome = torch.sqrt((1 - (g.x / (width * 1.12)) ** 2 - ((g.y - 0.02) / 0.95) ** 2).clamp(min=0.015)) * 0.42
    x, y = g.fx, g.fy
    length = f["nose_length"]
    nose = 0.075 * torch.exp(-((f["nose_x"] / (0.75 * f["nose_half"] + 0.01)) ** 2)) * smooth(y, -0.12, length - 0.03)
    nose = nose * (1 - smooth(y, length - 0.02, length + 0.03))
    tip = 0.055 * bump(f["nose_x"], y - length + 0.045, 0.045, 0.045)
    wings = 0.03 * bump(f["nose_x"].abs() - 0.75 * f["nose_wide"], y - length + 0.03, 0.028, 0.035)
    socket = -0.045 * bump(x.abs() - p.eye_gap, y + 0.005, 0.12, 0.065) + 0.022 * bump(
        x.abs() - p.eye_gap, y - 0.002, 0.06, 0.04
    )
    ridge = 0.028 * bump(x.abs() - p.eye_gap, y + p.brow_lift, 0.13, 0.045)
    smile = smile_amount(palette.params)[:, None, None]
    apple = (0.028 + 0.024 * smile.clamp(min=0)) * bump(x.abs() - 0.235, y - 0.19, 0.10, 0.095)
    fold_x = 0.115 + 0.13 * smooth(y, length - 0.05, p.mouth_y + 0.05)
    fold = (0.006 + 0.010 * smile.clamp(min=0) + 0.010 * (1 - p.Young)) * torch.exp(
        -(((x.abs() - fold_x) / 0.022) ** 2)
    )
    fold = fold * smooth(y, length - 0.07, length) * (1 - smooth(y, p.mouth_y - 0.02, p.mouth_y + 0.06))
    mouth = 0.02 * bump(f["mouth_x"], f["mouth_fy"], 0.16, 0.075)
    chin = 0.03 * bump(x, y - p.chin + 0.10, 0.10, 0.07) - 0.018 * bump(x, f["mouth_fy"] - 0.115, 0.10, 0.028)
    philtrum = -0.008 * bump(x, y - 0.5 * (length + p.mouth_y), 0.012, 0.05)
    bags = -0.012 * p.Bags_Under_Eyes * bump(x.abs() - p.eye_gap, y - 0.075, 0.08, 0.014)
    lines = -0.0050 * (1 - p.Young) * torch.sin(y * 75) * bump(x, y + 0.33, 0.22, 0.10)
    lines = lines - 0.008 * (1 - p.Young) * bump(x.abs() - p.eye_gap - 0.13, y, 0.05, 0.02) * torch.sin(y * 160)
    z = dome + nose + tip + wings + socket + ridge + apple - fold + mouth + chin + philtrum + bags + lines
    step = 2 * g.pixel
    dx = (torch.roll(z, -1, 2) - torch.roll(z, 1, 2)) / step
    dy = (torch.roll(z, -1, 1) - torch.roll(z, 1, 1)) / step
    inverse = torch.rsqrt(1 + dx * dx + dy * dy)
    direction = p.light / p.light.norm(dim=-1, keepdim=True)
    lit = ((-dx * direction[..., 0] - dy * direction[..., 1] + direction[..., 2]) * inverse).clamp(min=0)
    halfway = ((-dx * direction[..., 0] - dy * direction[..., 1] + direction[..., 2] + 1) * inverse * 0.5).clamp(0, 1)
    f["specular"] = halfway**24
    reference = direction[..., 2].clamp(min=0.35)
    return (p.ambient + (1 - p.ambient) * lit / reference).clamp(0.15, 1.6)


def _face(canvas: Canvas, p: Person, layers: Layers, palette: _Palette) -> None:
    a, f, g, noise = layers.alpha, layers.fields, layers.grid, layers.noise
    light = _relief(p, layers, palette)[:, None]
    base = palette.skin
    blush = (0.05 + 0.16 * p.Rosy_Cheeks + 0.06 * p.Heavy_Makeup) * bump(g.fx.abs() - 0.25, g.fy - 0.2, 0.11, 0.10)
    blush = blush + 0.05 * bump(f["nose_x"], g.fy - f["nose_length"] + 0.03, 0.06, 0.05)
    red = torch.stack([0.25 * blush, -0.35 * blush, -0.25 * blush], 1)
    blotch = 1 + (0.5 * p.skin_noise * noise.cloud(g.x + 1, g.y + 1, 5.0, 0))[:, None]
    spots = (
        smooth(noise.cloud(g.fx + 2, g.fy + 2, 30.0, 2), 0.42, 0.6) * p.freckles * bump(g.fx, g.fy - 0.12, 0.35, 0.2)
    )
    skin = (base + red * base) * blotch * palette.grain(1.0) * (1 - 0.25 * spots[:, None])
    gloss = (p.gloss * f["specular"] * 0.5)[:, None]
    hair_shadow = 1 - 0.22 * smooth(layers.alpha["hair_front"].roll(max(1, g.x.shape[-1] // 40), 1), 0.1, 0.9)[:, None]
    lit = light * hair_shadow

    def shaded(label: str, own: Tensor) -> Tensor:
        return palette.region(label, own) * lit + gloss

    canvas.paint("skin", a["face"], shaded("skin", skin))
    beard_region = torch.maximum(a["beard"] * a["face"], a["beard"] * f["beard_grown"])
    tone = palette.natural_colour * 0.8
    # Beards are darker than the skin they grow on, or nobody would see them.
    tone = tone * (0.42 * base.mean(1, keepdim=True) / tone.mean(1, keepdim=True).clamp_min(0.02)).clamp(max=1)
    gray = torch.full_like(tone, 0.6)
    own_beard = torch.where((p.beard_gray[:, None] > 0.45) & (p.Young[:, None] < 0.5), gray, tone)
    own_beard = torch.where(p.beard_kind[:, None] == 0, own_beard * 0.7 + 0.15 * base, own_beard)
    fleck = noise.cloud(g.fx * 1.0 + 4, g.fy * 0.5 + 4, 60.0, 1)
    hairs = own_beard * (1 + 0.45 * fleck)[:, None]
    rough = (beard_region * (0.75 + 0.5 * fleck)).clamp(0, 1)
    # Facial hair counts as skin in this label scheme, also where it hangs below the chin.
    canvas.paint("skin", f["beard_grown"] * smooth(a["beard"], 0.1, 0.4) * (1 - a["face"]), hairs * light)
    canvas.paint(None, rough, hairs * (0.6 + 0.4 * light))

    # A shaved jaw is a little darker and greyer than the cheeks above it.
    shaved_tone = torch.tensor([0.80, 0.83, 0.87], device=g.x.device).view(1, 3, 1, 1)
    canvas.paint(None, f["shaved"] * a["face"] * 0.6 * p.Male, skin * shaved_tone * light)

    shadow_under = 0.30 * bump(f["nose_x"], g.fy - f["nose_length"] - 0.02, 0.06, 0.022)[:, None]
    canvas.paint(None, a["face"] * shadow_under[:, 0], skin * 0.45)
    canvas.paint("nose", a["nose"] * a["face"], shaded("nose", skin * 1.01))
    wing = (f["nose_x"].abs() - f["nose_half"]).abs() < 0.006
    wing_line = (
        wing.float()
        * smooth(g.fy, f["nose_length"] - 0.07, f["nose_length"] - 0.03)
        * (1 - smooth(g.fy, f["nose_length"] - 0.015, f["nose_length"] + 0.01))
    )
    canvas.paint(None, wing_line * 0.35 * a["face"], skin * 0.5)
    canvas.paint(None, f["nostril"] * 0.85, base * 0.22)
    canvas.paint(None, a["mustache"] * (0.8 + 0.4 * fleck).clamp(0, 1), hairs * (0.6 + 0.4 * light))

    shadow_colour = p.eyeshadow[..., :3].permute(0, 3, 1, 2)
    make_up = (p.Heavy_Makeup * 0.45 + 0.10 * (1 - p.Male)) * f["lid_area"]
    canvas.paint(None, make_up * a["face"] * 0.6, (0.5 * shadow_colour + 0.35 * base) * light)
    canvas.paint(None, f["lid_area"] * 0.16, base * 0.55)
    canvas.paint(None, f["crease"] * 0.40 * p.lid_crease, base * 0.40)
    _eyes(canvas, p, layers, palette, lit)
    _mouth(canvas, p, layers, palette, lit)


def _eyes(canvas: Canvas, p: Person, layers: Layers, palette: _Palette, lit: Tensor) -> None:
    a, f, g = layers.alpha, layers.fields, layers.grid
    device = g.x.device
    sclera = torch.tensor([0.83, 0.80, 0.79], device=device).view(1, 3, 1, 1) * (0.40 + 0.50 * lit)
    for name in ("l_eye", "r_eye"):
        canvas.paint(name, a[name] * a["face"], palette.region(name, sclera.expand_as(canvas.image)))
    brown = torch.tensor([0.24, 0.14, 0.08], device=device)
    blue = torch.tensor([0.35, 0.48, 0.60], device=device)
    green = torch.tensor([0.36, 0.42, 0.26], device=device)
    hue = p.iris_hue[..., None]
    iris = torch.where(hue < 0.6, brown, torch.where(hue < 0.85, blue, green)) * (0.6 + 0.7 * p.iris_light[..., None])
    canvas.paint(None, f["iris"] * 0.95, _column(iris))
    canvas.paint(None, f["pupil"] * 0.97, torch.full((1, 3, 1, 1), 0.03, device=device))
    canvas.paint(None, f["glint"] * 0.85, torch.full((1, 3, 1, 1), 0.95, device=device))
    lash = f["lash"] * (0.45 + 0.35 * (1 - p.Male) + 0.15 * p.Heavy_Makeup)
    canvas.paint(None, lash.clamp(max=0.95), palette.base_skin * 0.18)


def _mouth(canvas: Canvas, p: Person, layers: Layers, palette: _Palette, lit: Tensor) -> None:
    a, f, g, noise = layers.alpha, layers.fields, layers.grid, layers.noise
    device = g.x.device
    natural = palette.base_skin * torch.tensor([0.93, 0.66, 0.66], device=device).view(1, 3, 1, 1)
    natural = natural + torch.tensor([0.03, 0.0, 0.01], device=device).view(1, 3, 1, 1)
    natural = palette.base_skin + p.lip_tone[:, None] * (natural - palette.base_skin)
    painted = _column(p.lipstick)
    natural = natural * (1 + (1 - p.Male[:, None]) * torch.tensor([0.02, -0.10, -0.07], device=device).view(1, 3, 1, 1))
    lips = natural + p.Wearing_Lipstick[:, None] * (0.85 * painted + 0.15 * natural - natural)
    lips = lips * (1 + 0.08 * noise.sample(f["mouth_x"] * 60 + 9, f["mouth_fy"] * 8, 2))[:, None]
    canvas.paint("u_lip", a["u_lip"] * a["face"], palette.region("u_lip", lips * 0.86) * lit)
    dark = torch.tensor([0.17, 0.06, 0.06], device=device).view(1, 3, 1, 1)
    tongue = torch.tensor([0.62, 0.30, 0.30], device=device).view(1, 3, 1, 1)
    depth = f["mouth_depth"][:, None]
    inside = dark + (tongue - dark) * (smooth(depth, 0.6, 1.0) * p.tongue[:, None])
    gaps = 1 - 0.10 * torch.exp(-((torch.sin(f["mouth_x"] * 95) / 0.18) ** 2))[:, None]
    tooth = torch.tensor([0.88, 0.85, 0.79], device=device).view(1, 3, 1, 1) * gaps * (0.6 + 0.4 * lit)
    tooth = tooth * (1 - 0.45 * smooth(f["mouth_x"].abs() / f["mouth_half"], 0.45, 1.0))[:, None]
    shown = (p.teeth[:, None] > 0.45) | (p.Smiling[:, None] > 0)
    rows = smooth(0.55 + 0.45 * p.teeth[:, None] - depth, 0.0, 0.12) * shown.float()
    inside = inside + rows * (tooth - inside)
    canvas.paint("mouth", a["mouth"] * a["face"], palette.region("mouth", inside))
    canvas.paint("l_lip", a["l_lip"] * a["face"], palette.region("l_lip", lips) * lit + 0.06 * f["specular"][:, None])
    closed = (1 - p.Mouth_Slightly_Open) * f["mouth_line"]
    canvas.paint(None, closed * 0.65, palette.base_skin * 0.22)


def _brows_over_hair(canvas: Canvas, layers: Layers, palette: _Palette) -> None:
    """Brows last: bangs hide them, but glasses and hats go on top."""
    a, p, g = layers.alpha, palette.p, layers.grid
    dark = palette.natural_colour * (1 - 0.75 * p.brow_dark[:, None]) + 0.04
    strands = layers.noise.sample(g.fx * 70 + g.fy * 40, g.fy * 25 + 3, 1)
    visible = (1 - a["hair_front"]) * a["face"]
    for name in ("l_brow", "r_brow"):
        colour = palette.region(name, dark * (1 + 0.35 * strands)[:, None])
        alpha = a[name] * visible
        thin = (0.62 + 0.25 * p.brow_dark + 0.12 * p.Bushy_Eyebrows + 0.15 * strands).clamp(0, 1)
        skin_below = canvas.image
        canvas.paint(name, alpha, skin_below + thin[:, None] * (colour - skin_below))


def _glasses(canvas: Canvas, p: Person, layers: Layers, palette: _Palette) -> None:
    a, g = layers.alpha, layers.grid
    eyes = torch.maximum(a["l_eye"], a["r_eye"]) * a["face"]
    brows = torch.maximum(a["l_brow"], a["r_brow"]) * a["face"]
    lens = a["lens"]
    tint = (0.05 + 0.75 * p.lens_tint)[:, 0, 0][:, None, None]
    canvas.paint(None, lens * tint, torch.full((1, 3, 1, 1), 0.08, device=g.x.device))
    streak = smooth(torch.sin((g.fx * 1.3 + g.fy) * 9 + p.ground_angle), 0.75, 0.95) * p.lens_glare * 0.35
    canvas.paint(None, lens * streak, torch.full((1, 3, 1, 1), 0.9, device=g.x.device))
    # Lenses count as glasses except where the eye or brow shows through, as annotated in CelebAMask-HQ.
    clear = lens * (1 - torch.maximum(eyes, brows))
    canvas.painted.append(("eye_g", clear))
    reach = torch.maximum(a["face"], torch.maximum(a["l_ear"], a["r_ear"]))
    canvas.paint(
        "eye_g",
        a["rim"] * reach,
        palette.region("eye_g", _column(p.rim_colour)) * (0.8 + 0.4 * palette.sparkle().clamp(min=0)),
    )
