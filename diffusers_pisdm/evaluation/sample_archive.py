"""A sample set as one file, for the evaluation suite of ADM (openai/guided-diffusion)."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from ..utils.files import write_whole
from .sample_files import sample_path
from .sample_record import read_sample_set
from .sample_set import missing_samples


def write_sample_archive(folder: str | Path, path: str | Path, show_progress: bool = True) -> None:
    """
    Packs a complete sample set into an NPZ file: `arr_0`, uint8, of shape `(N, H, W, 3)`, in the samples' order. It
    takes the disk space of the pixels, and the memory of one image.

    Args:
        folder (`str` or `Path`): The sample set's.
        path (`str` or `Path`): The file to write.
        show_progress (`bool`, defaults to `True`): Whether to show a progress bar.

    Raises:
        OSError: The file cannot be written.
        ValueError: Samples are missing, or the folder is no sample set, or one of mixed images.
    """
    num_samples = read_sample_set(folder)["settings"]["num_samples"]
    missing = missing_samples(folder)
    if missing:
        raise ValueError(
            f"{len(missing)} of the {num_samples} samples of {folder} are missing, the first is"
            f" {sample_path(folder, missing[0])}. Complete the set: run the sampling again."
        )
    with Image.open(sample_path(folder, 0)) as image:
        width, height = image.size
    header = {"descr": "|u1", "fortran_order": False, "shape": (num_samples, height, width, 3)}
    with write_whole(path) as unfinished, zipfile.ZipFile(unfinished, "w", zipfile.ZIP_STORED) as archive:
        # A `ZipInfo` of its own has a constant date: the same samples make the same file.
        with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as array:
            np.lib.format.write_array_header_1_0(array, header)
            for index in tqdm(range(num_samples), desc="packing", unit="image", disable=not show_progress):
                with Image.open(sample_path(folder, index)) as image:
                    array.write(image.convert("RGB").tobytes())
