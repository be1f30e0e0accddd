"""The page: what is on it, and what happens when it is used."""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr
from gradio.components.api_component import Api

from ..utils.names import names_with, show_name
from ..utils.shipped_files import CHECKPOINT
from .drawing import Drawing, Progress, draw, plan_drawing
from .models import Model, Models
from .own_picture import read_picture
from .parts import STATIC, class_picker, classes_of, head_of, own_picture, scan_view, sentences, stage_viewer
from .results import Record, columns, empty_canvas, message
from .scans import scans_of
from .settings import read_settings
from .style import make_theme


MOST_STAGES = 4
MOST_WAITING = 64  # requests in the queue
MOST_IMAGES_PER_CLASS = 8
NOTHING_NEW = "Nothing new was drawn."
FIRST_CLASS = "fluent3d/face-smiling"
OWN_HOSTS = ("127.0.0.1", "localhost", "::1")  # that only this machine reaches
CLEAN_EVERY, KEEP_FILES = 600, 3600  # seconds
DRAWING = {"concurrency_id": "drawing", "concurrency_limit": 1}  # the pipeline draws for one at a time
AT_ONCE = {"api_visibility": "private", "show_progress": "hidden", "queue": False}
WATCHED = {"api_visibility": "private", "show_progress": "minimal", **DRAWING}  # shows the place in the queue


def _on_gpu(function: Callable) -> Callable:
    """Borrows a GPU for as long as the function runs, where the page runs on Hugging Face's ZeroGPU."""
    try:
        import spaces
    except ImportError:
        return function
    return spaces.GPU(function)


class _Studio:
    """What the page's events do. Whoever draws shares the models; what belongs to one visitor is passed in."""

    def __init__(self, models: Models, name: str):
        self.models = models
        self.first = models.get(name)
        self.name = name

        def draw_with(name: str, drawing: Drawing) -> Iterator[Progress]:
            yield from draw(models.get(name).pipe, drawing)

        self._draw_with = _on_gpu(draw_with)

    def watch(self, name: str, drawing: Drawing) -> Iterator[Record]:
        """Yields the record of a drawing before its first step and after each."""
        record = Record(self.models.get(name), drawing)
        yield record
        with sentences():
            for progress in self._draw_with(name, drawing):
                record.add(progress)
                yield record

    def draw(self, name: str, labels: list[str], per_class: int, seed: int, keep: bool, *per_stage: float) -> Iterator:
        """Yields what the page shows: seed, growing pictures, lines of progress, gallery, stages."""
        drawn = self._draw(name, labels, per_class, seed, keep, *per_stage)
        yield from _or_else(drawn, (gr.skip(), gr.skip(), message(NOTHING_NEW), gr.skip(), gr.skip()))

    def _draw(
        self, name: str, labels: list[str], per_class: int, seed: int, keep: bool, *per_stage: float
    ) -> Iterator:
        with sentences():
            model = self.models.get(name)
            num_stages = model.pipe.num_stages
            steps, scales = per_stage[:num_stages], per_stage[MOST_STAGES : MOST_STAGES + num_stages]
            seed = seed if keep else _new_seed()
            drawing = plan_drawing(model, labels, per_class, seed, list(steps), list(scales))
        for record in self.watch(name, drawing):
            yield (
                drawing.seed,
                _growing(record),
                record.lines(),
                gr.skip() if record.images else _no_files(),
                gr.skip(),
            )
        with record.files() as files:
            yield drawing.seed, gr.HTML(visible=False), record.lines("done"), _finished(files), record.film()

    def enlarge(self, name: str, path: str | None, label: str, size: int, seed: int) -> Iterator:
        """Yields what the Upscale tab shows: growing pictures, lines, gallery."""
        nothing = gr.HTML(empty_canvas(1), visible=True), message(NOTHING_NEW), _no_files()
        yield from _or_else(self._enlarge(name, path, label, size, seed), nothing)

    def _enlarge(self, name: str, path: str | None, label: str, size: int, seed: int) -> Iterator:
        drawing = self.plan_enlarging(name, path, label, size or None, seed)
        for record in self.watch(name, drawing):
            yield _growing(record), record.lines(), gr.skip() if record.images else _no_files()
        with record.files() as files:
            yield gr.HTML(visible=False), record.lines("done"), _finished(files)

    def plan_enlarging(self, name: str, path: str | None, label: str | int, size: int | None, seed: int) -> Drawing:
        with sentences():
            model = self.models.get(name)
            if path is None:
                raise ValueError("There is no picture to enlarge. Choose one first.")
            image = read_picture(path, model.sizes, size)
            steps, scales = model.default("num_inference_steps"), model.default("guidance_scale")
            return plan_drawing(model, [label], 1, seed, steps, scales, image)

    def surprise(self, name: str) -> tuple[list[str], bool]:
        return [random.choice(self.models.get(name).labels)], False

    def apply_recipe(self, name: str, path: str | None) -> list:
        """What a dropped picture sets: picker, pictures per class, seed, whether to keep it, steps and guidance."""
        with sentences():
            settings = read_settings(path, self.models.get(name))
        if settings.unmatched:
            gr.Warning(
                f"The picture was drawn with {', '.join(settings.unmatched)}, which this page does not set: it will"
                f" look different here. {settings.remedy}"
            )
        else:
            gr.Info("The page is set as this picture was drawn. Press Draw to see it again.")
        drawing = settings.drawing
        per_stage = [_padded(drawing.num_inference_steps), _padded(drawing.guidance_scale)]
        return [[settings.label], 1, drawing.seed, True, *per_stage[0], *per_stage[1], None]


