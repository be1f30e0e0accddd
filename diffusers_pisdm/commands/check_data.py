"""Looks through images before training: classes, sizes, faults and duplicates.

    pisdm check-data my_images
    pisdm check-data my_images --size 64 --output sheet.png

Reads what `pisdm train` reads, by the same rules. The exit code is 1 if an image cannot be read.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from PIL import Image
from tqdm.auto import tqdm

from ..data.image_data import ImageData
from ..data.image_folders import METADATA_FILES
from ..data.image_rows import ImageReport, inspect_images, read_image
from ..data.image_transform import image_endings
from ..utils.arguments import COUNT, CommandParser, picture_path
from ..utils.files import check_writable
from ..utils.folder_scan import join_parts, scan_folder
from ..utils.image_grid import make_image_grid
from ..utils.messages import count_of, one_line, show_range
from ..utils.names import show_name
from ..utils.png_recipe import save_image
from .data_sources import add_data_arguments, add_folder_argument, check_source, load_data, source_options


FEW_IMAGES = 10  # a class with fewer is marked
LONG_ASPECT_RATIO = 1.5  # from here on, the crop to a square cuts off a third or more
MOST_LISTED = 20  # paths for each remark
SHEET_CLASSES = 64  # at most: a larger picture is hard to look at
SHEET_COLUMNS = 8
SHEET_CELL_SIZE = 96


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_folder_argument(parser)
    parser.add_argument("--size", type=COUNT, default=32, help="Side in pixels that you want to draw (default: 32).")
    parser.add_argument("--output", type=picture_path, help="A contact sheet: some pictures of each class.")
    add_data_arguments(parser)
    args = parser.parse_args(arguments)
    check_source(parser, args)
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    try:
        if args.output is not None:
            check_writable(args.output, is_folder=False)
        num_unreadable = check_data(args)
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    if num_unreadable:
        sys.exit(1)


def check_data(args: argparse.Namespace) -> int:
    """Prints what is in the data and draws the contact sheet; returns how many images cannot be read."""
    left_out: dict[str, list[str]] = defaultdict(list)

    def collect(folder: str | Path, by_reason: Mapping[str, list[str]]) -> None:
        for reason, paths in by_reason.items():
            left_out[reason] += paths

    try:
        data = load_data(args, report_left_out=collect)
    except (OSError, ValueError):  # what was left out may be why
        print_lines(args, describe_left_out(args, left_out))
        raise
    reports = list(tqdm(inspect_images(data), total=len(data.dataset), desc="reading images", leave=False))
    good = [report for report in reports if report.fault is None]
    faults = [report.fault for report in reports if report.fault is not None]
    lines = describe_classes(args, data) + describe_sizes(good, args.size) + describe_duplicates(good)
    lines += describe_left_out(args, left_out)
    if faults:
        lines += [f"Unreadable: {count_of(len(faults), 'image')}", *(f"  {fault}" for fault in faults)]
    print_lines(args, lines)
    if args.output is not None and good:
        save_image(draw_sheet(data, good), args.output)
        print(f"Wrote {args.output}")
    next_step = (
        'fine-tune the published checkpoint, which takes the fewest pictures ("Start from the published checkpoint" in'
        " docs/training.md), or start anew:\n"
        f"  pisdm new-recipe {source_options(args)} --size {args.size} --minutes 30"
    )
    print(f"Next: fix or remove {count_of(len(faults), 'unreadable image')}" if faults else f"Next: {next_step}")
    return len(faults)


def print_lines(args: argparse.Namespace, lines: list[str]) -> None:
    """Prints lines, with paths as they are in the folder that was named."""
    folder = f"{os.path.abspath(args.train_data_dir)}/" if args.train_data_dir else ""
    if lines:
        print("\n".join(lines).replace(folder, ""))


def describe_classes(args: argparse.Namespace, data: ImageData) -> list[str]:
    """The number of images and a table of the classes, the small ones marked."""
    counts, names = data.class_counts(), [show_name(name) for name in data.class_names]
    name_width, count_width = max(map(len, names)), len(f"{max(counts):,}")
    lines = [
        f"{args.dataset_name or args.train_data_dir}, split {args.split}: {count_of(sum(counts), 'image')} of"
        f" {count_of(len(names), 'class')}"
    ]
    for name, count in zip(names, counts):
        mark = "  none" if count == 0 else "  few" if count < FEW_IMAGES else ""
        lines.append(f"  {name:<{name_width}}  {count:>{count_width},}{mark}")
    return lines


def describe_sizes(reports: list[ImageReport], size: int) -> list[str]:
    """Sides and aspect ratios, and which images training would enlarge or crop a lot."""
    if not reports:
        return []
    sides = sorted(min(report.size) for report in reports)
    ratios = {report.place: max(report.size) / min(report.size) for report in reports}
    lines = [
        f"Shorter side: {show_range(sides[0], sides[-1])} px, median {statistics.median_low(sides)}",
        f"Aspect ratio: up to {max(ratios.values()):.2g}:1, median {statistics.median(ratios.values()):.2g}:1",
    ]
    small = [report.place for report in reports if min(report.size) < size]
    long = [place for place, ratio in ratios.items() if ratio >= LONG_ASPECT_RATIO]
    lines += list_paths(f"Smaller than {size} px, which would be enlarged", small)
    return lines + list_paths(f"Longer than {LONG_ASPECT_RATIO}:1, of which the square crop takes the middle", long)


def describe_duplicates(reports: list[ImageReport]) -> list[str]:
    """Images that have the same pixels as an earlier one."""
    places = defaultdict(list)
    for report in reports:
        places[report.digest].append(report.place)
    copies = [f"{copy} = {first}" for first, *others in places.values() for copy in others]
    return list_paths("Duplicates, pixel by pixel", copies)


def describe_left_out(args: argparse.Namespace, left_out: Mapping[str, list[str]]) -> list[str]:
    """What lies in the folder and is not read, by reason."""
    by_reason = {**left_out, "not images": stray_files(args, left_out)}
    return [line for reason, paths in by_reason.items() for line in list_paths(f"Left out: {reason}", paths)]


def stray_files(args: argparse.Namespace, left_out: Mapping[str, list[str]]) -> list[str]:
    """Files among a folder's images that are none, do not describe them, and are not told of otherwise."""
    if args.train_data_dir is None or not os.path.isdir(args.train_data_dir):
        return []
    content = scan_folder(args.train_data_dir, image_endings())
    beside = {parts: names for parts, names in content.others.items() if parts in content.images}
    told = {path for paths in left_out.values() for path in paths}
    return [path for path in join_parts(beside) if os.path.basename(path) not in METADATA_FILES and path not in told]


