"""Whatever lies in a folder is read, or said to be left out."""

import json
import logging
import os
import re
import zipfile
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, DatasetDict
from datasets import Image as ImageFeature

from diffusers_pisdm.data.image_data import load_image_data
from diffusers_pisdm.data.image_folders import sort_class_names
from diffusers_pisdm.data.rows import DataError
from tests.data.image_folders import load, write_parquet


CLASSES = ("cat", "dog")


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def put(real_image_files):
    """Writes a picture, another one for each call."""
    files = iter(real_image_files)

    def put(*paths: Path) -> None:
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(next(files).read_bytes())

    return put


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.WARNING)
    return lambda: " ".join(record.getMessage() for record in caplog.records if "diffusers_pisdm" in record.name)


@pytest.fixture
def folder(tmp_path, put):
    """Two class folders of two pictures each."""
    put(*(tmp_path / "images" / name / f"{i}.png" for name in CLASSES for i in range(2)))
    return tmp_path / "images"


def labelled(data):
    """Each row's path and class."""
    return [(row["image"]["path"], data.class_names[data.class_id(row, 0)]) for row in data.dataset]


def expected(folder, pattern="*/*"):
    return [(str(path), path.parent.name) for path in sorted(folder.glob(pattern), key=str) if path.is_file()]


SPLIT_WORDS = ("train", "training", "validation", "valid", "dev", "val", "test", "testing", "eval", "evaluation")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "odd",
    [*SPLIT_WORDS, "my-train set", "a\nb", "[x]*?", "50%", "#1", "a::b", "$HOME", "~", "__x__", "ü", "data", "x.png"],
)
def test_any_name_of_a_class_and_of_a_file(tmp_path, cache, put, said, odd, streaming):
    folder = tmp_path / "images"
    put(folder / "cat" / "1.png", folder / "cat" / f"{odd} 2.png", folder / odd / "1.png", folder / odd / f"{odd}.JPG")
    data = load(folder, cache, streaming=streaming)
    assert labelled(data) == expected(folder) and len(labelled(data)) == 4 == data.num_rows
    assert data.class_names == sorted(("cat", odd)) and said() == ""


@pytest.mark.parametrize(
    "name", ["a[1]", "a*b?", "a::b", "x#y%20", "$HOME", "a\nb", ".hidden", "train", "csv", "imagefolder"]
)
def test_any_name_of_the_folder(tmp_path, cache, put, name, monkeypatch):
    put(*(tmp_path / name / c / "1.png" for c in CLASSES))
    (tmp_path / "a1").mkdir()
    put(tmp_path / "a1" / "other.png")
    monkeypatch.chdir(tmp_path)
    assert labelled(load(name, cache)) == expected(tmp_path / name)


def test_what_datasets_would_take_for_a_pattern_is_refused(real_image_files, tmp_path, cache):
    for name in ("a[1]", "a?b", "a::b", "$HOME", "a\nb"):
        with pytest.raises(DataError, match=r"The path .* literally: rename"):
            load(write_parquet(real_image_files[:2], tmp_path / name), cache)


def test_a_format_is_not_a_folder(cache, put, tmp_path, monkeypatch):
    """`load_dataset("imagefolder")` would read whatever lies in the working directory."""
    put(tmp_path / "cat" / "1.png")
    monkeypatch.chdir(tmp_path)
    for name in ("imagefolder", "csv", "parquet"):
        with pytest.raises(FileNotFoundError, match=f"no folder {name}"):
            load(name, cache)


SPLIT_LAYOUTS = {
    "splits": ("train", "test"),
    "other words": ("training", "eval"),
    "capitals": ("Train", "TEST"),
    "a folder around them": ("data/train", "data/test"),
    "words in names": ("train_images", "images-test"),
}


@pytest.mark.parametrize("layout", SPLIT_LAYOUTS)
def test_splits_are_folders_above_the_classes(tmp_path, cache, put, layout):
    train, test = (tmp_path / "d" / name for name in SPLIT_LAYOUTS[layout])
    put(*(train / name / "1.png" for name in ("bus", "train", "val")), test / "bus" / "train.png")
    for split, folder in (("train", train), ("test", test)):
        data = load_image_data(tmp_path / "d", split, cache_dir=cache)
        assert labelled(data) == expected(folder) and data.class_names == ["bus", "train", "val"]
    with pytest.raises(DataError, match=r"split 'validation' .*train"):
        load_image_data(tmp_path / "d", "validation", cache_dir=cache)


