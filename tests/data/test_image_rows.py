import os
import pickle
from functools import partial

import pytest
import torch
from datasets import Dataset, Image

from diffusers_pisdm.data import image_rows
from diffusers_pisdm.data.batches import read_rows
from diffusers_pisdm.data.image_rows import ImageRows
from diffusers_pisdm.data.image_transform import ImageTransform
from diffusers_pisdm.data.parallel_read import read_batches
from diffusers_pisdm.data.rows import BadImageError, DataError
from diffusers_pisdm.data.stream_batches import stream_once
from tests.data.image_folders import copy_folder, damaged_images, load, write_parquet


@pytest.fixture
def folder(real_image_files, tmp_path):
    return copy_folder(real_image_files[::4], tmp_path / "images")


def damage(folder, index, kind):
    file = sorted(folder.glob("*/*.png"))[index]
    file.write_bytes(damaged_images(file.read_bytes())[kind])
    return file


def make_rows(folder, tmp_path, on_bad_image="stop", **transform):
    return ImageRows(load(folder, tmp_path / "cache"), ImageTransform(16, **transform), on_bad_image)


def test_pixels_follow_from_seed_epoch_and_row(folder, tmp_path):
    rows = make_rows(folder, tmp_path, random_crop=True, random_flip=True)
    first = rows.read(3, epoch=1, seed=2).images
    assert torch.equal(rows.read(3, epoch=1, seed=2).images, first)
    for epoch, seed in ((0, 2), (1, 3)):
        assert not torch.equal(rows.read(3, epoch, seed).images, first)


@pytest.mark.parametrize("kind", ["truncated", "empty", "text", "bomb", "strip"])
def test_a_damaged_image_stops_the_run_or_is_replaced_by_the_next(folder, tmp_path, kind):
    file = damage(folder, 4, kind)
    with pytest.raises(BadImageError, match=f"row 4 .*{file.name}.*--on_bad_image skip") as raised:
        make_rows(folder, tmp_path).read(4, 0, 0)
    assert len(str(raised.value).split(": ", 1)[1]) > 10  # a reason

    rows = make_rows(folder, tmp_path, "skip")
    replaced, following = rows.read(4, 0, 0), rows.read(5, 0, 0)
    assert torch.equal(replaced.images, following.images) and replaced.label == following.label
    assert len(replaced.bad_images) == 1 and str(file) in replaced.bad_images[0]
    assert following.bad_images == []


def test_the_first_row_follows_the_last(folder, tmp_path):
    for index in (10, 11):
        damage(folder, index, "empty")
    rows = make_rows(folder, tmp_path, "skip")
    replaced = rows.read(10, 0, 0)
    assert torch.equal(replaced.images, rows.read(0, 0, 0).images)
    assert len(replaced.bad_images) == 2


def test_a_missing_file_is_a_bad_image(folder, tmp_path):
    rows = make_rows(folder, tmp_path)
    sorted(folder.glob("*/*.png"))[2].unlink()
    with pytest.raises(BadImageError, match="No such file"):
        rows.read(2, 0, 0)


@pytest.mark.parametrize("kind", ["pipe", "folder", "dangling link"])
def test_what_is_no_file_any_more_is_never_opened(folder, tmp_path, kind):
    """To open a pipe would hang."""
    rows = make_rows(folder, tmp_path, "skip")
    file = sorted(folder.glob("*/*.png"))[2]
    file.unlink()
    {"pipe": os.mkfifo, "folder": os.mkdir, "dangling link": lambda path: os.symlink("nothing", path)}[kind](file)
    (told,) = rows.read(2, 0, 0).bad_images
    assert str(file) in told and ("No such file" if kind == "dangling link" else "not a file") in told


@pytest.mark.parametrize("kind", ["text", "empty", "truncated"])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_bad_image_is_one_line_with_its_path(folder, tmp_path, kind, streaming):
    file = damage(folder, 4, kind)
    file = file.rename(file.with_name("a\nb\u2028\x1b[3m\x85é.png"))
    data = load(folder, tmp_path / "cache", streaming=streaming)
    rows = ImageRows(data, ImageTransform(16), "skip")
    if streaming:
        told = [bad for batch in stream_once(rows, 5, 1, 0, 0) for bad in batch.bad_images]
    else:
        told = [bad for row in range(len(rows)) for bad in rows.read(row, 0, 0).bad_images]
    assert len(told) == 1 and told[0].isprintable()
    assert f"{file.parent}/a\\nb\\u2028\\x1b[3m\\x85é.png" in told[0] and "BytesIO" not in told[0]


