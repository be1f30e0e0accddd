import functools
import os
import re
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_pisdm.data.image_transform import ImageTransform, decode_image
from diffusers_pisdm.evaluation import DatasetImages, FolderImages, ImageSourceError, ListImages, NpzImages
from tests.data.image_folders import copy_folder, damaged_images, load, write_parquet


def crop_to(size):
    return functools.partial(ImageTransform(size), random=None)


def pixels_of(source, batch_size=5):
    return torch.cat(list(source.batches(batch_size)))


@pytest.fixture(scope="module")
def pictures(real_images):
    return ((real_images[:12] + 1) * 127.5).round().byte()  # (12, 3, 64, 64)


@pytest.fixture
def folder(real_image_files, tmp_path):
    return copy_folder(real_image_files[:12], tmp_path / "images")


def save_npz(path, pictures, save=np.savez):
    save(path, pictures.permute(0, 2, 3, 1).numpy())  # named arr_0
    return path


def test_batches_of_all_images_in_order(pictures):
    batches = list(ListImages(pictures).batches(5))
    assert [len(batch) for batch in batches] == [5, 5, 2]
    assert batches[0].dtype == torch.uint8 and torch.equal(torch.cat(batches), pictures)


def test_the_same_images_from_everywhere(folder, pictures, real_image_files, tmp_path):
    dataset = load(
        write_parquet(real_image_files[:12], tmp_path / "parquet"),
        tmp_path / "cache",
        image_column="picture",
        label_column="kind",
    )
    sources = {
        "folder": FolderImages(folder, decode_image),
        "npz": NpzImages(save_npz(tmp_path / "images.npz", pictures)),
        "compressed npz": NpzImages(save_npz(tmp_path / "small.npz", pictures, np.savez_compressed)),
        "data set": DatasetImages("emoji", dataset, decode_image),
        "Pillow": ListImages([Image.fromarray(x.permute(1, 2, 0).numpy()) for x in pictures]),
    }
    for source in sources.values():
        assert len(source) == 12
    wanted = pixels_of(sources["Pillow"])
    for name in ("npz", "compressed npz"):
        assert torch.equal(pixels_of(sources[name]), wanted)
    # Pictures with transparency: the fixture drops it, what training does is to lay them on white.
    on_white = torch.stack([crop_to(64)(decode_image(file.read_bytes())) for file in real_image_files[:12]])
    for name in ("folder", "data set"):
        assert torch.equal(pixels_of(sources[name]), on_white)
    for source in sources.values():
        chosen = torch.cat(list(source.batches(2, [1, 4, 5, 11])))
        assert torch.equal(chosen, pixels_of(source)[[1, 4, 5, 11]])


def test_images_are_brought_to_one_size_as_in_training(folder, pictures, tmp_path, real_image_files):
    Image.new("RGB", (200, 90), "red").save(folder / "wide.jpg")
    source = FolderImages(folder, decode_image, crop_to(32))
    found = pixels_of(source)
    assert found.shape == (13, 3, 32, 32)
    wanted = ImageTransform(32)(decode_image(real_image_files[0].read_bytes()), np.random.default_rng(0))
    assert torch.equal(found[0], wanted)
    for other in (NpzImages(save_npz(tmp_path / "a.npz", pictures), crop_to(16)), ListImages(pictures, crop_to(16))):
        assert pixels_of(other).shape == (12, 3, 16, 16)


def test_images_of_different_sizes_are_named(folder):
    Image.new("RGB", (200, 90)).save(folder / "wide.jpg")
    with pytest.raises(ImageSourceError, match=r"wide.jpg has 200x90 pixels, .*\.png has 64x64\. .*image size"):
        pixels_of(FolderImages(folder, decode_image))


def test_folders_are_read_sorted_and_through(tmp_path):
    colours = {"b/2.png": 1, "a/z.png": 0, "b/10.webp": None, "c.bmp": 3, "b/1/x.gif": None}
    for name, value in colours.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (value or 0, 0, 0)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / ".hidden").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / ".hidden" / "x.png")
    (tmp_path / "b" / ".unfinished.png").write_bytes(b"")
    source = FolderImages(tmp_path, decode_image)
    assert [str(file) for file in source.files] == ["a/z.png", "b/1/x.gif", "b/10.webp", "b/2.png", "c.bmp"]
    assert pixels_of(source)[:, 0, 0, 0].tolist() == [0, 0, 0, 1, 3]


@pytest.mark.parametrize("kind", ["pipe", "folder", "dangling link"])
def test_what_only_looks_like_an_image_is_named_and_never_opened(folder, kind):
    file = folder / "x\n.png"
    {"pipe": os.mkfifo, "folder": os.mkdir, "dangling link": lambda path: os.symlink("nothing", path)}[kind](file)
    with pytest.raises(ImageSourceError, match=r"dangling links, pipes .*: x\\n\.png\. Remove"):
        FolderImages(folder, decode_image)


