# SPDX-License-Identifier: Apache-2.0
"""`faceedit project`: a photo's face as styles and noise maps of a StyleGAN2."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from faceedit.cli import options
from faceedit.cli.editing import compare_path
from faceedit.cli.files import check_distinct, check_folder, write_tensors
from faceedit.cli.output import print_json, progress_bar
from faceedit.errors import UnknownNameError, UsageError, suggestion

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

    from faceedit.alignment import Framing
    from faceedit.networks.e4e import E4EEncoder
    from faceedit.networks.stylegan2 import StyleGAN2Generator
    from faceedit.projection import ProjectionStep


@contextmanager
def _watched(steps: int) -> Iterator[Callable[[ProjectionStep], None]]:
    """A progress bar with the loss terms on stderr."""
    with progress_bar() as bar:
        task = bar.add_task("projecting", total=steps)

        def show(step: ProjectionStep) -> None:
            terms = f"distance {step.distance.item():.4f}  noise {step.noise_penalty.item():.2e}"
            bar.update(task, description=terms, completed=step.step)

        yield show


def project(
    photo: options.Photo,
    output: Annotated[Path, typer.Option("--output", "-o", help="The projected face; its suffix is the format.")],
    weights: Annotated[
        str, typer.Option("--weights", "-w", help="A StyleGAN2: a registry name, a tag, a file, or a bundle (.json).")
    ] = "starter",
    framing: Annotated[
        str,
        typer.Option(
            "--framing",
            metavar="NAME",
            help="The crop that the generator was trained on, ffhq or portrait. Without it the bundle's; ffhq if none.",
            show_default=False,
        ),
    ] = "",
    encoder: Annotated[
        str, typer.Option("--encoder", help="An e4e encoder of that generator, whose styles are the start.")
    ] = "",
    steps: Annotated[int, typer.Option("--steps", min=1, help="Steps of the optimisation.")] = 1000,
    save_latents: Annotated[
        Path | None, typer.Option("--save-latents", help="Write styles and noise maps to this .safetensors file.")
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Also write OUT_compare: face | projection.")] = False,
    face: options.Face = 0,
    seed: options.Seed = 0,
    device: options.Device = "cpu",
    json: options.Json = False,
) -> None:
    """Find the styles and noise maps with which a StyleGAN2 shows a face, cropped as the generator knows faces.

    Example: faceedit project me.jpg -o projection.png --weights ffhq.safetensors --save-latents me.safetensors
    """
    if save_latents is not None and save_latents.suffix != ".safetensors":
        raise UsageError(f"project: --save-latents must end in .safetensors, got {save_latents}; change the suffix")

    import numpy as np

    from faceedit.devices import resolve_device
    from faceedit.images import check_writable, read_image, write_image
    from faceedit.maskfacegan.bundle import read_bundle
    from faceedit.parsing import image_tensor, load_parser
    from faceedit.projection import ProjectionConfig
    from faceedit.projection import project as project_image

    sheet = compare_path(output) if compare else None
    check_distinct("project", {"PHOTO": photo, "--output": output, "--compare": sheet, "--save-latents": save_latents})
    for path in (output, sheet):
        if path is not None:
            check_writable(path)
    if save_latents is not None:
        check_folder(save_latents)
    where = resolve_device(device)
    source = read_image(photo)
    bundle = read_bundle(weights)
    chosen = _framing(framing) if framing else bundle.framing
    generator, start_from = _load(bundle.generator, encoder, where)
    side = generator.config.size_px
    record = load_parser(device).find_face(source.pixels, face)
    crop = record.framed(chosen, side).warp_image(source.pixels)
    image = image_tensor(crop).to(where)
    started = time.perf_counter()
    with _watched(steps) as show:
        found = project_image(
            generator,
            image,
            ProjectionConfig(steps=steps),
            start=None if start_from is None else start_from.encode(image),
            seed=seed,
            callback=show,
            callback_every=max(1, steps // 100),
        )
    seconds = time.perf_counter() - started
    made = generator.synthesis(found.ws, found.noise).clamp(-1, 1)
    pixels = _pixels(made)
    write_image(output, pixels)
    written = [output]
    if sheet is not None:
        write_image(sheet, np.concatenate([crop, pixels], axis=1))
        written.append(sheet)
    if save_latents is not None:
        about = {"weights": weights, "framing": chosen, "encoder": encoder, "steps": str(steps), "seed": str(seed)}
        write_tensors(save_latents, found.tensors(), about)
        written.append(save_latents)
    if json:
        error = (made - image).square().mean().item()
        print_json(
            {
                "weights": weights,
                "framing": chosen,
                "encoder": encoder,
                "seed": seed,
                "steps": len(found.distance),
                "size_px": side,
                "distance": {"first": found.distance[0].item(), "last": found.distance[-1].item()},
                "noise_penalty": found.noise_penalty[-1].item(),
                "psnr_db": round(10 * math.log10(4 / max(error, 1e-10)), 3),
                "seconds": round(seconds, 3),
                "written": [str(path) for path in written],
            }
        )


def _framing(name: str) -> Framing:
    """The framing of that name. Raises UnknownNameError."""
    from faceedit.alignment import FRAMINGS

    for known in FRAMINGS:
        if name == known:
            return known
    raise UnknownNameError(f"project: --framing must be a known framing, got {name!r}; {suggestion(name, FRAMINGS)}")


def _load(weights: str, encoder: str, device: torch.device) -> tuple[StyleGAN2Generator, E4EEncoder | None]:
    """Generator and encoder. Raises UsageError when they do not belong together, and what loading raises."""
    from faceedit.networks.e4e import E4EEncoder
    from faceedit.networks.stylegan2 import StyleGAN2Generator
    from faceedit.registry import load_network

    generator = load_network(weights, device, kind="stylegan2")
    assert isinstance(generator, StyleGAN2Generator)
    if not encoder:
        return generator, None
    inverse = load_network(encoder, device, kind="e4e")
    assert isinstance(inverse, E4EEncoder)
    wanted, given = ((c.num_ws, c.w_width) for c in (generator.config, inverse.config))
    if given != wanted:
        raise UsageError(
            f"project: --encoder must give {wanted[0]} styles of {wanted[1]} for {weights}, got {given[0]} of "
            f"{given[1]} from {encoder}; use an encoder that was trained for this generator"
        )
    return generator, inverse


def _pixels(image: Tensor) -> NDArray[np.uint8]:
    """1×3×S×S in [-1, 1] to uint8 S×S×3."""
    return ((image[0] + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
