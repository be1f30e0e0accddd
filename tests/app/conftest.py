"""A small model, the page that serves it, and a browser to visit it with."""

from contextlib import contextmanager

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from diffusers_pisdm import PISDMCascadePipeline, PISDMTransformer2DModel


gradio = pytest.importorskip("gradio")
LABELS = ["noto/cat-face", "noto/heart", "twemoji/cat-face", "twemoji/heart", "fxemoji/sun"]


TAKES_DROPS = """(selector) => {
  const dataTransfer = new DataTransfer();
  dataTransfer.items.add(new File([""], "any.png", { type: "image/png" }));
  const over = new DragEvent("dragover", { dataTransfer, bubbles: true, cancelable: true });
  return !document.querySelector(selector).dispatchEvent(over);
}"""


def make_pipe(labels: list[str] = LABELS, num_stages: int = 2, **defaults) -> PISDMCascadePipeline:
    torch.manual_seed(0)
    transformers = [
        PISDMTransformer2DModel(
            sample_size=size,
            patch_size=2,
            in_channels=3,
            num_layers=1,
            hidden_size=16,
            num_classes=len(labels),
            low_res_channels=low,
            residual_scale=scale,
        )
        for size, low, scale in ((8, None, None), (16, 3, 0.2))[:num_stages]
    ]
    for transformer in transformers:  # new models predict nothing
        for parameter in transformer.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    scheduler = DPMSolverMultistepScheduler(algorithm_type="dpmsolver++")
    defaults = {"default_num_inference_steps": [3, 2], "default_guidance_scale": [2.0, 1.0]} | defaults
    return PISDMCascadePipeline.from_stages(transformers, scheduler, id2label=labels, **defaults)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "small"
    make_pipe().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def other_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "other"
    make_pipe(["🐶👩‍🚀🐱", "b"], default_num_inference_steps=[2, 4]).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model(model_folder):
    from diffusers_pisdm.app.models import Models

    return Models().get(str(model_folder))


@contextmanager
def served(folder):
    from diffusers_pisdm.app.page import build_app, launch_options

    app = build_app(str(folder))
    try:
        _, url, _ = app.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, **launch_options())
        yield url
    finally:
        app.close(verbose=False)


@pytest.fixture(scope="session")
def url(model_folder):
    with served(model_folder) as url:
        yield url


@pytest.fixture
def open_page(browser, url):
    """Opens the page as a visitor of its own; what the page's scripts throw fails the test."""
    contexts, errors = [], []

    def open_page(width: int = 1280, height: int = 860):
        context = browser.new_context(viewport={"width": width, "height": height})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)  # a busy machine is slow, not wrong
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(url, wait_until="domcontentloaded")
        page.wait_for_selector(".picker-tile")
        page.wait_for_function(TAKES_DROPS, arg="#head")  # its events are bound
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert errors == []
