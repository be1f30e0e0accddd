import os
import resource
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image

from diffusers_pisdm import PISDMCascadePipeline
from diffusers_pisdm.evaluation import (
    SampleSettings,
    missing_samples,
    read_sample_set,
    sample_classes,
    write_sample_archive,
    write_sample_set,
)
from diffusers_pisdm.evaluation.samples.files import sample_path
from tests.pipelines.tiny_cascade import make_cascade, make_transformer
from tests.pipelines.tiny_dit import make_dit


CHECKPOINT = Path(__file__).parents[3] / "checkpoints" / "pisdm-emoji128"
SETTINGS = SampleSettings(num_samples=7, seed=3, num_inference_steps=2)


@pytest.fixture(scope="module")
def pipe():
    return make_cascade(2)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def pixels(folder):
    num_samples = read_sample_set(folder)["settings"]["num_samples"]
    images = []
    for index in range(num_samples):
        with Image.open(sample_path(folder, index)) as image:
            images.append(np.asarray(image).astype(int))
    return np.stack(images)  # (N, H, W, C)


@pytest.fixture(scope="module")
def whole(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    write_sample_set(pipe, folder, SETTINGS, batch_size=2)
    return folder


def test_samples_and_their_record_are_written(whole):
    names = {f"000/{index:06d}.png" for index in range(7)}
    assert {str(path) for path in contents(whole)} == names | {"sample_set.json"}
    assert missing_samples(whole) == []
    assert pixels(whole).shape == (7, 16, 16, 3)
    assert len({image.tobytes() for image in pixels(whole)}) == 7


@pytest.mark.parametrize("num_processes", [2, 3, 5])
def test_any_number_of_processes_writes_the_same_files(pipe, whole, tmp_path, num_processes):
    for index in reversed(range(num_processes)):
        write_sample_set(pipe, tmp_path, SETTINGS, 2, index, num_processes)
    assert contents(tmp_path) == contents(whole)


def test_no_two_processes_draw_the_same_sample(pipe, whole, tmp_path):
    shares = []
    for index in range(3):
        write_sample_set(pipe, tmp_path / str(index), SETTINGS, 2, index, 3)
        shares.append(contents(tmp_path / str(index)))
        shares[-1].pop(Path("sample_set.json"))
    assert [len(share) for share in shares] == [3, 2, 2]  # of the batches of 2, 2, 2 and 1
    together = shares[0] | shares[1] | shares[2]
    assert together == {path: content for path, content in contents(whole).items() if path.suffix == ".png"}


@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_another_batch_size_changes_no_more_than_the_rounding(pipe, whole, tmp_path, batch_size):
    write_sample_set(pipe, tmp_path, SETTINGS, batch_size)
    assert abs(pixels(tmp_path) - pixels(whole)).max() <= 1


def test_the_published_checkpoint_draws_the_same_in_any_batch(tmp_path):
    pipe = PISDMCascadePipeline.from_pretrained(CHECKPOINT)
    settings = SampleSettings(num_samples=4, num_inference_steps=2)
    for batch_size in (1, 4):
        write_sample_set(pipe, tmp_path / str(batch_size), settings, batch_size)
    one, four = pixels(tmp_path / "1"), pixels(tmp_path / "4")
    assert one.shape == (4, 128, 128, 3) and one.std() > 20
    assert abs(one - four).max() <= 1


def test_a_sample_is_of_its_class_and_noise(pipe, whole):
    """What a caller of the pipeline would draw for sample 5, by hand."""
    from diffusers_pisdm.evaluation.samples.settings import sample_generators

    label = sample_classes(SETTINGS, 10)[5]
    generator = sample_generators(3, [5])
    image = pipe(class_labels=[label], generator=generator, num_inference_steps=2).images[0]
    assert abs(np.asarray(image).astype(int) - pixels(whole)[5]).max() <= 1


def test_what_is_there_is_kept_and_what_is_damaged_is_drawn_again(pipe, whole, tmp_path):
    write_sample_set(pipe, tmp_path, SETTINGS, 2)
    kept = sample_path(tmp_path, 1)
    os.utime(kept, (1, 1))
    sample_path(tmp_path, 0).unlink()
    truncated = sample_path(tmp_path, 4)
    truncated.write_bytes(truncated.read_bytes()[:-30])
    left_behind = sample_path(tmp_path, 0).with_name("000000.png.unfinished")  # by a killed process
    left_behind.write_bytes(b"half")
    assert missing_samples(tmp_path) == [0, 4]
    write_sample_set(pipe, tmp_path, SETTINGS, 2)
    assert contents(tmp_path) == contents(whole)
    assert kept.stat().st_mtime == 1


def test_a_complete_set_is_not_drawn_again(pipe, whole, monkeypatch):
    monkeypatch.setattr(type(pipe), "predict", lambda *_: pytest.fail("drew"))
    before = contents(whole)
    write_sample_set(pipe, whole, SETTINGS, batch_size=4, process_index=1, num_processes=2)
    assert contents(whole) == before


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"seed": 4}, "settings.seed was 3, is 4"),
        ({"num_samples": 8}, "settings.num_samples was 7, is 8"),
        ({"num_samples": 6}, "settings.num_samples was 7, is 6"),
        ({"classes": [1, 2]}, r"settings.classes was 'balanced', is \[1, 2\]"),
        ({"guidance_scale": 2.0}, "settings.guidance_scale was 4.0, is 2.0"),
        ({"num_inference_steps": [2, 2]}, r"settings.num_inference_steps was 2, is \[2, 2\]"),
        ({"scheduler": "DDIMScheduler"}, "schedulers.scheduler._class_name was 'DPMSolver.*', is 'DDIMScheduler'"),
    ],
)
def test_a_folder_of_other_settings_is_refused(pipe, whole, changes, message):
    before = contents(whole)
    settings = SampleSettings(**{"num_samples": 7, "seed": 3, "num_inference_steps": 2, **changes})
    with pytest.raises(ValueError, match=f"made differently: .*{message}.*Use another folder"):
        write_sample_set(pipe, whole, settings, 2)
    assert contents(whole) == before


