"""Draws the pictures of docs/pipeline.md: images enlarged, changed and repainted, and mixes of classes."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from diffusers_pisdm import PISDMCascadePipeline
from diffusers_pisdm.utils.image_grid import make_image_grid


SIDE = 128
STRENGTHS = (0.3, 0.5, 0.7, 0.9)
REPAINTED_AS = ("noto/face-smiling", "noto/face-tongue", "noto/face-concerned", "noto/face-negative")
SHARES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
MIXES = (  # from, to, seed
    ("twemoji/face-smiling", "fluent3d/face-smiling", 1),
    ("twemoji/food-fruit", "fluent3d/food-fruit", 2),
    ("noto/animal-bird", "noto/food-fruit", 3),
)


def draw_icon() -> Image.Image:
    """A face of 16 pixels."""
    icon = Image.new("RGB", (SIDE, SIDE), "white")
    draw = ImageDraw.Draw(icon)
    draw.ellipse((14, 14, 114, 114), fill=(250, 200, 50))
    for left in (40, 76):
        draw.ellipse((left, 45, left + 12, 60), fill=(80, 50, 20))
    draw.arc((40, 60, 88, 92), 20, 160, fill=(120, 60, 20), width=5)
    return icon.resize((16, 16), Image.Resampling.BOX)


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def draw_given(pipe: PISDMCascadePipeline) -> Image.Image:
    """The icon, enlarged, and changed with several strengths."""
    icon = draw_icon()
    cells, labels = (
        [icon, pipe("noto/face-smiling", image=icon, generator=generators(5)).images[0]],
        ["icon", "enlarged"],
    )
    for strength in STRENGTHS:
        cells += pipe("fluent/face-smiling", image=icon, strength=strength, generator=generators(5)).images
        labels.append(f"strength={strength}")
    return make_image_grid(cells, labels, len(cells), SIDE)


def draw_repainted(pipe: PISDMCascadePipeline) -> Image.Image:
    """An image, what of it is repainted, and as several classes."""
    image = pipe("noto/face-smiling", generator=generators(0)).images[0]
    mask = Image.new("L", image.size)
    ImageDraw.Draw(mask).rectangle((0, SIDE // 2, SIDE, SIDE), fill=255)
    shown = Image.composite(Image.new("RGB", image.size, "lightgrey"), image, mask)
    cells, labels = [image, shown], ["image", "with the mask"]
    for name in REPAINTED_AS:
        cells += pipe(name, image=image, mask_image=mask, generator=generators(6)).images
        labels.append(name)
    return make_image_grid(cells, labels, len(cells), SIDE)


def draw_mixes(pipe: PISDMCascadePipeline) -> Image.Image:
    """A row for each pair of classes, from one to the other."""
    cells, labels = [], []
    for first, second, seed in MIXES:
        mixes = [{first: 1 - share, second: share} for share in SHARES]
        cells += pipe(mixes, generator=generators(*[seed] * len(mixes))).images
        labels += [first, *(f"{share:.0%}" for share in SHARES[1:-1]), second]
    return make_image_grid(cells, labels, len(SHARES), SIDE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="checkpoints/pisdm-emoji128")
    parser.add_argument("--output", type=Path, default=Path("docs/images"), help="folder of the three pictures")
    args = parser.parse_args()
    pipe = PISDMCascadePipeline.from_pretrained(args.model)
    for name, draw in (("given", draw_given), ("repainted", draw_repainted), ("mixes", draw_mixes)):
        draw(pipe).save(args.output / f"images_{name}.png")


if __name__ == "__main__":
    main()
