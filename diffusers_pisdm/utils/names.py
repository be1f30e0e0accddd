"""Names from outside, such as those of classes: of any length, with any characters."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from .messages import one_line


LONGEST = 80


def show_name(name: object) -> str:
    """A name for messages, bars and labels: printable, on one line, its middle left out if it is long."""
    text = str(name)
    half = LONGEST // 2
    if len(text) > LONGEST:
        text = f"{text[:half]}…{text[-half:]}"
    return one_line(text)


def nearest_name(name: str, known: Iterable[str]) -> str | None:
    """The known name most like this one, by their beginnings: comparing takes the square of the length."""
    beginnings = {other[:LONGEST]: other for other in known}
    matches = difflib.get_close_matches(name[:LONGEST], beginnings, n=1, cutoff=0.0)
    return beginnings[matches[0]] if matches else None
