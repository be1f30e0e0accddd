"""Make a folder of labelled pictures, one subfolder per class, from a Debian package of free pictures.

    apt-get download tuxpaint-stamps-default papirus-icon-theme
    dpkg -x tuxpaint-stamps-default_*.deb unpacked && dpkg -x papirus-icon-theme_*.deb unpacked
    python examples/datasets/debian_pictures.py stamps --unpacked unpacked --output_dir data/stamps
    python examples/datasets/debian_pictures.py folders --unpacked unpacked --output_dir data/folders

`stamps` are birds, flowers, fruit and houses (Tux Paint, GPL-2). `folders` are icons of folders with various signs, by
colour (Papirus, GPL-3; needs `pip install resvg-py`). The pictures are centred on white squares.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import ImageColor

from emoji import import_resvg, render


STAMPS = {  # by names that are part of the published checkpoint's, from which such classes start
    "animal-bird": ("animals/birds", "animals/birds/cartoon"),
    "food-fruit": ("food/fruit", "food/fruit/cartoon"),
    "place-building": ("town/houses/cartoon",),
    "plant-flower": ("plants/flowers",),
}
FOLDERS = ("black", "blue", "brown", "green", "orange", "pink", "red", "yellow")


def find_stamps(unpacked: Path) -> Iterator[tuple[str, Path]]:
    """The class and the file of each picture."""
    top = unpacked / "usr/share/tuxpaint/stamps"
    for name, folders in STAMPS.items():
        for folder in folders:
            yield from ((name, path) for path in sorted((top / folder).glob("*.png")))


def find_folders(unpacked: Path) -> Iterator[tuple[str, Path]]:
    import_resvg()
    top = unpacked / "usr/share/icons/Papirus/64x64/places"
    for name in FOLDERS:
        yield from ((name, path) for path in sorted(top.glob(f"folder-{name}-*.svg")))


SETS = {"stamps": (find_stamps, 128), "folders": (find_folders, 64)}  # and the pixels per side


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=SETS)
    parser.add_argument("--unpacked", type=Path, required=True, help="where `dpkg -x` unpacked the package")
    parser.add_argument("--output_dir", type=Path, required=True, help="the folder to write: a new one")
    args = parser.parse_args(argv)
    find, resolution = SETS[args.set]
    try:
        found = list(find(args.unpacked))
        if not found:
            raise FileNotFoundError(
                f"{args.unpacked} has none of the pictures: unpack the package there (see --help)."
            )
        args.output_dir.mkdir(parents=True)
        for name, path in found:
            (args.output_dir / name).mkdir(exist_ok=True)
            picture = render(path.read_bytes(), resolution, ImageColor.getrgb("white"))
            picture.save(args.output_dir / name / f"{path.parent.name}-{path.stem}.png")
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"error: {error}")
    print(f"Wrote {len(found)} pictures of {len({name for name, _ in found})} classes to {args.output_dir}")


if __name__ == "__main__":
    main()
