import resource
import shutil
import zipfile

import numpy as np
import pytest
from PIL import Image

from diffusers_pisdm.evaluation import SampleSettings, write_sample_archive, write_sample_set
from diffusers_pisdm.evaluation.sample_files import sample_path
from tests.pipelines.tiny_cascade import make_cascade


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("set")
    write_sample_set(make_cascade(1), folder, SampleSettings(5, num_inference_steps=1))
    return folder


@pytest.fixture(scope="module")
def expected(folder):
    images = []
    for index in range(5):
        with Image.open(sample_path(folder, index)) as image:
            images.append(np.asarray(image))
    return np.stack(images)


def test_images_are_in_their_order(folder, expected, tmp_path):
    write_sample_archive(folder, tmp_path / "new" / "samples.npz")
    with np.load(tmp_path / "new" / "samples.npz", allow_pickle=False) as arrays:
        assert list(arrays) == ["arr_0"]
        assert arrays["arr_0"].dtype == np.uint8
        assert np.array_equal(arrays["arr_0"], expected)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["samples.npz"]


def test_adms_evaluator_can_stream_it(folder, expected, tmp_path):
    """What that does with `arr_0`: a header of version 1 or 2, then batches of bytes."""
    write_sample_archive(folder, tmp_path / "samples.npz", show_progress=False)
    with zipfile.ZipFile(tmp_path / "samples.npz") as archive, archive.open("arr_0.npy") as array:
        assert archive.getinfo("arr_0.npy").compress_type == zipfile.ZIP_STORED
        assert np.lib.format.read_magic(array) == (1, 0)
        assert np.lib.format.read_array_header_1_0(array) == ((5, 8, 8, 3), False, np.uint8)
        for start in (0, 2, 4):
            batch = expected[start : start + 2]
            assert array.read(batch.size) == batch.tobytes()
        assert array.read() == b""


def test_the_same_samples_make_the_same_file(folder, tmp_path):
    for name in ("a", "b"):
        write_sample_archive(folder, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_an_incomplete_set_is_not_packed(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "set")
    sample_path(tmp_path / "set", 3).write_bytes(b"half")
    sample_path(tmp_path / "set", 4).unlink()
    with pytest.raises(ValueError, match=r"2 of the 5 samples of .* are missing, the first is .*000003.png"):
        write_sample_archive(tmp_path / "set", tmp_path / "samples.npz")
    assert not (tmp_path / "samples.npz").exists()


def test_a_full_disk_leaves_the_old_file(folder, tmp_path):
    path = tmp_path / "samples.npz"
    path.write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
    try:
        with pytest.raises(OSError, match=f"Cannot write {path}: .*Make room"):
            write_sample_archive(folder, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [file.name for file in tmp_path.iterdir()] == ["samples.npz"]
    assert path.read_bytes() == b"old"
