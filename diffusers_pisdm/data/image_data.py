"""A labelled image data set from a folder or the Hub."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import fsspec
from datasets import ClassLabel, Dataset, Image, IterableDataset, Value, load_dataset

from .rows import DataError


@dataclass
class ImageData:
    """
    Rows of encoded images and labels, made by [`load_image_data`].

    Args:
        dataset (`Dataset` or `IterableDataset`): The rows; images are not decoded.
        class_names (`list[str]`): The name of each class.
        num_rows (`int` or `None`): `None` if a stream does not say.
        image_column, label_column (`str`): The columns that are used.
        class_ids (`dict`): The label in a row to the class, an index of `class_names`.
        flip_column (`str`, *optional*): A column that says which images may be mirrored; all may without it.
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
        """Whether the rows come one after the other, instead of by their number."""
        return isinstance(self.dataset, IterableDataset)

    def encoded_image(self, row: dict) -> bytes:
        """The image file of a row, as it is."""
        image = row[self.image_column] or {}
        if image.get("bytes") is not None:
            return image["bytes"]
        path = image.get("path")
        if path is None:
            raise ValueError("the row holds no image")
        with fsspec.open(path, "rb") if "://" in path else open(path, "rb") as file:
            return file.read()

    def class_id(self, row: dict, position: int) -> int:
        """The class of a row; `position` is its number, for the error."""
        label = row[self.label_column]
        if label not in self.class_ids:
            raise DataError(_unknown_labels([label], self.class_names, self.place(row, position)))
        return self.class_ids[label]

    def may_flip(self, row: dict) -> bool:
        """Whether the image of a row shows the same thing in the mirror."""
        return self.flip_column is None or bool(row[self.flip_column])

    def place(self, row: dict, position: int) -> str:
        """Where a row comes from, for messages: its number and, where known, the file."""
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
) -> ImageData:
    """
    Loads a labelled image data set by `datasets.load_dataset`: a folder of images with one folder a class, a folder of
    parquet files or of webdataset tars, or a data set on the Hub.

    Classes are those of the label column if it is a `ClassLabel`; else its sorted values.

    Args:
        name_or_path (`str` or `Path`): A local folder or a name on the Hub.
        split (`str`): Which split to load.
        streaming (`bool`, defaults to `False`): Read row after row, without copying the data set to the cache first.
        image_column (`str`, defaults to `"image"`), label_column (`str`, defaults to `"label"`):
            Webdataset columns are named by file endings: `jpg` and `cls`, say.
        class_names (`list[str]`, *optional*):
            The classes in their order. The data's own names are looked up in it, whole numbers without a name are
            indices. Needed for a stream whose labels are no `ClassLabel`, and to give a held-out split the classes of
            the training split.
        cache_dir (`str` or `Path`, *optional*): Where `datasets` keeps what it prepared.
        flip_column (`str`, *optional*): A column of truth values: which images may be mirrored.

    Returns:
        [`ImageData`].

    Raises:
        FileNotFoundError: There is no such folder or data set, or it holds nothing readable.
        ValueError: There is no such split or column, or the labels do not fit the class names.
    """
    dataset = _load(name_or_path, split, streaming, cache_dir)
    features = dataset.features
    if features is None:
        raise DataError(
            f"A stream of {name_or_path} does not say which columns it has: load it without --streaming, or convert it"
            " to parquet."
        )
    columns = {"image": image_column, "label": label_column, "flip": flip_column}
    for name, column in columns.items():
        if column is not None and column not in features:
            hint = " Images in folders have labels if there is one folder a class, and two or more."
            raise DataError(
                f"{name_or_path} has no column {column!r}, only {', '.join(features)}: name the right one with"
                f" --{name}_column.{hint if name == 'label' else ''}"
            )
    kind = features[image_column]
    if not (isinstance(kind, Image) or (isinstance(kind, Value) and kind.dtype.endswith(("string", "binary")))):
        raise DataError(f"Column {image_column!r} of {name_or_path} holds {kind}, not images: see --image_column.")

    if flip_column is not None and features[flip_column] != Value("bool"):
        raise DataError(
            f"Column {flip_column!r} of {name_or_path} holds {features[flip_column]}, not truth values: see"
            " --flip_column."
        )
    kept = [column for column in (*columns.values(), "__url__") if column in features]
    dataset = dataset.select_columns(kept).cast_column(image_column, Image(decode=False))
    num_rows, labels = None, None
    if not streaming:
        num_rows, labels = len(dataset), dataset.unique(label_column)
    elif dataset.info.splits is not None and split in dataset.info.splits:
        num_rows = dataset.info.splits[split].num_examples or None
    class_names, class_ids = _classes(features[label_column], labels, class_names)
    unknown = [label for label in labels or [] if label not in class_ids]
    if unknown:
        raise DataError(_unknown_labels(unknown, class_names, f"column {label_column!r} of split {split!r}"))
    return ImageData(dataset, class_names, num_rows, image_column, label_column, class_ids, flip_column)