def _or_else(steps: Iterator, nothing: tuple) -> Iterator:
    """What the page shows, and what instead after an error: `failure` would not do, as it also follows a stop."""
    try:
        yield from steps
    except Exception:
        yield nothing
        raise


def _busy() -> tuple[gr.Button, gr.Button]:
    return gr.Button(visible=False), gr.Button(visible=True)


def _idle() -> tuple[gr.Button, gr.Button]:
    return gr.Button(visible=True), gr.Button(visible=False)


def _stopped() -> tuple[gr.Button, gr.Button, str]:
    return *_idle(), message("Stopped.")


def _new_seed() -> int:
    return random.randint(0, 999_999)


def _padded(values: list) -> list:
    return [*values, *[gr.skip()] * (MOST_STAGES - len(values))]


def _growing(record: Record) -> gr.HTML:
    return gr.HTML(record.pictures(), visible=True)


def _no_files() -> gr.Gallery:
    return gr.Gallery(value=[], visible=False)


def _finished(files: list[tuple[str, str]]) -> gr.Gallery:
    return gr.Gallery(value=files, columns=columns(len(files)), visible=True, selected_index=None)


def _stage_inputs(model: Model) -> tuple[list[dict], list[dict]]:
    """Arguments of the inputs of steps and guidance, for as many stages as there can be."""
    num_stages = model.pipe.num_stages
    return tuple(
        [
            {"value": values[i], "label": f"{model.sizes[i]} px", "visible": True}
            if i < num_stages
            else {"visible": False}
            for i in range(MOST_STAGES)
        ]
        for values in (model.default("num_inference_steps"), model.default("guidance_scale"))
    )


def _if_stages(model: Model) -> bool | str:
    """Whether the tabs about stages show; "hidden", as Gradio does not take a tab away that is already there."""
    return len(model.sizes) > 1 or "hidden"


def _size_choices(model: Model) -> list[tuple[str, int]]:
    return [("Auto", 0), *((f"{size} px", size) for size in model.sizes[:-1])]


