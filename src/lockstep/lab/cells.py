"""What the tables of a comparison hold, as text: the same in the terminal and in the HTML report."""

import json
from typing import Any

from lockstep.lab.numbers import Row

MANY_ROWS = 200
"""Above this many iterations the tables are thinned."""

THIN_ROWS = 60


def thin(rows: list[Row]) -> list[Row]:
    """Return the rows a table shows: all of a short run; of a long one both ends, where it parts, and a sample."""
    if len(rows) <= MANY_ROWS:
        return rows
    keep = {*range(10), *range(len(rows) - 10, len(rows)), *range(0, len(rows), -(-len(rows) // THIN_ROWS))}
    for grade in ("inside", "outside"):
        first = next((i for i, row in enumerate(rows) if row.grade == grade), None)
        if first is not None:
            keep |= set(range(max(0, first - 2), min(len(rows), first + 3)))
    known = [i for i, row in enumerate(rows) if row.difference is not None]
    if known:
        keep.add(max(known, key=lambda i: abs(rows[i].difference or 0.0)))
    return [rows[i] for i in sorted(keep)]


STATES = {"equal": "\u2713 equal", "differs": "\u2717 differs", "unknown": "? unknown"}
GRADES = {"equal": "\u2713 equal", "inside": "~ inside the band", "outside": "\u2717 outside the band"}
"""States of the walk and grades of numbers, with a sign: they read without colour."""

GRADE_HEADING = "Loss and norm"
ROW_HEADINGS = ("Iteration", "Loss A", "Loss B", "B - A", "Grad norm A", "Grad norm B", "LR A", "LR B")


def row_cells(row: Row) -> list[str]:
    """Return the cells of one iteration."""
    span = str(row.iteration) if row.start == row.iteration else f"{row.start}-{row.iteration}"
    pairs = (row.loss_a, row.loss_b), (row.norm_a, row.norm_b), (row.lr_a, row.lr_b)
    losses, norms, rates = (number_pair(*pair) for pair in pairs)
    return [span, *losses, difference_text(row.difference), *norms, *rates]


def number_pair(a: float | None, b: float | None) -> tuple[str, str]:
    """Spell two numbers with 7 digits, or with as many as it takes to tell them apart."""
    for digits in (7, 10, 13, 17):
        texts = tuple("" if value is None else f"{value:.{digits}g}" for value in (a, b))
        if a == b or texts[0] != texts[1]:
            break
    return texts[0], texts[1]


def difference_text(value: float | None) -> str:
    """Spell a difference with its sign; nothing differs by ``0``."""
    return "" if value is None else "0" if value == 0 else f"{value:+.3g}"


def spell(value: Any) -> str:
    """Spell a config value for a table."""
    return value if isinstance(value, str) else json.dumps(value)