def test_what_is_in_no_split_is_named(tmp_path, cache, put, said):
    put(*(tmp_path / "d" / split / name / "1.png" for split in ("Train", "test", "extra") for name in CLASSES))
    assert labelled(load(tmp_path / "d", cache)) == expected(tmp_path / "d" / "Train")
    assert "not in a class folder: 2 (extra/cat/1.png, extra/dog/1.png)" in said()


def test_a_split_that_is_only_a_word_in_a_name_is_told(tmp_path, cache, put, said):
    put(*(tmp_path / "d" / top / "1.png" for top in ("model train/steam", "model train/diesel", "crash test/car")))
    assert len(labelled(load(tmp_path / "d", cache))) == 2
    assert "crash test as test, model train as train" in said()


def test_splits_in_class_folders(tmp_path, cache, put):
    put(*(tmp_path / "d" / name / split / "1.png" for name in CLASSES for split in ("train", "test")))
    for split in ("train", "test"):
        data = load_image_data(tmp_path / "d", split, cache_dir=cache)
        assert labelled(data) == [(str(tmp_path / "d" / name / split / "1.png"), name) for name in CLASSES]


def test_words_for_splits_of_which_none_is_for_training_are_classes(tmp_path, cache, put):
    put(*(tmp_path / "d" / name / "1.png" for name in ("dev", "valid", "eval", "testing")))
    assert labelled(load(tmp_path / "d", cache)) == expected(tmp_path / "d")


def test_one_deep_folder_with_most_images_does_not_hide_the_classes(folder, cache, put, said):
    rows = expected(folder)
    put(*(folder / "bird" / "x" / f"{i}.png" for i in range(5)))
    assert labelled(load(folder, cache)) == rows
    assert "not in a class folder: 5 (bird/x/0.png" in said()


ONE_CLASS = {  # the images, which of them are taken, and what is said of the others
    "a tie": (
        "cat/0 cat/1 dog/deep/0 dog/deep/1",
        "2 images in one folder, cat",
        "2 (dog/deep/0.png, dog/deep/1.png)",
    ),
    "one stray": ("cat/0 cat/1 stray", "2 images in one folder, cat", "1 (stray.png)"),
    "most are deep": ("cat/0 dog/deep/0 dog/deep/1", "2 images in one folder, dog/deep", "1 (cat/0.png)"),
    "most are in no folder": ("0 1 2 cat/0 dog/0", "3 images in one folder, .", "2 (cat/0.png, dog/0.png)"),
    "many strays": (
        "cat/0 cat/1 cat/2 cat/3 cat/4 cat/5 cat/6 1 2 3 4 5 6",
        "7 images in one folder, cat",
        "6 (1.png, 2.png, 3.png, 4.png, 5.png and 1 more)",
    ),
}


@pytest.mark.parametrize("layout", ONE_CLASS)
def test_images_at_another_depth_than_most_are_named_with_the_refusal(tmp_path, cache, put, layout):
    images, taken, strays = ONE_CLASS[layout]
    put(*(tmp_path / "d" / f"{path}.png" for path in images.split()))
    with pytest.raises(DataError, match=rf"holds {re.escape(taken)}, .*: {re.escape(strays)}"):
        load(tmp_path / "d", cache)


@pytest.mark.parametrize("file", ["00", "1.nef", "2.png~", "3.jpg_large", None])
def test_a_class_without_images_is_named(folder, cache, said, file):
    (folder / "hen").mkdir()
    if file is not None:
        (folder / "hen" / file).write_bytes(b"")
    assert labelled(load(folder, cache)) == expected(folder, "[cd]*/*")
    assert f"(hen{'' if file is None else f' with 1 file such as {file}'})" in said()


def test_classes_of_the_same_name_are_told_to_be_one(tmp_path, cache, put, said):
    put(*(tmp_path / "d" / side / name / "1.png" for side in ("left", "right") for name in ("ok", "bad")))
    put(tmp_path / "d" / "left" / "odd" / "1.png")
    assert load(tmp_path / "d", cache).class_names == ["bad", "odd", "ok"]
    assert "2 in all: left/bad, right/bad; left/ok, right/ok" in said()


def test_a_word_in_the_name_of_a_group_of_classes_makes_no_split(tmp_path, cache, put):
    put(tmp_path / "d" / "train vehicles" / "bus" / "1.png", tmp_path / "d" / "pets" / "cat" / "1.png")
    assert labelled(load(tmp_path / "d", cache)) == expected(tmp_path / "d", "*/*/*")