def test_a_row_without_an_image_is_a_bad_image(real_image_files, tmp_path):
    data = load(
        write_parquet(real_image_files[:2], tmp_path / "p"),
        tmp_path / "cache",
        image_column="picture",
        label_column="kind",
    )
    rows = ImageRows(data, ImageTransform(16))
    with pytest.raises(BadImageError, match="row 7: the row holds no image"):
        rows.decode({"picture": None, "kind": "animal-mammal"}, 7, 0, 0)


def test_nothing_but_bad_images_is_an_error(folder, tmp_path, monkeypatch):
    for index in range(12):
        damage(folder, index, "text")
    rows = make_rows(folder, tmp_path, "skip")
    with pytest.raises(BadImageError, match="None of 12 images in a row"):
        rows.read(5, 0, 0)
    monkeypatch.setattr(image_rows, "MAX_BAD_IN_A_ROW", 3)
    with pytest.raises(BadImageError, match="None of 3 images in a row"):
        rows.read(5, 0, 0)


def test_what_to_do_about_bad_images_must_be_known(folder, tmp_path):
    with pytest.raises(ValueError, match="stop, skip, got ignore"):
        make_rows(folder, tmp_path, "ignore")


def test_only_images_that_may_be_are_mirrored(folder, tmp_path):
    files = sorted(folder.glob("*/*.png"))
    rows = [
        {"image": {"bytes": file.read_bytes(), "path": None}, "label": file.parent.name, "free": i % 2 == 0}
        for i, file in enumerate(files)
    ]
    Dataset.from_list(rows).cast_column("image", Image()).to_parquet(tmp_path / "data" / "train.parquet")
    data = load(tmp_path / "data", tmp_path / "cache", flip_column="free")
    plain = ImageRows(data, ImageTransform(16))
    mirrored = ImageRows(data, ImageTransform(16, random_flip=True))
    flipped = set()
    for epoch in range(8):
        for i in range(len(files)):
            image, original = mirrored.read(i, epoch, 0).images, plain.read(i, epoch, 0).images
            if not torch.equal(image, original):
                assert torch.equal(image, original.flip(-1))
                flipped.add(i)
    assert flipped == set(range(0, len(files), 2))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_kept_images_are_decoded_once_and_the_same(folder, tmp_path, num_workers):
    data, transform = load(folder, tmp_path / "cache"), ImageTransform(16, random_flip=True)
    size_gib = len(data.dataset) * 3 * 16**2 / 2**30
    kept, plain = ImageRows(data, transform, keep_gib=size_gib), ImageRows(data, transform, keep_gib=0.999 * size_gib)
    assert plain.kept is None
    wanted = {(row, epoch): plain.read(row, epoch, 5) for row in range(len(plain)) for epoch in range(6)}

    def read(epoch):
        keys = [[(row, epoch)] for row in range(len(kept))]
        return list(read_batches(partial(read_rows, kept, 5), keys, num_workers))

    for epoch in range(6):
        for row, batch in enumerate(read(epoch)):  # each time with other workers
            assert torch.equal(batch.images[0], wanted[row, epoch].images)
            assert batch.labels.tolist() == [wanted[row, epoch].label]
        if epoch == 0:
            for file in folder.glob("*/*.png"):
                file.unlink()
    assert len({batch.images.numpy().tobytes() for epoch in range(6) for batch in read(epoch)[:1]}) == 2  # mirrored


def test_what_changes_is_not_kept_and_nor_are_bad_images(folder, tmp_path):
    assert ImageRows(load(folder, tmp_path / "cache"), ImageTransform(16, random_crop=True), keep_gib=1).kept is None
    assert ImageRows(load(folder, tmp_path / "cache", streaming=True), ImageTransform(16), keep_gib=1).kept is None
    damage(folder, 4, "empty")
    rows = ImageRows(load(folder, tmp_path / "cache"), ImageTransform(16), "skip", keep_gib=1)
    for _ in range(2):
        assert len(rows.read(4, 0, 0).bad_images) == 1
    rows.read(5, 0, 0).images.zero_()  # what a caller does to an image stays with it
    assert rows.read(5, 0, 0).images.any()
    assert pickle.loads(pickle.dumps(rows)).kept is None


@pytest.mark.parametrize(("column", "culprit"), [("size", "Column 'size' .*not booleans"), ("none", "no column")])
def test_a_flip_column_that_is_none_is_refused(folder, tmp_path, column, culprit):
    rows = [{"image": file.read_bytes(), "label": "a", "size": 3} for file in folder.glob("*/*.png")]
    Dataset.from_list(rows).to_parquet(tmp_path / "data" / "train.parquet")
    with pytest.raises(DataError, match=f"{culprit}.*--flip_column"):
        load(tmp_path / "data", tmp_path / "cache", flip_column=column)
