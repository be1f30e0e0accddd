#!/usr/bin/env python
"""
Draws the pictures of docs/concepts.md: the cascade, a stage, and the scale-invariant loss.

    python docs/drawings.py

Writes docs/images/{cascade,stage,scale_invariant_loss}.svg. The cascade's pictures are samples of the published
checkpoint: an image of docs/images/demo_stages.png, at every stage.
"""

from __future__ import annotations

import base64
import io
from pathlib import Path
from xml.sax.saxutils import escape

from PIL import Image


IMAGES = Path(__file__).parent / "images"
INK, SOFT, LINE = "#1f2440", "#5b6178", "#8a90a8"
BLUE, ORANGE, GREEN, PLAIN = "#dfe6fb", "#fde8d2", "#dcf1e1", "#f1f2f7"


class Drawing:
    """An SVG on a white panel, so that it reads in light and dark pages."""

    def __init__(self, width: int, height: int):
        self.size = (width, height)
        self.parts: list[str] = []

    def text(
        self, x: float, y: float, text: str, size: int = 15, colour: str = INK, anchor: str = "middle", bold=False
    ):
        weight = ' font-weight="600"' if bold else ""
        style = f'font-size="{size}" fill="{colour}" text-anchor="{anchor}"{weight}'
        self.parts.append(f'<text x="{x}" y="{y}" {style}>{escape(text)}</text>')

    def box(self, x: float, y: float, width: float, height: float, lines: list[str], fill: str = PLAIN):
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="8" fill="{fill}" stroke="{LINE}"/>'
        )
        first = y + height / 2 + 5 - 9 * (len(lines) - 1)
        for index, line in enumerate(lines):
            self.text(
                x + width / 2, first + 18 * index, line, 14 if index else 15, SOFT if index else INK, bold=not index
            )

    def arrow(self, *points: tuple[float, float], dashed: bool = False):
        path = " ".join(f"{'L' if index else 'M'}{x},{y}" for index, (x, y) in enumerate(points))
        dashes = ' stroke-dasharray="5 4"' if dashed else ""
        self.parts.append(
            f'<path d="{path}" fill="none" stroke="{LINE}" stroke-width="2" marker-end="url(#tip)"{dashes}/>'
        )

    def picture(self, x: float, y: float, side: float, image: Image.Image, pixelated: bool):
        data = io.BytesIO()
        image.save(data, format="PNG")
        source = base64.b64encode(data.getvalue()).decode()
        style = ' style="image-rendering:pixelated"' if pixelated else ""
        self.parts.append(
            f'<image x="{x}" y="{y}" width="{side}" height="{side}"{style} href="data:image/png;base64,{source}"/>'
            f'<rect x="{x}" y="{y}" width="{side}" height="{side}" fill="none" stroke="{LINE}"/>'
        )

    def save(self, name: str, title: str):
        width, height = self.size
        tip = (
            '<defs><marker id="tip" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
            f'orient="auto"><path d="M0,0 L10,5 L0,10 z" fill="{LINE}"/></marker></defs>'
        )
        body = "\n".join(self.parts)
        (IMAGES / name).write_text(
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'font-family="system-ui, sans-serif" role="img"><title>{escape(title)}</title>{tip}'
            f'<rect width="{width}" height="{height}" rx="10" fill="#fff"/>\n{body}\n</svg>\n',
            encoding="utf-8",
        )


def stage_pictures(column: int = 10) -> list[Image.Image]:
    """One image at every stage, cut out of the grid that examples/generate.py draws."""
    grid = Image.open(IMAGES / "demo_stages.png").convert("RGB")
    cell, gap, label = 64, 6, 17
    tops = [gap + row * (cell + label + gap) for row in range(4)]
    left = gap + column * (cell + gap)
    return [grid.crop((left, top, left + cell, top + cell)) for top in tops]


