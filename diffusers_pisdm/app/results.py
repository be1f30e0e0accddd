"""What a drawing looks like on the page while it grows, and its files once it is done."""

from __future__ import annotations

import base64
import html
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image

from ..utils.png_recipe import recipe_chunk
from .drawing import Drawing, Progress
from .models import Model


SMALL = 128  # images of fewer pixels are shown as squares of one colour
MOST_FILMED = 4  # images whose every step is kept


class Record:
    """The steps of a drawing so far."""

    def __init__(self, model: Model, drawing: Drawing):
        self.model = model
        self.drawing = drawing
        first = 0 if drawing.image is None else model.sizes.index(drawing.image.width) + 1
        self.steps = dict.fromkeys(range(first + 1, len(model.sizes) + 1), 0)  # done, by stage
        self.images: list[Image.Image] = []
        self.films: list[list[dict[str, Any]]] = [[] for _ in drawing.class_ids[:MOST_FILMED]]
        self._sources: list[str] = []
        self._start = time.perf_counter()

    def add(self, progress: Progress) -> None:
        self.steps[progress.stage] = progress.step
        self.images = progress.images
        self._sources = [_data_url(image) for image in progress.images]
        for film, source in zip(self.films, self._sources):
            steps = self.drawing.num_inference_steps[progress.stage - 1]
            film.append({"size": progress.images[0].width, "step": progress.step, "steps": steps, "src": source})

    def pictures(self) -> str:
        """The images so far, as HTML."""
        count = len(self.drawing.class_ids)
        small = not self.images or self.images[0].width < SMALL
        cells = [f'<img src="{source}" alt="">' for source in self._sources] or ["<i></i>"] * count
        return f'<div class="pictures{" pixels" * small}" style="--columns: {columns(count)}">{"".join(cells)}</div>'

    def lines(self, state: str = "running") -> str:
        """A line of progress per stage, as HTML."""
        rows = []
        for stage, done in self.steps.items():
            steps, size = self.drawing.num_inference_steps[stage - 1], self.model.sizes[stage - 1]
            rows.append(
                f'<div class="stage{" done" * (done == steps)}" data-stage="{stage}"><b>{size} px</b>'
                f'<progress max="{steps}" value="{done}" aria-label="Stage of {size} pixels"></progress>'
                f"<span>{done}/{steps}</span></div>"
            )
        words = {
            "running": "Drawing",
            "done": f"Drawn in {time.perf_counter() - self._start:.1f} s",
        }
        return f'<div class="stages">{"".join(rows)}</div><p class="state {state}" role="status">{words[state]}</p>'

    def film(self) -> dict[str, Any]:
        """For the page's view of the stages."""
        labels = [self.model.labels[class_id] for class_id in self.drawing.class_ids]
        return {"pictures": [{"label": label, "frames": film} for label, film in zip(labels, self.films)]}

    @contextmanager
    def files(self) -> Iterator[list[tuple[str, str]]]:
        """Paths of the finished images with captions; each PNG carries its recipe. Gone when the context ends."""
        with TemporaryDirectory(prefix="pisdm-") as folder:
            files = []
            for image, recipe in zip(self.images, self.drawing.recipes(self.model)):
                label, seed = str(recipe["class_label"]), recipe["seed"]
                stem = re.sub(r"[^\w.-]+", "-", label)[:60]
                path = Path(folder) / f"{stem}_{seed}.png"
                image.save(path, pnginfo=recipe_chunk(recipe))
                files.append((str(path), f"{label} · seed {seed}"))
            yield files


def columns(count: int) -> int:
    """Columns of a grid of so many images."""
    return next(number for number in (1, 2, 3, 4) if count <= number * number)


def empty_canvas(count: int) -> str:
    """Where so many images will be drawn, as HTML."""
    return f'<div class="pictures empty" style="--columns: {columns(count)}">{"<i></i>" * count}</div>'


def message(text: str) -> str:
    return f'<p class="state" role="status">{html.escape(text)}</p>'


def _data_url(image: Image.Image) -> str:
    data = BytesIO()
    is_small = image.width < SMALL // 2
    image.convert("RGB").save(data, "WEBP", lossless=is_small, quality=60 if is_small else 90, method=1)
    return f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}"
