import json
from itertools import islice

import numpy as np
import pytest
import torch

from diffusers_pisdm.data import stream_batches
from diffusers_pisdm.data.batches import TrainingBatches, validation_batches
from diffusers_pisdm.data.image_rows import ImageRows
from diffusers_pisdm.data.image_transform import ImageTransform
from diffusers_pisdm.data.rows import BadImageError, DataError
from tests.data.image_folders import copy_folder, damaged_images, load, write_tars


NUM_ROWS = 12


@pytest.fixture
def files(real_image_files):
    return real_image_files[::4]


@pytest.fixture
def folder(files, tmp_path):
    return copy_folder(files, tmp_path / "images")


@pytest.fixture(params=["map", "stream"])
def streaming(request):
    return request.param == "stream"


def make_rows(folder, streaming=False, on_bad_image="stop", augment=True):
    data = load(folder, folder.parent / "cache", streaming=streaming)
    return ImageRows(data, ImageTransform(8, random_crop=augment, random_flip=augment), on_bad_image)


def make_batches(rows, batch_size=5, **arguments):
    return TrainingBatches(rows, batch_size, **{"seed": 1, "shuffle_buffer": 8, **arguments})


def damage(folder, *indices):
    for index in indices:
        file = sorted(folder.glob("*/*.png"))[index]
        file.write_bytes(damaged_images(file.read_bytes())["truncated"])


def assert_same(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)
        assert a.bad_images == b.bad_images


def pixels(images):
    return [image.numpy().tobytes() for image in images]


def test_batches_hold_pixels_and_their_classes(folder, files, streaming):
    rows = make_rows(folder, streaming, augment=False)
    label_of = {pixels([rows.decode(row, 0, 0, 0)[0]])[0]: rows.data.class_id(row, 0) for row in rows.data.dataset}
    for batch in islice(make_batches(rows), 5):
        assert batch.images.shape == (5, 3, 8, 8) and batch.images.dtype == torch.uint8
        assert batch.labels.dtype == torch.int64 and batch.bad_images == []
        assert [label_of[image] for image in pixels(batch.images)] == batch.labels.tolist()


def test_every_epoch_has_every_image_in_another_order(folder, streaming):
    rows = make_rows(folder, streaming, augment=False)
    images = [image for batch in islice(make_batches(rows, 4), 6) for image in pixels(batch.images)]
    first, second = images[:NUM_ROWS], images[NUM_ROWS:]
    assert len(set(first)) == NUM_ROWS and set(first) == set(second)
    assert first != second
    other_seed = next(make_batches(rows, NUM_ROWS, seed=2))
    assert pixels(other_seed.images) != first


def test_a_buffer_mixes_a_stream_beyond_its_own_size():
    """Every row comes once, some early and some much later."""
    mixed = list(stream_batches._mix(range(1000), 100, np.random.default_rng(0)))
    assert sorted(mixed) == list(range(1000))
    moved = np.array(mixed) - np.arange(1000)
    assert moved.min() < -200 and moved.max() > 90


def test_workers_change_nothing(folder, streaming):
    rows = make_rows(folder, streaming)
    assert_same(list(islice(make_batches(rows, num_workers=2), 6)), list(islice(make_batches(rows, num_workers=0), 6)))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_run_resumes_anywhere(folder, streaming, num_workers):
    """In an epoch, at its end, and in the next; what workers have read ahead does not count."""
    rows = make_rows(folder, streaming)
    through = make_batches(rows, 4, num_workers=num_workers)
    batches, states = [], [through.state_dict()]
    for batch in islice(through, 7):
        batches.append(batch)
        states.append(through.state_dict())
    resumed = make_batches(rows, 4, num_workers=num_workers)
    for start in (0, 2, 3, 5):
        resumed.load_state_dict(json.loads(json.dumps(states[start])))
        assert_same(list(islice(resumed, 2)), batches[start : start + 2])
        assert resumed.state_dict() == states[start + 2]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_run_with_bad_images_resumes_anywhere(folder, streaming, num_workers):
    damage(folder, 1, 2, 6, 11)
    rows = make_rows(folder, streaming, "skip")
    through = make_batches(rows, 3, num_workers=num_workers)
    batches, states = [], [through.state_dict()]
    for batch in islice(through, 9):
        assert len(batch.images) == len(batch.labels) == 3
        batches.append(batch)
        states.append(through.state_dict())
    assert sum(len(batch.bad_images) for batch in batches) >= 8  # two epochs
    resumed = make_batches(rows, 3, num_workers=num_workers)
    for start in range(8):
        resumed.load_state_dict(states[start])
        assert_same([next(resumed)], batches[start : start + 1])


