"""Command lines and their values, and recipes', checked: numbers against their range, paths for being given."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from PIL import Image


class CommandParser(argparse.ArgumentParser):
    """Names `--help` after an error, where argparse would print the usage: with our many options, it is a page."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n`{self.prog} --help` lists the options.\n")


def with_options(message: object, args: argparse.Namespace) -> str:
    """Writes a message of our functions for the command line: `seed` and `private=True` are --seed and --private."""
    return re.sub(r"`(\w+)(=True)?`", lambda match: f"--{match[1]}" if match[1] in args else match[0], str(message))


@dataclass(frozen=True)
class Bounds:
    """A range of finite numbers: `minimum` and `maximum` belong to it, `above` and `below` do not."""

    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    below: float | None = None

    def fault(self, value: float) -> str | None:
        """What is wrong with a number, if anything, to follow its name."""
        if isinstance(value, float) and not math.isfinite(value):  # integers are, of any size
            return f"must be finite, got {value}"
        if self.minimum is not None and value < self.minimum:
            return f"must be at least {self.minimum}, got {value}"
        if self.maximum is not None and value > self.maximum:
            return f"must be at most {self.maximum}, got {value}"
        if self.above is not None and value <= self.above:
            return f"must be more than {self.above}, got {value}"
        if self.below is not None and value >= self.below:
            return f"must be less than {self.below}, got {value}"
        return None


def bounded(kind: type[int] | type[float], bounds: Bounds) -> Callable[[str], float]:
    """A `type` for `ArgumentParser.add_argument` that only takes numbers within `bounds`."""

    def convert(text: str) -> float:
        value = kind(text)
        fault = bounds.fault(value)
        if fault is not None:
            raise argparse.ArgumentTypeError(fault)
        return value

    convert.__name__ = kind.__name__  # argparse: "invalid int value: ..."
    return convert


def not_empty(text: str) -> str:
    """A `type` for `ArgumentParser.add_argument`: as a path, an empty text would be the current folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def output_path(text: str) -> Path:
    """A `type` for `ArgumentParser.add_argument`: where to write; see [`not_empty`]."""
    return Path(not_empty(text))


def picture_path(text: str) -> Path:
    """A `type` for `ArgumentParser.add_argument`: a file that Pillow can write, by its suffix."""
    formats = Image.registered_extensions()
    suffix = Path(text).suffix.lower()
    if formats.get(suffix) not in Image.SAVE:
        raise argparse.ArgumentTypeError(f"{text!r} is no picture's name: use .png, .jpg or .webp")
    return Path(text)


COUNT = bounded(int, Bounds(minimum=1))
COUNT_OR_ZERO = bounded(int, Bounds(minimum=0))
SEEDS = Bounds(minimum=0, maximum=2**63 - 1)  # of torch's generators
SEED = bounded(int, SEEDS)
NOT_NEGATIVE = bounded(float, Bounds(minimum=0))
SHARE = bounded(float, Bounds(minimum=0, maximum=1))
PERCENT = bounded(float, Bounds(minimum=0, maximum=100))