def test_a_folder_of_another_model_is_refused(pipe, whole):
    other = make_cascade(2, transformer=make_transformer(3, sample_size=8, low_res_channels=None))
    with pytest.raises(ValueError, match=r"model.sha256 was '\w+...\w+', is '\w+...\w+'"):
        write_sample_set(other, whole, SETTINGS, 2)


def test_defaults_that_are_spelt_out_are_the_same_settings(pipe, whole):
    before = contents(whole)
    settings = SampleSettings(7, 3, num_inference_steps=2, guidance_scale=4, scheduler=type(pipe.scheduler).__name__)
    write_sample_set(pipe, whole, settings, 2)
    assert contents(whole) == before


def test_settings_that_the_pipeline_refuses_do_not_bind_the_folder(pipe, tmp_path):
    with pytest.raises(ValueError, match=r"`noise_level` has to be in \[0, 1\) but is 2"):
        write_sample_set(pipe, tmp_path, SampleSettings(1, noise_level=2.0), 1)
    with pytest.raises(ValueError, match="for flow matching"):
        write_sample_set(pipe, tmp_path, SampleSettings(1, scheduler="FlowMatchEulerDiscreteScheduler"), 1)
    write_sample_set(pipe, tmp_path, SampleSettings(1, num_inference_steps=1), 1)
    assert missing_samples(tmp_path) == []