def test_a_stream_puts_the_next_row_in_a_bad_one_s_place(folder):
    damage(folder, 1, 2, 6)
    rows = make_rows(folder, True, "skip", augment=False)
    batches = list(validation_batches(rows, 4))
    good = [i for i in range(NUM_ROWS) if i not in (1, 2, 6)]
    expected = [row for i, row in enumerate(rows.data.dataset) if i in good]
    assert [len(batch.labels) for batch in batches] == [4, 4, 1]
    assert torch.equal(
        torch.cat([b.images for b in batches]), torch.stack([rows.decode(r, 0, 0, 0)[0] for r in expected])
    )
    assert [len(batch.bad_images) for batch in batches] == [2, 1, 0]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_bad_image_stops_the_run_with_its_name(folder, streaming, num_workers):
    damage(folder, 3)
    name = sorted(folder.glob("*/*.png"))[3].name
    with pytest.raises(BadImageError, match=rf"^Cannot read the image of row .*{name}.*--on_bad_image skip.$"):
        list(islice(make_batches(make_rows(folder, streaming), 6, num_workers=num_workers), 2))


def test_nothing_but_bad_images_ends_a_stream(folder, monkeypatch):
    damage(folder, *range(NUM_ROWS))
    monkeypatch.setattr(stream_batches, "MAX_BAD_IN_A_ROW", 30)
    with pytest.raises(BadImageError, match=r"None of 3. images in a row"):
        next(make_batches(make_rows(folder, True, "skip")))


def test_an_unknown_label_is_no_bad_image(files, tmp_path):
    names = ["animal-mammal", "clothing"]
    tars = {"image_column": "png", "label_column": "cls"}
    data = load(write_tars(files, tmp_path / "tars"), tmp_path / "cache", streaming=True, class_names=names, **tars)
    with pytest.raises(DataError, match="Unknown labels in row"):
        list(islice(make_batches(ImageRows(data, ImageTransform(8), "skip")), 3))


def test_processes_see_together_what_one_sees(folder):
    rows = make_rows(folder)
    alone = islice(make_batches(rows, 4), 7)
    pair = zip(*(make_batches(rows, 2, num_processes=2, process_index=i) for i in range(2)))
    for whole, halves in zip(alone, pair):
        for i, half in enumerate(halves):
            assert torch.equal(whole.images[i::2], half.images)
            assert torch.equal(whole.labels[i::2], half.labels)


@pytest.mark.parametrize("shards", [1, 2])
def test_processes_share_a_stream(files, tmp_path, shards):
    tars = {"image_column": "png", "label_column": "cls", "class_names": list("abcdefgh")}
    data = load(write_tars(files, tmp_path / "tars", shards), tmp_path / "cache", streaming=True, **tars)
    rows = ImageRows(data, ImageTransform(8))
    shares = [
        {
            image
            for batch in islice(make_batches(rows, 3, num_processes=2, process_index=i), 2)
            for image in pixels(batch.images)
        }
        for i in range(2)
    ]
    assert [len(share) for share in shares] == [6, 6]
    assert not shares[0] & shares[1]


def test_a_run_may_go_on_with_other_batches(folder):
    """The position counts rows: no image comes twice in an epoch."""
    rows = make_rows(folder, augment=False)
    first = make_batches(rows, 4)
    seen = pixels(next(first).images)
    second = make_batches(rows, 2, num_processes=2)
    second.load_state_dict(first.state_dict())
    rest = [pixels(next(second).images) for _ in range(2)]
    assert not {*rest[0], *rest[1]} & set(seen)


def test_a_position_in_other_data_is_refused(folder, streaming):
    state = make_batches(make_rows(folder, streaming)).state_dict()
    with pytest.raises(ValueError, match="seed was 1, is 2"):
        make_batches(make_rows(folder, streaming), seed=2).load_state_dict(state)
    if streaming:
        with pytest.raises(ValueError, match="process_index was 0, is 1"):
            make_batches(make_rows(folder, True), num_processes=2, process_index=1).load_state_dict(state)
    else:
        next(folder.glob("*/*.png")).unlink()
        with pytest.raises(ValueError, match="num_rows was 12, is 11"):
            make_batches(make_rows(folder)).load_state_dict(state)


def test_too_few_rows_for_a_batch_are_an_error(folder):
    rows = make_rows(folder)
    TrainingBatches(rows, 6, num_processes=2)
    with pytest.raises(DataError, match=r"12 images, .*batch of 7 on each of 2 processes: .*--train_batch_size"):
        TrainingBatches(rows, 7, num_processes=2)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_held_out_images_come_once_and_in_order(folder, streaming, num_workers):
    rows = make_rows(folder, streaming, augment=False)
    expected = torch.stack([rows.decode(row, 0, 0, 0)[0] for row in rows.data.dataset])
    batches = list(validation_batches(rows, 5, num_workers=num_workers))
    assert [len(batch.labels) for batch in batches] == [5, 5, 2]
    assert torch.equal(torch.cat([batch.images for batch in batches]), expected)


def test_processes_share_held_out_images(folder, streaming):
    rows = make_rows(folder, streaming, augment=False)
    whole = next(validation_batches(rows, NUM_ROWS)).images
    for i in range(5):
        batches = list(validation_batches(rows, 2, num_processes=5, process_index=i))
        assert torch.equal(torch.cat([batch.images for batch in batches]), whole[i::5])


def test_held_out_images_are_not_random(folder):
    with pytest.raises(ValueError, match="must be False"):
        validation_batches(make_rows(folder), 5)
