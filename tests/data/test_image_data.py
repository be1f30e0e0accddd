import shutil

import pytest
from datasets import ClassLabel, Dataset
from datasets import Image as ImageFeature

from diffusers_pisdm.data import image_data
from diffusers_pisdm.data.image_data import load_image_data, read_class_names
from diffusers_pisdm.data.rows import DataError
from tests.data.image_folders import copy_folder, load, write_parquet, write_tars


PARQUET = {"image_column": "picture", "label_column": "kind"}
TARS = {"image_column": "png", "label_column": "cls"}


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def files(real_image_files):
    return real_image_files[::3]  # two of each of 8 classes


def contents(data):
    """What the rows hold: files and the names of their classes."""
    rows = list(data.dataset)
    return [(data.encoded_image(row), data.class_names[data.class_id(row, i)]) for i, row in enumerate(rows)]


def expected(files):
    return [(file.read_bytes(), file.parent.name) for file in files]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_of_images(files, tmp_path, cache, streaming):
    data = load(copy_folder(files, tmp_path / "images"), cache, streaming=streaming)
    assert contents(data) == expected(files)
    assert data.class_names == sorted({file.parent.name for file in files})
    assert data.is_stream is streaming
    assert streaming or data.num_rows == len(files)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_of_parquet_files(files, tmp_path, cache, streaming):
    names = sorted({file.parent.name for file in files}) if streaming else None
    data = load(write_parquet(files, tmp_path / "p"), cache, streaming=streaming, class_names=names, **PARQUET)
    assert contents(data) == expected(files)
    assert data.dataset.column_names == ["picture", "kind"]  # others are not read


def test_the_fingerprint_tells_which_class_was_changed(files, tmp_path, cache):
    folder = copy_folder(files, tmp_path / "images")
    data = load(folder, cache)
    before, (a, b, *rest) = data.fingerprint(), data.class_names
    assert set(before) == set(data.class_names) and before == load(folder, cache).fingerprint()
    assert all(digest.startswith("2 images") for digest in before.values())
    assert load(shutil.copytree(folder, tmp_path / "moved"), cache).fingerprint() == before
    picture = next((folder / a).iterdir())
    replaced = bytearray(picture.read_bytes())
    replaced[-30] ^= 1
    picture.write_bytes(replaced)  # as large as before
    assert [name for name in before if load(folder, cache).fingerprint()[name] != before[name]] == [a]
    picture.rename(folder / b / "new.png")
    after = load(folder, cache).fingerprint()
    assert after[a].startswith("1 images") and after[b].startswith("3 images")
    assert {name: after[name] for name in rest} == {name: before[name] for name in rest}


