"""The page in a real browser."""

import base64
import contextlib
import time
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import TimeoutError as TooLate

from diffusers_pisdm import PISDMTransformer2DModel
from diffusers_pisdm.utils.png_recipe import read_recipe, recipe_chunk
from tests.app.conftest import TAKES_DROPS, make_pipe


DROP = """([selector, name, data]) => {
  const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
  const transfer = new DataTransfer();
  transfer.items.add(new File([bytes], name, { type: "image/png" }));
  const options = { dataTransfer: transfer, bubbles: true, cancelable: true };
  document.querySelector(selector).dispatchEvent(new DragEvent("drop", options));
}"""


def drop(page, path: Path, selector: str = "#head") -> None:
    page.wait_for_function(TAKES_DROPS, arg=selector)  # as a browser asks before it drops
    page.evaluate(DROP, [selector, path.name, base64.b64encode(path.read_bytes()).decode()])


def set_number(page, selector: str, value) -> None:
    page.fill(f"{selector} input[type=number]", str(value))
    page.press(f"{selector} input[type=number]", "Tab")


def chosen(page) -> list[str]:
    return page.locator(".picker-chip span:nth-child(2)").all_inner_texts()


def visible_tiles(page) -> list[str]:
    return page.locator(".picker-tile").evaluate_all("tiles => tiles.map((tile) => tile.dataset.label)")


def draw(page) -> None:
    page.evaluate("document.querySelector('#lines .state').className = 'state'")  # of the drawing before
    page.click("#draw")
    page.wait_for_selector("#lines .state.done")
    page.wait_for_selector("#gallery img")


def save(page, context_url: str, path: Path) -> Path:
    """The file behind the first picture of the gallery."""
    source = page.locator("#gallery img").first.get_attribute("src")
    path.write_bytes(page.request.get(source if source.startswith("http") else context_url + source).body())
    return path


def test_classes_are_found_by_words_style_and_subject(open_page):
    page = open_page()
    assert chosen(page) == ["noto/cat-face"]
    page.fill(".picker-search", "CAT")
    assert visible_tiles(page) == ["noto/cat-face", "twemoji/cat-face"]
    page.click(".picker-style >> text=twemoji")
    assert visible_tiles(page) == ["twemoji/cat-face"]
    page.click(".picker-tile")
    assert chosen(page) == ["noto/cat-face", "twemoji/cat-face"]
    page.fill(".picker-search", "")
    page.click(".picker-style >> text=All styles")
    page.select_option(".picker-subject", "heart")
    assert visible_tiles(page) == ["noto/heart", "twemoji/heart"]
    assert page.locator(".picker-name").all_inner_texts() == ["noto", "twemoji"]  # the subject is the same
    page.fill(".picker-search", "nothing")
    assert "No class" in page.inner_text(".picker-count")


@pytest.fixture
def slow_down(monkeypatch):
    """Makes each pass of a model take some seconds longer."""
    forward = PISDMTransformer2DModel.forward

    def slow_down(seconds: float) -> None:
        def slow_forward(*args, **kwargs):
            time.sleep(seconds)
            return forward(*args, **kwargs)

        monkeypatch.setattr(PISDMTransformer2DModel, "forward", slow_forward)

    return slow_down


def test_pictures_grow_stage_by_stage_and_carry_their_recipe(open_page, url, tmp_path, slow_down):
    slow_down(0.1)  # a page may skip what is replaced at once
    page = open_page()
    set_number(page, "#per-class", 2)
    set_number(page, "#seed", 7)
    page.wait_for_selector("#keep input:checked")  # a typed seed is meant
    page.evaluate("""() => {
      window.seen = [];
      new MutationObserver(() => {
        const shown = document.querySelector("#growing img");
        if (!shown) return;
        const image = new Image();  // stays when the page goes on
        image.src = shown.src;
        image.decode().then(() => window.seen.push(image.naturalWidth));
      }).observe(document.body, { childList: true, subtree: true, attributes: true });
    }""")
    draw(page)
    assert {8, 16} <= set(page.evaluate("window.seen"))
    assert page.locator("#gallery img").count() == 2
    assert page.locator(".stage span").all_inner_texts()[:2] == ["3/3", "2/2"]
    picture = save(page, url, tmp_path / "picture.png")
    recipe = read_recipe(picture)
    assert (recipe["class_label"], recipe["seed"]) == ("noto/cat-face", 7)
    assert (recipe["num_inference_steps"], recipe["guidance_scale"]) == ([3, 2], [2.0, 1.0])
    with Image.open(picture) as image:
        assert image.size == (16, 16)

    page.get_by_role("tab", name="Stages").click()
    assert page.locator(".viewer-slider").get_attribute("max") == "4"  # five steps
    page.locator(".viewer-slider").fill("0")
    assert page.inner_text(".viewer-caption") == "8 × 8 pixels, step 1 of 3"


