"""Names from outside, such as those of classes: of any length, with any characters."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from .messages import one_line


LONGEST = 80
MOST_SUGGESTIONS = 8


def show_name(name: object) -> str:
    """A name for messages, bars and labels: printable, on one line, its middle left out if it is long."""
    text = str(name)
    half = LONGEST // 2
    if len(text) > LONGEST:
        text = f"{text[:half]}…{text[-half:]}"
    return one_line(text)


def names_with(word: str, known: Iterable[str]) -> list[str]:
    """The known names that contain a word or a part of one, in upper or lower case."""
    return [name for name in known if word.casefold() in name.casefold()]


def similar_names(name: str, known: Iterable[str]) -> list[str]:
    """
    The known names that contain this one, first as a word, then within one, then those that are spelled like it, or
    have a word that is, from the first letter on. Only beginnings are compared: comparing takes the square of the
    length.
    """
    known, wanted = list(known), name.casefold()[:LONGEST]
    spellings: dict[str, list[str]] = {}
    for other in known:
        beginning = other.casefold()[:LONGEST]
        for piece in dict.fromkeys([beginning, *re.findall(r"\w+", beginning)]):
            if piece[:1] == wanted[:1]:
                spellings.setdefault(piece, []).append(other)
    close = difflib.get_close_matches(wanted, spellings, n=MOST_SUGGESTIONS, cutoff=0.75)
    holding = names_with(name, known)
    holding.sort(key=lambda other: re.search(rf"\b{re.escape(wanted)}\b", other.casefold()) is None)
    similar = holding + [other for spelling in close for other in spellings[spelling]]
    if not similar:
        similar = [spellings[match][0] for match in difflib.get_close_matches(wanted, spellings, n=1)]
    return list(dict.fromkeys(similar))


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A sentence that suggests known names for one that is not; nothing if none is like it."""
    similar = similar_names(name, known)
    if not similar:
        return ""
    *others, last = [f"'{show_name(other)}'" for other in similar[:MOST_SUGGESTIONS]]
    left = len(similar) - MOST_SUGGESTIONS
    if left > 0:
        others, last = [*others, last], f"one of {left} more"
    return f"Did you mean {', '.join(others)} or {last}?" if others else f"Did you mean {last}?"
