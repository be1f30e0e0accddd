"""Draws a model's samples for evaluation, in any number of processes and sessions, and packs them for ADM."""

from __future__ import annotations

import copy
import zipfile
from pathlib import Path

import numpy as np
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from tqdm.auto import tqdm

from ...schedulers import swap_scheduler
from ...utils.files import write_whole
from ...utils.messages import count_of, show_size
from .files import check_no_foreign_images, find_damaged, sample_path
from .record import claim_folder, describe_samples, read_sample_set
from .settings import CALL_ARGUMENTS, SampleSettings, count_classes, sample_classes, sample_generators


def write_sample_set(
    pipe: DiffusionPipeline,
    folder: str | Path,
    settings: SampleSettings,
    batch_size: int = 50,
    process_index: int = 0,
    num_processes: int = 1,
) -> None:
    """
    Draws samples into `folder/000/000000.png` and so on, and records how they were made in `folder/sample_set.json`.
    When called again, it draws only missing or damaged samples. Several processes or machines can share the work by
    writing to one folder, each with its own `process_index`.

    Sample i is the same however the work is split: bit for bit for any number of processes and interruptions, and up
    to the model's rounding (1 of 255 in float32) for another `batch_size`.

    Args:
        pipe ([`DiffusionPipeline`]):
            A class-conditional pipeline: its call takes `class_labels`, a list of generators and
            `output_type="np"`. It is not modified, nor are its schedulers and progress bars.
        folder (`str` or `Path`): The folder, created if necessary.
        settings ([`SampleSettings`]): What to draw.
        batch_size (`int`, defaults to 50): Samples that each process draws at once.
        process_index (`int`, defaults to 0): The index of this process, from 0.
        num_processes (`int`, defaults to 1): The number of processes.

    Raises:
        OSError: The folder is not writable, or the disk is full.
        ValueError: An argument is out of range; the folder holds samples of another model or other settings, or images
            that are not samples or differ in size; or the model outputs NaN.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` has to be at least 1 but is {batch_size}.")
    if not 0 <= process_index < num_processes:
        raise ValueError(f"`process_index` has to be from 0 to {num_processes - 1} but is {process_index}.")
    pipe = copy.copy(pipe)  # the caller's pipeline keeps its schedulers and bars
    pipe.set_progress_bar_config(disable=True)
    if settings.scheduler is not None:
        swap_scheduler(pipe, settings.scheduler)
    settings = settings.resolve(pipe)
    classes = sample_classes(settings, count_classes(pipe))
    claim_folder(folder, describe_samples(pipe, settings), process_index)

    # Batches cover fixed ranges and are drawn whole, since an image's last bits depend on its batch size.
    starts = range(0, settings.num_samples, batch_size)[process_index::num_processes]
    batches = [range(start, min(start + batch_size, settings.num_samples)) for start in starts]
    damaged, size = find_damaged(folder, (index for batch in batches for index in batch))
    damaged = set(damaged)
    total = sum(map(len, batches))
    with tqdm(
        desc="samples" if num_processes == 1 else f"samples (process 1 of {num_processes})",
        total=total,
        initial=total - len(damaged),
        unit="image",
        disable=process_index != 0,
    ) as progress:
        for batch in batches:
            wanted = [index for index in batch if index in damaged]
            if not wanted:
                continue
            images = _draw(pipe, settings, classes, batch)
            size = size or images[0].size
            if images[0].size != size:
                raise ValueError(
                    f"The images in {folder} have {show_size(*size)} pixels, but this model makes"
                    f" {show_size(*images[0].size)}: they are not its samples. Use another folder."
                )
            for index in wanted:
                with write_whole(sample_path(folder, index)) as unfinished:
                    images[index - batch.start].save(unfinished, format="PNG")
            progress.update(len(wanted))


def missing_samples(folder: str | Path) -> list[int]:
    """
    Finds the samples of a set that are missing, truncated or damaged. Reads every image in full.

    Args:
        folder (`str` or `Path`): The sample set's folder.

    Returns:
        `list[int]`: Their indices, ascending; empty if the set is complete.

    Raises:
        ValueError: The folder is not a sample set, or holds images that are not samples or differ in size.
    """
    num_samples = read_sample_set(folder)["settings"]["num_samples"]
    check_no_foreign_images(folder, num_samples)
    return find_damaged(folder, range(num_samples))[0]


def _draw(pipe: DiffusionPipeline, settings: SampleSettings, classes: list[int], batch: range) -> list[Image.Image]:
    arguments = {name: getattr(settings, name) for name in CALL_ARGUMENTS if getattr(settings, name) is not None}
    pixels = pipe(
        class_labels=classes[batch.start : batch.stop],
        generator=sample_generators(settings.seed, batch),
        output_type="np",
        **arguments,
    ).images  # (B, H, W, C) in [0, 1]
    finite = np.isfinite(pixels).all(axis=(1, 2, 3))  # (B,)
    if not finite.all():
        raise ValueError(
            f"Sample {batch[int(np.argmin(finite))]} has pixels that are not finite. Sample in float32 or bfloat16"
            " instead of float16; if that does not help, the model's weights are at fault."
        )
    return VaeImageProcessor.numpy_to_pil(pixels)


def write_sample_archive(folder: str | Path, path: str | Path, show_progress: bool = True) -> None:
    """
    Packs a complete sample set into an NPZ file: `arr_0`, uint8, of shape `(N, H, W, 3)`, in sample order. The file is
    not compressed, and only one image is in memory at a time.

    Args:
        folder (`str` or `Path`): The sample set's folder.
        path (`str` or `Path`): The file to write.
        show_progress (`bool`, defaults to `True`): Whether to show a progress bar.

    Raises:
        OSError: The file cannot be written.
        ValueError: Samples are missing, or the folder is not a sample set, or holds other images.
    """
    num_samples = read_sample_set(folder)["settings"]["num_samples"]
    missing = missing_samples(folder)
    if missing:
        raise ValueError(
            f"{len(missing):,} of the {count_of(num_samples, 'sample')} of {folder} are missing, the first is"
            f" {sample_path(folder, missing[0])}. Rerun the sampling to complete the set."
        )
    with Image.open(sample_path(folder, 0)) as image:
        width, height = image.size
    header = {"descr": "|u1", "fortran_order": False, "shape": (num_samples, height, width, 3)}
    with write_whole(path) as unfinished, zipfile.ZipFile(unfinished, "w", zipfile.ZIP_STORED) as archive:
        # A new `ZipInfo` has a constant date, so the same samples make the same file.
        with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as array:
            np.lib.format.write_array_header_1_0(array, header)
            for index in tqdm(range(num_samples), desc="packing", unit="image", disable=not show_progress):
                with Image.open(sample_path(folder, index)) as image:
                    array.write(image.convert("RGB").tobytes())