def test_the_fingerprint_of_embedded_images(files, tmp_path, cache, monkeypatch):
    whole = load(write_parquet(files, tmp_path / "p"), cache, **PARQUET)
    (a, *_), before = whole.class_names, whole.fingerprint()
    assert all(digest.startswith("2 images") for digest in before.values())
    changed = [*files[2:], *files[1:2], files[2]]  # one image of the first class is gone
    after = load(write_parquet(changed, tmp_path / "q"), cache, **PARQUET).fingerprint()
    assert after[a].startswith("1 images") and after[a] != before[a]
    monkeypatch.setattr(image_data, "MOST_IN_FINGERPRINT", len(files) // 2)
    assert all(digest.startswith("1 images") for digest in whole.fingerprint().values())


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_of_webdataset_tars(files, tmp_path, cache, streaming):
    names = sorted({file.parent.name for file in files})
    folder = write_tars(files, tmp_path / "tars")
    data = load(folder, cache, streaming=streaming, class_names=names, **TARS)
    assert sorted(contents(data)) == sorted(expected(files))
    row = next(iter(data.dataset))
    assert "train-000.tar" in data.place(row, 0) and files[0].stem in data.place(row, 0)


def test_numbers_are_named_by_their_sorted_values(files, tmp_path, cache):
    labels = [3, 10, 7, 3] * 4
    data = load(write_parquet(files, tmp_path / "p", labels), cache, **PARQUET)
    assert data.class_names == ["3", "7", "10"]
    assert [data.class_id(row, 0) for row in data.dataset][:3] == [0, 2, 1]


def test_a_held_out_split_takes_the_training_classes(files, tmp_path, cache):
    """Whether they are words, numbers or class labels, and though it holds only some of them."""
    words = load(
        write_parquet(files[:4], tmp_path / "words"), cache, class_names=["x", "animal-mammal", "clothing"], **PARQUET
    )
    assert [words.class_id(row, 0) for row in words.dataset] == [1, 1, 2, 2]
    folder = copy_folder(files[:4], tmp_path / "folder")
    folders = load(folder, cache, class_names=["x", "clothing", "animal-mammal"])
    assert [folders.class_id(row, 0) for row in folders.dataset] == [2, 2, 1, 1]
    numbers = write_parquet(files[:2], tmp_path / "numbers", [7, 3])
    by_name = load(numbers, cache, class_names=["3", "5", "7"], **PARQUET)
    assert [by_name.class_id(row, 0) for row in by_name.dataset] == [2, 0]
    by_index = load(numbers, cache, class_names=list("abcdefgh"), **PARQUET)
    assert [by_index.class_id(row, 0) for row in by_index.dataset] == [7, 3]


def test_classes_can_be_given_other_names(files, tmp_path, cache):
    folder = copy_folder(files[:4], tmp_path / "folder")
    data = load(folder, cache, class_names=["mammal", "clothes"])
    assert [name for _, name in contents(data)] == ["mammal", "mammal", "clothes", "clothes"]
    with pytest.raises(DataError, match=r"2 classes .* 3 others"):
        load(folder, cache, class_names=["a", "b", "c"])
    with pytest.raises(DataError, match="given twice: a"):
        load(folder, cache, class_names=["a", "a"])


def test_class_names_are_read_from_a_file(tmp_path):
    (tmp_path / "names.txt").write_text("tench, Tinca\n\n goldfish \n")
    assert read_class_names(tmp_path / "names.txt") == ["tench, Tinca", "goldfish"]


def test_a_stream_of_unnamed_labels_needs_names(files, tmp_path, cache):
    with pytest.raises(DataError, match="--class_names_file"):
        load(write_tars(files, tmp_path / "tars"), cache, streaming=True, **TARS)


@pytest.mark.parametrize("streaming", [False, True])
def test_labels_outside_the_classes_are_errors(files, tmp_path, cache, streaming):
    folder = write_parquet(files[:3], tmp_path / "p", [0, 2, -1])
    names = ["a", "b", "c"] if streaming else None
    with pytest.raises(DataError, match=r"Unknown labels in .*: -1\. .*hidden"):
        contents(load(folder, cache, streaming=streaming, class_names=names, **PARQUET))
    with pytest.raises(DataError, match=r"Unknown labels in .*: 2"):
        contents(load(folder, cache, streaming=streaming, class_names=["a", "b"], **PARQUET))


def test_hidden_class_labels_are_errors(files, tmp_path, cache):
    rows = [{"image": str(files[0]), "label": -1}]
    dataset = (
        Dataset.from_list(rows).cast_column("image", ImageFeature()).cast_column("label", ClassLabel(names=["a"]))
    )
    (tmp_path / "p").mkdir()
    dataset.to_parquet(tmp_path / "p" / "train.parquet")
    with pytest.raises(DataError, match="-1"):
        load(tmp_path / "p", cache)


def test_labels_must_be_classes(files, tmp_path, cache):
    folder = write_parquet(files[:2], tmp_path / "p", [0.5, 1.5])
    with pytest.raises(DataError, match="not Value"):
        load(folder, cache, **PARQUET)


def test_wrong_columns_are_errors(files, tmp_path, cache):
    folder = write_parquet(files, tmp_path / "p", [1] * len(files))
    with pytest.raises(DataError, match=r"no column 'image', only picture, kind, name: .*--image_column"):
        load(folder, cache)
    with pytest.raises(DataError, match=r"no column 'label', only picture, kind, name: .*--label_column"):
        load(folder, cache, image_column="picture")
    with pytest.raises(DataError, match=r"'kind' .* not images"):
        load(folder, cache, image_column="kind", label_column="kind")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_missing_split_is_an_error_that_names_the_others(files, tmp_path, cache, streaming):
    folder = copy_folder(files, tmp_path / "images")
    with pytest.raises(DataError, match=r"split 'test' .*train"):
        load_image_data(folder, "test", streaming=streaming, cache_dir=cache)


def test_a_folder_without_classes_is_an_error(files, tmp_path, cache):
    (tmp_path / "flat").mkdir()
    shutil.copy(files[0], tmp_path / "flat")
    with pytest.raises(DataError, match=r"holds \d+ images? in one folder, .*one subfolder per class"):
        load(tmp_path / "flat", cache)


def test_nothing_to_load_is_an_error(tmp_path, cache, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"There is no folder .*nowhere"):
        load(tmp_path / "nowhere", cache)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"No data found in .*empty: put images"):
        load(tmp_path / "empty", cache)

    def unreachable(*_, **arguments):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(image_data, "load_dataset", unreachable)
    with pytest.raises(
        FileNotFoundError,
        match=r"no folder .*no dataset of this name in the cache; .*be reached",
    ):
        load_image_data("someone/something", "train", cache_dir=cache)


def test_a_data_set_without_rows_is_an_error(files, tmp_path, cache):
    folder = write_parquet(files[:1], tmp_path / "p")
    Dataset.from_parquet(str(folder / "train.parquet"), cache_dir=str(cache)).select([]).to_parquet(
        folder / "train.parquet"
    )
    with pytest.raises(DataError, match=r"split 'train' .* no data"):
        load(folder, cache, **PARQUET)
