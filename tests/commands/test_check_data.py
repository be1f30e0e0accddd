import re
import shutil

import pytest
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image

from diffusers_pisdm.commands import check_data
from tests.data.image_folders import copy_folder, damaged_images


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture
def images(real_image_files, tmp_path):
    chosen = [file for file in real_image_files if file.parent.name in ("animal-mammal", "heart")]
    return copy_folder(chosen, tmp_path / "my images")


def count(images, name):
    return len(list((images / name).iterdir()))


def test_good_images_are_counted_and_a_recipe_is_the_next_step(images, capsys):
    check_data.main([str(images), "--size", "64"])
    out = capsys.readouterr().out
    mammals, hearts = count(images, "animal-mammal"), count(images, "heart")
    assert f"my images, split train: {mammals + hearts} images of 2 classes\n" in out
    for name, number in (("animal-mammal", mammals), ("heart", hearts)):
        assert re.search(rf"^  {name} +{number}{'  few' if number < 10 else ''}$", out, re.MULTILINE)
    assert "Shorter side: 64 px, median 64" in out
    assert "Smaller" not in out and "Unreadable" not in out and "Duplicates" not in out
    assert re.search(r"^Next: .*published checkpoint.*docs/training.md", out, re.MULTILINE)
    assert re.search(rf"^  pisdm new-recipe --train_data_dir '{images}' --size 64", out, re.MULTILINE)


def test_what_is_wrong_is_named_by_path_and_ends_with_1(images, capsys):
    first, second, *_ = sorted((images / "heart").iterdir())
    with Image.open(first) as image:
        image.save(images / "heart" / "again.bmp")  # other bytes, the same pixels
        image.resize((20, 40)).save(images / "heart" / "small.png")
    (images / "heart" / "torn.png").write_bytes(damaged_images(second.read_bytes())["truncated"])
    (images / "stray.png").write_bytes(first.read_bytes())
    (images / "heart" / "drawing.svg").write_text("<svg/>")
    (images / "heart" / "notes.txt").write_text("mine")
    (images / "hollow").mkdir()
    (images / "single").mkdir()
    Image.new("RGB", (64, 64), "red").save(images / "single" / "red.png")
    with pytest.raises(SystemExit) as end:
        check_data.main([str(images), "--size", "32"])
    out = capsys.readouterr().out
    assert end.value.code == 1
    assert re.search(r"^Unreadable: 1 image\n.*heart/torn\.png\): image file is truncated", out, re.MULTILINE)
    assert re.search(
        rf"^Duplicates.*: 1\n.*heart/again\.bmp\) = .*heart/{re.escape(first.name)}\)$", out, re.MULTILINE
    )
    assert re.search(r"^Smaller than 32 px.*: 1\n.*heart/small\.png", out, re.MULTILINE)
    assert re.search(r"^Longer than 1\.5:1.*: 1\n.*heart/small\.png", out, re.MULTILINE)
    assert re.search(r"^Left out: not in a class folder: 1\n  stray\.png$", out, re.MULTILINE)
    assert re.search(r"^Left out: class folders without images: 1\n  hollow$", out, re.MULTILINE)
    assert re.search(r"formats that we do not read: 1\n  heart/drawing\.svg$", out, re.MULTILINE)
    assert re.search(r"^Left out: not images: 1\n  heart/notes\.txt$", out, re.MULTILINE)
    assert re.search(r"^  single +1  few$", out, re.MULTILINE)
    assert re.search(r"^Next: fix or remove 1 unreadable image$", out, re.MULTILINE)


@pytest.mark.parametrize("stray", ["heart/deep/1.png", "heart/1.heic"])
def test_what_was_left_out_is_listed_before_a_refusal(images, stray, capsys):
    file, *_ = (images / "animal-mammal").iterdir()
    shutil.rmtree(images / "heart")
    (images / stray).parent.mkdir(parents=True)
    shutil.copy(file, images / stray)
    with pytest.raises(SystemExit, match=rf"in one folder, animal-mammal, .*{stray}"):
        check_data.main([str(images)])
    assert re.search(rf"^Left out: .*: 1\n  {stray}$", capsys.readouterr().out, re.MULTILINE)


def test_a_class_of_a_data_set_may_have_no_images(real_image_files, tmp_path, capsys):
    features = Features({"picture": ImageFeature(), "kind": ClassLabel(names=["a", "never", "b"])})
    rows = [{"picture": str(file), "kind": 2 * (i % 2)} for i, file in enumerate(real_image_files[:20])]
    (tmp_path / "set").mkdir()
    Dataset.from_list(rows, features).to_parquet(tmp_path / "set" / "validation.parquet")
    columns = ["--image_column", "picture", "--label_column", "kind", "--split", "validation"]
    check_data.main(["--train_data_dir", str(tmp_path / "set"), *columns])
    out = capsys.readouterr().out
    assert re.search(r"^  a +10\n  never +0  none\n  b +10$", out, re.MULTILINE)
    assert "--image_column picture --label_column kind --split validation --size 32" in out


def test_the_sheet_has_a_row_for_each_class(images, tmp_path, capsys):
    check_data.main([str(images), "--output", str(tmp_path / "sheet.png")])
    with Image.open(tmp_path / "sheet.png") as sheet:
        cell = check_data.SHEET_CELL_SIZE
        assert sheet.width // cell == check_data.SHEET_COLUMNS
        assert sheet.height // cell == 2
        rows = [sheet.crop((0, top, sheet.width, top + cell)) for top in (6, sheet.height - cell - 20)]
    assert all(len(row.convert("L").getcolors()) > 20 for row in rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "either a folder or --dataset_name"),
        (["a", "--train_data_dir", "b"], "either a folder or --dataset_name"),
        (["a", "--output", "sheet.doc"], "no picture's name"),
    ],
)
def test_wrong_usage_is_told(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        check_data.main(arguments)
    assert re.search(message, capsys.readouterr().err)


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(SystemExit, match="error: There is no folder"):
        check_data.main([str(tmp_path / "nothing" / "here")])
