import pytest
import torch

from diffusers_pisdm.training.device_images import augment_images, load_labelled_images
from diffusers_pisdm.training.image_rows import ImageRows
from diffusers_pisdm.training.image_transform import ImageTransform
from diffusers_pisdm.training.row_noise import RowNoise
from tests.training.image_sources import copy_folder, damaged_images, load


@pytest.fixture
def folder(real_image_files, tmp_path):
    return copy_folder(real_image_files[::4], tmp_path / "images")


def noise(seed=0):
    return RowNoise(seed, torch.device("cpu"))


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


def test_bad_images_are_left_out(folder, tmp_path, capsys):
    file = sorted(folder.glob("*/*.png"))[3]
    file.write_bytes(damaged_images(file.read_bytes())["truncated"])
    rows = ImageRows(load(folder, tmp_path / "cache"), ImageTransform(16), on_bad_image="skip")
    data = load_labelled_images(rows)
    good = [rows.read(i, 0, 0).images for i in range(len(rows)) if i != 3]
    assert torch.equal(data.images, torch.stack(good))
    assert file.name in capsys.readouterr().out


def test_every_other_image_that_may_be_is_mirrored():
    images = torch.randint(0, 256, (1000, 3, 4, 4), dtype=torch.uint8)
    may_flip = torch.arange(1000) % 4 != 0
    augmented = augment_images(images, noise(), may_flip)
    same = (augmented == images).flatten(1).all(dim=1)
    mirrored = (augmented == images.flip(-1)).flatten(1).all(dim=1)
    assert (same ^ mirrored).all()
    assert same[~may_flip].all()
    assert abs(mirrored[may_flip].float().mean() - 0.5) < 0.06
    assert torch.equal(augment_images(images, noise(), may_flip), augmented)
    assert torch.equal(augment_images(images, noise()), images)


def test_images_move_in_all_directions_and_repeat_their_borders():
    images = torch.randint(0, 256, (500, 3, 6, 5), dtype=torch.uint8)
    moved = augment_images(images, noise(), max_shift=2)
    padded = torch.nn.functional.pad(images.float(), (2, 2, 2, 2), mode="replicate").to(torch.uint8)
    found = set()
    for image, around in zip(moved, padded):
        matches = {
            (down, right)
            for down in range(5)
            for right in range(5)
            if torch.equal(image, around[:, down : down + 6, right : right + 5])
        }
        assert matches
        found |= matches
    assert len(found) == 25
