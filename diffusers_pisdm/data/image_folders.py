"""Data sets in local folders: which split and class each image belongs to."""

from __future__ import annotations

import glob
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

import pyarrow.compute as pc
import yaml
from datasets import (
    ClassLabel,
    Dataset,
    Features,
    Image,
    IterableDataset,
    ReadInstruction,
    concatenate_datasets,
    load_dataset,
    load_dataset_builder,
    load_from_disk,
)
from datasets.data_files import SPLIT_KEYWORDS, sanitize_patterns
from datasets.exceptions import DatasetsError
from datasets.utils.metadata import MetadataConfigs
from huggingface_hub import DatasetCardData, metadata_load

from ..utils.folder_scan import (
    FolderContent,
    Parts,
    ReportLeftOut,
    join_parts,
    scan_folder,
    warn_of_left_out,
    warn_once,
)
from ..utils.messages import count_of, one_line
from .image_transform import image_endings
from .rows import DataError


# To `datasets`, these are patterns, chained file systems and variables, even where they are part of a path.
SPECIAL_IN_PATHS = re.compile(r"[*?\[\]$\n]|::")
METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
SHARD_ENDINGS = (".parquet", ".arrow", ".tar", ".zip")
SPLITS = {keyword: str(split) for split, keywords in SPLIT_KEYWORDS.items() for keyword in keywords}
SPLIT_WORD = re.compile(rf"(?:^|[-._ 0-9])({'|'.join(SPLITS)})(?:[-._ 0-9]|$)")


def load_folder(
    folder: str,
    split: str,
    streaming: bool,
    label_column: str,
    cache_dir: str | Path | None = None,
    config_name: str | None = None,
    report_left_out: ReportLeftOut = warn_of_left_out,
) -> Dataset | IterableDataset:
    """
    Loads a split of a local data set: images, or files that `datasets` reads.

    Args:
        folder (`str`): Its absolute path.
        label_column (`str`): The column of labels where images have metadata.
        split, streaming, cache_dir, config_name, report_left_out:
            See [`~diffusers_pisdm.data.image_data.load_image_data`].

    Returns:
        `Dataset` or `IterableDataset`: A stream only of what `datasets` copies to its cache otherwise.

    Raises:
        DataError: The folder cannot be read.
        Exception: Whatever `datasets` raises if it cannot read the files.
    """
    if _is_saved_to_disk(folder):
        saved = load_from_disk(folder)
        return _select({str(saved.split or "train"): saved} if isinstance(saved, Dataset) else saved, split)
    config_name, config = _choose_config(folder, config_name)
    split_folders = None
    if "data_files" in config:
        split_folders = _split_folders(folder, config["data_files"])
        if split_folders is None:
            return _load_files(folder, split, streaming, cache_dir, config_name)
    elif "data_dir" in config:
        folder = os.path.join(folder, config["data_dir"])
    content = scan_folder(folder, image_endings())
    images = join_parts(content.images)
    shards = [path for path in join_parts(content.others) if path.lower().endswith(SHARD_ENDINGS)]
    shards = [path for path in shards if os.path.basename(path) not in METADATA_FILES]
    if len(images) > len(shards):
        report_left_out(folder, {"files that may hold images": shards, **content.left_out})
        splits = _read_images(folder, content, label_column, cache_dir, split_folders, report_left_out)
        return _select(splits, split)
    report_left_out(folder, {"images beside files that hold images": images, **content.left_out})
    dataset = _load_files(folder, split, streaming, cache_dir)
    taken = load_dataset_builder(folder, cache_dir=cache_dir).config.data_files or {}
    taken = {os.path.realpath(file) for files in taken.values() for file in files}
    unused = [path for path in shards if os.path.realpath(os.path.join(folder, path)) not in taken]
    report_left_out(folder, {"files that are in no split": unused})
    return dataset


def _is_saved_to_disk(folder: str) -> bool:
    def has(name: str) -> bool:
        return os.path.isfile(os.path.join(folder, name))

    return has("dataset_dict.json") or (has("dataset_info.json") and has("state.json"))


def _select(splits: Mapping[str, Dataset], split: str) -> Dataset:
    """A split, slices of splits, or both, as `load_dataset` takes them: train, train[:90%], train+test."""
    lengths = {str(name): len(rows) for name, rows in splits.items()}
    parts = []
    for part in ReadInstruction.from_spec(split).to_absolute(lengths):
        rows, chosen = splits[part.splitname], range(lengths[part.splitname])[part.from_ : part.to]
        parts.append(rows if len(chosen) == len(rows) else rows.select(chosen))
    return parts[0] if len(parts) == 1 else concatenate_datasets(parts)


