"""What the lab prints: tables that read without colour and lose no number on a narrow screen, the verdict last."""

import codecs
import io
import sys
from collections.abc import Iterable, Mapping

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

PIPE_WIDTH = 120
"""Columns when the output is not a terminal."""

_COLOURS = {
    "equal": "green",
    "rounding": "green",
    "inside": "yellow",
    "unknown": "yellow",
    "outside": "red",
    "differs": "red",
}
_ASCII = {"\u2713": "+", "\u2717": "x", "\u2212": "-"}
_INDENT = "  "
_GAP = 3
"""Columns between two columns of a table."""


def _spelled(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError), "of an output"
    return "".join(_ASCII.get(sign, "?") for sign in error.object[error.start : error.end]), error.end


def make_console() -> Console:
    """Return the console of the standard output; rich leaves out colours where NO_COLOR or a pipe asks for it.

    Signs that the encoding of the output has none for are spelled in ASCII.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        codecs.register_error("lockstep-signs", _spelled)
        sys.stdout.reconfigure(errors="lockstep-signs")
    return Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False)


def mark(state: str, marks: Mapping[str, str]) -> Text:
    """Return the sign of a state, with its words if it has any, in its colour."""
    return Text(marks[state], style=_COLOURS[state])


def make_table(*columns: str, right: Iterable[str] = (), whole: Iterable[str] = ()) -> Table:
    """Return an empty table; columns are aligned to the ``right``, or kept ``whole`` in one line, where named."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    right = set(right)
    for name in columns:
        number = name in right
        table.add_column(
            name, justify="right" if number else "left", no_wrap=number or name in set(whole), overflow="fold"
        )
    return table


def needed(table: Table) -> int:
    """Return the columns that a table needs to show every number whole; words of the others can go below each other."""
    widths = []
    for column in table.columns:
        texts = [str(column.header), *map(str, column.cells)]
        parts = texts if column.no_wrap else [word for text in texts for word in text.split()]
        widths.append(max(map(cell_len, parts), default=0))
    return sum(widths) + _GAP * (len(widths) - 1)


def put(console: Console, title: str, table: Table) -> None:
    """Print a table below a title; one that is too wide goes over the edge, where the terminal wraps it."""
    console.print()
    console.print(Text(title, style="bold"))
    width = needed(table)
    if width > console.width:
        table.width = width
    console.print(table, crop=False)


def put_verdict(console: Console, verdict: str, sentence: str, next_step: str, *, right: bool) -> None:
    """Print the verdict with its sentence and what to do next; ``right`` says whether it is good news."""
    console.print()
    console.print(Text(f"verdict: {verdict}", style=f"bold {'green' if right else 'red'}"))
    for text in [sentence, f"Next: {next_step}"] if next_step else [sentence]:
        for line in Text(text).wrap(console, max(console.width - len(_INDENT), 1)):
            line.rstrip()
            console.print(Text(_INDENT).append_text(line), soft_wrap=True)
