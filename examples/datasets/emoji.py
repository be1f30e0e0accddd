"""Build the emoji data set: Fluent 3D, Noto and Twemoji pictures on one background, labelled style/subgroup.

    python examples/datasets/emoji.py --output_dir data/emoji64
    python -c "from datasets import load_dataset; print(load_dataset('data/emoji64'))"

The pictures come from three npm packages of fixed versions, fetched by `npm pack` or given by `--tarballs`. They are
read from the tarballs in memory: nothing is unpacked to disk. The result depends on the arguments alone.
"""

import argparse
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from dataset_folder import check_replaceable, write_dataset_folder
from datasets import ClassLabel, Features, Value
from datasets import Image as ImageFeature
from PIL import Image, ImageColor
from tqdm import tqdm


@dataclass(frozen=True)
class Source:
    """One npm package of pictures: `image_dir` is the folder of the picture files inside the tarball."""

    style: str
    package: str
    version: str
    image_dir: str
    license: str


SOURCES = (
    Source(
        "fluent3d",
        "@lobehub/fluent-emoji-3d",
        "1.1.0",
        "package/assets",
        "Fluent Emoji, Copyright (c) Microsoft Corporation, MIT licence "
        "(https://github.com/microsoft/fluentui-emoji), packaged by LobeHub, MIT licence",
    ),
    Source(
        "noto",
        "emoji-datasource-google",
        "16.0.0",
        "package/img/google/64",
        "Noto Emoji, Copyright Google LLC, Apache License 2.0 (https://github.com/googlefonts/noto-emoji); "
        "packaging and emoji.json by Cal Henderson, MIT licence",
    ),
    Source(
        "twemoji",
        "emoji-datasource-twitter",
        "16.0.0",
        "package/img/twitter/64",
        "Twemoji, Copyright Twitter, Inc and other contributors, graphics under CC-BY 4.0 "
        "(https://creativecommons.org/licenses/by/4.0/, https://github.com/jdecked/twemoji): whoever passes these "
        "pictures on must name the authors and the licence and say what was changed (here: composited on a plain "
        "background and resized); packaging by Cal Henderson, MIT licence",
    ),
)
SOURCE_OF_PACKAGE = {source.package: source for source in SOURCES}

# Code points that change how a picture is drawn but not what it shows.
VARIATION_SELECTOR = "fe0f"
SKIN_TONES = {"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"}
GENDER_AND_DIRECTION = {"2640", "2642", "27a1"}
ADULTS = {"1f468", "1f469", "1f9d1"}  # man, woman, person
JOINER = "200d"

# Microsoft draws no country flags: those in the Fluent package are Noto's pictures, under Noto's licence.
NOT_OF_THE_STYLE = {("fluent3d", "country-flag")}


@dataclass(frozen=True)
class Emoji:
    """What emoji.json says about one picture, with or without a skin tone."""

    name: str
    subgroup: str
    base: str  # normalized code points without the skin tone
    is_skin_tone: bool
    order: int


@dataclass
class Package:
    """The parts of a tarball that are needed: encoded pictures by normalized code points, and emoji.json."""

    source: Source
    version: str
    path: Path
    images: dict[str, tuple[str, bytes]]  # code points -> (member path, encoded picture)
    emoji_json: list[dict] | None


def normalize_code_points(code_points: str) -> str:
    """The form shared by all packages: lower case, no leading zeros, no variation selector, joined by hyphens.

    >>> normalize_code_points("0023-FE0F-20E3")
    '23-20e3'
    """
    parts = (part.lstrip("0") for part in re.split("[-_]", code_points.lower()))
    return "-".join(part for part in parts if part != VARIATION_SELECTOR)


def split_key(code_points: str) -> str:
    """The emoji that a picture belongs to when the validation split is drawn.

    Skin tones, gender signs and directions are removed and man, woman and person are one in joined sequences, because
    those pictures are near copies of each other (the runner and the man running are often the same picture): one in
    each split would make the held-out loss look better than it is.
    """
    ignored = SKIN_TONES | GENDER_AND_DIRECTION
    parts = normalize_code_points(code_points).split("-")
    if len(parts) == 1:  # the female sign and the skin tones are emoji too
        return parts[0]
    if JOINER in parts:
        parts = ["1f9d1" if part in ADULTS else part for part in parts]
    return "-".join(part for part in parts if part not in ignored and part != JOINER)


