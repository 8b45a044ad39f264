"""How the command line says how a side is to be read."""

from collections.abc import Iterable

from lockstep.errors import UserError
from lockstep.lab.foreign.columns import Columns, parse_columns
from lockstep.lab.foreign.detect import Reader

_SIDES = ("A", "B")


def make_readers(formats: Iterable[str], columns: Iterable[str], intervals: Iterable[str]) -> tuple[Reader, Reader]:
    """Return the reader of each side; a word that starts with ``A:`` or ``B:`` is for that side, another for both.

    Raises:
        UserError: a side is given two words of a kind, or a word cannot be read.
    """
    given = formats, columns, intervals = list(formats), list(columns), list(intervals)
    named = _by_side("--format", formats)
    chosen = _by_side("--columns", columns)
    counted = _by_side("--interval", intervals)
    readers = [
        Reader(
            format=named.get(side),
            columns=parse_columns(chosen[side]) if side in chosen else Columns(),
            interval=_count(counted[side]) if side in counted else None,
            aimed=next((w for words in given for w in words if w.startswith(f"{side}:")), ""),
        )
        for side in _SIDES
    ]
    return readers[0], readers[1]


def _by_side(option: str, words: Iterable[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for word in words:
        label, colon, rest = word.partition(":")
        aimed = bool(colon) and label in _SIDES
        for side in (label,) if aimed else _SIDES:
            if side in found:
                raise UserError(
                    f"{option}: {word!r} and {found[side]!r} are both for {side}; give one a side, as A:..."
                )
            found[side] = rest if aimed else word
    return found


def _count(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise UserError(f"--interval: {text!r} is no number of steps; give the run's logging_steps")
    return int(text)
