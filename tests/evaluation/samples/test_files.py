import shutil

import pytest
from PIL import Image

from diffusers_pisdm.evaluation.samples.files import check_no_foreign_images, find_damaged, sample_path


@pytest.fixture
def folder(tmp_path, real_image_files):
    """Samples 0 to 4 of a set: real pictures."""
    for index, file in enumerate(real_image_files[:5]):
        path = sample_path(tmp_path, index)
        path.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, path)
    return tmp_path


def test_a_thousand_images_a_folder(tmp_path):
    places = {0: "000/000000.png", 999: "000/000999.png", 1000: "001/001000.png", 1_234_567: "1234/1234567.png"}
    for index, place in places.items():
        assert sample_path(tmp_path, index) == tmp_path / place


def damage_of(kind, content):
    middle = len(content) // 2
    return {
        "empty": b"",
        "cut in its header": content[:20],
        "cut": content[:middle],
        "cut before its end": content[:-12],
        "one byte changed": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
        "zeros": bytes(len(content)),
        "text": b"no picture",
    }[kind]


@pytest.mark.parametrize(
    "kind", ["empty", "cut in its header", "cut", "cut before its end", "one byte changed", "zeros", "text"]
)
def test_absent_and_damaged_samples_are_found(folder, kind):
    path = sample_path(folder, 2)
    path.write_bytes(damage_of(kind, path.read_bytes()))
    sample_path(folder, 4).unlink()
    assert find_damaged(folder, range(6)) == ([2, 4, 5], (64, 64))
    assert find_damaged(folder, [0, 1]) == ([], (64, 64))
    assert find_damaged(folder, [5]) == ([5], None)


def test_images_of_two_sizes_are_told(folder):
    path = sample_path(folder, 3)
    Image.new("RGB", (64, 32)).save(path)
    with pytest.raises(ValueError, match=f"differ in size: .*000000.png has 64x64 pixels, {path} has 64x32"):
        find_damaged(folder, range(5))


def test_foreign_images_are_told(folder):
    check_no_foreign_images(folder, 5)
    (folder / "notes.txt").touch()
    check_no_foreign_images(folder, 5)
    with pytest.raises(ValueError, match=r"not among its 4 samples: .*000004.png\. Move"):
        check_no_foreign_images(folder, 4)
    (folder / "deeper").mkdir()
    for name in ("deeper/a.PNG", "b.png", "c.png", "d.png"):
        (folder / name).touch()
    with pytest.raises(ValueError, match=r"b.png, .*c.png, .*d.png and 1 more"):
        check_no_foreign_images(folder, 5)