def read_class_names(path: str | Path) -> list[str]:
    """Reads a text file of class names, one a line in the order of the classes."""
    return [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]


def _load(
    name_or_path: str | Path, split: str, streaming: bool, cache_dir: str | Path | None
) -> Dataset | IterableDataset:
    name = os.path.expanduser(name_or_path)
    is_path = os.path.isabs(name) or name.startswith(".") or name.count("/") > 1  # names on the Hub have one slash
    if is_path and not os.path.isdir(name):
        raise FileNotFoundError(f"There is no folder {name}: check the path.")
    try:
        return load_dataset(name, split=split, streaming=streaming, cache_dir=cache_dir)
    except (FileNotFoundError, ConnectionError) as error:
        if os.path.isdir(name):
            remedy = "put images (one folder a class), parquet files or webdataset tars into it"
        else:
            remedy = "there is no such folder here, and no such data set could be reached on the Hub"
        raise FileNotFoundError(f"No data found in {name}: {remedy}. ({error})") from error
    except ValueError as error:  # of datasets: it lists the splits there are
        raise DataError(f"Cannot load split {split!r} of {name}: {error}") from error


def _classes(
    feature: ClassLabel | Value, labels: list | None, class_names: list[str] | None
) -> tuple[list[str], dict[int | str, int]]:
    """The names of the classes, and the class of each label."""
    is_text = isinstance(feature, Value) and feature.dtype.endswith("string")
    is_number = isinstance(feature, Value) and "int" in feature.dtype
    if not (isinstance(feature, ClassLabel) or is_text or is_number):
        raise DataError(f"Labels must be class labels, strings or whole numbers, not {feature}: see --label_column.")

    if class_names is None:
        if isinstance(feature, ClassLabel):
            return feature.names, {i: i for i in range(len(feature.names))}
        if labels is None:
            raise DataError(
                "A stream of unnamed labels does not say which classes there are: --class_names_file must."
            )
        values = sorted(label for label in labels if label is not None and (is_text or label >= 0))
        return [str(value) for value in values], {value: i for i, value in enumerate(values)}

    ids = {name: i for i, name in enumerate(class_names)}
    if len(ids) < len(class_names):
        raise DataError(
            f"Class names must differ; given twice: {_first({n for n in ids if class_names.count(n) > 1})}."
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
        f"The data set has {len(feature.names)} classes ({_first(feature.names)}), the class names given are"
        f" {len(class_names)} others ({_first(class_names)}): give as many, or the data set's own."
    )


def _unknown_labels(labels: list, class_names: list[str], place: str) -> str:
    return (
        f"Unknown labels in {place}: {_first(map(repr, labels))}. There are {len(class_names)} classes"
        f" ({_first(class_names)}). Negative labels and None usually mark a test split whose labels are hidden: use"
        " another split; for other classes see --class_names_file."
    )


def _first(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
