"""The parts of the page that Gradio has no component for: HTML here, behaviour in static/."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import gradio as gr
from gradio.data_classes import ImageData
from pydantic import ValidationError
from typing_extensions import Self

from ..utils.names import show_name
from .class_sheet import COLUMNS
from .models import Model
from .own_picture import NOT_READABLE
from .scans import scans_of


STATIC = Path(__file__).parent / "static"

HEAD = """
<div class="brand">
  <svg viewBox="0 0 44 44" fill="currentColor" aria-hidden="true">
    <rect x="0" y="26" width="18" height="18" rx="3"/>
    <rect x="22" y="26" width="10" height="10" rx="2" opacity=".8"/>
    <rect x="34" y="26" width="10" height="10" rx="2" opacity=".45"/>
    <rect x="22" y="36.5" width="7.5" height="7.5" rx="1.5" opacity=".45"/>
    <rect x="0" y="0" width="24" height="24" rx="4" opacity=".28"/>
    <rect x="26" y="10" width="14" height="14" rx="3" opacity=".55"/>
  </svg>
  <div><h1>Pictures that grow</h1><p>{subtitle}</p></div>
</div>
"""

PICKER = """
<div class="picker">
  <div class="picker-chosen"></div>
  <p class="picker-none">Nothing chosen yet: pick a class below.</p>
  <div class="picker-row">
    <input class="picker-search" type="search" placeholder="Search: cat, heart…" aria-label="Search classes">
    <select class="picker-subject" aria-label="Subject"></select>
  </div>
  <div class="picker-styles" role="group" aria-label="Style"></div>
  <div class="picker-grid"></div>
  <p class="picker-count" role="status"></p>
</div>
"""

VIEWER = """
<div class="viewer">
  <p class="viewer-empty">Draw a picture first. Every step it takes is then shown here.</p>
  <div class="viewer-body" hidden>
    <div>
      <img class="viewer-picture" alt="The picture at this step">
      <p class="viewer-caption" role="status"></p>
      <div class="viewer-controls">
        <button type="button" class="viewer-play plain-button">Play</button>
        <input class="viewer-slider" type="range" min="0" max="0" value="0" aria-label="Step">
      </div>
    </div>
    <div><div class="viewer-stages"></div><div class="viewer-choices"></div></div>
  </div>
</div>
"""

SCANS = """
<div class="scans">
  <div class="scans-controls">
    <button type="button" class="scans-play plain-button">Pause</button>
    <input class="scans-slider" type="range" min="1" max="64" value="64" aria-label="Tokens read">
    <label><input class="scans-snake" type="checkbox"> Snake: turn back at each line's end</label>
  </div>
  <div class="scans-grid"></div>
</div>
"""


@contextmanager
def sentences() -> Iterator[None]:
    """Shows the visitor what was wrong with the input, instead of "Error"."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise gr.Error(str(error), title="That did not work", duration=12, print_exception=False) from error


class OwnPictureData(ImageData):
    """What comes in place of a visitor's picture: what is no file, but a path or an address, ends in a sentence."""

    @classmethod
    def model_validate(cls, value: Any, **options: Any) -> Self:
        try:
            return super().model_validate(value, **options)
        except ValidationError as error:
            with sentences():
                raise ValueError(
                    f"The picture has to be a file, not {show_name(repr(value))}. With gradio_client, pass"
                    " `handle_file(...)` of a path or an address."
                ) from error


def own_picture(**arguments: Any) -> gr.Image:
    """Takes a visitor's picture, by its path: a file that is none ends in a sentence, not in Gradio's bare "Error"."""
    image = gr.Image(type="filepath", image_mode=None, **arguments)
    image.data_model = OwnPictureData
    read = image.preprocess

    def preprocess(payload: Any) -> str | None:
        try:
            return read(payload)
        except Exception as error:  # Pillow's, of any file
            with sentences():
                raise ValueError(NOT_READABLE) from error

    image.preprocess = preprocess  # a subclass would make Gradio write a .pyi file into the package
    return image


def class_picker(model: Model, value: list[str]) -> gr.HTML:
    """Chooses classes; its value is their labels."""
    return gr.HTML(
        value=value,
        html_template=PICKER,
        js_on_load=(STATIC / "class_picker.js").read_text(encoding="utf-8"),
        elem_id="picker",
        columns=COLUMNS,
        **classes_of(model),
    )


def stage_viewer() -> gr.HTML:
    """Walks through the steps of a drawing; its value is [`~results.Record.film`]'s."""
    return gr.HTML(
        value={"pictures": []},
        html_template=VIEWER,
        js_on_load=(STATIC / "stage_viewer.js").read_text(encoding="utf-8"),
        elem_id="viewer",
    )


def scan_view(model: Model) -> gr.HTML:
    """Draws the scan paths; its value is [`~scans.scans_of`]'s."""
    return gr.HTML(
        value=scans_of(model),
        html_template=SCANS,
        js_on_load=(STATIC / "scan_paths.js").read_text(encoding="utf-8"),
        elem_id="scans",
    )


def classes_of(model: Model) -> dict[str, Any]:
    """What the picker shows of a model."""
    if model.sheet is not None:
        gr.set_static_paths([model.sheet])
    return {
        "labels": model.labels,
        "sheet": f"gradio_api/file={quote(str(model.sheet.absolute()))}" if model.sheet is not None else "",
    }


def head_of(model: Model) -> str:
    stages = ", stage by stage" if len(model.sizes) > 1 else ""
    return HEAD.format(subtitle=f"Diffusion with Mamba{stages}: {' → '.join(map(str, model.sizes))} pixels")