def test_rows_are_in_the_order_of_their_paths(tmp_path, cache, put):
    """As text, in which `cat-2/` and `cat 3/` precede `cat/`."""
    put(*(tmp_path / "d" / name / "1.png" for name in ("cat", "cat-2", "cat 3", "Cat", "ä")))
    data = load(tmp_path / "d", cache)
    assert [name for _, name in labelled(data)] == ["Cat", "cat 3", "cat-2", "cat", "ä"]
    assert data.class_names == ["Cat", "cat", "cat 3", "cat-2", "ä"]


@pytest.mark.parametrize("names", [("train", "test"), ("data/train", "data/val"), ("cat",), ("three/only",), (".",)])
def test_splits_or_one_folder_are_no_classes(tmp_path, cache, put, names):
    put(*(tmp_path / "d" / name / "1.png" for name in names))
    with pytest.raises(DataError, match=rf"holds 1 image in one folder, {names[0]}, .*one subfolder per class"):
        load(tmp_path / "d", cache)
    (tmp_path / "d" / names[0] / "metadata.csv").write_text("file_name,caption\n1.png,x\n")
    with pytest.raises(DataError, match=r"no column 'label', only image, caption: .*--label_column"):
        load(tmp_path / "d", cache)


def test_slices_and_sums_of_splits(tmp_path, cache, put):
    put(*(tmp_path / "d" / "train" / name / f"{i}.png" for name in CLASSES for i in range(5)))
    put(*(tmp_path / "d" / "val" / name / "1.png" for name in CLASSES))
    train, val = expected(tmp_path / "d" / "train"), expected(tmp_path / "d" / "val")
    for split, rows in {
        "train[:30%]": train[:3],
        "train[3:-1]": train[3:-1],
        "train+validation": train + val,
        "validation+train[:1]": val + train[:1],
    }.items():
        assert labelled(load_image_data(tmp_path / "d", split, cache_dir=cache)) == rows


def test_what_is_left_out_is_counted_and_named(folder, cache, put, said):
    rows = expected(folder)
    put(*(folder / name for name in ("preview.png", "cat/old/1.png", ".cache/1.png", "cat/._1.png", ".a/b/c/1.png")))
    (folder / "cat" / "0.txt").write_text("a cat")
    (folder / "cat" / "1.json").write_text("{}")
    (folder / "README.md").write_text("# Pets")
    (folder / "dog" / "x.heic").write_bytes(b"")
    (folder / "dog" / "x.eps").write_bytes(b"")
    (folder / "dog" / "folder.png").mkdir()
    os.mkfifo(folder / "dog" / "pipe.png")
    (folder / "dog" / "dangling.png").symlink_to("nothing")
    (folder / "dog" / "circle.png").symlink_to("circle.png")
    (folder / "bird").symlink_to(folder.parent / "gone")
    data = load(folder, cache)
    assert labelled(data) == rows and data.class_names == list(CLASSES)
    for reason in (
        "not in a class folder: 2 (cat/old/1.png, preview.png)",
        "hidden: 3 (.a, .cache, cat/._1.png)",
        "of formats that we do not read: 2 (dog/x.eps, dog/x.heic)",
        "dangling links, pipes or the like: 5 (bird, dog/circle.png, dog/dangling.png, dog/folder.png, dog/pipe.png)",
    ):
        assert reason in said()


def test_links_are_followed_but_not_in_circles(folder, tmp_path, cache, said):
    links = tmp_path / "links"
    links.mkdir()
    for name in CLASSES:
        (links / name).symlink_to(folder / name)
    (folder / "dog" / "up").symlink_to(tmp_path)  # holds `links` and itself
    data = load(links, cache)
    assert [(path, name) for path, name in labelled(data) if "up" not in path] == expected(links)
    assert data.class_names == list(CLASSES)


def test_labels_in_metadata_go_before_class_folders(folder, cache, said):
    files = ["dog/1.png", "cat/0.png", "dog/0.png"]
    rows = [{"file_name": file, "label": kind, "flip": kind == "x"} for file, kind in zip(files, "xyx")]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = load(folder, cache, flip_column="flip")
    assert labelled(data) == [(str(folder / file), kind) for file, kind in zip(files, "xyx")]
    assert [data.may_flip(row) for row in data.dataset] == [True, False, True]
    assert "not listed as metadata: 1 (cat/1.png)" in said()


@pytest.mark.parametrize("content", ["file_name,caption\ncat/0.png,x\n", "caption\nx\n", "", "\xff\x00"])
def test_class_folders_need_no_metadata(folder, cache, said, content):
    (folder / "metadata.csv").write_text(content, encoding="latin-1")
    assert labelled(load(folder, cache)) == expected(folder)
    assert "metadata.csv is not used" in said()