def stable_fraction(text: str) -> float:
    """A number in [0, 1) that depends on `text` alone, on every machine and in every release of Python."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def read_labels(emoji_json: Sequence[dict]) -> dict[str, Emoji]:
    """Map normalized code points, those of skin tones and of older spellings included, to what they show."""
    labels = {}
    for entry in emoji_json:
        base = normalize_code_points(entry["unified"])
        subgroup = re.sub("[^a-z0-9]+", "-", entry["subcategory"].lower()).strip("-")  # names safe in shells and paths
        for variant, is_skin_tone in [(entry, False)] + [(v, True) for v in entry.get("skin_variations", {}).values()]:
            emoji = Emoji(entry["name"].lower(), subgroup, base, is_skin_tone, entry["sort_order"])
            for spelling in (variant["unified"], variant.get("non_qualified")):
                if spelling:
                    labels.setdefault(normalize_code_points(spelling), emoji)
    return labels


def read_package(path: Path) -> Package:
    """Read one npm tarball into memory.

    Raises:
        ValueError: The file is no tarball, is truncated, or is not one of the three packages.
    """
    files, emoji_json, package_json = {}, None, None
    try:
        with tarfile.open(path, "r:*") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                if member.name == "package/package.json":
                    package_json = json.load(tar.extractfile(member))
                elif member.name == "package/emoji.json":
                    emoji_json = json.load(tar.extractfile(member))
                elif any(str(PurePosixPath(member.name).parent) == source.image_dir for source in SOURCES):
                    files[member.name] = tar.extractfile(member).read()
    except (tarfile.TarError, EOFError, zlib.error, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a whole npm tarball ({error}): remove it and fetch it again.") from error
    name = (package_json or {}).get("name")
    if name not in SOURCE_OF_PACKAGE:
        raise ValueError(f"{path} holds the package {name!r}; known are {', '.join(sorted(SOURCE_OF_PACKAGE))}.")
    source = SOURCE_OF_PACKAGE[name]
    images = {}
    for member_path in sorted(files):  # sorted: of two spellings of one emoji (00ae-fe0f, ae-fe0f) the first wins
        if str(PurePosixPath(member_path).parent) == source.image_dir:
            images.setdefault(
                normalize_code_points(PurePosixPath(member_path).stem), (member_path, files[member_path])
            )
    return Package(source, package_json["version"], path, images, emoji_json)


def fetch_tarballs(cache_dir: Path) -> list[Path]:
    """Fetch the three packages with `npm pack`, which checks their checksums; those in `cache_dir` are kept.

    Raises:
        FileNotFoundError: npm is not installed.
        RuntimeError: npm failed.
    """
    paths = []
    for source in SOURCES:
        path = cache_dir / f"{source.package.lstrip('@').replace('/', '-')}-{source.version}.tgz"
        paths.append(path)
        if path.is_file():
            continue
        npm = shutil.which("npm")
        if npm is None:
            raise FileNotFoundError(
                "npm is not installed: install it (Debian: apt install npm), or fetch the packages "
                + ", ".join(f"{s.package}@{s.version}" for s in SOURCES)
                + " elsewhere with `npm pack` and name the files with --tarballs."
            )
        cache_dir.mkdir(parents=True, exist_ok=True)
        print(f"npm pack {source.package}@{source.version}", flush=True)
        with tempfile.TemporaryDirectory(dir=cache_dir) as workspace:  # so that a stopped download leaves no half file
            command = [npm, "pack", "--silent", "--pack-destination", workspace, f"{source.package}@{source.version}"]
            result = subprocess.run(command, cwd=workspace, capture_output=True, text=True)
            if result.returncode != 0:
                raise RuntimeError(f"`{' '.join(command)}` failed: {result.stderr.strip()}")
            os.replace(Path(workspace) / path.name, path)
    return paths


def render(encoded: bytes, resolution: int, background: tuple[int, int, int]) -> Image.Image:
    """Decode a picture, composite it on `background`, centre it on a square and resize it.

    Compositing comes before resizing: the colour of fully transparent pixels, which is arbitrary, would otherwise
    bleed into the edges.

    Returns:
        `PIL.Image.Image`: RGB, `resolution` x `resolution`.
    """
    picture = Image.open(io.BytesIO(encoded)).convert("RGBA")
    side = max(picture.size)
    canvas = Image.new("RGBA", (side, side), (*background, 255))
    canvas.alpha_composite(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    canvas = canvas.convert("RGB")
    if side == resolution:
        return canvas
    if side % resolution == 0:
        return canvas.reduce(side // resolution)  # exact area average: no ringing around the hard edges of emoji
    return canvas.resize((resolution, resolution), Image.Resampling.LANCZOS)


def select_code_points(package: Package, labels: dict[str, Emoji], max_skin_tones: int) -> list[str]:
    """The package's labelled code points, with at most `max_skin_tones` skin tones of each emoji.

    Tones are ranked by a hash of their code points, so that each of the five appears equally often in the data set,
    the styles agree, and a larger cap adds pictures without changing those there.
    """
    chosen, tones = [], defaultdict(list)
    for code_points in package.images:
        emoji = labels.get(code_points)
        if emoji is not None and (package.source.style, emoji.subgroup) not in NOT_OF_THE_STYLE:
            (tones[emoji.base] if emoji.is_skin_tone else chosen).append(code_points)
    for variants in tones.values():
        chosen += sorted(variants, key=stable_fraction)[:max_skin_tones]
    return sorted(chosen, key=lambda code_points: (labels[code_points].order, code_points))


def build(
    packages: Sequence[Package],
    resolution: int = 64,
    max_skin_tones: int = 1,
    holdout: float = 0.05,
    min_images: int = 2,
    background: str = "white",
) -> tuple[dict[str, list[dict]], Features, dict]:
    """Make the rows of both splits.

    Args:
        packages (`Sequence[Package]`): At least one with an emoji.json.
        resolution (`int`): Height and width of the pictures in pixels.
        max_skin_tones (`int`): Skin tones kept of each emoji and style.
        holdout (`float`): Share of emoji, in [0, 1), that goes to the split `validation`, in all styles and tones.
        min_images (`int`): Classes with fewer training pictures are left out.
        background (`str`): Any colour name or code that PIL knows.

    Returns:
        `tuple[dict[str, list[dict]], Features, dict]`: Rows by split, their features, and counts for the report.

    Raises:
        ValueError: No emoji.json, a package given twice, or nothing left to write.
    """
    styles = [package.source.style for package in packages]
    if len(set(styles)) != len(styles):
        raise ValueError(f"A package is given twice: {', '.join(str(package.path) for package in packages)}.")
    emoji_json = next((package.emoji_json for package in packages if package.emoji_json), None)
    if emoji_json is None:
        raise ValueError("No emoji.json, which holds the labels: add the tarball of emoji-datasource-google.")
    labels = read_labels(emoji_json)
    color = ImageColor.getrgb(background)[:3]
    selected = [
        (package, code) for package in packages for code in select_code_points(package, labels, max_skin_tones)
    ]

    rows, corrupt, seen, duplicates = {"train": [], "validation": []}, [], set(), 0
    for package, code_points in tqdm(selected, desc="emoji", unit="image"):
        member_path, encoded = package.images[code_points]
        try:
            picture = render(encoded, resolution, color)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            corrupt.append(f"{package.path.name}:{member_path}")
            tqdm.write(f"skipped {corrupt[-1]}: {error}", file=sys.stderr)
            continue
        # Some emoji share one picture (the flags of Norway and Bouvet Island): the first stands for all of them,
        # or copies of a training picture would be in the validation split.
        pixels = (package.source.style, picture.tobytes())
        if pixels in seen:
            duplicates += 1
            continue
        seen.add(pixels)
        png = io.BytesIO()
        picture.save(png, "PNG")
        emoji, style = labels[code_points], package.source.style
        split = "validation" if stable_fraction(split_key(emoji.base)) < holdout else "train"
        rows[split].append(
            {
                "image": {"bytes": png.getvalue(), "path": f"{style}-{code_points}.png"},
                "label": f"{style}/{emoji.subgroup}",
                "emoji": emoji.name,
                "code_point": code_points,
                "style": style,
            }
        )

    counts = Counter(row["label"] for row in rows["train"])
    all_names = sorted({row["label"] for split in rows.values() for row in split})
    names = [name for name in all_names if counts[name] >= min_images]
    if not names:
        raise ValueError(f"No class has {min_images} training images: lower --min_images or --holdout.")
    ids = {name: index for index, name in enumerate(names)}
    for split in rows:
        rows[split] = [{**row, "label": ids[row["label"]]} for row in rows[split] if row["label"] in ids]
    features = Features(
        image=ImageFeature(),
        label=ClassLabel(names=names),
        emoji=Value("string"),
        code_point=Value("string"),
        style=Value("string"),
    )
    report = {
        "splits": {split: Counter(row["style"] for row in rows[split]) for split in rows},
        "names": names,
        "left_out": {name: counts[name] for name in all_names if name not in ids},
        "unlabelled": sum(code_points not in labels for package in packages for code_points in package.images),
        "corrupt": corrupt,
        "duplicates": duplicates,
    }
    return rows, features, report


def describe(report: dict, packages: Sequence[Package]) -> tuple[str, str]:
    """The data set's README.md body and its LICENSES.md."""
    styles = [package.source.style for package in packages]
    table = "".join(
        f"| {split} | {' | '.join(str(counts[style]) for style in styles)} | {counts.total()} |\n"
        for split, counts in report["splits"].items()
    )
    left_out = ", ".join(f"{name} ({count})" for name, count in report["left_out"].items()) or "none"
    card = (
        f"# Emoji\n\n"
        f"| split | {' | '.join(styles)} | all |\n|---|{'---|' * (len(styles) + 1)}\n{table}\n"
        f"- Classes: {len(report['names'])}, style/subgroup, ids in order of their names.\n"
        f"- Classes left out for want of training images (with how many there were): {left_out}.\n"
        f"- Pictures equal to another one of their style, left out: {report['duplicates']}.\n"
        f"- Pictures of emoji that emoji.json does not know, left out: {report['unlabelled']}.\n"
        f"- Corrupt pictures, skipped: {len(report['corrupt'])}{''.join(f' {path}' for path in report['corrupt'])}.\n"
        "- `validation` holds whole emoji, in all styles, skin tones and genders.\n"
        "- Licences: see LICENSES.md.\n"
    )
    licenses = "# Licences of the pictures\n\n" + "".join(
        f"- `{package.source.style}` ({package.source.package} {package.version}): {package.source.license}.\n"
        for package in packages
    )
    return card, licenses


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output_dir", type=Path, required=True, help="the folder to write; an earlier build is replaced"
    )
    parser.add_argument(
        "--tarballs", type=Path, nargs="+", help="npm tarballs to read (default: `npm pack` fetches them)"
    )
    parser.add_argument(
        "--cache_dir",
        type=Path,
        default=Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "diffusers_pisdm" / "npm",
        help="where fetched tarballs are kept (default: %(default)s)",
    )
    parser.add_argument("--resolution", type=int, default=64, help="pixels a side (default: %(default)s)")
    parser.add_argument("--format", choices=("parquet", "imagefolder"), default="parquet")
    parser.add_argument(
        "--max_skin_tones",
        type=int,
        default=1,
        help="skin tones kept of each emoji and style, besides the yellow one (default: %(default)s: a third of the "
        "pictures are then of people; all tones, which add no new shapes, would make it 60%%)",
    )
    parser.add_argument(
        "--holdout", type=float, default=0.05, help="share of emoji held out for validation (default: %(default)s)"
    )
    parser.add_argument(
        "--min_images",
        type=int,
        default=2,
        help="leave out classes with fewer training images (default: %(default)s, which costs 6 of 294 classes; 4 "
        "would cost 23, monkey faces and hats among them)",
    )
    parser.add_argument("--background", default="white", help="colour behind the pictures (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.resolution < 1:
        parser.error(f"--resolution must be at least 1, got {args.resolution}")
    if args.max_skin_tones < 0:
        parser.error(f"--max_skin_tones must be at least 0, got {args.max_skin_tones}")
    if not 0 <= args.holdout < 1:
        parser.error(f"--holdout must be in [0, 1), got {args.holdout}")
    if args.min_images < 1:
        parser.error(f"--min_images must be at least 1, got {args.min_images}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        check_replaceable(args.output_dir)
        packages = [read_package(path) for path in args.tarballs or fetch_tarballs(args.cache_dir)]
        packages.sort(key=lambda package: package.source.style)
        rows, features, report = build(
            packages, args.resolution, args.max_skin_tones, args.holdout, args.min_images, args.background
        )
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    card, licenses = describe(report, packages)
    write_dataset_folder(args.output_dir, rows, features, card, licenses, args.format)
    print(card)
    print(licenses)
    print(f"wrote {args.output_dir}")


if __name__ == "__main__":
    main()
