"""A labelled image data set from a folder or the Hub."""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import fsspec
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, Image, IterableDataset, Value, load_dataset
from datasets.exceptions import DatasetsError
from datasets.packaged_modules.cache.cache import Cache

from ..utils.folder_scan import ReportLeftOut, describe_left_out, read_regular_file, size_and_end, warn_of_left_out
from ..utils.hub_names import hub_or_cache
from ..utils.messages import count_of, list_first, one_line
from .image_folders import load_folder, sort_class_names
from .rows import DataError


MOST_IN_FINGERPRINT = 100_000  # images: looking at them must not delay a run


@dataclass
class ImageData:
    """
    Rows of encoded images and labels, as returned by [`load_image_data`].

    Args:
        dataset (`Dataset` or `IterableDataset`): The rows; images are not decoded.
        class_names (`list[str]`): The name of each class.
        num_rows (`int` or `None`): Number of rows; `None` if a stream does not say.
        image_column, label_column (`str`): The columns to read.
        class_ids (`dict`): Maps a row's label to its class, an index into `class_names`.
        flip_column (`str`, *optional*): The column that says which images may be mirrored; all may by default.
    """

    dataset: Dataset | IterableDataset
    class_names: list[str]
    num_rows: int | None
    image_column: str
    label_column: str
    class_ids: dict[int | str, int]
    flip_column: str | None = None

    @property
    def is_stream(self) -> bool:
        """Whether rows can only be read in sequence, not by index."""
        return isinstance(self.dataset, IterableDataset)

    def encoded_image(self, row: dict) -> bytes:
        """The unmodified image file of a row."""
        image = row[self.image_column] or {}
        if image.get("bytes") is not None:
            return image["bytes"]
        path = image.get("path")
        if path is None:
            raise ValueError("the row holds no image")
        if "://" not in path:
            return read_regular_file(path)
        with fsspec.open(path, "rb") as file:
            return file.read()

    def class_id(self, row: dict, position: int) -> int:
        """The class of a row; `position` is its index, for the error message."""
        label = row[self.label_column]
        if label not in self.class_ids:
            raise DataError(_unknown_labels([label], self.class_names, self.place(row, position)))
        return self.class_ids[label]

    def class_counts(self, left_out: Iterable[int] = ()) -> list[int]:
        """How many images each class has, by class, without some rows; of data that is not a stream."""
        labels = self.dataset[self.label_column]
        counts = Counter(self.class_ids.get(label) for label in labels)
        counts.subtract(self.class_ids.get(labels[row]) for row in left_out)
        return [counts[class_id] for class_id in range(len(self.class_names))]

    def may_flip(self, row: dict) -> bool:
        """Whether the image of a row keeps its meaning when mirrored."""
        return self.flip_column is None or bool(row[self.flip_column])

    def fingerprint(self) -> dict[str, str]:
        """
        For each class, by name, the number of its images and a digest of their names, sizes and last bytes. They are
        not read; of more than `MOST_IN_FINGERPRINT` images, as many are taken evenly. Empty for a stream.
        """
        if self.is_stream:
            return {}
        counts, digests = Counter(), defaultdict(hashlib.sha256)
        every = -(-len(self.dataset) // MOST_IN_FINGERPRINT)
        taken = self.dataset if every == 1 else self.dataset.select(range(0, len(self.dataset), every))
        for rows in taken.with_format("arrow").iter(1000):
            labels, images = rows[self.label_column].to_pylist(), rows[self.image_column]
            paths, contents = (pc.struct_field(images, part) for part in ("path", "bytes"))
            # As in size_and_end, without a copy of the images.
            sizes, ends = pc.binary_length(contents).to_pylist(), pc.binary_slice(contents, -64).to_pylist()
            for label, path, *size_and_last in zip(labels, paths.to_pylist(), sizes, ends):
                if size_and_last == [None, None] and path is not None and "://" not in path:
                    size_and_last = size_and_end(path)
                counts[label] += 1
                digests[label].update(repr((path and os.path.basename(path), *size_and_last)).encode())
        names = {label: self.class_names[self.class_ids[label]] for label in counts}
        return {names[label]: f"{counts[label]} images, {digests[label].hexdigest()[:16]}" for label in counts}

    def place(self, row: dict, position: int) -> str:
        """Where a row comes from, for messages: its index and, if known, the file."""
        path = (row[self.image_column] or {}).get("path")
        if path is None:
            return f"row {position}"
        archive = row.get("__url__")
        return f"row {position} ({path if archive is None else f'{archive}: {path}'})"


def load_image_data(
    name_or_path: str | Path,
    split: str,
    streaming: bool = False,
    image_column: str = "image",
    label_column: str = "label",
    class_names: list[str] | None = None,
    cache_dir: str | Path | None = None,
    flip_column: str | None = None,
    config_name: str | None = None,
    class_order: Sequence[str] | None = None,
    report_left_out: ReportLeftOut = warn_of_left_out,
) -> ImageData:
    """
    Loads a labelled image data set: a folder of images with one subfolder per class, or whatever `datasets` reads,
    such as a folder of parquet files or webdataset tars, one written by `save_to_disk`, or a data set on the Hub.

    The classes are those of the label column if it is a `ClassLabel`, otherwise its sorted values; names that are all
    integers are sorted by value. What lies in a folder and is not read is logged as a warning.

    Args:
        name_or_path (`str` or `Path`): A local folder or a data set on the Hub.
        split (`str`): The split to load.
        streaming (`bool`, defaults to `False`): Read rows in sequence, without first copying the data to the cache.
        image_column (`str`, defaults to `"image"`), label_column (`str`, defaults to `"label"`):
            The columns to read. Webdataset columns are named after file extensions, e.g. `jpg` and `cls`.
        class_names (`list[str]`, *optional*):
            The classes in order. Named labels are looked up in this list; unnamed integer labels are indices into it.
            Required for a stream whose labels are not a `ClassLabel`, and to give a held-out split the classes of the
            training split.
        cache_dir (`str` or `Path`, *optional*): Where `datasets` caches prepared data.
        flip_column (`str`, *optional*): A boolean column: which images may be mirrored.
        config_name (`str`, *optional*): The configuration, if the data set has several.
        class_order (`Sequence[str]`, *optional*):
            The names of a model's classes in its order, which the data's classes take if they are the same.
        report_left_out (`Callable`, defaults to `warn_of_left_out`):
            Called with a folder and what lies in it that is not read: the paths by reason, once or more often.

    Returns:
        [`ImageData`].

    Raises:
        FileNotFoundError: The folder or data set does not exist, or holds nothing readable.
        ValueError: The split or a column does not exist, or the labels do not match the class names.
    """
    left_out: dict[str, list[str]] = defaultdict(list)

    def note_left_out(folder: str | Path, by_reason: Mapping[str, list[str]]) -> None:
        for reason, paths in by_reason.items():
            left_out[reason] += paths
        report_left_out(folder, by_reason)

    try:
        dataset = _load(name_or_path, split, streaming, cache_dir, config_name, label_column, note_left_out)
    except PermissionError as error:
        raise DataError(f"Cannot read {name_or_path}: {error}.") from error
    if isinstance(dataset, Dataset) and len(dataset) == 0:
        raise DataError(f"There is nothing in split {split!r} of {name_or_path}.")
    features = dataset.features
    if features is None:
        raise DataError(
            f"Streaming {name_or_path} does not tell us its columns: load it without --streaming, or convert it to"
            " parquet."
        )
    columns = {"image": image_column, "label": label_column, "flip": flip_column}
    for name, column in columns.items():
        if name == "label" and column not in features and (folders := _folders_of_images(dataset, name_or_path)):
            found = "one folder" if len(folders) == 1 else "folders that are splits"
            raise DataError(
                f"{name_or_path} holds {count_of(len(dataset), 'image')} in {found}, {list_first(folders)}, so there"
                " are no classes to learn: make one subfolder per class, at least two, all at the same depth."
                f" {describe_left_out(name_or_path, left_out)}".rstrip()
            )
        if column is not None and column not in features:
            raise DataError(
                f"{name_or_path} has no column {column!r}, only {', '.join(features)}: set the right one with"
                f" --{name}_column."
            )
    kind = features[image_column]
    if not (isinstance(kind, Image) or (isinstance(kind, Value) and kind.dtype.endswith(("string", "binary")))):
        raise DataError(f"Column {image_column!r} of {name_or_path} holds {kind}, not images: see --image_column.")

    if flip_column is not None and features[flip_column] != Value("bool"):
        raise DataError(
            f"Column {flip_column!r} of {name_or_path} holds {features[flip_column]}, not booleans: see --flip_column."
        )
    kept = [column for column in (*columns.values(), "__url__") if column in features]
    dataset = dataset.select_columns(kept).cast_column(image_column, Image(decode=False))
    num_rows, labels = None, None
    if isinstance(dataset, Dataset):
        num_rows, labels = len(dataset), None if streaming else dataset.unique(label_column)
        dataset = dataset.to_iterable_dataset() if streaming else dataset
    elif dataset.info.splits is not None and split in dataset.info.splits:
        num_rows = dataset.info.splits[split].num_examples or None
    if class_names is None:
        class_names, class_ids = _classes(features[label_column], labels, None)
        if class_order is not None and sorted(class_names) == sorted(class_order):
            class_names, class_ids = _classes(features[label_column], labels, list(class_order))
    else:
        class_names, class_ids = _classes(features[label_column], labels, class_names)
    unknown = [label for label in labels or [] if label not in class_ids]
    if unknown:
        raise DataError(_unknown_labels(unknown, class_names, f"column {label_column!r} of split {split!r}"))
    return ImageData(dataset, class_names, num_rows, image_column, label_column, class_ids, flip_column)


def read_class_names(path: str | Path) -> list[str]:
    """Reads class names from a text file with one per line, in class order."""
    return [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]


def _load(
    name_or_path: str | Path,
    split: str,
    streaming: bool,
    cache_dir: str | Path | None,
    config_name: str | None,
    label_column: str,
    report_left_out: ReportLeftOut,
) -> Dataset | IterableDataset:
    name = os.path.expanduser(name_or_path)
    is_folder = os.path.isdir(name)
    is_format = name.isidentifier() and find_spec(f"datasets.packaged_modules.{name}") is not None  # such as "csv"
    if is_format and not is_folder:
        raise FileNotFoundError(f"There is no folder {name}: check the path.")
    try:
        if is_folder:
            options = (streaming, label_column, cache_dir, config_name, report_left_out)
            return load_folder(os.path.abspath(name), split, *options)
        with hub_or_cache(name, "dataset") as local_files_only:
            if local_files_only:
                return _load_cached(name, split, streaming, cache_dir, config_name)
            return load_dataset(name, config_name, split=split, streaming=streaming, cache_dir=cache_dir)
    except (DataError, PermissionError):
        raise
    except (FileNotFoundError, ConnectionError) as error:
        if not is_folder:
            raise FileNotFoundError(one_line(error)) from error
        remedy = "put images (one subfolder per class), parquet files or webdataset tars into it"
        raise FileNotFoundError(f"No data found in {name}: {remedy}. ({error})") from error
    except ValueError as error:  # it lists the splits or configurations that there are
        raise DataError(
            f"Cannot load split {split!r} of {name}: {one_line(error)} See also --dataset_config_name."
        ) from error
    except (DatasetsError, tarfile.TarError, IndexError, TypeError) as error:
        raise DataError(
            f"Cannot read split {split!r} of {name}: {one_line(error.__cause__ or error)}. A file may be damaged, or"
            " not hold images and labels as rows."
        ) from error


def _load_cached(
    name: str, split: str, streaming: bool, cache_dir: str | Path | None, config_name: str | None
) -> Dataset | IterableDataset:
    """Loads what `load_dataset` keeps of a data set on the Hub; by itself, it would ask there first, many times."""
    try:
        builder = Cache(cache_dir, name.split("/")[-1], config_name, version="auto", hash="auto", repo_id=name)
    except ValueError as error:  # it lists the configurations that there are
        raise FileNotFoundError(one_line(error)) from error
    return builder.as_streaming_dataset(split=split) if streaming else builder.as_dataset(split=split)


def _folders_of_images(dataset: Dataset | IterableDataset, top: str | Path) -> list[str]:
    """The folders of images that came without labels or other columns, below `top`; none if they came otherwise."""
    if isinstance(dataset, IterableDataset) or list(dataset.features) != ["image"] or not os.path.isdir(top):
        return []
    paths = [image["path"] for image in dataset.cast_column("image", Image(decode=False))["image"]]
    return sorted({os.path.relpath(os.path.dirname(path), top) for path in paths if path})


def _classes(
    feature: ClassLabel | Value, labels: list | None, class_names: list[str] | None
) -> tuple[list[str], dict[int | str, int]]:
    """The class names, and the class of each label."""
    is_text = isinstance(feature, Value) and feature.dtype.endswith("string")
    is_number = isinstance(feature, Value) and "int" in feature.dtype
    if not (isinstance(feature, ClassLabel) or is_text or is_number):
        raise DataError(f"Labels must be class labels, strings or integers, not {feature}: see --label_column.")

    if class_names is None:
        if isinstance(feature, ClassLabel):
            return feature.names, {i: i for i in range(len(feature.names))}
        if labels is None:
            raise DataError("A stream of unnamed labels does not list its classes: pass them with --class_names_file.")
        values = [label for label in labels if label is not None and (is_text or label >= 0)]
        values = sort_class_names(values) if is_text else sorted(values)
        return [str(value) for value in values], {value: i for i, value in enumerate(values)}

    ids = {name: i for i, name in enumerate(class_names)}
    if len(ids) < len(class_names):
        raise DataError(
            f"Class names must be unique; given twice: {list_first({n for n in ids if class_names.count(n) > 1})}."
        )
    if is_text:
        return class_names, ids
    if is_number:
        by_name = all(name.isdecimal() for name in class_names)
        return class_names, {int(name) if by_name else i: i for name, i in ids.items()}
    if all(name in ids for name in feature.names):
        return class_names, {label: ids[name] for label, name in enumerate(feature.names)}
    if len(feature.names) == len(class_names):
        return class_names, {i: i for i in range(len(class_names))}
    raise DataError(
        f"The data set has {count_of(len(feature.names), 'class')} ({list_first(feature.names)}), but you"
        f" named {len(class_names)} others ({list_first(class_names)}): name as many, or use the data set's own"
        " names."
    )


def _unknown_labels(labels: list, class_names: list[str], place: str) -> str:
    return (
        f"Unknown labels in {place}: {list_first(map(repr, labels))}. The data set has"
        f" {count_of(len(class_names), 'class')} ({list_first(class_names)}). Negative labels and None usually mean a"
        " test split with hidden labels: use another split. To name other classes, see --class_names_file."
    )