def test_metadata_of_splits_without_class_folders(tmp_path, cache, put):
    for split, kinds in (("train", "xyx"), ("test", "y")):
        put(*(tmp_path / "d" / split / f"{i}.png" for i in range(len(kinds))))
        lines = [f"{i}.png,{kind}" for i, kind in enumerate(kinds)]
        (tmp_path / "d" / split / "metadata.csv").write_text("\n".join(["file_name,label", *lines]))
        data = load_image_data(tmp_path / "d", split, cache_dir=cache)
        assert [name for _, name in labelled(data)] == list(kinds)


def test_metadata_above_the_splits_belongs_to_none(tmp_path, cache, put):
    put(*(tmp_path / "d" / split / name / "1.png" for split in ("train", "test") for name in CLASSES))
    (tmp_path / "d" / "metadata.csv").write_text("file_name,label\ntrain/cat/1.png,x\ntest/dog/1.png,y\n")
    for split in ("train", "test"):
        data = load_image_data(tmp_path / "d", split, cache_dir=cache)
        assert labelled(data) == expected(tmp_path / "d" / split)


def test_metadata_that_is_needed_must_be_readable(tmp_path, cache, put):
    put(tmp_path / "d" / "1.png")
    (tmp_path / "d" / "metadata.csv").write_text("caption\nx\n")
    with pytest.raises(DataError, match=r"Cannot read .*metadata\.csv: .*file_name"):
        load(tmp_path / "d", cache)


def test_names_must_be_utf8(folder, cache):
    os.rename(folder / "cat" / "1.png", os.fsencode(folder / "cat") + b"/caf\xe9\n.png")
    with pytest.raises(DataError, match=r"cat/caf\\xe9\\n\.png is not UTF-8: rename"):
        load(folder, cache)


def test_a_folder_that_may_not_be_read_is_named(folder, cache, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == "dog":
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=r"Permission denied: '.*dog'"):
        load(folder, cache)


CONFIGS = """---
configs:
- config_name: small
  data_dir: s
- config_name: large
  data_files:
  - split: train
    path: l/one/**
---
"""


def test_configurations(tmp_path, cache, put):
    put(*(tmp_path / top / name / "train.png" for top in ("s", "l/one", "l/two") for name in CLASSES))
    (tmp_path / "README.md").write_text(CONFIGS)
    with pytest.raises(DataError, match=r"small, large: .*--dataset_config_name"):
        load(tmp_path, cache)
    with pytest.raises(DataError, match="no configuration 'tiny', only small, large"):
        load(tmp_path, cache, config_name="tiny")
    for name, top in (("small", "s"), ("large", "l/one")):
        assert labelled(load(tmp_path, cache, config_name=name)) == expected(tmp_path / top)
    (tmp_path / "README.md").write_text(CONFIGS.replace("name: small", "name: default"))
    assert labelled(load(tmp_path, cache)) == expected(tmp_path / "s")
    with pytest.raises(DataError, match=r"no configuration 'x', as its README\.md names none"):
        load(tmp_path / "s", cache, config_name="x")
    (tmp_path / "s" / "README.md").write_text("---\nconfigs:\n- config_name: here\n---\n")
    assert labelled(load(tmp_path / "s", cache)) == expected(tmp_path / "s")
    for broken in (
        ": [",
        "- a",
        "configs: 3",
        "configs: [{data_dir: s}]",
        "configs: [3]",
        "configs: [{config_name: a, data_dir: [1]}]",
        "\xff",
    ):
        (tmp_path / "README.md").write_text(f"---\n{broken}\n---\n", encoding="latin-1")
        with pytest.raises(DataError, match=r"header of .*README\.md"):
            load(tmp_path, cache)


def test_configurations_of_parquet_files(real_image_files, tmp_path, cache):
    configs = []
    for name, files in (("small", real_image_files[:2]), ("large", real_image_files[:6])):
        write_parquet(files, tmp_path / name, ["a"] * len(files))
        configs.append(f"- config_name: {name}\n  data_files: {name}/*.parquet\n")
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{''.join(configs)}---\n")
    for name, count in (("small", 2), ("large", 6)):
        data = load(tmp_path, cache, image_column="picture", label_column="kind", config_name=name)
        assert len(data.dataset) == count


