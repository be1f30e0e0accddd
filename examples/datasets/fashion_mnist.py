"""Build Fashion-MNIST from the four idx files that Debian's package dataset-fashion-mnist installs.

    apt install dataset-fashion-mnist
    python examples/datasets/fashion_mnist.py --output_dir data/fashion-mnist32 --resolution 32
    python -c "from datasets import load_dataset; print(load_dataset('data/fashion-mnist32'))"

Columns and splits (`image`, `label`; train, test) are those of `fashion_mnist` on the Hub.
"""

import argparse
import gzip
import io
import math
import struct
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Features
from datasets import Image as ImageFeature
from PIL import Image
from tqdm import tqdm

from dataset_folder import check_replaceable, write_dataset_folder


IDX_DIR = Path("/usr/share/datasets/fashion-mnist")
NAMES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot")
FILE_PREFIXES = {"train": "train", "test": "t10k"}
LICENSE = (
    "# Licence of the pictures\n\n"
    "- Fashion-MNIST, Copyright (c) 2017 Zalando SE, https://tech.zalando.com, MIT licence "
    "(https://github.com/zalandoresearch/fashion-mnist).\n"
)


def read_idx(path: Path) -> np.ndarray:
    """
    Read a gzipped idx file of bytes: two zero bytes, type 8, number of axes, axis lengths (big-endian), values.
    Raises FileNotFoundError with what to install, ValueError if it is damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: install it (Debian: apt install dataset-fashion-mnist) or pass the folder with "
            "the four *-ubyte.gz files as --idx_dir."
        )
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a complete gzip file ({error}): install or download it again.") from error
    num_axes = content[3] if content[:3] == b"\x00\x00\x08" and len(content) > 3 else 0
    start = 4 + 4 * num_axes
    shape = struct.unpack(f">{num_axes}I", content[4:start]) if len(content) >= start else ()
    if not shape or len(content) != start + math.prod(shape):
        raise ValueError(f"{path} is not an idx file of bytes: install or download it again.")
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape)


def read_split(idx_dir: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 28, 28) and labels (N,) of one split, both uint8; 0 is the black background."""
    images = read_idx(idx_dir / f"{FILE_PREFIXES[split]}-images-idx3-ubyte.gz")
    labels = read_idx(idx_dir / f"{FILE_PREFIXES[split]}-labels-idx1-ubyte.gz")
    if images.shape[1:] != (28, 28) or labels.shape != images.shape[:1] or labels.max(initial=0) >= len(NAMES):
        raise ValueError(
            f"The {split} files in {idx_dir} are not Fashion-MNIST: images {images.shape}, labels {labels.shape} "
            f"up to {labels.max(initial=0)}."
        )
    return images, labels


def build(idx_dir: Path, resolution: int = 32) -> tuple[dict[str, list[dict]], Features]:
    """
    Make the rows of both splits and their features; 32 pixels are 28 with a black border of two, so that four stages
    can halve them.
    """
    border = (resolution - 28) // 2
    rows = {}
    for split in FILE_PREFIXES:
        images, labels = read_split(idx_dir, split)
        images = np.pad(images, ((0, 0), (border, border), (border, border)))  # (N, resolution, resolution)
        rows[split] = []
        for index, (image, label) in enumerate(tqdm(zip(images, labels), split, total=len(images), unit="image")):
            png = io.BytesIO()
            Image.fromarray(image).save(png, "PNG")
            rows[split].append({"image": {"bytes": png.getvalue(), "path": f"{index:05d}.png"}, "label": int(label)})
    return rows, Features(image=ImageFeature(), label=ClassLabel(names=list(NAMES)))


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output_dir", type=Path, required=True, help="the folder to write; an earlier one is replaced"
    )
    parser.add_argument("--idx_dir", type=Path, default=IDX_DIR, help="folder of the idx files (default: %(default)s)")
    parser.add_argument("--resolution", type=int, choices=(28, 32), default=32, help="pixels per side (default: 32)")
    parser.add_argument("--format", choices=("parquet", "imagefolder"), default="parquet")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        check_replaceable(args.output_dir)
        rows, features = build(args.idx_dir, args.resolution)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    counts = "".join(f"| {split} | {len(rows[split])} |\n" for split in rows)
    card = f"# Fashion-MNIST, {args.resolution} x {args.resolution}, grey\n\n| split | images |\n|---|---|\n{counts}"
    write_dataset_folder(args.output_dir, rows, features, card, LICENSE, args.format)
    print(card)
    print(LICENSE)
    print(f"Wrote {args.output_dir}")


if __name__ == "__main__":
    main()
