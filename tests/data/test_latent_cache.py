import json
import shutil
import threading
import time
from collections import Counter
from dataclasses import replace
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from diffusers_pisdm.data.batches import TrainingBatches, validation_batches
from diffusers_pisdm.data.image_pyramid import image_pyramid
from diffusers_pisdm.data.image_rows import ImageRows
from diffusers_pisdm.data.image_transform import ImageTransform
from diffusers_pisdm.data.latent_cache import CacheIndex, LatentCache, find_shard_fault, shard_path
from diffusers_pisdm.data.latent_cache_writer import vae_fingerprint, write_latent_cache
from diffusers_pisdm.data.rows import BadImageError, DataError
from diffusers_pisdm.models.latents import encode_moments
from tests.data.image_folders import copy_folder, damaged_images, load
from tests.models.tiny_vae import make_dc, make_kl, make_tiny


NUM_ROWS = 12
SIZES = [4, 8]  # 16 and 32 pixels


@pytest.fixture
def images(real_image_files, tmp_path):
    return copy_folder(real_image_files[::4], tmp_path / "images")


@pytest.fixture
def vae():
    torch.manual_seed(0)
    return make_kl(scaling_factor=0.5, shift_factor=0.1).eval()


def make_rows(images, on_bad_image="stop", **transform):
    return ImageRows(load(images, images.parent / "cache"), ImageTransform(32, **transform), on_bad_image)


def make_index(rows, vae, **changes):
    index = CacheIndex(
        dataset="images",
        split="train",
        num_images=NUM_ROWS,
        class_names=rows.data.class_names,
        image_size=32,
        stage_sizes=SIZES,
        channels=4,
        vae="tiny",
        vae_class=type(vae).__name__,
        vae_sha256=vae_fingerprint(vae),
        vae_dtype="float32",
        has_std=hasattr(vae, "quant_conv"),
        has_flips=True,
        dtype="float32",
        images_per_shard=5,
    )
    return replace(index, **changes)


def write(images, vae, folder, on_bad_image="stop", num_workers=0, report=print, **changes):
    rows = make_rows(images, on_bad_image)
    index = make_index(rows, vae, **changes)
    write_latent_cache(rows, vae, index, folder, Accelerator(cpu=True), 3, num_workers, report)
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@torch.no_grad()
def moments(rows, vae, flipped=False):
    """Encoded one by one: mean and deviation of each stage."""
    pixels = torch.stack([rows.read(row, 0, 0).images for row in range(NUM_ROWS)]).float() / 127.5 - 1
    pyramid = image_pyramid(pixels.flip(-1) if flipped else pixels, [4 * size for size in SIZES])
    return [encode_moments(vae, level) for level in pyramid]


@pytest.mark.parametrize("make_vae", [make_kl, make_tiny, make_dc])
def test_the_cache_holds_what_the_autoencoder_makes_of_the_images(images, tmp_path, make_vae):
    torch.manual_seed(0)
    vae = make_vae(scaling_factor=0.5).eval()
    rows = make_rows(images)
    folder = write(images, vae, tmp_path / "latents", num_workers=2)
    assert sorted(contents(folder)) == ["index.json", *(f"shard-0000{i}.safetensors" for i in range(3))]
    shards = [load_file(shard_path(folder, i)) for i in range(3)]
    found = {name: torch.cat([shard[name] for shard in shards]) for name in shards[0]}
    for suffix in ("", ".flipped"):
        for stage, (mean, std) in enumerate(moments(rows, vae, suffix == ".flipped"), start=1):
            torch.testing.assert_close(found.pop(f"stage_{stage}.mean{suffix}"), mean, atol=1e-5, rtol=1e-4)
            if std is not None:
                torch.testing.assert_close(found.pop(f"stage_{stage}.std{suffix}"), std, atol=1e-5, rtol=1e-4)
    assert found.pop("labels").tolist() == [rows.read(row, 0, 0).label for row in range(NUM_ROWS)]
    assert found == {}


def test_rows_are_drawn_from_the_cached_distribution(images, tmp_path, vae):
    cache = LatentCache(write(images, vae, tmp_path / "latents"))
    rows = make_rows(images)
    assert len(cache) == NUM_ROWS and cache.class_names == rows.data.class_names
    expected = moments(rows, vae)
    noise = []
    for i in range(NUM_ROWS):
        row = cache.read(i, epoch=1, seed=2)
        assert row.label == rows.read(i, 0, 0).label
        for latents, (mean, std), size in zip(row.images, expected, SIZES):
            assert latents.shape == (4, size, size) and latents.dtype == torch.float32
            noise.append(((latents - mean[i]) / std[i]).flatten())
    noise = torch.cat(noise)
    assert abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.1
    again, later = cache.read(3, 1, 2).images[1], cache.read(3, 2, 2).images[1]
    assert torch.equal(again, cache.read(3, 1, 2).images[1])
    assert not torch.equal(again, later)