def build_app(model: str, takes_models: bool = True) -> gr.Blocks:
    r"""
    Builds the page.

    Args:
        model (`str`): A saved pipeline's folder or Hub repository, or `"pisdm-emoji128"`.
        takes_models (`bool`, defaults to `True`):
            Whether visitors may load others: folders of this machine, or what this machine downloads from the Hub.

    Returns:
        `gr.Blocks`: To launch with [`launch_options`].

    Raises:
        ValueError: The model cannot be loaded.
    """
    studio = _Studio(Models(), model)
    first = studio.first
    first_label = FIRST_CLASS if FIRST_CLASS in first.labels else first.labels[0]
    of_steps, of_scales = _stage_inputs(first)

    with gr.Blocks(
        title="PIS-DM: pictures that grow", analytics_enabled=False, delete_cache=(CLEAN_EVERY, KEEP_FILES)
    ) as app:
        name = gr.State(model)
        head = gr.HTML(head_of(first), elem_id="head")
        with gr.Tabs(overflow_behavior="wrap"):
            with gr.Tab("Draw"), gr.Row(elem_classes="workbench"):
                with gr.Column(scale=5, min_width=300, elem_classes="tools"):
                    picker = class_picker(first, [first_label])
                    with gr.Row(elem_classes="actions"):
                        draw_button = gr.Button("Draw", variant="primary", scale=2, elem_id="draw")
                        stop_button = gr.Button("Stop", scale=2, visible=False, elem_id="stop")
                        surprise_button = gr.Button("Surprise me", scale=1, elem_id="surprise")
                    with gr.Row():
                        per_class = gr.Slider(
                            1, MOST_IMAGES_PER_CLASS, 4, step=1, label="Pictures per class", elem_id="per-class"
                        )
                        with gr.Column(min_width=150):
                            seed = gr.Number(0, label="Seed", precision=0, elem_id="seed")
                            keep = gr.Checkbox(label="The same seed again", container=False, elem_id="keep")
                    with gr.Column(elem_id="recipe"):
                        recipe_file = gr.UploadButton(
                            "Open a picture drawn here, or drop it on the page, to get its settings back",
                            file_types=[".png"],
                            size="sm",
                            elem_id="recipe-file",
                        )
                    with gr.Accordion("Advanced", open=False, elem_id="advanced"):
                        gr.HTML("<p class='hint'>Denoising steps per stage</p>")
                        with gr.Row(elem_classes="per-stage"):
                            steps = [gr.Number(precision=0, min_width=64, **arguments) for arguments in of_steps]
                        gr.HTML(
                            "<p class='hint'>Guidance per stage: how strictly to follow the class; 1 turns it off</p>"
                        )
                        with gr.Row(elem_classes="per-stage"):
                            scales = [gr.Number(step=0.5, min_width=64, **arguments) for arguments in of_scales]
                        if takes_models:
                            with gr.Row():
                                model_box = gr.Textbox(
                                    model, label="Model (folder or Hub repository)", max_length=300, elem_id="model"
                                )
                                load_button = gr.Button("Load", scale=0, min_width=90, size="sm", elem_id="load")
                with gr.Column(scale=6, min_width=300, elem_classes="stage-area"):
                    growing = gr.HTML(empty_canvas(4), elem_id="growing")
                    gallery = gr.Gallery(
                        visible=False,
                        show_label=False,
                        format="png",
                        interactive=False,
                        object_fit="contain",
                        buttons=["download", "download_all", "fullscreen"],
                        elem_id="gallery",
                        columns=2,
                        height="auto",
                    )
                    lines = gr.HTML(message("Pick a class and press Draw."), elem_id="lines")

            with gr.Tab("Upscale", visible=_if_stages(first)) as upscale_tab:
                gr.HTML(
                    "<p class='intro'>Take a small picture of your own, an icon say, and let the higher stages enlarge"
                    " it. Say what it shows and in which style.</p>"
                )
                with gr.Row(elem_classes="workbench"):
                    with gr.Column(scale=5, min_width=300, elem_classes="tools"):
                        own = own_picture(
                            sources=["upload", "clipboard"],
                            show_label=False,
                            height=300,
                            buttons=[],
                            elem_id="own-picture",
                        )
                        label = gr.Dropdown(
                            first.labels, value=first_label, label="What it shows", elem_id="own-class"
                        )
                        size = gr.Radio(_size_choices(first), value=0, label="Start from", elem_id="own-size")
                        own_seed = gr.Number(0, label="Seed", precision=0, elem_id="own-seed")
                        enlarge_button = gr.Button("Enlarge", variant="primary", elem_id="enlarge")
                        own_stop = gr.Button("Stop", visible=False, elem_id="own-stop")
                    with gr.Column(scale=6, min_width=300, elem_classes="stage-area"):
                        own_growing = gr.HTML(empty_canvas(1), elem_id="own-growing")
                        enlarged = gr.Gallery(
                            visible=False,
                            show_label=False,
                            format="png",
                            interactive=False,
                            object_fit="contain",
                            buttons=["download", "fullscreen"],
                            elem_id="enlarged",
                            columns=1,
                            height="auto",
                        )
                        own_lines = gr.HTML(message("Choose a picture and press Enlarge."), elem_id="own-lines")

            with gr.Tab("Stages", visible=_if_stages(first)) as stages_tab:
                gr.HTML(
                    "<p class='intro'>Each stage starts from noise and from the picture of the stage before. Move the"
                    " slider through all steps of your last drawing.</p>"
                )
                viewer = stage_viewer()

            with gr.Tab("How it scans"):
                gr.HTML(
                    "<p class='intro'>A Mamba layer reads its tokens one after another, so a picture needs an order."
                    " Each layer takes one of these eight: together, they reach every token from every side.</p>"
                )
                scans = scan_view(first)

        drawn = [seed, growing, lines, gallery, viewer]
        settings = [picker, per_class, seed, keep, *steps, *scales]

        buttons, own_buttons = [draw_button, stop_button], [enlarge_button, own_stop]

        # One after the other, so that an early error cannot be overtaken by the buttons' change.
        picked = surprise_button.click(studio.surprise, name, [picker, keep], **AT_ONCE)
        drawing_events = []
        for start in (draw_button.click, picked.then):
            event = start(_busy, None, buttons, **AT_ONCE).then(
                studio.draw, [name, *settings], drawn, show_progress_on=[lines], **WATCHED
            )
            for end in (event.success, event.failure):
                end(_idle, None, buttons, **AT_ONCE)
            drawing_events.append(event)
        stop_button.click(None, cancels=drawing_events).then(_stopped, None, [*buttons, lines], **AT_ONCE)
        seed.input(None, None, keep, js="() => true")  # a seed that is typed is meant
        recipe_file.upload(
            studio.apply_recipe,
            [name, recipe_file],
            [*settings, recipe_file],
            api_visibility="private",
            show_progress="hidden",
            concurrency_limit=None,
        )

        own_inputs = [name, own, label, size, own_seed]
        enlarging = enlarge_button.click(_busy, None, own_buttons, **AT_ONCE).then(
            studio.enlarge, own_inputs, [own_growing, own_lines, enlarged], show_progress_on=[own_lines], **WATCHED
        )
        for end in (enlarging.success, enlarging.failure):
            end(_idle, None, own_buttons, **AT_ONCE)
        own_stop.click(None, cancels=[enlarging]).then(_stopped, None, [*own_buttons, own_lines], **AT_ONCE)

        def load(wanted: str) -> list:
            with sentences():
                loaded = studio.models.get(wanted.strip())
            of_steps, of_scales = _stage_inputs(loaded)
            gr.Info(f"Drawing with {loaded.name} from now on.")
            return [
                wanted.strip(),
                head_of(loaded),
                gr.HTML(value=[loaded.labels[0]], **classes_of(loaded)),
                *(gr.Number(**arguments) for arguments in (*of_steps, *of_scales)),
                gr.Dropdown(choices=loaded.labels, value=loaded.labels[0]),
                gr.Radio(choices=_size_choices(loaded), value=0),
                scans_of(loaded),
                *[gr.Tab(visible=_if_stages(loaded))] * 2,
            ]

        if takes_models:
            gr.on(
                [load_button.click, model_box.submit],
                load,
                model_box,
                [name, head, picker, *steps, *scales, label, size, scans, upscale_tab, stages_tab],
                api_visibility="private",
                show_progress_on=[model_box],
            )
        _add_endpoints(studio)

        app.load(None, None, None, js=(STATIC / "page.js").read_text(encoding="utf-8"))
    return app.queue(max_size=MOST_WAITING)