def list_paths(remark: str, paths: list[str]) -> list[str]:
    """A remark with its number of images and the first of their paths; nothing if there are none."""
    lines = [f"{remark}: {len(paths):,}"] if paths else []
    lines += [f"  {one_line(path)}" for path in paths[:MOST_LISTED]]
    return lines + ([f"  ... and {len(paths) - MOST_LISTED:,} more"] if len(paths) > MOST_LISTED else [])


def draw_sheet(data: ImageData, reports: list[ImageReport]) -> Image.Image:
    """A row of pictures for each class, spread evenly over it."""
    labels, by_class = data.dataset[data.label_column], defaultdict(list)
    for report in reports:
        by_class[data.class_ids[labels[report.position]]].append(report.position)
    cells, captions = [], []
    for class_id in sorted(by_class)[:SHEET_CLASSES]:
        positions = by_class[class_id]
        count = min(SHEET_COLUMNS, len(positions))
        chosen = [positions[i * len(positions) // count] for i in range(count)]
        cells += [read_image(data, data.dataset[position], position) for position in chosen]
        cells += [Image.new("RGB", (1, 1), "white")] * (SHEET_COLUMNS - count)
        captions += [data.class_names[class_id]] + [""] * (SHEET_COLUMNS - 1)
    return make_image_grid(cells, captions, SHEET_COLUMNS, SHEET_CELL_SIZE)


if __name__ == "__main__":
    main()