def test_a_new_seed_each_time_unless_the_same_is_wanted(open_page, url, tmp_path):
    page = open_page()
    set_number(page, "#per-class", 1)
    draws = []
    for same in (False, False, True):
        page.set_checked("#keep input", same)
        draw(page)
        path = save(page, url, tmp_path / f"{len(draws)}.png")
        with Image.open(path) as image:
            draws.append((read_recipe(path)["seed"], image.tobytes()))
    assert draws[0] != draws[1] and draws[1] == draws[2]


def test_a_dropped_picture_sets_the_page(open_page, model, tmp_path):
    page = open_page()
    path = tmp_path / "drawn.png"
    recipe = {
        "model": model.name,
        "class_label": "twemoji/heart",
        "seed": 41,
        "num_inference_steps": [4, 1],
        "guidance_scale": 3.5,
        "noise_level": [0.1],
        "scheduler": "DPMSolverMultistepScheduler",
    }
    Image.new("RGB", (16, 16)).save(path, pnginfo=recipe_chunk(recipe))
    drop(page, path)
    page.wait_for_selector("text=/press draw/i >> visible=true")
    page.wait_for_function("document.querySelector('.picker-chip')?.innerText.includes('twemoji/heart')")
    assert page.input_value("#seed input") == "41"
    assert page.is_checked("#keep input")
    page.click("#advanced button")
    assert page.locator(".per-stage input").evaluate_all("all => all.map((input) => input.value)") == [
        *("4", "1"),
        *("3.5", "3.5"),
    ]


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda path: Image.new("RGB", (9, 9)).save(path), "carries no recipe"),
        (lambda path: path.write_bytes(b"text"), "not a PNG"),
        (
            lambda path: Image.new("RGB", (9, 9)).save(path, pnginfo=recipe_chunk({"class_label": "no", "seed": 1})),
            "not a class",
        ),
    ],
    ids=["no recipe", "no picture", "another model's"],
)
def test_a_wrong_picture_is_refused_in_a_sentence(open_page, tmp_path, make, words):
    page = open_page()
    make(tmp_path / "wrong.png")
    drop(page, tmp_path / "wrong.png")
    page.wait_for_selector(f".toast-body >> text=/{words}/i")
    assert chosen(page) == ["noto/cat-face"]
    draw(page)  # the page goes on


def test_nothing_chosen_is_a_sentence_and_the_page_goes_on(open_page):
    page = open_page()
    page.click(".picker-chip")
    page.click("#draw")
    page.wait_for_selector(".toast-body >> text=/Pick at least one/")
    page.wait_for_selector("#draw", state="visible")
    page.click(".picker-tile >> nth=1")
    draw(page)


def test_stop_ends_a_drawing_and_frees_the_worker(open_page, slow_down, real_image_files):
    slow_down(0.05)  # the drawing would take 10 seconds
    page = open_page()
    page.click("#advanced button")
    for stage in (0, 1):
        page.fill(f".per-stage input >> nth={stage}", "100")
    set_number(page, "#per-class", 8)
    page.click("#draw")
    page.wait_for_selector("#growing img")
    waiting = open_page()
    waiting.click("#draw")
    waiting.wait_for_selector("#lines .progress-text >> text=/queue: 1.1/")
    waiting.get_by_role("tab", name="Upscale").click()
    waiting.set_input_files("#own-picture input[type=file]", real_image_files[0])
    waiting.wait_for_selector("#own-picture img")
    waiting.click("#enlarge")
    waiting.wait_for_selector("#own-lines .progress-text >> text=/queue: 2.2/")
    assert waiting.evaluate("document.querySelector('#own-lines .minimal').clientHeight") > 9  # it has room
    page.click("#stop")
    page.wait_for_selector("#lines >> text=Stopped")
    page.wait_for_timeout(500)  # what Gradio tells of it comes later
    assert page.inner_text("#lines").strip() == "Stopped."
    assert page.locator("#gallery img").count() == 0
    for stage in (0, 1):
        page.fill(f".per-stage input >> nth={stage}", "1")
    draw(page)


def test_two_visitors_at_once_get_their_own(open_page, url, tmp_path):
    pages = [open_page(), open_page()]
    for page, tile, seed in zip(pages, (1, 3), (5, 6)):
        page.click(".picker-chip")
        page.click(f".picker-tile >> nth={tile}")
        set_number(page, "#seed", seed)
    for page in pages:
        page.click("#draw")
    recipes = []
    for page in pages:
        page.wait_for_selector("#gallery img")
        recipes.append(read_recipe(save(page, url, tmp_path / "picture.png")))
    assert [(recipe["class_label"], recipe["seed"]) for recipe in recipes] == [("noto/heart", 5), ("twemoji/heart", 6)]
    read_aloud = "[...document.querySelectorAll('[aria-live]')].some((part) => part.textContent === 'Complete')"
    pages[0].wait_for_function(read_aloud)


def test_a_surprise_chooses_and_draws(open_page):
    page = open_page()
    page.click("#surprise")
    page.wait_for_selector("#gallery img")
    assert len(chosen(page)) == 1


