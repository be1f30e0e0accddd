"""The real pictures of the tests in every form a data set can have, and pictures that are damaged."""

from __future__ import annotations

import io
import struct
import tarfile
import zlib
from pathlib import Path

from datasets import Dataset
from PIL import Image

from diffusers_pisdm.data.image_data import ImageData, load_image_data


def copy_folder(files: list[Path], folder: Path) -> Path:
    """An image folder: one folder a class."""
    for file in files:
        copy = folder / file.parent.name / file.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    return folder


def write_parquet(files: list[Path], folder: Path, labels: list | None = None) -> Path:
    """A folder of one parquet file, whose labels are the classes' names unless given."""
    rows = [
        {"picture": file.read_bytes(), "kind": file.parent.name if labels is None else labels[i], "name": file.name}
        for i, file in enumerate(files)
    ]
    folder.mkdir(parents=True)
    Dataset.from_list(rows).to_parquet(folder / "train.parquet")
    return folder


def write_tars(files: list[Path], folder: Path, count: int = 2) -> Path:
    """A folder of `count` webdataset tars, with the endings `png` and `cls`, a number."""
    names = sorted({file.parent.name for file in files})
    folder.mkdir(parents=True)
    for shard in range(count):
        with tarfile.open(folder / f"train-{shard:03d}.tar", "w") as tar:
            for file in files[shard::count]:
                key = file.stem.replace(".", "-")
                for ending, content in (
                    ("png", file.read_bytes()),
                    ("cls", str(names.index(file.parent.name)).encode()),
                ):
                    member = tarfile.TarInfo(f"{key}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return folder


def load(folder: Path, cache_dir: Path, **arguments) -> ImageData:
    return load_image_data(folder, "train", cache_dir=cache_dir, **arguments)


def _bomb() -> bytes:
    """A PNG of a few bytes that says it has 10^10 pixels."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def _strip() -> bytes:
    png = io.BytesIO()
    Image.new("RGB", (2000, 2)).save(png, "PNG")
    return png.getvalue()


def damaged_images(good: bytes) -> dict[str, bytes]:
    """One file of each kind that cannot be used."""
    return {
        "truncated": good[: len(good) // 2],
        "empty": b"",
        "text": b"this is no picture",
        "bomb": _bomb(),
        "strip": _strip(),
    }
