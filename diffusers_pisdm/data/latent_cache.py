"""The latents of a data set, cached on disk to train without the autoencoder."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from ..utils.files import write_whole
from ..utils.folder_scan import size_and_end
from .rows import DataError, TrainingRow


INDEX_FILE = "index.json"
REMEDY = "Rerun `pisdm cache-latents` with the same arguments: it resumes where it stopped."
DTYPES = {"float16": (torch.float16, "F16"), "bfloat16": (torch.bfloat16, "BF16"), "float32": (torch.float32, "F32")}


@dataclass
class CacheIndex:
    """What a cache holds and how it was made; kept in `index.json`."""

    dataset: str
    split: str
    num_images: int  # rows of the data set
    class_names: list[str]
    image_size: int  # in pixels: the shorter side is scaled to it, then the centre is cropped
    stage_sizes: list[int]  # height and width of each stage's latents
    channels: int  # of the latents
    vae: str  # where it came from
    vae_class: str
    vae_sha256: str  # of its configuration and weights
    vae_dtype: str  # of its computations
    has_std: bool  # whether latents are drawn from a mean and a standard deviation
    has_flips: bool  # whether mirrored images are encoded too
    dtype: str  # of the stored latents: float16, bfloat16 or float32
    images_per_shard: int  # rows per file

    @property
    def num_shards(self) -> int:
        return -(-self.num_images // self.images_per_shard)

    def shard_rows(self, shard: int) -> range:
        """The rows in a shard."""
        start = shard * self.images_per_shard
        return range(start, min(start + self.images_per_shard, self.num_images))

    def latent_shapes(self, shard: int) -> dict[str, tuple[int, ...]]:
        """Names and shapes of a shard's latents."""
        return {
            tensor_name(stage, part, flipped): (len(self.shard_rows(shard)), self.channels, size, size)
            for stage, size in enumerate(self.stage_sizes)
            for part in (("mean", "std") if self.has_std else ("mean",))
            for flipped in ((False, True) if self.has_flips else (False,))
        }

    def write(self, folder: Path) -> None:
        """Writes `index.json` atomically."""
        with write_whole(folder / INDEX_FILE) as unfinished:
            unfinished.write_text(json.dumps(asdict(self), indent=2), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> CacheIndex:
        """Reads `index.json`; raises a [`DataError`] if it is missing or damaged."""
        try:
            return cls(**json.loads((folder / INDEX_FILE).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise DataError(f"{folder} is not a latent cache ({error}): `pisdm cache-latents` writes one.") from error


def shard_path(folder: Path, shard: int) -> Path:
    """The path of a shard."""
    return folder / f"shard-{shard:05d}.safetensors"


def tensor_name(stage: int, part: str, flipped: bool) -> str:
    """The name of a tensor in a shard: stages count from 1, as in the pipeline."""
    return f"stage_{stage + 1}.{part}{'.flipped' if flipped else ''}"


def find_shard_fault(folder: Path, index: CacheIndex, shard: int) -> str | None:
    """What is wrong with a shard, if anything: missing, truncated, damaged, or different from the index."""
    path = shard_path(folder, shard)
    if not path.is_file():
        return f"{path.name} is missing"
    latent_dtype = DTYPES[index.dtype][1]
    expected = {name: (shape, latent_dtype) for name, shape in index.latent_shapes(shard).items()}
    expected["labels"] = ((len(index.shard_rows(shard)),), "I64")
    try:
        with safe_open(path, framework="pt") as file:  # checks the header against the file size
            slices = {name: file.get_slice(name) for name in file.keys()}
            found = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        return f"{path.name} is truncated or damaged ({error})"
    return None if found == expected else f"{path.name} does not hold the latents that {INDEX_FILE} lists"


class LatentCache:
    """
    Reads a cache written by `pisdm cache-latents`: each image's latents at every stage, straight from disk.
    Latents of an [`AutoencoderKL`] are sampled afresh every epoch.

    Args:
        folder (`str` or `Path`): The cache.
        random_flip (`bool`, defaults to `False`): Use the mirrored image's latents with probability 0.5.

    Raises:
        DataError: The cache is missing, incomplete, or lacks the mirrored images that `random_flip` needs.
    """

    is_stream = False

    def __init__(self, folder: str | Path, random_flip: bool = False):
        self.folder = Path(folder)
        self.index = CacheIndex.read(self.folder)
        self.random_flip = random_flip
        faults = [find_shard_fault(self.folder, self.index, shard) for shard in range(self.index.num_shards)]
        faults = [fault for fault in faults if fault is not None]
        if faults:
            raise DataError(
                f"The cache {folder} is incomplete: {len(faults)} of {self.index.num_shards} files are missing or"
                f" damaged, the first: {faults[0]}. {REMEDY}"
            )
        if random_flip and not self.index.has_flips:
            raise DataError(
                f"The cache {folder} has no mirrored images: train without --random_flip, or rebuild it with that."
            )
        self._shards: dict[int, safe_open] = {}

    @property
    def class_names(self) -> list[str]:
        return self.index.class_names

    @property
    def is_random(self) -> bool:
        """Whether a row may be mirrored in some epochs only."""
        return self.random_flip

    def check_stages(self, sample_sizes: list[int], channels: int) -> None:
        """
        Args:
            sample_sizes (`list[int]`): The size of each stage of the cascade.
            channels (`int`): The number of latent channels.

        Raises:
            DataError: The cache does not match.
        """
        index = self.index
        if (index.stage_sizes, index.channels) != (sample_sizes, channels):
            raise DataError(
                f"The cache {self.folder} holds latents of {index.channels} channels and sizes {index.stage_sizes};"
                f" the cascade needs {channels} channels and sizes {sample_sizes}: build a cache with its"
                " --cascade_config."
            )

    def __len__(self) -> int:
        return self.index.num_images

    def fingerprint(self) -> dict[str, str]:
        """A digest of each file's size and last bytes, by its name."""
        files = [shard_path(self.folder, shard) for shard in range(self.index.num_shards)]
        return {file.name: hashlib.sha256(repr(size_and_end(file)).encode()).hexdigest()[:16] for file in files}

    def read(self, row: int, epoch: int, seed: int) -> TrainingRow:
        """
        Reads a row.

        Args:
            row (`int`): In `0..len(self) - 1`.
            epoch, seed (`int`): Not negative; with the row, they determine flip and latents.

        Returns:
            [`TrainingRow`]: Float32 latents of shapes `(C, H_s, W_s)`, and the class.
        """
        shard, place = divmod(row, self.index.images_per_shard)
        if shard not in self._shards:
            self._shards[shard] = safe_open(shard_path(self.folder, shard), framework="pt")
        file = self._shards[shard]
        random = np.random.default_rng((seed, epoch, row))
        flipped = self.random_flip and random.random() < 0.5
        latents = []
        for stage in range(len(self.index.stage_sizes)):
            latent = file.get_slice(tensor_name(stage, "mean", flipped))[place].float()  # (C, H_s, W_s)
            if self.index.has_std:
                std = file.get_slice(tensor_name(stage, "std", flipped))[place].float()
                latent = latent + std * torch.from_numpy(random.standard_normal(std.shape, dtype=np.float32))
            latents.append(latent)
        return TrainingRow(latents, int(file.get_slice("labels")[place]), [])

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_shards": {}}  # each worker opens its own
