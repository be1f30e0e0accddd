"""examples/datasets/fashion_mnist.py on small idx files made from the real pictures in tests/data."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
from datasets import load_dataset
from PIL import Image

import fashion_mnist


ROOT = Path(__file__).parents[3]


def write_idx(path: Path, values: np.ndarray) -> None:
    header = struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape)
    path.write_bytes(gzip.compress(header + values.tobytes()))


def real_images() -> np.ndarray:
    """(48, 28, 28) uint8, bright on black as in Fashion-MNIST."""
    paths = sorted((ROOT / "tests" / "data" / "fluent3d").glob("*/*.png"))
    return np.stack([255 - np.asarray(Image.open(path).convert("L").resize((28, 28))) for path in paths])


@pytest.fixture
def idx_dir(tmp_path) -> Path:
    folder = tmp_path / "idx"
    folder.mkdir()
    images = real_images()
    labels = np.arange(len(images), dtype=np.uint8) % 10
    for prefix, part in (("train", slice(0, 40)), ("t10k", slice(40, None))):
        write_idx(folder / f"{prefix}-images-idx3-ubyte.gz", images[part])
        write_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", labels[part])
    return folder


def run_main(idx_dir: Path, output_dir: Path, *arguments: str) -> None:
    fashion_mnist.main(["--idx_dir", str(idx_dir), "--output_dir", str(output_dir), *arguments])


@pytest.mark.parametrize(("resolution", "border"), [(28, 0), (32, 2)])
def test_pictures_labels_and_border(idx_dir, tmp_path, resolution, border, capsys):
    run_main(idx_dir, tmp_path / "out", "--resolution", str(resolution))
    data = load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    assert {split: len(data[split]) for split in data} == {"train": 40, "test": 8}
    assert data["train"].features["label"].names == list(fashion_mnist.NAMES)
    assert data["test"]["label"] == [index % 10 for index in range(40, 48)]
    expected = np.pad(real_images(), ((0, 0), (border, border), (border, border)))
    found = np.stack([np.asarray(image) for split in data for image in data[split]["image"]])
    np.testing.assert_array_equal(found, expected)
    assert "Zalando" in capsys.readouterr().out
    assert "MIT" in (tmp_path / "out" / "LICENSES.md").read_text()


def test_imagefolder_keeps_the_pictures_of_each_class(idx_dir, tmp_path):
    run_main(idx_dir, tmp_path / "out", "--format", "imagefolder")
    data = load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    names = data["train"].features["label"].names
    assert sorted(names) == sorted(fashion_mnist.NAMES)
    images = np.pad(real_images(), ((0, 0), (2, 2), (2, 2)))
    for split, part in (("train", range(40)), ("test", range(40, 48))):
        expected = {(fashion_mnist.NAMES[index % 10], images[index].tobytes()) for index in part}
        assert {(names[row["label"]], np.asarray(row["image"]).tobytes()) for row in data[split]} == expected


def test_a_missing_folder_says_what_to_install(tmp_path):
    with pytest.raises(SystemExit, match=r"nowhere.*does not exist.*apt install dataset-fashion-mnist.*--idx_dir"):
        run_main(tmp_path / "nowhere", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def damage_gzip(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def damage_magic(path: Path) -> None:
    path.write_bytes(gzip.compress(b"\x89PNG" + bytes(100)))


def damage_length(path: Path) -> None:
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-1]))


def damage_header(path: Path) -> None:
    path.write_bytes(gzip.compress(b"\x00\x00\x08\x03\x00"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_gzip, "is not a complete gzip file"),
        (damage_magic, "is not an idx file of bytes"),
        (damage_length, "is not an idx file of bytes"),
        (damage_header, "is not an idx file of bytes"),
    ],
)
def test_damaged_files_are_named(idx_dir, tmp_path, damage, message):
    damage(idx_dir / "train-images-idx3-ubyte.gz")
    with pytest.raises(SystemExit, match=rf"train-images-idx3-ubyte\.gz {message}"):
        run_main(idx_dir, tmp_path / "out")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros(39, np.uint8), r"labels \(39,\)"),
        (np.full(40, 10, np.uint8), "up to 10"),
        (np.zeros((40, 1), np.uint8), r"labels \(40, 1\)"),
    ],
)
def test_labels_that_do_not_fit_are_refused(idx_dir, tmp_path, labels, message):
    write_idx(idx_dir / "train-labels-idx1-ubyte.gz", labels)
    with pytest.raises(SystemExit, match=rf"The train files in .* are not Fashion-MNIST: .*{message}"):
        run_main(idx_dir, tmp_path / "out")


def test_the_files_of_another_set_are_refused(idx_dir, tmp_path):
    write_idx(idx_dir / "t10k-images-idx3-ubyte.gz", np.zeros((8, 32, 32), np.uint8))
    with pytest.raises(SystemExit, match=r"The test files in .* are not Fashion-MNIST"):
        run_main(idx_dir, tmp_path / "out")


@pytest.mark.skipif(not fashion_mnist.IDX_DIR.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_debians_files_are_whole():
    images, labels = fashion_mnist.read_split(fashion_mnist.IDX_DIR, "test")
    assert len(images) == 10000
    assert np.bincount(labels).tolist() == [1000] * 10
