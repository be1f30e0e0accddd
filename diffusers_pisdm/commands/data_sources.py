"""What the commands that read training images share: which data, and how it is loaded."""

from __future__ import annotations

import argparse
import shlex
from typing import Any

from ..data.image_data import ImageData, load_image_data, read_class_names


def add_data_arguments(parser: argparse.ArgumentParser) -> Any:
    """Adds the arguments of [`load_data`], in a group of their own, which is returned."""
    data = parser.add_argument_group("data (pass one of the first two)")
    data.add_argument("--dataset_name", help="A data set on the Hub.")
    data.add_argument("--train_data_dir", help="A folder: one subfolder of images per class, parquet or webdataset.")
    data.add_argument("--dataset_config_name", help="The data set's configuration, if it has several.")
    data.add_argument("--split", default="train")
    data.add_argument("--image_column", default="image")
    data.add_argument("--label_column", default="label")
    data.add_argument("--class_names_file", help="A file with one class name per line, if labels are bare numbers.")
    return data


def add_folder_argument(parser: argparse.ArgumentParser) -> None:
    """Lets the command line name the folder without `--train_data_dir`."""
    parser.add_argument("folder", nargs="?", metavar="FOLDER", help="The same as --train_data_dir.")


def check_source(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the command unless it got one data set; a folder becomes `args.train_data_dir`."""
    folders = [folder for folder in (getattr(args, "folder", None), args.train_data_dir) if folder is not None]
    if len(folders) + (args.dataset_name is not None) != 1:
        has_folder = hasattr(args, "folder")
        parser.error(
            f"pass either {'a folder or --dataset_name' if has_folder else '--dataset_name or --train_data_dir'}"
        )
    args.train_data_dir = folders[0] if folders else None


def source_options(args: argparse.Namespace, of_training: bool = False) -> str:
    """The options that name the same data to another of these commands, or to `pisdm train`."""
    defaults = dict.fromkeys(("train_data_dir", "dataset_name", "dataset_config_name", "class_names_file"))
    defaults |= {"image_column": "image", "label_column": "label", "split": "train"}
    given = {name: getattr(args, name) for name, default in defaults.items() if getattr(args, name) != default}
    if of_training and "split" in given:
        given["train_split"] = given.pop("split")
    return " ".join(f"--{name} {shlex.quote(value)}" for name, value in given.items())


def load_data(args: argparse.Namespace, **options: Any) -> ImageData:
    """Loads the data that the arguments name; `options` go to [`load_image_data`]."""
    return load_image_data(
        args.dataset_name or args.train_data_dir,
        args.split,
        image_column=args.image_column,
        label_column=args.label_column,
        config_name=args.dataset_config_name,
        class_names=None if args.class_names_file is None else read_class_names(args.class_names_file),
        **options,
    )
