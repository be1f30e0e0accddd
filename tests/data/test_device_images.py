import pytest
import torch

from diffusers_pisdm.data.device_images import DeviceBatches, batch_rows, load_labelled_images
from diffusers_pisdm.data.image_rows import ImageRows
from diffusers_pisdm.data.image_transform import ImageTransform
from tests.data.image_folders import copy_folder, damaged_images, load


@pytest.fixture
def folder(real_image_files, tmp_path):
    return copy_folder(real_image_files[::4], tmp_path / "images")


def test_all_images_in_their_order(folder, tmp_path):
    rows = ImageRows(load(folder, tmp_path / "cache"), ImageTransform(16))
    data = load_labelled_images(rows, num_threads=3)
    read = [rows.read(i, 0, 0) for i in range(len(rows))]
    assert torch.equal(data.images, torch.stack([row.images for row in read]))
    assert data.labels.tolist() == [row.label for row in read]
    assert data.class_names == rows.data.class_names
    assert data.may_flip.all()
    moved = data.to(torch.device("meta"))
    assert {moved.images.device.type, moved.labels.device.type, moved.may_flip.device.type} == {"meta"}


def test_the_fingerprint_tells_which_class_was_changed(folder, tmp_path):
    data = load_labelled_images(ImageRows(load(folder, tmp_path / "cache"), ImageTransform(16)))
    batches = DeviceBatches(data, batch_size=5, seed=3)
    before, row = batches.fingerprint(), 3
    data.images[row, 0, 0, 0] ^= 1
    after, name = batches.fingerprint(), data.class_names[data.labels[row]]
    assert list(before) == data.class_names and [n for n in before if before[n] != after[n]] == [name]


def test_bad_images_are_left_out(folder, tmp_path, capsys):
    file = sorted(folder.glob("*/*.png"))[3]
    file.write_bytes(damaged_images(file.read_bytes())["truncated"])
    rows = ImageRows(load(folder, tmp_path / "cache"), ImageTransform(16), on_bad_image="skip")
    data = load_labelled_images(rows)
    good = [rows.read(i, 0, 0).images for i in range(len(rows)) if i != 3]
    assert torch.equal(data.images, torch.stack(good))
    assert file.name in capsys.readouterr().out


def test_an_epoch_shows_every_image_once_in_an_order_of_its_own():
    rows = [row for step in range(5) for row in batch_rows(step, 20, 8, seed=1)]
    assert sorted(rows[:20]) == sorted(rows[20:]) == list(range(20))
    assert rows[:20] != rows[20:40]
    assert rows[:8] != list(batch_rows(0, 20, 8, seed=2))


def test_batches_go_on_from_where_they_were(folder, tmp_path):
    data = load_labelled_images(ImageRows(load(folder, tmp_path / "cache"), ImageTransform(16)))
    batches = DeviceBatches(data, batch_size=5, seed=3)
    next(batches)
    other = DeviceBatches(data, batch_size=5, seed=3)
    other.load_state_dict(batches.state_dict())
    for _ in range(3):
        images, labels, bad_images = next(batches)
        again = next(other)
        rows = [data.labels[row].item() for row in batch_rows(batches.step - 1, len(data.images), 5, 3)]
        assert torch.equal(images, again.images) and torch.equal(labels, again.labels)
        assert labels.tolist() == rows and bad_images == []
