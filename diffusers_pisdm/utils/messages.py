"""Text for messages."""

from __future__ import annotations


def one_line(text: object) -> str:
    """Writes what would break the line, garble a terminal or is not UTF-8 as an escape, such as `\\n`."""

    def escape(character: str) -> str:
        if "\udc80" <= character <= "\udcff":  # how Python holds a byte of a file's name that is not UTF-8
            return f"\\x{ord(character) - 0xDC00:02x}"
        return character.encode("unicode_escape").decode("ascii")

    return "".join(c if c.isprintable() else escape(c) for c in str(text))
