"""What lies in a folder, without opening a file."""

from __future__ import annotations

import functools
import os
import stat
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from diffusers.utils import logging
from PIL import Image

from .messages import list_first, one_line


Parts = tuple[str, ...]  # the folders from the top to a file
Place = str | Path | os.DirEntry

UNREGISTERED_ENDINGS = {".heic", ".heif", ".jxl", ".svg"}  # of images, but not to Pillow

# A folder is scanned for each of its splits: what was left out is said once.
warn_once = functools.cache(logging.get_logger(__name__).warning)


@dataclass
class FolderContent:
    """
    The names of the files in each folder below the top one, whose parts are `()`. Links are followed.

    Args:
        images, others (`dict`): Image files with one of the endings asked for, and all other files.
        hidden (`list[str]`): Images, and folders with images, whose names start with a dot.
        foreign (`list[str]`): Images with other endings.
        unusual (`list[str]`): Dangling links, and pipes, devices and folders without images that are named as images.
        empty (`list[Parts]`): Folders without images, in themselves or in the folders below.
    """

    images: dict[Parts, list[str]] = field(default_factory=lambda: defaultdict(list))
    others: dict[Parts, list[str]] = field(default_factory=lambda: defaultdict(list))
    hidden: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    unusual: list[str] = field(default_factory=list)
    empty: list[Parts] = field(default_factory=list)

    @property
    def left_out(self) -> dict[str, list[str]]:
        """The images that are not listed as such, by reason."""
        return {
            "hidden": self.hidden,
            "of formats that we do not read": self.foreign,
            "dangling links, pipes or the like": self.unusual,
        }


def join_parts(files: Mapping[Parts, Iterable[str]]) -> list[str]:
    """The paths below the top folder."""
    return ["/".join((*parts, name)) for parts, names in files.items() for name in names]


def scan_folder(folder: str | Path, endings: Collection[str]) -> FolderContent:
    """
    Lists the files in a folder and the folders in it.

    Args:
        folder (`str` or `Path`): The folder.
        endings (`Collection[str]`): Those of images, in lower case with the dot.

    Raises:
        OSError: A folder cannot be listed.
    """
    content = FolderContent()
    foreign = ({*Image.registered_extensions()} | UNREGISTERED_ENDINGS) - {*endings, ".pdf"}

    def is_image(name: str) -> bool:
        return _ending(name) in endings

    for parts, entry in _walk(folder):
        path, is_hidden = "/".join((*parts, entry.name)), entry.name.startswith(".")
        if _is(entry, stat.S_ISREG):
            if is_hidden:
                content.hidden += [path] if is_image(entry.name) else []
                continue
            (content.images if is_image(entry.name) else content.others)[parts].append(entry.name)
            content.foreign += [path] if _ending(entry.name) in foreign else []
        elif _is(entry, stat.S_ISDIR):
            if is_hidden or is_image(entry.name):
                holds_images = any(is_image(inner.name) for _, inner in _walk(entry))
                if holds_images == is_hidden:
                    (content.hidden if is_hidden else content.unusual).append(path)
            else:
                content.empty.append((*parts, entry.name))  # until an image is found in it
        elif not is_hidden and (is_image(entry.name) or entry.is_symlink()):
            content.unusual.append(path)
    above_images = {parts[:depth] for parts in content.images for depth in range(1, len(parts) + 1)}
    content.empty = [parts for parts in content.empty if parts not in above_images]
    return content


def _walk(folder: Place, parts: Parts = (), above: frozenset = frozenset()) -> Iterator[tuple[Parts, os.DirEntry]]:
    status = os.stat(folder)
    if (status.st_dev, status.st_ino) in above:  # a link to a folder that it lies in
        return
    above |= {(status.st_dev, status.st_ino)}
    with os.scandir(folder) as entries:
        entries = sorted(entries, key=lambda entry: entry.name)
    for entry in entries:
        yield parts, entry
        if _is(entry, stat.S_ISDIR) and not entry.name.startswith("."):
            yield from _walk(entry, (*parts, entry.name), above)


def _ending(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _is(entry: os.DirEntry, kind: Callable[[int], bool]) -> bool:
    """Whether a file, or what it links to, is of a kind; not if that cannot be told."""
    if not entry.is_symlink():  # told without another look at the disk
        return entry.is_dir() if kind is stat.S_ISDIR else entry.is_file()
    try:
        return kind(entry.stat().st_mode)
    except OSError:  # it links to nothing, or to itself
        return False


def read_regular_file(path: str | Path) -> bytes:
    """The content of a file; a pipe, which might never end, is an error (OSError), as are folders and devices."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(f"{path} is a folder, a pipe or a device, not a file")
    return Path(path).read_bytes()


ReportLeftOut = Callable[[str | Path, Mapping[str, list[str]]], None]  # the folder, and paths by reason


def size_and_end(path: str | Path) -> tuple[int, bytes] | None:
    """The size and the last 64 bytes of a file, by which a replaced one is noticed; `None` if it cannot be read."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return None
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 64))
            return size, file.read()
    except OSError:
        return None


def describe_left_out(folder: str | Path, left_out: Mapping[str, list[str]]) -> str:
    """Which files of a folder are not read, for each reason; nothing if all are."""
    reasons = [f"{reason}: {len(paths):,} ({list_first(paths)})" for reason, paths in left_out.items() if paths]
    if not reasons:
        return ""
    return f"Left out of {one_line(folder)}: {'; '.join(reasons)}. Move or rename them to have them read."


def warn_of_left_out(folder: str | Path, left_out: Mapping[str, list[str]]) -> None:
    """Logs which files of a folder are not read, for each reason."""
    if described := describe_left_out(folder, left_out):
        warn_once(described)