def test_mirrored_images_come_half_of_the_time(images, tmp_path):
    torch.manual_seed(0)
    vae = make_tiny().eval()
    folder = write(images, vae, tmp_path / "latents")
    plain, random = LatentCache(folder), LatentCache(folder, random_flip=True)
    assert random.is_random and not plain.is_random
    (_, _), (flipped, _) = moments(make_rows(images), vae, flipped=True)
    counts = Counter()
    for epoch in range(4):
        for row in range(NUM_ROWS):
            latents, unflipped = random.read(row, epoch, 0).images[1], plain.read(row, epoch, 0).images[1]
            mirrored = not torch.equal(latents, unflipped)
            counts[mirrored] += 1
            if mirrored:
                torch.testing.assert_close(latents, flipped[row], atol=1e-5, rtol=1e-4)
    assert 14 < counts[True] < 34


@pytest.mark.parametrize("harm", ["remove", "cut", "empty"])
def test_an_interrupted_cache_is_completed_to_the_same_bytes(images, tmp_path, vae, harm):
    whole = contents(write(images, vae, tmp_path / "latents"))
    last = shard_path(tmp_path / "latents", 2)
    if harm == "remove":
        last.unlink()
        last.with_name(f"{last.name}.unfinished").write_bytes(b"half a file")
    else:
        last.write_bytes(last.read_bytes()[: -100 if harm == "cut" else 0])
    with pytest.raises(DataError, match=r"1 of 3 files .*: shard-00002.*Rerun .*pisdm cache-latents"):
        LatentCache(tmp_path / "latents")
    untouched = shard_path(tmp_path / "latents", 0).stat().st_mtime_ns
    assert contents(write(images, vae, tmp_path / "latents")) == whole
    assert shard_path(tmp_path / "latents", 0).stat().st_mtime_ns == untouched


def test_processes_write_the_same_files(images, tmp_path, vae):
    alone = contents(write(images, vae, tmp_path / "alone"))
    barrier = threading.Barrier(2, timeout=60)
    failures = []

    def run(process):
        def wait():
            barrier.wait()
            time.sleep(0.5 * process)  # the second must not see what the first has written meanwhile

        accelerator = SimpleNamespace(
            process_index=process,
            num_processes=2,
            is_main_process=process == 0,
            is_local_main_process=False,
            wait_for_everyone=wait,
        )
        try:
            rows = make_rows(images)
            write_latent_cache(rows, vae, make_index(rows, vae), tmp_path / "pair", accelerator, 3)
        except Exception as error:
            failures.append(error)
            barrier.abort()

    processes = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert failures == []
    assert contents(tmp_path / "pair") == alone


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stage_sizes": [2, 8]}, r"stage_sizes was \[4, 8\], is \[2, 8\]"),
        ({"has_flips": False}, "has_flips was True, is False"),
        ({"vae_sha256": "0"}, "vae_sha256 was .*, is 0"),
        ({"images_per_shard": 4, "dtype": "bfloat16"}, "dtype was float32, is bfloat16; images_per_shard was 5, is 4"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_other_settings_are_refused(images, tmp_path, vae, changes, message):
    before = contents(write(images, vae, tmp_path / "latents"))
    with pytest.raises(DataError, match=message):
        write(images, vae, tmp_path / "latents", **changes)
    assert contents(tmp_path / "latents") == before


def test_the_fingerprint_is_of_weights_and_configuration(vae):
    same = make_kl(scaling_factor=0.5, shift_factor=0.1)
    same.load_state_dict(vae.state_dict())
    assert vae_fingerprint(same) == vae_fingerprint(vae)
    with torch.no_grad():
        next(same.parameters()).add_(1e-3)
    assert vae_fingerprint(same) != vae_fingerprint(vae)
    scaled = make_kl(scaling_factor=0.25, shift_factor=0.1)
    scaled.load_state_dict(vae.state_dict())
    assert vae_fingerprint(scaled) != vae_fingerprint(vae)


def test_other_latents_are_told_by_their_file(images, tmp_path, vae):
    cache = LatentCache(write(images, vae, tmp_path / "latents"))
    before, file = cache.fingerprint(), shard_path(tmp_path / "latents", 1)
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)
    assert [name for name, digest in cache.fingerprint().items() if before[name] != digest] == [file.name]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_takes_half_the_space(images, tmp_path, vae, dtype):
    full = LatentCache(write(images, vae, tmp_path / "full"))
    half = LatentCache(write(images, vae, tmp_path / "half", dtype=dtype))
    for one, other in zip(full.read(5, 0, 0).images, half.read(5, 0, 0).images):
        assert other.dtype == torch.float32
        torch.testing.assert_close(other, one, atol=0.02, rtol=0.02)
    sizes = [shard_path(cache.folder, 0).stat().st_size for cache in (full, half)]
    assert sizes[1] < 0.6 * sizes[0]