def _choose_config(folder: str, config_name: str | None) -> tuple[str | None, dict]:
    """A configuration of the data set's README.md and its name; an empty one if it names none."""
    card = os.path.join(folder, "README.md")
    try:
        data = DatasetCardData(**(metadata_load(card) or {} if os.path.isfile(card) else {}))
        configs = MetadataConfigs.from_dataset_card_data(data)
    except (TypeError, ValueError, yaml.YAMLError) as error:
        raise DataError(f"Cannot read the header of {card}: {one_line(error)}. Fix or remove it.") from error
    names = ", ".join(map(str, configs))
    if config_name is not None and config_name not in configs:
        known = f"only {names}" if configs else "as its README.md names none"
        raise DataError(f"{folder} has no configuration {config_name!r}, {known}: see --dataset_config_name.")
    for name, config in configs.items():
        if not isinstance(config.get("data_dir", ""), str):
            raise DataError(
                f"The header of {card} has no path as `data_dir` of {name}: {config['data_dir']!r}. Fix it."
            )
    config_name = config_name or configs.get_default_config_name()
    if config_name is None and configs:
        raise DataError(f"{folder} has several configurations, {names}: choose one with --dataset_config_name.")
    return config_name, configs.get(config_name, {})


def _split_folders(folder: str, data_files: str | list | Mapping) -> dict[str, Parts] | None:
    """The folder of each split, if that is all that a configuration's files say, such as `data/train/**`."""
    folders = {}
    for split, patterns in sanitize_patterns(data_files).items():
        top = patterns[0].removesuffix("/**")
        if len(patterns) > 1 or top == patterns[0] or not os.path.isdir(os.path.join(folder, top)):
            return None
        folders[split] = tuple(top.split("/"))
    return folders


def _load_files(
    folder: str, split: str, streaming: bool, cache_dir: str | Path | None, config_name: str | None = None
) -> Dataset | IterableDataset:
    """Lets `datasets` find and read the files."""
    if special := SPECIAL_IN_PATHS.search(folder):
        raise DataError(
            f"The path {one_line(folder)} has {special[0]!r}, which `datasets` would not take literally: rename the"
            " folder."
        )
    return load_dataset(folder, config_name, split=split, streaming=streaming, cache_dir=cache_dir)


def sort_class_names(names: Iterable[str]) -> list[str]:
    """Class names in the order of their ids: as text, but by value if all are integers."""
    names = sorted(names)
    if all(re.fullmatch(r"-?[0-9]+", name) for name in names):
        names.sort(key=int)
    return names


def _read_images(
    folder: str,
    content: FolderContent,
    label_column: str,
    cache_dir: str | Path | None,
    split_folders: Mapping[str, Parts] | None,
    report_left_out: ReportLeftOut,
) -> dict[str, Dataset]:
    """
    The rows of each split, sorted by path: an image's path and, if there are at least two class folders, its label.

    Most images decide at which depth the class folders are; a depth of one folder, which makes no classes, yields to
    one of several. Folders above them that are named train, validation or
    test (or valid, dev, ...) are splits, unless `split_folders` says which are; class folders and files can have any
    name. Splits may also lie in the class folders. Metadata files are read instead if they have labels, or nothing
    else has.
    """
    folders, sizes = Counter(map(len, content.images)), Counter()
    for parts, names in content.images.items():
        sizes[len(parts)] += len(names)
    several = {depth for depth in sizes if folders[depth] > 1}
    depths = {0, *several} if several else {*sizes}
    depth = max(depths, key=lambda depth: (sizes[depth], -depth))
    candidates = [parts for parts in content.images if len(parts) == depth]
    if split_folders is None:
        split_of, class_part = _find_splits(candidates)
    else:
        tops = {top: split for split, top in split_folders.items()}
        split_of = {parts: tops[parts[:n]] for parts in candidates for n in range(depth + 1) if parts[:n] in tops}
        class_part = None if any(parts in tops for parts in candidates) else -1
    has_classes = class_part is not None and depth > 0
    class_names = sort_class_names({parts[class_part] for parts in split_of}) if has_classes else []
    has_classes = len(class_names) > 1

    rows = _read_metadata(folder, content, split_of, label_column, cache_dir, needed=not has_classes)
    if rows is not None:
        listed = {path for dataset in rows.values() for path in _image_paths(dataset)}
        unlisted = [path for path in join_parts(content.images) if os.path.join(folder, path) not in listed]
        report_left_out(folder, {"not listed as metadata": unlisted})
        return rows
    elsewhere = {parts: names for parts, names in content.images.items() if parts not in split_of}
    report_left_out(
        folder,
        {
            "not in a class folder" if has_classes else "elsewhere": join_parts(elsewhere),
            "class folders without images": _empty_classes(content, split_of) if has_classes else [],
        },
    )
    if has_classes:
        _tell_of_merged_classes(split_of, class_part)
    features = Features({"image": Image(), **({"label": ClassLabel(names=class_names)} if has_classes else {})})
    for split in dict.fromkeys(split_of.values()):
        images = sorted(
            (_checked(os.path.join(folder, *parts, name)), *([parts[class_part]] if has_classes else []))
            for parts, names in content.images.items()
            if split_of.get(parts) == split
            for name in names
        )
        rows = {**(rows or {}), split: Dataset.from_dict(dict(zip(features, zip(*images))), features)}
    return rows