@pytest.mark.parametrize(
    "settings, options, message",
    [
        ({"classes": [10]}, {}, "`classes` contains 10, but this model's classes are 0 to 9"),
        ({"scheduler": "DDIMSchedular"}, {}, "diffusers has no scheduler `DDIMSchedular`"),
        ({}, {"batch_size": 0}, "`batch_size` has to be at least 1 but is 0"),
        ({}, {"process_index": 2, "num_processes": 2}, "`process_index` has to be from 0 to 1 but is 2"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(pipe, tmp_path, settings, options, message):
    with pytest.raises(ValueError, match=message):
        write_sample_set(pipe, tmp_path / "new", SampleSettings(2, **settings), **options)
    assert list(tmp_path.iterdir()) == []


def test_the_pipeline_stays_as_it_was(tmp_path, capfd):
    pipe = make_cascade(2, scheduler_2=DDIMScheduler())
    pipe.set_progress_bar_config(desc="mine")
    schedulers = pipe.scheduler, pipe.scheduler_2
    settings = SampleSettings(2, num_inference_steps=1, scheduler="EulerDiscreteScheduler")
    write_sample_set(pipe, tmp_path, settings)
    recorded = read_sample_set(tmp_path)["schedulers"]
    assert [config["_class_name"] for config in recorded.values()] == ["EulerDiscreteScheduler"] * 2
    assert (pipe.scheduler, pipe.scheduler_2) == schedulers
    assert pipe.config.scheduler[1] == "DPMSolverMultistepScheduler"
    bars = capfd.readouterr().err
    assert "samples" in bars and "mine" not in bars
    pipe(class_labels=0, num_inference_steps=1)
    assert "mine" in capfd.readouterr().err


def test_one_process_shows_a_bar(pipe, tmp_path, capfd):
    settings = SampleSettings(2, num_inference_steps=1)
    write_sample_set(pipe, tmp_path, settings, 1, 1, 2)
    assert capfd.readouterr().err == ""
    write_sample_set(pipe, tmp_path, settings, 1, 0, 2)
    assert "samples (process 1 of 2): 100%" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["cat.png", "000/000007.png"])
def test_foreign_images_are_refused(pipe, whole, name):
    foreign = whole / name
    foreign.write_bytes(sample_path(whole, 0).read_bytes())
    try:
        for check in (lambda: write_sample_set(pipe, whole, SETTINGS, 2), lambda: missing_samples(whole)):
            with pytest.raises(ValueError, match=f"not among its 7 samples: {foreign}"):
                check()
    finally:
        foreign.unlink()


def test_images_without_a_record_are_refused(pipe, real_image_dir, tmp_path):
    (tmp_path / "lion.png").write_bytes((real_image_dir / "animal-mammal" / "1f981.png").read_bytes())
    with pytest.raises(ValueError, match=r"holds images, such as .*lion.png, but no sample_set.json"):
        write_sample_set(pipe, tmp_path, SETTINGS)
    assert [path.name for path in tmp_path.iterdir()] == ["lion.png"]


def test_images_of_another_size_are_told(pipe, tmp_path):
    settings = SampleSettings(4, num_inference_steps=1)
    write_sample_set(pipe, tmp_path, settings, 2)
    for index in (0, 1):
        Image.new("RGB", (8, 8)).save(sample_path(tmp_path, index))
    for check in (lambda: write_sample_set(pipe, tmp_path, settings, 2), lambda: missing_samples(tmp_path)):
        with pytest.raises(ValueError, match=r"000000.png has 8x8 pixels, .*000002.png has 16x16"):
            check()
    for index in (2, 3):
        sample_path(tmp_path, index).unlink()
    with pytest.raises(ValueError, match="have 8x8 pixels, but this model makes 16x16"):
        write_sample_set(pipe, tmp_path, settings, 2)


def test_a_full_disk_is_told_and_what_was_drawn_stays(pipe, whole, tmp_path):
    sizes = [sample_path(whole, index).stat().st_size for index in range(7)]
    record = (whole / "sample_set.json").stat().st_size
    assert record > max(sizes)  # so this limit is met by the record first
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit, file in ((record - 1, "sample_set.json"), (min(sizes) - 1, "000000.png")):
        if file == "000000.png":
            write_sample_set(pipe, tmp_path, SETTINGS, 2, 1, 4)  # samples 2 and 3
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(OSError, match=f"Cannot write .*{file}: .*Free up space"):
                write_sample_set(pipe, tmp_path, SETTINGS, 2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert missing_samples(tmp_path) == [0, 1, 4, 5, 6]
    write_sample_set(pipe, tmp_path, SETTINGS, 2)
    assert contents(tmp_path) == contents(whole)


def test_a_place_that_cannot_be_a_folder_is_told(pipe, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"Cannot write .*sample_set.json"):
        write_sample_set(pipe, tmp_path / "file", SETTINGS)


def test_pixels_that_are_no_numbers_are_told(tmp_path):
    pipe = make_cascade(1)
    with torch.no_grad():
        pipe.transformer.class_embedding.weight[4] = torch.nan
    with pytest.raises(ValueError, match=r"Sample 1 .*not finite.*bfloat16"):
        write_sample_set(pipe, tmp_path, SampleSettings(3, classes=[4], num_inference_steps=1), 1, 1, 2)
    assert missing_samples(tmp_path) == [0, 1, 2]


def test_a_dit_is_sampled_too(tmp_path):
    pipe = make_dit()
    settings = SampleSettings(5, num_inference_steps=2, guidance_scale=1.5)
    for name, batch_size, num_processes in (("a", 2, 1), ("b", 2, 2), ("c", 5, 1)):
        for index in range(num_processes):
            write_sample_set(pipe, tmp_path / name, settings, batch_size, index, num_processes)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert abs(pixels(tmp_path / "a") - pixels(tmp_path / "c")).max() <= 1
    record = read_sample_set(tmp_path / "a")
    assert (record["num_classes"], record["settings"]["noise_level"]) == (1000, None)


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
        with pytest.raises(OSError, match=f"Cannot write {path}: .*Free up space"):
            write_sample_archive(folder, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [file.name for file in tmp_path.iterdir()] == ["samples.npz"]
    assert path.read_bytes() == b"old"