def draw_cascade() -> None:
    drawing = Drawing(980, 330)
    for index, (image, size) in enumerate(zip(stage_pictures(), (16, 32, 64, 128))):
        x = 50 + 240 * index
        drawing.box(x, 40, 160, 62, [f"Stage {index + 1}", f"{size} x {size} px"], BLUE)
        drawing.arrow((x + 80, 102), (x + 80, 132))
        drawing.picture(x + 16, 134, 128, image, pixelated=True)
        if index:
            drawing.arrow((x - 96, 198), (x - 40, 198), (x - 40, 71), (x - 3, 71))
            drawing.text(x - 40, 222, "upsample", 13, SOFT)
            drawing.text(x - 40, 238, "+ a little noise", 13, SOFT)
    drawing.text(20, 26, "class, and noise for every stage", 14, SOFT, "start")
    drawing.text(
        490, 306, "Each stage draws with its own network, noise and steps; only the last image leaves.", 14, SOFT
    )
    drawing.save("cascade.svg", "Four stages, each conditioned on the image of the one before")


def draw_stage() -> None:
    drawing = Drawing(980, 400)
    drawing.box(24, 60, 168, 62, ["noisy image", "this stage's x_t"], GREEN)
    drawing.box(24, 150, 168, 62, ["image from below", "upsampled, noised"], GREEN)
    drawing.box(24, 270, 168, 62, ["timestep, class", "and noise level"], ORANGE)
    drawing.box(230, 92, 130, 88, ["patches", "one token each", "+ positions"])
    drawing.arrow((192, 91), (210, 91), (210, 125), (227, 125))
    drawing.arrow((192, 181), (210, 181), (210, 147), (227, 147))
    names = ["rows →", "columns ↓", "rows ←", "columns ↑"]
    for index, name in enumerate(names):
        x = 410 + 96 * index
        drawing.box(x, 82, 84, 108, ["Mamba", name], BLUE)
        drawing.arrow((x - (50 if index == 0 else 12), 136), (x - 3, 136))
    drawing.arrow((452, 82), (452, 44), (740, 44), (740, 79), dashed=True)
    drawing.text(596, 36, "long skip: layers of the same direction", 13, SOFT)
    drawing.box(830, 82, 120, 108, ["patches", "back to pixels", "+ 3x3 convs"])
    drawing.arrow((782, 136), (827, 136))
    drawing.arrow((890, 190), (890, 250))
    drawing.text(890, 270, "noise, velocity", 14)
    drawing.text(890, 288, "or the image", 14)
    drawing.arrow((192, 301), (596, 301), (596, 193))
    drawing.text(390, 292, "modulate every layer, and stand in front as two tokens", 13, SOFT)
    drawing.text(
        490, 370, "Eight directions in turn, one per layer; a learned token ends every scanned line.", 14, SOFT
    )
    drawing.save("stage.svg", "One stage: patches, Mamba layers that scan in turn in eight directions, patches")


def draw_loss() -> None:
    drawing = Drawing(980, 330)
    for row, (name, fill) in enumerate((("16 px", BLUE), ("32 px", ORANGE))):
        y = 50 + 130 * row
        drawing.text(66, y + 36, f"stage {row + 1}", 15, bold=True)
        drawing.text(66, y + 56, name, 13, SOFT)
        drawing.box(120, y, 150, 76, ["batch", "noised images", "of four pictures"], fill)
        drawing.box(330, y, 130, 76, ["layers", "image tokens"], fill)
        drawing.box(520, y, 130, 76, ["mean, head", "unit vectors"], fill)
        drawing.arrow((270, y + 38), (327, y + 38))
        drawing.arrow((460, y + 38), (517, y + 38))
    x, y, cell = 730, 66, 44
    drawing.arrow((650, 88), (690, 88), (690, 130), (725, 130))
    drawing.arrow((650, 218), (690, 218), (690, 176), (725, 176))
    for i in range(4):
        for j in range(4):
            fill = "#4a9b5e" if i == j else "#f3d9d6"
            place = f'x="{x + cell * j}" y="{y + cell * i}" width="{cell - 3}" height="{cell - 3}"'
            drawing.parts.append(f'<rect {place} rx="4" fill="{fill}"/>')
    drawing.text(x + 88, y - 12, "similarity of every pair", 14, SOFT)
    drawing.text(x + 88, y + 4 * cell + 22, "green: pull together", 14, "#2f7a43")
    drawing.text(x + 88, y + 4 * cell + 42, "red: push apart", 14, "#b0463c")
    drawing.text(380, 306, "The same picture at two sizes should have the same features.", 14, SOFT)
    drawing.save("scale_invariant_loss.svg", "The scale-invariant loss compares features of a batch at two sizes")


if __name__ == "__main__":
    draw_cascade()
    draw_stage()
    draw_loss()