def test_bad_images_are_replaced_and_reported(images, tmp_path, vae):
    file = sorted(images.glob("*/*.png"))[4]  # the last of its shard
    file.write_bytes(damaged_images(file.read_bytes())["truncated"])
    with pytest.raises(BadImageError, match=file.name):
        write(images, vae, tmp_path / "latents")
    reports = []
    cache = LatentCache(write(images, vae, tmp_path / "latents", "skip", report=reports.append))
    assert len(reports) == 1 and str(file) in reports[0]
    shards = [load_file(shard_path(cache.folder, i)) for i in range(2)]
    torch.testing.assert_close(shards[0]["stage_2.mean"][4], shards[1]["stage_2.mean"][0], atol=1e-5, rtol=1e-4)
    assert cache.read(4, 0, 0).label == cache.read(5, 0, 0).label


def test_latents_that_are_not_finite_are_an_error(images, tmp_path):
    vae = make_kl(scaling_factor=1e6).eval()
    with pytest.raises(DataError, match=r"stage 1 are not finite.*--latent_dtype"):
        write(images, vae, tmp_path / "latents", dtype="float16")


def test_images_must_not_be_random_nor_of_another_size(images, tmp_path, vae):
    random = make_rows(images, random_flip=True)
    small = ImageRows(random.data, ImageTransform(16))
    for rows in (random, small):
        with pytest.raises(DataError, match="32 pixels per side"):
            write_latent_cache(rows, vae, make_index(rows, vae), tmp_path / "latents", Accelerator(cpu=True))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_batches_come_from_a_cache(images, tmp_path, vae, num_workers):
    cache = LatentCache(write(images, vae, tmp_path / "latents"), random_flip=True)
    through = TrainingBatches(cache, 5, seed=1, num_workers=num_workers)
    expected = list(islice(TrainingBatches(cache, 5, seed=1), 4))
    next(through)
    state = json.loads(json.dumps(through.state_dict()))
    resumed = TrainingBatches(cache, 5, seed=1, num_workers=num_workers)
    resumed.load_state_dict(state)
    for batch, other in zip(expected[1:], resumed):
        assert [latents.shape for latents in batch.images] == [(5, 4, 4, 4), (5, 4, 8, 8)]
        assert all(torch.equal(a, b) for a, b in zip(batch.images, other.images))
        assert torch.equal(batch.labels, other.labels)


def test_held_out_latents_are_the_same_every_time(images, tmp_path, vae):
    cache = LatentCache(write(images, vae, tmp_path / "latents"))
    first, second = (torch.cat([batch.images[1] for batch in validation_batches(cache, 5)]) for _ in range(2))
    assert first.shape == (NUM_ROWS, 4, 8, 8) and torch.equal(first, second)


def test_a_cache_must_fit_the_cascade(images, tmp_path, vae):
    cache = LatentCache(write(images, vae, tmp_path / "latents"))
    cache.check_stages(SIZES, 4)
    for sizes, channels in (([4, 16], 4), ([8], 4), (SIZES, 16)):
        with pytest.raises(DataError, match=r"4 channels and sizes \[4, 8\]; the cascade needs"):
            cache.check_stages(sizes, channels)


def test_a_folder_without_a_cache_is_an_error(images, tmp_path, vae):
    with pytest.raises(DataError, match=r"not a latent cache.*pisdm cache-latents"):
        LatentCache(tmp_path)
    folder = write(images, vae, tmp_path / "latents", has_flips=False)
    with pytest.raises(DataError, match=r"no mirrored images: .*--random_flip"):
        LatentCache(folder, random_flip=True)
    (folder / "index.json").write_text('{"dataset": "images"}')
    with pytest.raises(DataError, match="not a latent cache"):
        LatentCache(folder)


def test_files_of_another_cache_are_found(images, tmp_path, vae):
    folder = write(images, vae, tmp_path / "latents")
    other = write(images, vae, tmp_path / "other", dtype="float16")
    shutil.copy(shard_path(other, 1), shard_path(folder, 1))
    assert (
        find_shard_fault(folder, CacheIndex.read(folder), 1)
        == "shard-00001.safetensors does not hold the latents that index.json lists"
    )