def test_shards_in_no_split_and_images_beside_are_named(real_image_files, tmp_path, cache, put, said):
    folder = write_parquet(real_image_files[:2], tmp_path / "d")
    write_parquet(real_image_files[2:4], tmp_path / "e")
    os.rename(tmp_path / "e" / "train.parquet", folder / "more.parquet")
    put(folder / "preview.png")
    data = load(folder, cache, image_column="picture", label_column="kind")
    assert len(data.dataset) == 2
    assert "files that are in no split: 1 (more.parquet)" in said() and "(preview.png)" in said()


def _truncated_parquet(folder, files):
    content = (write_parquet(files, folder) / "train.parquet").read_bytes()
    (folder / "train.parquet").write_bytes(content[: len(content) // 2])


def _zips(folder, files):
    folder.mkdir()
    for name in CLASSES:
        with zipfile.ZipFile(folder / f"{name}.zip", "w") as archive:
            archive.write(files[0], f"{name}/1.png")


def _empty_tar(folder, files):
    folder.mkdir()
    (folder / "train.tar").write_bytes(b"")


@pytest.mark.parametrize("make", [_truncated_parquet, _zips, _empty_tar])
def test_files_that_cannot_be_read_are_an_error_of_the_data(real_image_files, tmp_path, cache, make):
    make(tmp_path / "d", real_image_files[:4])
    with pytest.raises(DataError, match=r"split 'train' of .*/d: "):
        load(tmp_path / "d", cache, image_column="picture", label_column="kind")


@pytest.mark.parametrize("split", ["train[9:]", "train[:0]"])
def test_an_empty_slice_is_an_error(folder, real_image_files, tmp_path, cache, split):
    for data in (folder, write_parquet(real_image_files[:4], tmp_path / "p")):
        with pytest.raises(DataError, match=rf"split '{re.escape(split)}' .*"):
            load_image_data(data, split, cache_dir=cache, image_column="picture", label_column="kind")


def test_an_archive_beside_the_images_is_named(folder, cache, said):
    (folder / "images.tar").write_bytes(b"")
    assert labelled(load(folder, cache)) == expected(folder)
    assert "(images.tar)" in said()


@pytest.mark.parametrize("streaming", [False, True])
def test_what_save_to_disk_wrote(real_image_files, tmp_path, cache, streaming):
    rows = [{"image": str(file), "label": i % 2} for i, file in enumerate(real_image_files[:4])]
    dataset = (
        Dataset.from_list(rows).cast_column("image", ImageFeature()).cast_column("label", ClassLabel(names=["b", "a"]))
    )
    dataset.save_to_disk(tmp_path / "one")
    DatasetDict({"train": dataset, "test": dataset.select([3])}).save_to_disk(tmp_path / "several")
    for name, split, count in (("one", "train", 4), ("several", "train", 4), ("several", "test", 1)):
        data = load_image_data(tmp_path / name, split, streaming, cache_dir=cache)
        assert len(list(data.dataset)) == count == data.num_rows and data.class_names == ["b", "a"]


def test_classes_follow_numbers():
    assert sort_class_names(["10", "9", "-1", "2"]) == ["-1", "2", "9", "10"]
    assert sort_class_names(["01", "1", "2"]) == ["01", "1", "2"]
    assert sort_class_names(["10", "9", "b"]) == ["10", "9", "b"]
    assert sort_class_names(["²", "10", "9"]) == ["10", "9", "²"]


@pytest.mark.parametrize("kind", ["folders", "texts", "integers"])
def test_ids_follow_numbers_wherever_they_stand(real_image_files, tmp_path, cache, put, kind):
    names = ["10", "9", "1", "2"]
    columns = {}
    if kind == "folders":
        put(*(tmp_path / "d" / name / "1.png" for name in names))
    else:
        labels = names if kind == "texts" else [int(name) for name in names]
        write_parquet(real_image_files[:4], tmp_path / "d", labels)
        columns = {"image_column": "picture", "label_column": "kind"}
    data = load(tmp_path / "d", cache, **columns)
    assert data.class_names == ["1", "2", "9", "10"]
    assert sorted(data.class_id(row, 0) for row in data.dataset) == [0, 1, 2, 3]
    # A model's order wins, if it is of the same classes.
    kept = load(tmp_path / "d", cache, class_order=["1", "10", "2", "9"], **columns)
    assert kept.class_names == ["1", "10", "2", "9"]
    for row in data.dataset:
        assert kept.class_names[kept.class_id(row, 0)] == data.class_names[data.class_id(row, 0)]
    assert load(tmp_path / "d", cache, class_order=["1", "10", "2"], **columns).class_names == data.class_names
