# SPDX-License-Identifier: Apache-2.0
"""From a person to shapes: the coverage of every part, back to front, before any colour is chosen."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from faceedit.training.synthetic.noise import NoiseField
from faceedit.training.synthetic.parameters import PortraitParameters
from faceedit.training.synthetic.shapes import Grid, band, ellipse, make_grid, segment, smooth, superellipse, to_pixels


@dataclass
class Layers:
    """Coverages N×S×S in [0,1] by name, and the fields that shading needs."""

    grid: Grid
    noise: NoiseField
    alpha: dict[str, Tensor] = field(default_factory=dict)
    fields: dict[str, Tensor] = field(default_factory=dict)


class Person:
    """Parameters as N×1×1 columns (vectors as N×1×1×K), ready to broadcast over a grid."""

    def __init__(self, params: PortraitParameters) -> None:
        self._params = params

    def __getattr__(self, name: str) -> Tensor:
        value = self._params.values[name]
        value = value.float() if value.dtype == torch.bool else value
        return value[:, None, None] if value.dim() == 1 else value[:, None, None, :]


def face_points(params: PortraitParameters, size_px: int) -> Tensor:
    """The five landmarks in pixels, N×5×2 (x, y): image-left eye, image-right eye, nose tip, image-left and -right
    mouth corner."""
    gap = params["eye_gap"]
    zero = torch.zeros_like(gap)
    half, rise = _mouth_corner(params)
    nose_tip = nose_length(params) - 0.035
    points = torch.stack(
        [
            torch.stack([-gap, zero], -1),
            torch.stack([gap, zero], -1),
            torch.stack([params["nose_side"], nose_tip], -1),
            torch.stack([-half, params["mouth_y"] - rise], -1),
            torch.stack([half, params["mouth_y"] - rise], -1),
        ],
        1,
    )
    return to_pixels(points, size_px, params["tilt"], params["zoom"], params["shift"], params["yaw"], params["pitch"])


def smile_amount(params: PortraitParameters) -> Tensor:
    return torch.where(params["Smiling"], params["smile"], params["frown"])


def nose_length(params: PortraitParameters) -> Tensor:
    return params["nose_length"] + 0.015 * params["Big_Nose"]


def _mouth_corner(params: PortraitParameters) -> tuple[Tensor, Tensor]:
    """Half width of the mouth and how far its corners rise, both after the smile."""
    smile = smile_amount(params)
    return params["mouth_width"] * (1 + 0.16 * smile), 0.046 * smile


def build_layers(params: PortraitParameters, size_px: int) -> Layers:
    """Coverages of every part of N portraits at size_px²."""
    p = Person(params)
    grid = make_grid(size_px, p.tilt, p.zoom, p.shift, p.yaw, p.pitch)
    layers = Layers(grid, NoiseField(params["seed"]))
    _head(layers, p)
    _hair(layers, p)
    _eyes(layers, p)
    _nose(layers, p)
    _mouth(layers, p, params)
    _facial_hair(layers, p)
    _worn(layers, p)
    return layers


def _head(layers: Layers, p: Person) -> None:
    g, a, f = layers.grid, layers.alpha, layers.fields
    width = p.face_width * (1 + 0.05 * p.Chubby) * (1 + 0.015 * (p.Male - 0.5))
    centre = 0.06
    turn = (
        0.35 * torch.sin(p.yaw) * p.face_width * smooth(g.y, 0.1, 0.8)
    )  # the chin follows the turn more than the skull
    x = g.x - turn
    power = p.jaw + 0.25 * p.Male + 0.25 * p.Chubby
    low = superellipse(x, g.y - centre, width, p.chin - centre, power)
    high = superellipse(x, g.y - centre, width, p.skull + centre, 2.35)
    f["face_distance"] = torch.where(g.y > centre, low, high)
    f["face_width"] = width
    a["face"] = g.alpha(f["face_distance"])

    neck = p.neck_width * (1 + 0.14 * p.Male + 0.12 * p.Chubby)
    flare = neck * (1 + 0.25 * smooth(g.y, 0.75, 1.15))
    a["neck"] = g.alpha(torch.maximum((g.x - 0.3 * turn).abs() - flare, 0.25 - g.y))

    shoulder = p.shoulder_y + p.shoulder_slope * (g.x.abs() - 0.28).clamp(min=0) ** 1.2 * 0.9
    a["shoulders"] = g.alpha(shoulder - 0.08 - g.y)
    open_width = torch.where(p.clothes_kind == 1, torch.zeros_like(g.x) + neck * 1.05, neck * 0.62)
    depth = p.shoulder_y + torch.where(p.clothes_kind == 1, 0.05 + 0.1 * p.neckline, 0.15 + p.neckline)
    vee = (g.x.abs() / open_width + (g.y - p.shoulder_y + 0.1) / (depth - p.shoulder_y + 0.1) - 1) * 0.15
    round_neck = ellipse(g.x, g.y - p.shoulder_y + 0.06, open_width, depth - p.shoulder_y + 0.06)
    opening = torch.where(p.clothes_kind == 1, round_neck, vee)
    opening = torch.where(p.clothes_kind == 0, torch.full_like(opening, 1.0), opening)  # a jacket closes over its shirt
    a["clothes"] = a["shoulders"] * (1 - g.alpha(opening))
    jacket = (p.clothes_kind == 0).float()
    shirt_edge = g.x.abs() - (0.10 + 0.32 * (1.35 - g.y)).clamp(min=0.02)
    a["shirt"] = a["shoulders"] * g.alpha(shirt_edge) * jacket
    tie_half = 0.035 + 0.05 * (g.y - p.shoulder_y).clamp(min=0)
    a["tie"] = a["shoulders"] * g.alpha(torch.maximum(g.x.abs() - tie_half, p.shoulder_y - g.y)) * p.Wearing_Necktie

    for side in (-1.0, 1.0):
        hidden = smooth(side * p.yaw, 0.05, 0.40)
        out = width * (0.985 + 0.035 * p.ear_out) - 0.05 * hidden
        dx = (g.x * side - out) + 0.10 * (g.y - 0.08)
        ear = g.alpha(ellipse(dx, g.y - 0.085, 0.052 * p.ear_size, 0.135 * p.ear_size)) * (1 - smooth(hidden, 0.6, 0.9))
        a["l_ear" if side > 0 else "r_ear"] = ear


def _hair(layers: Layers, p: Person) -> None:
    g, a, f, noise = layers.grid, layers.alpha, layers.fields, layers.noise
    width, style = f["face_width"], p.hair_style
    long_hair, medium, up = (style == 2).float(), (style == 1).float(), (style == 3).float()
    hanging = long_hair + medium
    curly, wavy = (p.hair_texture == 2).float(), (p.hair_texture == 1).float()
    shows = 1 - p.Bald

    # Outline: an ellipse around the skull, thicker on top, ragged by curls.
    top = p.skull + p.hair_top + 0.08 * curly + 0.04 * hanging
    side = width + p.hair_side + 0.05 * curly + 0.5 * p.hair_volume * hanging
    angle = torch.atan2(g.x, -(g.y + 0.1))
    ragged = noise.wave(angle + 4, 3.0 + 9 * curly) * (0.012 + 0.03 * curly + 0.012 * wavy)
    ragged = ragged + noise.wave(angle + 9, 26.0, 2) * 0.008
    lean = 0.25 * p.parting * smooth(-g.y, 0.2, 0.9)
    outer = superellipse(g.x - lean, g.y + 0.02, side, top + 0.02, 2.4) + ragged

    # The face opening that hair frames.
    line = p.hairline + p.recede * p.Receding_Hairline * 0.6
    x = g.fx
    part = p.part_depth * torch.exp(-(((x - p.parting) / 0.05) ** 2))
    corners = p.recede * p.Receding_Hairline * torch.exp(-(((x.abs() - 0.24) / 0.10) ** 2))
    opening_top = line + part + corners + noise.wave(x + 2, 14.0, 3) * 0.012
    opening_width = width * p.temple
    opening = superellipse(x, g.y - 0.15, opening_width, (opening_top + 0.15).clamp(min=0.1), p.hairline_shape)
    opening = torch.where(g.y > 0.15, x.abs() - opening_width, opening)
    # A curtain of long hair may fall over the cheeks.
    drawn = width * p.curtain + 0.04 * noise.wave(g.y + 3, 3.0, 2)
    opening = torch.where((hanging > 0) & (g.y > -0.35), torch.maximum(opening, x.abs() - drawn), opening)
    bangs_edge = -p.bang_depth - p.bang_slope * x * 0.35 + noise.wave(x + 6, 24.0, 0) * p.bang_ragged
    opening = torch.where(p.Bangs > 0, torch.maximum(opening, bangs_edge - g.fy), opening)
    f["bangs"] = p.Bangs * smooth(-opening, -0.05, 0.0)

    # How far down the sides it reaches.
    reach = p.hair_side_limit + 0.02 * noise.wave(g.x + 5, 10.0, 1)
    end = torch.where(long_hair > 0, 0.62 + 0.9 * p.hair_end, 0.18 + 0.36 * p.hair_end)
    end = end + noise.wave(g.x + 1, 7.0 + 8 * curly, 3) * (0.05 + 0.04 * curly)
    reach = torch.where(hanging > 0, end, reach)
    short_front = torch.maximum(torch.maximum(outer, -opening), g.y - reach)
    fall_half = width + p.hair_volume * (0.55 + 0.5 * smooth(g.y, -0.1, 0.55)) * (0.7 + 0.5 * curly)
    fall_half = fall_half - 0.10 * smooth(g.y, 0.55, 1.3) * (1 - curly)
    fall_half = fall_half + noise.wave(g.y + 3 + 7 * torch.sign(g.x), 5.0 + 7 * curly, 0) * (
        0.015 + 0.045 * curly + 0.03 * wavy
    )
    fall = torch.maximum(torch.maximum(g.x.abs() - fall_half, -0.15 - g.y), g.y - end)
    fall_front = torch.maximum(torch.maximum(fall, -opening), drawn - 0.02 - g.x.abs())
    front = torch.where(hanging > 0, torch.minimum(short_front, fall_front), short_front)
    fringe = torch.maximum(torch.maximum(outer, width * 0.93 - x.abs()), band(g.y, -0.42, reach + 0.02))
    bald_sides = g.alpha(fringe + 0.03, 4.0) * p.Bald * p.bald_fringe
    burns = torch.maximum(band(x.abs(), width * 0.91, width * 1.01), band(g.y, -0.2, 0.26))
    front_alpha = torch.maximum(g.alpha(front, 2.0), g.alpha(burns, 4.0) * p.Sideburns * 0.9)
    a["hair_front"] = torch.maximum(front_alpha * shows, bald_sides * p.Male)

    back = torch.where(hanging > 0, torch.minimum(outer, fall), torch.maximum(outer, g.y - reach))
    bun = ellipse(g.x - 0.3 * p.parting, g.y + top + 0.02, 0.16, 0.12) + ragged
    back = torch.where(up > 0, torch.minimum(back, bun), back)
    a["hair_back"] = g.alpha(back, 2.0) * shows
    # In front of the shoulders the same fall is drawn again, over the clothes but beside the neck.
    beside = torch.maximum(fall, p.neck_width * 0.95 - g.x.abs())
    a["hair_shoulder"] = g.alpha(beside, 2.0) * shows * long_hair * p.over_shoulder

    # Strand direction: around the skull above the eyes, hanging below.
    down = smooth(g.y, -0.45, 0.1) * hanging
    f["strand_across"] = (angle * 0.55) * (1 - down) + g.x * down
    f["strand_along"] = torch.sqrt(g.x**2 + (g.y + 0.2) ** 2) * (1 - down) + g.y * down


def _eyes(layers: Layers, p: Person) -> None:
    g, a, f = layers.grid, layers.alpha, layers.fields
    shape_open = p.eye_open * (1 - 0.42 * p.Narrow_Eyes) * (1 - 0.12 * p.Smiling) * (1 + 0.08 * (1 - p.Male))
    half = p.eye_width
    crease = torch.zeros_like(g.x)
    lash = torch.zeros_like(g.x)
    iris_all, pupil_all, glint = torch.zeros_like(g.x), torch.zeros_like(g.x), torch.zeros_like(g.x)
    near = torch.zeros_like(g.x)
    for side in (-1.0, 1.0):
        ex, ey = (g.fx - side * p.eye_gap) * side, g.fy  # ex grows outwards
        t = (ex / half).clamp(-1.2, 1.2)
        base = -p.eye_slant * ex
        arc = (1 - t * t).clamp(min=0)
        upper = base - shape_open * arc**0.75 * (1 + 0.12 * (-t))
        lower = base + 0.72 * shape_open * arc
        d = torch.maximum(torch.maximum(upper - ey, ey - lower), (ex.abs() - half) * 0.6)
        eye = g.alpha(d)
        a["l_eye" if side > 0 else "r_eye"] = eye
        gx, gy = p.gaze[..., 0] * 0.03 * side, p.gaze[..., 1] * 0.012 - 0.006
        iris = ellipse(ex - gx, ey - gy, 0.0405, 0.0405)
        iris_all = torch.maximum(iris_all, g.alpha(iris) * eye)
        pupil_all = torch.maximum(pupil_all, g.alpha(iris + 0.024) * eye)
        glint = torch.maximum(glint, g.alpha(ellipse(ex - gx + 0.012 * side, ey - gy + 0.013, 0.0085, 0.0085)) * eye)
        edge = torch.maximum((ey - upper).abs() - 0.007, (ex.abs() - half * 1.08))
        lash = torch.maximum(lash, g.alpha(edge, 1.6))
        lid = torch.maximum((ey - upper + 0.024 + 0.012 * arc).abs() - 0.004, (ex.abs() - half * 1.02))
        crease = torch.maximum(crease, g.alpha(lid, 2.5))
        near = torch.maximum(near, torch.exp(-((ex / (half * 1.25)) ** 2) - ((ey + 0.03) / 0.07) ** 2))
        _brow(layers, p, side)
    f["iris"], f["pupil"], f["glint"], f["lash"], f["crease"], f["lid_area"] = (
        iris_all,
        pupil_all,
        glint,
        lash,
        crease,
        near,
    )


def _brow(layers: Layers, p: Person, side: float) -> None:
    g = layers.grid
    lift = p.brow_lift + 0.012 * p.Arched_Eyebrows + 0.008 * (1 - p.Male)
    bx = (g.fx - side * (p.eye_gap + 0.012)) * side
    half = p.brow_length * (1 + 0.06 * p.Bushy_Eyebrows)
    t = bx / half
    arch = p.brow_arch + 0.026 * p.Arched_Eyebrows
    centre = -lift - arch * (1 - (t - 0.25) ** 2) + p.brow_slant * bx + arch
    thick = p.brow_thick * (1 + 0.75 * p.Bushy_Eyebrows) * (0.78 + 0.44 * p.Male)
    thick = thick * (1 - 0.30 * t - 0.35 * smooth(t, 0.1, 1.05))
    ragged = layers.noise.wave(bx * 1.0 + 3 + side, 60.0, 2) * 0.006
    d = torch.maximum((g.fy - centre).abs() - thick + ragged, bx.abs() - half)
    layers.alpha["l_brow" if side > 0 else "r_brow"] = g.alpha(d, 1.6)


def _nose(layers: Layers, p: Person) -> None:
    g, a, f = layers.grid, layers.alpha, layers.fields
    length = p.nose_length + 0.015 * p.Big_Nose
    wide = p.nose_width * (1 + 0.22 * p.Big_Nose - 0.10 * p.Pointy_Nose) * (0.96 + 0.08 * p.Male)
    slide = 0.16 * torch.sin(p.yaw) * smooth(g.fy, -0.05, length)
    x = g.fx - p.nose_side - 0.4 * slide
    t = (g.fy / length).clamp(0, 1)
    half = p.nose_bridge + (wide - p.nose_bridge) * t**1.5 * (1 - 0.22 * smooth(g.fy, length * 0.90, length * 1.03))
    bottom = length - 0.10 * (x / wide) ** 2 * 0.35
    d = torch.maximum(x.abs() - half, torch.maximum(-0.03 - g.fy, g.fy - bottom))
    a["nose"] = g.alpha(d)
    f["nose_x"], f["nose_length"], f["nose_half"], f["nose_wide"] = x, length, half, wide
    nostril = torch.zeros_like(x)
    for side in (-1.0, 1.0):
        hole = ellipse((x * side - wide * 0.46) + (g.fy - length) * 0.5, g.fy - length + 0.018, wide * 0.25, 0.0115)
        nostril = torch.maximum(nostril, g.alpha(hole, 2.0))
    f["nostril"] = nostril


def _mouth(layers: Layers, p: Person, params: PortraitParameters) -> None:
    g, a, f = layers.grid, layers.alpha, layers.fields
    half, rise = (v[:, None, None] for v in _mouth_corner(params))
    opened = p.open_by * p.Mouth_Slightly_Open
    full = 1 + 0.4 * p.Big_Lips - 0.15 * p.Male
    thin = 1 - 0.22 * p.Smiling
    x, y = g.fx, g.fy - p.mouth_y
    t = (x / half).clamp(-1.3, 1.3)
    arc = (1 - t * t).clamp(min=0)
    line = -rise * (t * t)  # the closed mouth: corners rise with the smile
    inner_up, inner_low = line - 0.35 * opened * arc**0.6, line + 0.65 * opened * arc**0.6
    bow = 1 - 0.28 * torch.exp(-((x / 0.022) ** 2)) + 0.10 * torch.exp(-(((x.abs() - 0.045) / 0.03) ** 2))
    top = inner_up - p.lip_upper * full * thin * arc**0.7 * bow
    low = inner_low + p.lip_lower * full * thin * arc**0.6
    side = (x.abs() - half) * 0.5
    a["u_lip"] = g.alpha(torch.maximum(torch.maximum(top - y, y - inner_up), side))
    a["l_lip"] = g.alpha(torch.maximum(torch.maximum(inner_low - y, y - low), side))
    a["mouth"] = g.alpha(torch.maximum(torch.maximum(inner_up - y, y - inner_low), side)) * p.Mouth_Slightly_Open
    f["mouth_line"] = g.alpha(torch.maximum((y - inner_up).abs() - 0.005, side), 2.0)
    f["mouth_x"], f["mouth_fy"], f["mouth_half"] = x, y, half
    reach = (inner_low - inner_up).clamp(min=1e-3)
    f["mouth_depth"] = ((y - inner_up) / reach).clamp(0, 1)
    f["lip_low"], f["lip_top"] = low, top


def _facial_hair(layers: Layers, p: Person) -> None:
    g, a, f, noise = layers.grid, layers.alpha, layers.fields, layers.noise
    bearded = 1 - p.No_Beard
    x, y = g.fx, g.fy
    grow = p.beard_length * (p.beard_kind == 2).float() * bearded
    jaw = superellipse(g.x, g.y - 0.06, f["face_width"], p.chin + grow - 0.06, p.jaw + 0.25 * p.Male)
    line = p.beard_top + 0.30 * (1 - (x.abs() / f["face_width"]).clamp(0, 1)) ** 1.0 * 0.6
    cheek = line - y - 0.55 * (x.abs() - 0.30).clamp(min=0) * 1.3
    full = torch.maximum(jaw, cheek + noise.wave(x + 3, 16.0, 1) * 0.012)
    clear = ellipse(x, f["mouth_fy"] - 0.01, f["mouth_half"] * 1.12, 0.085)
    full = torch.maximum(full, -clear)
    goatee = torch.maximum(ellipse(x, f["mouth_fy"] - 0.16, 0.135, 0.16), jaw)
    goatee = torch.maximum(goatee, f["lip_low"] - f["mouth_fy"])
    shape = torch.where(p.beard_kind == 1, goatee, full)
    density = torch.where(p.beard_kind == 0, 0.38 * p.beard_density, p.beard_density)
    a["beard"] = g.alpha(shape, 12.0) * density * bearded
    f["shaved"] = g.alpha(full, 16.0)
    reach = f["mouth_half"] * (0.92 + 0.1 * p.beard_density)
    my = f["mouth_fy"] - f["lip_top"] + p.mustache_thick * 0.7
    droop = 0.06 * (x / reach) ** 2
    stache = torch.maximum((my - droop).abs() - p.mustache_thick * (1 - 0.4 * (x / reach) ** 2), x.abs() - reach)
    stubble = (p.beard_kind == 0).float() * bearded * (1 - p.Mustache)
    a["mustache"] = g.alpha(stache + noise.wave(x + 8, 40.0, 3) * 0.008, 3.0) * (0.9 * p.Mustache + 0.35 * stubble)
    f["beard_grown"] = g.alpha(jaw, 3.0) * (grow > 0.001).float() * smooth(y, 0.2, 0.45)


def _worn(layers: Layers, p: Person) -> None:
    g, a, f = layers.grid, layers.alpha, layers.fields
    lens, rim = torch.full_like(g.x, 1.0), torch.full_like(g.x, 1.0)
    for side in (-1.0, 1.0):
        lx = (g.fx - side * (p.eye_gap + 0.005)) * side
        d = superellipse(lx, g.fy - p.lens_drop, p.lens_size, p.lens_height, p.lens_shape)
        lens = torch.minimum(lens, d)
        rim = torch.minimum(rim, d.abs() - p.rim)
        temple_y = p.lens_drop - 0.3 * p.lens_height
        arm = segment(g.x * side, g.y, p.eye_gap + p.lens_size * 0.9, temple_y, f["face_width"] * 1.01, temple_y - 0.01)
        rim = torch.minimum(rim, arm - p.rim * 0.8)
    bridge = segment(
        g.fx,
        g.fy,
        -p.eye_gap + p.lens_size * 0.9,
        p.lens_drop - 0.02,
        p.eye_gap - p.lens_size * 0.9,
        p.lens_drop - 0.02,
    )
    rim = torch.minimum(rim, bridge - p.rim * 0.9)
    a["lens"], a["rim"] = g.alpha(lens) * p.Eyeglasses, g.alpha(rim) * p.Eyeglasses

    line = p.hat_line - 0.06 * g.x**2
    crown = torch.maximum(
        superellipse(g.x, g.y + 0.3, f["face_width"] * 1.12, p.skull - 0.3 + p.hat_height, 2.8), g.y + line
    )
    crown = torch.where(g.y < -0.3, crown, torch.maximum(g.x.abs() - f["face_width"] * 1.12, g.y + line))
    brim = ellipse(g.x, g.y + line - 0.01, f["face_width"] * (1.12 + p.hat_brim), 0.045 + 0.12 * p.hat_brim)
    a["hat"] = (
        g.alpha(torch.minimum(crown, torch.where(p.hat_brim > 0.06, brim, torch.full_like(brim, 1.0)))) * p.Wearing_Hat
    )
    f["hat_brim"] = g.alpha(brim)

    rings = torch.zeros_like(g.x)
    for side in (-1.0, 1.0):
        hidden = smooth(side * p.yaw, 0.18, 0.3)
        ring = ellipse(
            g.x * side - f["face_width"] * 0.99, g.y - 0.235 - p.earring_size, p.earring_size, p.earring_size * 1.4
        )
        rings = torch.maximum(rings, g.alpha(ring) * (1 - hidden))
    a["earrings"] = rings * p.Wearing_Earrings
    arc = ellipse(g.x, g.y - 0.78, p.neck_width * 0.98, p.necklace_drop)
    beads = 0.006 + 0.004 * torch.sin(60 * torch.atan2(g.x, g.y - 0.78))
    a["necklace"] = g.alpha(torch.maximum(arc.abs() - beads, 0.80 - g.y)) * p.Wearing_Necklace