def _add_endpoints(studio: _Studio) -> None:
    """What programs call with gradio_client: the first model, whatever visitors load."""

    def draw(drawing: Drawing) -> Iterator[list[dict[str, Any]]]:
        for record in studio.watch(studio.name, drawing):  # noqa: B007 - its last value is used
            yield []
        with record.files() as files:
            yield [gr.FileData(path=path).model_dump() for path, _ in files]

    def generate(
        class_labels: list[str],
        images_per_class: int = 1,
        seed: int = 0,
        num_inference_steps: list[int] | None = None,
        guidance_scale: list[float] | None = None,
    ) -> Iterator[list[dict[str, Any]]]:
        """Draws pictures of classes; returns the files, each with its recipe.

        Parameters:
            class_labels: Names of classes, or their numbers as text.
            images_per_class: From 1; at most 16 pictures in all.
            seed: Of the first picture; the next has the next number.
            num_inference_steps: A number per stage, or one for all; by default, the model's.
            guidance_scale: A number per stage, or one for all; by default, the model's.
        """
        with sentences():
            model = studio.first
            steps = model.default("num_inference_steps") if num_inference_steps is None else num_inference_steps
            scales = model.default("guidance_scale") if guidance_scale is None else guidance_scale
            drawing = plan_drawing(model, class_labels, images_per_class, seed, steps, scales)
        yield from draw(drawing)

    def upscale(
        image: str | None, class_label: str, size: int | None = None, seed: int = 0
    ) -> Iterator[list[dict[str, Any]]]:
        """Enlarges a picture by the stages above its size; returns the file.

        Parameters:
            image: A picture of your own; with gradio_client, `handle_file(path)`.
            class_label: What it shows: the name of a class, or its number as text.
            size: The stage to start from, by its pixels; by default, the highest that the picture fills.
            seed: Of the noise.
        """
        yield from draw(studio.plan_enlarging(studio.name, image, class_label, size, seed))

    def classes(contains: str = "") -> list[str]:
        """Lists the model's classes, in order of their numbers.

        Parameters:
            contains: Only those that contain this word.
        """
        with sentences():
            if not isinstance(contains, str):
                raise TypeError(f"`contains` has to be text but is {show_name(repr(contains))}. Pass a word, or ''.")
            return names_with(contains, studio.first.labels)

    def stages() -> list[int]:
        """Lists the width in pixels of each stage's pictures."""
        return studio.first.sizes

    # What callers get: Gradio reads types from here, and files' paths are text to its clients.
    for function, returned in ((generate, list[str]), (classes, list[str]), (stages, list[int])):
        function.__annotations__["return"] = returned
    gr.api(generate, api_name="generate", **DRAWING)
    gr.api(classes, api_name="classes", concurrency_limit=None)
    gr.api(stages, api_name="stages", concurrency_limit=None)
    # Not by `gr.api`: it would read any file of this machine that a caller names.
    text, number = {"type": "string"}, {"type": "integer"}
    inputs = [
        own_picture(visible=False, label="Image"),
        *(
            Api(value, schema, label)
            for value, schema, label in (
                (None, text, "Class"),
                (None, {"oneOf": [{"type": "null"}, number]}, "Size"),
                (0, number, "Seed"),
            )
        ),
    ]
    output = Api(None, {"type": "array", "items": text}, "Files")
    gr.Button(visible=False).click(upscale, inputs, output, api_name="upscale", **DRAWING)


