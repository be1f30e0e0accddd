"""Encodes a data set once, for [`LatentCache`]."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny
from safetensors.torch import save_file
from tqdm.auto import tqdm

from ..models.latents import encode_moments, vae_scale_factor
from ..utils.files import write_whole
from .batches import read_rows
from .image_pyramid import image_pyramid
from .image_rows import ImageRows
from .latent_cache import DTYPES, INDEX_FILE, CacheIndex, find_shard_fault, shard_path, tensor_name
from .parallel_read import read_batches
from .rows import DataError, TrainingBatch


def vae_fingerprint(vae: AutoencoderKL | AutoencoderTiny | AutoencoderDC) -> str:
    """A SHA-256 of an autoencoder's configuration and weights."""
    config = {name: value for name, value in vae.config.items() if not name.startswith("_")}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def write_latent_cache(
    rows: ImageRows,
    vae: AutoencoderKL | AutoencoderTiny | AutoencoderDC,
    index: CacheIndex,
    folder: str | Path,
    accelerator: Accelerator,
    batch_size: int = 64,
    num_workers: int = 0,
    report: Callable[[str], None] = tqdm.write,
) -> None:
    """
    Encodes every image at every stage's size and writes the latents to `folder`. Raises DataError if the folder holds
    a cache made with other settings, the rows do not fit, or latents are not finite.

    Every process must call it: each writes its own shards, atomically, and existing complete shards are kept. `rows`
    must be at `index.image_size`, not a stream, and without random crop or flip; `report` is called with each bad
    image that was replaced.
    """
    folder = Path(folder)
    factor = vae_scale_factor(vae)
    if rows.is_stream or rows.is_random or rows.transform.size != factor * max(index.stage_sizes):
        raise DataError(
            "A cache needs images that can be read in any order, are not randomly cropped or flipped, and have"
            f" {factor * max(index.stage_sizes)} pixels per side."
        )
    if (folder / INDEX_FILE).exists():
        _check_same(CacheIndex.read(folder), index, folder)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        index.write(folder)
    missing = [shard for shard in range(index.num_shards) if find_shard_fault(folder, index, shard) is not None]
    accelerator.wait_for_everyone()  # all processes must see the same shards before any writes
    own = missing[accelerator.process_index :: accelerator.num_processes]

    keys = ([(row, 0) for row in batch] for shard in own for batch in _batches(index, shard, batch_size))
    batches = read_batches(partial(read_rows, rows, 0), keys, num_workers)
    with tqdm(
        desc=f"{len(missing)} of {index.num_shards} files",
        total=sum(len(index.shard_rows(shard)) for shard in own),
        unit="image",
        disable=not accelerator.is_local_main_process,
    ) as progress:
        for shard in own:
            count = len(list(_batches(index, shard, batch_size)))
            parts = [_encode(batch, vae, index) for batch in _watched(islice(batches, count), progress, report)]
            tensors = {name: torch.cat([part[name] for part in parts]).contiguous() for name in parts[0]}
            with write_whole(shard_path(folder, shard)) as unfinished:
                save_file(tensors, unfinished)
    accelerator.wait_for_everyone()


def _check_same(found: CacheIndex, wanted: CacheIndex, folder: Path) -> None:
    found, wanted = asdict(found), asdict(wanted)
    changed = [f"{name} was {found[name]}, is {wanted[name]}" for name in wanted if found[name] != wanted[name]]
    if changed:
        raise DataError(
            f"{folder} holds a cache made with other settings: {'; '.join(changed)}. Use another --output_dir, remove"
            " this cache, or use its settings."
        )


def _batches(index: CacheIndex, shard: int, batch_size: int) -> Iterator[range]:
    """
    The rows of a shard in batches, the same wherever a run resumes: latents differ in their last bits between batch
    sizes.
    """
    rows = index.shard_rows(shard)
    return (rows[start : start + batch_size] for start in range(0, len(rows), batch_size))


def _watched(
    batches: Iterator[TrainingBatch], progress: tqdm, report: Callable[[str], None]
) -> Iterator[TrainingBatch]:
    for batch in batches:
        for bad_image in batch.bad_images:
            report(bad_image)
        yield batch
        progress.update(len(batch.labels))


@torch.no_grad()
def _encode(
    batch: TrainingBatch, vae: AutoencoderKL | AutoencoderTiny | AutoencoderDC, index: CacheIndex
) -> dict[str, torch.Tensor]:
    dtype = DTYPES[index.dtype][0]
    images = batch.images.to(vae.device).float() / 127.5 - 1.0  # (B, 3, H, W)
    factor = vae_scale_factor(vae)
    encoded = {"labels": batch.labels}
    for stage, image in enumerate(image_pyramid(images, [factor * size for size in index.stage_sizes])):
        for flipped in (False, True) if index.has_flips else (False,):
            moments = encode_moments(vae, image.flip(-1) if flipped else image)
            for part, values in zip(("mean", "std") if index.has_std else ("mean",), moments):
                values = values.to(dtype)
                if not values.isfinite().all():
                    raise DataError(
                        f"Latents of stage {stage + 1} are not finite: the autoencoder computes in {index.vae_dtype}"
                        f" and its latents are stored as {index.dtype}; choose a wider --vae_dtype or --latent_dtype."
                    )
                encoded[tensor_name(stage, part, flipped)] = values.cpu()  # (B, C, H_s, W_s)
    return encoded