def test_links_are_followed_and_what_is_left_out_is_named(folder, tmp_path, caplog):
    links = tmp_path / "links"
    links.mkdir()
    for path in folder.iterdir():
        (links / path.name).symlink_to(path)
    (links / "up").symlink_to(links)
    (links / ".a.png").touch()
    (links / "a.eps").touch()
    assert [links / file for file in FolderImages(links, decode_image).files] == sorted(links.glob("[!u]*/*"))
    assert "hidden: 1 (.a.png); of formats that we do not read: 1 (a.eps)" in caplog.text


@pytest.mark.parametrize("kind", ["truncated", "empty", "text"])
def test_a_damaged_image_is_named(folder, kind):
    file = sorted(folder.glob("*/*.png"))[7]
    file.write_bytes(damaged_images(file.read_bytes())[kind])
    with pytest.raises(ImageSourceError, match=rf"Cannot read the image of .*{file.name}: .{{10,}}"):
        pixels_of(FolderImages(folder, decode_image))


def test_a_damaged_row_is_named(real_image_files, tmp_path):
    copy = copy_folder(real_image_files[:12], tmp_path / "copy")
    sorted(copy.glob("*/*.png"))[3].write_bytes(b"no image")
    data = load(copy, tmp_path / "cache")
    with pytest.raises(ImageSourceError, match=r"Cannot read the image of row 3 \(.*\.png\) of emoji"):
        pixels_of(DatasetImages("emoji", data, decode_image))


def test_nothing_to_read(tmp_path):
    with pytest.raises(ImageSourceError, match="There is no folder"):
        FolderImages(tmp_path / "nowhere", decode_image)
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(ImageSourceError, match="There are no images in"):
        FolderImages(tmp_path, decode_image)
    with pytest.raises(ImageSourceError, match="There are no images in memory"):
        ListImages([])
    with pytest.raises(ImageSourceError, match=re.escape("with N of at least 1, but is uint8 of shape (0, 4, 4, 3)")):
        NpzImages(save_npz(tmp_path / "none.npz", torch.zeros(0, 3, 4, 4, dtype=torch.uint8)))


def test_images_of_another_kind():
    with pytest.raises(ImageSourceError, match="mode RGB, got L, RGBA: convert"):
        ListImages([Image.new("L", (2, 2)), Image.new("RGBA", (2, 2)), Image.new("RGB", (2, 2))])
    with pytest.raises(ImageSourceError, match=r"got torch.float32 of shape \(1, 3, 2, 2\)"):
        ListImages(torch.zeros(1, 3, 2, 2))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": np.zeros((2, 4, 4, 3), np.uint8)}, "no image array `arr_0`"),
        ({"arr_0": np.zeros((2, 4, 4, 3), np.float32)}, "but is float32 of shape (2, 4, 4, 3)"),
        ({"arr_0": np.zeros((2, 3, 4, 4), np.uint8)}, "but is uint8 of shape (2, 3, 4, 4)"),
        ({"arr_0": np.zeros((2, 4, 4, 3), np.uint8, order="F")}, "(2, 4, 4, 3) in Fortran order"),
        ({"arr_0": np.array([{"a": 1}], dtype=object)}, "but is object"),
    ],
)
def test_files_of_other_arrays(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ImageSourceError, match=re.escape(message)):
        NpzImages(tmp_path / "a.npz")


def test_files_that_are_no_archives_or_damaged(tmp_path, pictures):
    with pytest.raises(ImageSourceError, match=r"missing.npz cannot be read"):
        NpzImages(tmp_path / "missing.npz")
    (tmp_path / "a.npz").write_bytes(b"no archive")
    with pytest.raises(ImageSourceError, match=r"a.npz cannot be read"):
        NpzImages(tmp_path / "a.npz")

    for save in (np.savez, np.savez_compressed):
        path = save_npz(tmp_path / "images.npz", pictures, save)
        content = bytearray(path.read_bytes())
        with zipfile.ZipFile(path) as archive:
            place = archive.getinfo("arr_0.npy").compress_size // 2
        content[place : place + 4] = bytes(byte ^ 0xFF for byte in content[place : place + 4])
        path.write_bytes(content)
        with pytest.raises(ImageSourceError, match=r"Cannot read image \d+ of .*images.npz: .*damaged"):
            pixels_of(NpzImages(path))


def test_a_large_file_is_not_read_into_memory(tmp_path):
    """Files of 15 MB, read with a tenth of it, stored and compressed."""
    pictures = torch.arange(300, dtype=torch.int32).remainder(251).byte().view(-1, 1, 1, 1).expand(300, 3, 128, 128)
    for save in (np.savez, np.savez_compressed):
        source = NpzImages(save_npz(tmp_path / "images.npz", pictures, save))
        tracemalloc.start()
        try:
            for start, batch in enumerate(source.batches(10)):
                assert batch[0, 0, 0, 0] == start * 10 % 251
            assert tracemalloc.get_traced_memory()[1] < 1_500_000
        finally:
            tracemalloc.stop()
