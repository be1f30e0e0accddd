"""Write a labelled image data set as a folder that `datasets.load_dataset(folder)` reads, all of it or nothing."""

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from datasets import Dataset, Features
from huggingface_hub import DatasetCardData


MARKER = "LICENSES.md"  # every folder written here has one; a folder without it is somebody else's and is not replaced


def check_replaceable(output_dir: Path) -> None:
    """Refuse an `output_dir` that holds something other than a data set written by this module.

    Raises:
        FileExistsError: `output_dir` is a file, or a folder with files but without `LICENSES.md`.
    """
    if output_dir.is_dir() and (not any(output_dir.iterdir()) or (output_dir / MARKER).is_file()):
        return
    if output_dir.exists():
        raise FileExistsError(
            f"{output_dir} exists and is not a data set written by this script: name another --output_dir or remove it."
        )


def write_dataset_folder(
    output_dir: Path,
    splits: Mapping[str, Sequence[dict]],
    features: Features,
    card: str,
    licenses: str,
    format: str = "parquet",
) -> None:
    """Write the splits under a temporary name beside `output_dir`, then rename: a stopped run leaves no half data set.

    Args:
        output_dir (`Path`): The folder to make; a data set written there before is replaced.
        splits (`Mapping[str, Sequence[dict]]`): Split name to rows; `row["image"]` is `{"bytes": PNG, "path": name}`
            with a name that is unique in its split.
        features (`datasets.Features`): The columns, with an `Image` named `image` and a `ClassLabel` named `label`.
        card (`str`): Markdown for README.md, without the YAML header, which is made here.
        licenses (`str`): Markdown for LICENSES.md.
        format (`str`): `"parquet"` (one file a split) or `"imagefolder"` (PNG files and a metadata.jsonl a split).

    Raises:
        FileExistsError: `output_dir` holds something else.
    """
    check_replaceable(output_dir)
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir.parent, prefix=f".{output_dir.name}-") as workspace:
        new_dir = Path(workspace) / "new"
        for split, rows in splits.items():
            if format == "parquet":
                path = new_dir / "data" / f"{split}-00000-of-00001.parquet"
                path.parent.mkdir(parents=True, exist_ok=True)
                Dataset.from_list(list(rows), features=features).to_parquet(path)
            else:
                _write_image_files(new_dir / "data" / split, rows)
        (new_dir / "README.md").write_text(_yaml_header(splits, features, format) + card, encoding="utf-8")
        (new_dir / MARKER).write_text(licenses, encoding="utf-8")
        if output_dir.exists():
            os.rename(output_dir, Path(workspace) / "old")
        os.rename(new_dir, output_dir)


def _write_image_files(folder: Path, rows: Sequence[dict]) -> None:
    folder.mkdir(parents=True)
    with open(folder / "metadata.jsonl", "w", encoding="utf-8") as metadata:
        for row in rows:
            name = row["image"]["path"]
            (folder / name).write_bytes(row["image"]["bytes"])
            columns = {key: value for key, value in row.items() if key != "image"}
            metadata.write(json.dumps({"file_name": name, **columns}, ensure_ascii=False) + "\n")


def _yaml_header(splits: Mapping[str, Sequence[dict]], features: Features, format: str) -> str:
    """The card's header: it gives imagefolder, whose files only hold ids, the class names as well."""
    pattern = "data/{}-*.parquet" if format == "parquet" else "data/{}/**"
    data_files = [{"split": split, "path": pattern.format(split)} for split in splits]
    header = DatasetCardData(
        license="other",
        configs=[{"config_name": "default", "data_files": data_files}],
        dataset_info={"features": features._to_yaml_list()},
    )
    return f"---\n{header.to_yaml()}\n---\n\n"
