"""Text for messages."""

from __future__ import annotations

from collections.abc import Iterable
from textwrap import shorten


def one_line(text: object) -> str:
    """Writes what would break the line, garble a terminal or is not UTF-8 as an escape, such as `\\n`."""

    def escape(character: str) -> str:
        if "\udc80" <= character <= "\udcff":  # how Python holds a byte of a file's name that is not UTF-8
            return f"\\x{ord(character) - 0xDC00:02x}"
        return character.encode("unicode_escape").decode("ascii")

    return "".join(c if c.isprintable() else escape(c) for c in str(text))


def list_first(things: Iterable[object], most: int = 5) -> str:
    """The first of some names, and how many more there are: a, b and 3 more."""
    things = list(things)
    more = f" and {len(things) - most:,} more" if len(things) > most else ""
    return ", ".join(map(one_line, things[:most])) + more


def cause_of(error: BaseException, width: int = 500) -> str:
    """What a library's error says, on one line, cut between words; the error itself where it points to a traceback."""
    if "stacktrace above" in str(error) and error.__cause__ is not None:
        error = error.__cause__
    return shorten(one_line(" ".join(str(error).split())), width, placeholder=" …")


def show_duration(seconds: float) -> str:
    """A time as people say it: 0.4 s, 85 s, 12 min, 3.2 h, 15 days."""
    for unit, length, until in (("s", 1, 120), ("min", 60, 120), ("h", 3600, 72)):
        if seconds < until * length:
            return f"{_short(seconds / length)} {unit}"
    return f"{_short(seconds / 86400)} days"


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 9.95 else f"{value:.2g}"


def show_size(width: int, height: int) -> str:
    """The size of a picture, as Pillow says it: 64x32 is wide."""
    return f"{width}x{height}"


def show_range(low: int, high: int) -> str:
    """The smallest and largest of some numbers: 3 to 2,000, or 4 if all are."""
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def count_of(count: int, thing: str) -> str:
    """A number and what there is of it: 1 image, 2,000 images; `thing` takes its regular plural."""
    plural = thing if count == 1 else f"{thing}es" if thing.endswith("s") else f"{thing}s"
    return f"{count:,} {plural}"