def launch_options() -> dict[str, Any]:
    """How the page is launched wherever it is: its looks and limits."""
    return {
        "theme": make_theme(),
        "css": (STATIC / "page.css").read_text(encoding="utf-8"),
        "footer_links": ["api"],
        "max_file_size": "8mb",
        "run_history": False,
        "ssr_mode": False,
        "i18n": gr.I18n(en={"common.complete": "Complete"}),  # Gradio reads it to the blind, but has no text for it
    }


def _check_free(host: str, port: int) -> None:
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"Cannot serve at port {port} of {host}: {reason}. Choose another with --port.") from error


def launch(model: str | None = None, host: str = "127.0.0.1", port: int | None = None, share: bool = False) -> None:
    r"""
    Serves the page until it is interrupted.

    Args:
        model (`str`, *optional*):
            A saved pipeline's folder or Hub repository; by default, the environment's `PISDM_MODEL`, or the checkpoint
            that comes with the package.
        host (`str`, defaults to `"127.0.0.1"`): The address to serve at; `"0.0.0.0"` for all of the machine's.
        port (`int`, *optional*): By default, the first free one from 7860.
        share (`bool`, defaults to `False`): Whether to make a public link through Gradio's servers.

    Raises:
        OSError: The port is taken, or the address is not this machine's.
        ValueError: The model cannot be loaded.
    """
    if port is not None:
        _check_free(host, port)
    is_own = host in OWN_HOSTS and not share and not os.environ.get("SPACE_ID")
    app = build_app(model or os.environ.get("PISDM_MODEL") or CHECKPOINT.name, takes_models=is_own)
    # Gradio's own lines would tell users of the command to set arguments of its function.
    options = {"quiet": True, "prevent_thread_lock": True, **launch_options()}
    _, url, _ = app.launch(server_name=host, server_port=port, share=share, **options)
    print(f"The page is at {url} (Ctrl+C ends it)", flush=True)
    app.block_thread()