def _find_splits(folders: list[Parts]) -> tuple[dict[Parts, str], int | None]:
    """The split of each folder of images, unless it is in none, and which of its parts may be the class, if any."""
    named = {parts: [SPLITS[name.lower()] for name in parts[:-1] if name.lower() in SPLITS] for parts in folders}
    if all(parts and parts[-1].lower() in SPLITS for parts in folders):
        split_of = {parts: SPLITS[parts[-1].lower()] for parts in folders}
        if len({parts[:-1] for parts in folders}) > 1:  # cat/train, cat/test, dog/train, dog/test
            return split_of, None if any(named.values()) else -2
        if "train" in split_of.values() or len({*split_of.values()}) == len(folders):  # splits without classes
            return split_of, None
    if any(named.values()):
        return {parts: splits[0] for parts, splits in named.items() if splits}, -1
    alike = {parts: SPLIT_WORD.search(" ".join(parts[:-1]).lower()) for parts in folders}
    if all(alike.values()):  # train_images, test_images
        split_of = {parts: SPLITS[match[1]] for parts, match in alike.items()}
        taken = sorted({f"{one_line('/'.join(parts[:-1]))} as {split}" for parts, split in split_of.items()})
        warn_once(f"Folders are taken as splits for a word in their names: {', '.join(taken)}.")
        return split_of, -1
    return dict.fromkeys(folders, "train"), -1


def _empty_classes(content: FolderContent, classes: Iterable[Parts]) -> list[str]:
    """The folders without images beside class folders, and what they hold instead."""
    beside = {parts[:-1] for parts in classes}
    held = {parts: content.others.get(parts) for parts in content.empty if parts[:-1] in beside}
    return [
        "/".join(parts) + (f" with {count_of(len(names), 'file')} such as {names[0]}" if names else "")
        for parts, names in held.items()
    ]


def _tell_of_merged_classes(split_of: Mapping[Parts, str], class_part: int) -> None:
    folders = defaultdict(list)
    for parts, split in split_of.items():
        folders[split, parts[class_part]].append(one_line("/".join(parts)))
    merged = [paths for paths in folders.values() if len(paths) > 1]
    if merged:
        shown = "; ".join(", ".join(paths[:3]) + (", ..." if len(paths) > 3 else "") for paths in merged[:5])
        warn_once(f"Folders with the same name are one class, {len(merged)} in all: {shown}.")


def _read_metadata(
    folder: str,
    content: FolderContent,
    split_of: Mapping[Parts, str],
    label_column: str,
    cache_dir: str | Path | None,
    needed: bool,
) -> dict[str, Dataset] | None:
    """The rows that metadata files list; `None` if there are none, or if they are not `needed` and have no labels."""
    files = defaultdict(list)
    for parts, names in content.others.items():
        found = [os.path.join(folder, *parts, name) for name in names if name in METADATA_FILES]
        # The splits of the folders of images above and below.
        splits = {split for other, split in split_of.items() if all(a == b for a, b in zip(parts, other))}
        if found and len(splits) == 1:
            files[splits.pop()] += found
    if not files:
        return None
    first = one_line(next(iter(files.values()))[0])
    try:
        # Without the images: their names would be patterns.
        data_files = {split: [glob.escape(path) for path in paths] for split, paths in files.items()}
        rows = load_dataset("imagefolder", data_files=data_files, cache_dir=cache_dir)
    except (OSError, ValueError, DatasetsError) as error:
        rows, reason = {}, f"; it cannot be read: {one_line(error.__cause__ or error)}"
        if needed:
            raise DataError(f"Cannot read {first}: {one_line(error.__cause__ or error)}.") from error
    else:
        reason = f"; it has no column {label_column!r}"
    if needed or (rows and all(label_column in dataset.features for dataset in rows.values())):
        return dict(rows)
    warn_once(f"{first} is not used, as the class folders name the classes{reason}.")
    return None


def _image_paths(dataset: Dataset) -> list[str]:
    columns = [dataset.data.column(name) for name, kind in dataset.features.items() if isinstance(kind, Image)]
    return [path for column in columns for path in pc.struct_field(column, "path").to_pylist()]


def _checked(path: str) -> str:
    try:
        path.encode()
    except UnicodeEncodeError:
        raise DataError(f"The name of {one_line(path)} is not UTF-8: rename it.") from None
    return path
