import pytest
from PIL import Image

from diffusers_pisdm.training.sample_sheets import MAX_ROWS, forget_later_sheets, save_sample_sheets
from diffusers_pisdm.utils.image_grid import make_image_grid


@pytest.fixture
def images(real_image_files):
    return [Image.open(file).convert("RGB").resize((16, 16)) for file in real_image_files[:10]]


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))


def test_a_grid_a_strip_and_a_row_over_time(tmp_path, images):
    labels = [str(i) for i in range(10)]
    grid = save_sample_sheets(tmp_path, 5, images, labels)
    first = Image.open(tmp_path / "over_time.png").size
    save_sample_sheets(tmp_path, 10, images, labels)
    second = Image.open(tmp_path / "over_time.png").size
    assert grid == tmp_path / "step-0000005.png"
    assert names(tmp_path) == [
        "over_time.png",
        "step-0000005.png",
        "step-0000010.png",
        "strips/step-0000005.png",
        "strips/step-0000010.png",
    ]
    assert second[0] == first[0] and second[1] > 1.5 * first[1]
    strip = Image.open(tmp_path / "strips" / "step-0000005.png")
    assert strip.size == (8 * 16, 16)
    assert strip.crop((16, 0, 32, 16)).tobytes() == images[1].tobytes()


def test_the_sheet_over_time_names_steps_and_classes(tmp_path, images):
    rows = {5: images[:2], 10: images[2:4]}
    for step, drawn in rows.items():
        save_sample_sheets(tmp_path, step, drawn, ["cat", "dog"])
    empty = Image.new("RGB", (16, 16), "white")
    labels = ["step 5", "cat", "dog", "step 10", "cat", "dog"]
    expected = make_image_grid([empty, *rows[5], empty, *rows[10]], labels, columns=3)
    assert Image.open(tmp_path / "over_time.png").tobytes() == expected.tobytes()


def test_a_long_run_keeps_a_sheet_of_bounded_height(tmp_path, images):
    for step in range(MAX_ROWS + 3):
        save_sample_sheets(tmp_path, step, images[:2], ["a", "b"])
        if step == MAX_ROWS - 1:
            full = Image.open(tmp_path / "over_time.png").size
    assert Image.open(tmp_path / "over_time.png").size == full


def test_pictures_of_steps_that_will_be_made_again_go(tmp_path, images):
    for step in (4, 8, 12):
        save_sample_sheets(tmp_path, step, images[:1], ["a"])
    forget_later_sheets(tmp_path, 8)
    assert names(tmp_path) == [
        "over_time.png",
        *(f"{folder}step-000000{step}.png" for folder in ("", "strips/") for step in (4, 8)),
    ]
    forget_later_sheets(tmp_path / "nowhere", 8)
