"""Reading the lines of a console log, whatever is around them."""

import re
from collections.abc import Iterator
from pathlib import Path

from lockstep.errors import UserError

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_RANK = re.compile(r"\s*(?:\[(?:default|rank)\s?(\d+)\]:?|(\d+):\s)")
_HEAD = 1 << 16


CUT_OFF = "the last line is cut off and was left out"


def read_lines(path: Path, notes: list[str] | None = None) -> Iterator[tuple[str | None, str]]:
    """Yield the rank that a launcher put before each line, or None, and the line without it and without colours.

    With ``notes``, a last line without an end is left out and noted: a number in it may lack digits.

    Raises:
        UserError: the file cannot be read, is empty, or is no text.
    """
    check_text(path)
    with path.open(encoding="utf-8", errors="replace") as file:
        for text in file:
            if notes is not None and not text.endswith("\n"):
                notes.append(CUT_OFF)
                return
            plain = _COLOUR.sub("", text.rstrip("\n"))
            found = _RANK.match(plain)
            if found:
                yield found[1] or found[2], plain[found.end() :]
            else:
                yield None, plain


def check_text(path: Path) -> None:
    """Refuse what is no text.

    Raises:
        UserError: the file cannot be read, is empty, or is binary.
    """
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if not head.strip():
        raise UserError(f"{path} is empty; give a console log, a metrics file or a run directory")
    if b"\0" in head:
        raise UserError(f"{path} is binary, not a log; unpack it if it is compressed")
