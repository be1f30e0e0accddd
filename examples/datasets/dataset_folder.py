"""Write a labelled image data set as a folder that `datasets.load_dataset(folder)` reads, all of it or nothing."""

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from datasets import Dataset, Features
from huggingface_hub import DatasetCardData


MADE_BY = "Made by examples/datasets of diffusers-pisdm."  # in the README.md of every folder written here


def check_replaceable(output_dir: Path) -> None:
    """
    Refuse (FileExistsError) an `output_dir` that is not empty and not a data set written here: it would be deleted.
    """
    if not output_dir.exists():
        return
    card = output_dir / "README.md"
    names = {path.name for path in output_dir.iterdir()} if output_dir.is_dir() else {output_dir.name}
    if names - {"README.md", "LICENSES.md", "data"} or (
        names and not (card.is_file() and MADE_BY in card.read_text(encoding="utf-8"))
    ):
        raise FileExistsError(
            f"{output_dir} exists and is not a data set from this script: choose another --output_dir or move it."
        )


def write_dataset_folder(
    output_dir: Path,
    splits: Mapping[str, Sequence[dict]],
    features: Features,
    card: str,
    licenses: str,
    format: str = "parquet",
) -> None:
    """
    Write the splits under a temporary name, then rename: a stopped run leaves no half data set.

    `row["image"]` is `{"bytes": encoded picture, "path": name}` with a name that is unique in its split; a split
    without rows is left out. `"parquet"` makes one file per split with all columns, `"imagefolder"` a folder of
    pictures per class, a slash in its name written as an underscore, with image and label only.
    """
    check_replaceable(output_dir)
    splits = {split: rows for split, rows in splits.items() if rows}
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir.parent, prefix=f".{output_dir.name}-") as workspace:
        new_dir = Path(workspace) / "new"
        pattern = "data/{}-*.parquet" if format == "parquet" else "data/{}/**"
        for split, rows in splits.items():
            if format == "parquet":
                path = new_dir / "data" / f"{split}-00000-of-00001.parquet"
                path.parent.mkdir(parents=True, exist_ok=True)
                Dataset.from_list(list(rows), features=features).to_parquet(path)
            else:
                _write_class_folders(new_dir / "data" / split, rows, features["label"].names)
        (new_dir / "README.md").write_text(
            f"{_yaml_header(list(splits), pattern)}{card}\n{MADE_BY}\n", encoding="utf-8"
        )
        (new_dir / "LICENSES.md").write_text(licenses, encoding="utf-8")
        if output_dir.exists():
            os.rename(output_dir, Path(workspace) / "old")
        os.rename(new_dir, output_dir)


def _write_class_folders(folder: Path, rows: Sequence[dict], names: Sequence[str]) -> None:
    """One folder a class. imagefolder takes a class's name from the last folder only, hence no slash in it."""
    for row in rows:
        path = folder / names[row["label"]].replace("/", "_") / row["image"]["path"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(row["image"]["bytes"])


def _yaml_header(splits: Sequence[str], pattern: str) -> str:
    """The card's header: it tells `load_dataset` and the Hub which files make up which split."""
    data_files = [{"split": split, "path": pattern.format(split)} for split in splits]
    data = DatasetCardData(license="other", configs=[{"config_name": "default", "data_files": data_files}])
    return f"---\n{data.to_yaml()}\n---\n\n"