def test_a_picture_of_ones_own_is_enlarged(open_page, real_image_files, tmp_path):
    page = open_page()
    page.get_by_role("tab", name="Upscale").click()
    page.click("#enlarge")
    page.wait_for_selector(".toast-body >> text=/no picture/")
    (tmp_path / "text.png").write_text("text")
    page.set_input_files("#own-picture input[type=file]", tmp_path / "text.png")
    page.wait_for_selector("#own-picture img", state="attached")
    page.click("#enlarge")
    page.wait_for_selector(".toast-body >> text=/not a picture/")
    page.click("#own-picture [aria-label='Remove Image']")
    page.set_input_files("#own-picture input[type=file]", real_image_files[0])
    page.wait_for_selector("#own-picture img")
    page.click("#enlarge")
    page.wait_for_selector("#enlarged img")
    assert page.locator("#enlarged img").first.evaluate("image => image.naturalWidth") == 16
    page.click("#own-picture [aria-label='Remove Image']")
    page.click("#enlarge")
    page.wait_for_selector("#own-lines >> text=Nothing new")
    page.wait_for_selector("#enlarged img", state="hidden")  # it would seem to be of the new picture


def test_another_model_changes_the_page(open_page, other_folder, tmp_path):
    page = open_page()
    page.click("#advanced button")
    told = page.locator(".toast-body", has_text="no folder no/such folder")
    for _ in range(12):  # what is typed while the page still starts may be lost
        page.fill("#model input, #model textarea", "no/such folder")
        page.click("#load")
        with contextlib.suppress(TooLate):
            told.first.wait_for(timeout=5_000)
            break
    else:
        pytest.fail("the page does not say that there is no such model")
    page.fill("#model input, #model textarea", str(other_folder))
    page.click("#load")
    page.wait_for_function("document.querySelectorAll('.picker-tile').length === 2")
    assert visible_tiles(page) == ["🐶👩‍🚀🐱", "b"]
    assert page.locator(".picker-tile .picker-picture").all_inner_texts() == ["🐶👩‍🚀", "b"]
    assert page.input_value(".per-stage input >> nth=1") == "4"
    assert "stage by stage: 8 → 16" in page.inner_text("#head")
    draw(page)
    make_pipe(num_stages=1, default_num_inference_steps=2, default_guidance_scale=1.0).save_pretrained(
        tmp_path / "one"
    )
    page.fill("#model input, #model textarea", str(tmp_path / "one"))
    page.click("#load")
    page.wait_for_selector("#head >> text=/Mamba: 8 pixels/")
    page.get_by_role("tab", name="Stages").wait_for(state="hidden")  # what is left of it without stages
    assert page.get_by_role("tab").all_inner_texts() == ["Draw", "How it scans"]
    draw(page)
    page.fill("#model input, #model textarea", str(other_folder))
    page.click("#load")
    page.get_by_role("tab", name="Stages").wait_for()


@pytest.mark.parametrize("width", [320, 390])
def test_a_phone_shows_everything_in_its_width(open_page, width):
    page = open_page(width, 844)
    page.locator(".picker-name").first.evaluate("name => { name.textContent = 'animal-mammal-marine-hairless'; }")
    fits = page.locator(".picker-name").first.evaluate("name => name.scrollWidth <= name.clientWidth")
    assert fits  # cut off, neighbours would look alike
    for name in ("Draw", "Upscale", "Stages", "How it scans"):
        page.get_by_role("tab", name=name).click()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.wait_for_selector(".scan-head")
    assert page.locator(".scan").count() == 8


def test_scans_walk_the_paths_of_the_model(open_page):
    page = open_page()
    page.get_by_role("tab", name="How it scans").click()
    page.locator(".scans-slider").fill("10")
    first = "() => document.querySelector('.scan-line').getAttribute('points').split(' ')"
    points = page.evaluate(first)
    assert (points[0], points[7:]) == ("0.5,0.5", ["7.5,0.5", "0.5,1.5", "1.5,1.5"])
    page.check(".scans-snake")
    assert page.evaluate(first)[7:] == ["7.5,0.5", "7.5,1.5", "6.5,1.5"]


def test_thumbnails_come_from_the_models_folder(browser, model_folder, tmp_path):
    import shutil

    from diffusers_pisdm.app import class_sheet
    from tests.app.conftest import served

    folder = tmp_path / "with sheet"
    shutil.copytree(model_folder, folder)
    class_sheet.main(["--model", str(folder), "--num_inference_steps", "1"])
    assert class_sheet.find_sheet(str(folder), 6) == class_sheet.find_sheet(str(folder), 5)  # the same rows
    assert class_sheet.find_sheet(str(folder), 33) is None
    with served(folder) as url:
        page = browser.new_page()
        page.goto(url, wait_until="domcontentloaded")
        style = page.locator(".picker-tile .picker-picture").nth(1).evaluate("node => node.style.backgroundImage")
        body = page.request.get(f"{url}{style.split(chr(34))[1]}").body()
        page.close()
    with Image.open(BytesIO(body)) as sheet:
        assert sheet.size == (32 * 64, 64)
