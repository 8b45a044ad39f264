"""Tables: CSV or TSV with a header, and lines of JSON objects."""

import csv
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lockstep.errors import UserError
from lockstep.lab.digits import EXACT, Digits, digits_of
from lockstep.lab.foreign.columns import COUNTED, Columns, choose
from lockstep.lab.foreign.text import CUT_OFF, check_text
from lockstep.lab.foreign.trace import Format, Trace
from lockstep.lab.point import Point
from lockstep.words import is_number

_FACTS = (
    "a loss is taken as that of its iteration alone, or with average=true as the mean since the row before; digits are "
    "those of the column's longest numbers"
)
CSV = Format("csv", "CSV table", _FACTS)
JSONL = Format("jsonl", "lines of JSON", _FACTS)
_CAUSES = (*COUNTED, "lr", "next_lr", "loss_scale")
"""Numbers that are named as the cause where they differ, so that one that may lack digits is not read."""
_EMPTY = ("", "none", "null", "-")

Row = tuple[str, dict[str, str]]
"""Where a row stands, and its cells as written."""


def recognises_csv(text: str) -> bool:
    """Tell whether a first line is a header."""
    cells = [cell.strip() for cell in text.split(_delimiter(text))]
    return len(cells) > 1 and not any(is_number(cell) for cell in cells) and "{" not in text


def recognises_jsonl(text: str) -> bool:
    """Tell whether a first line is a JSON object."""
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def parse_csv(path: Path, columns: Columns) -> Trace:
    """Read a table with a header.

    Raises:
        UserError: columns that are not there or could be several, or a cell that is no number.
    """
    check_text(path)
    trace = Trace(path, CSV)
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        whole = file.read()
    lines = whole.splitlines()
    reader = csv.reader(lines, delimiter=_delimiter(lines[0]))
    header = [cell.strip() for cell in next(reader)]
    if len(set(header)) < len(header):
        twice = next(name for name in header if header.count(name) > 1)
        raise UserError(f"{path}: the column {twice} is there twice; take one out")
    rows: list[Row] = []
    for cells in reader:
        if not any(cell.strip() for cell in cells):
            continue
        if len(cells) != len(header):
            if reader.line_num == len(lines) and not whole.endswith("\n"):
                trace.notes.append(CUT_OFF)
                continue
            raise UserError(f"{path}:{reader.line_num}: {len(cells)} cells under {len(header)} names; mend the line")
        rows.append((f"{path}:{reader.line_num}", dict(zip(header, cells, strict=True))))
    chosen = choose(str(path), header, columns)
    if not whole.endswith("\n") and rows and rows[-1][0].endswith(f":{len(lines)}"):
        trace.notes.append("the last line has no end: it may be cut off")
        if header[-1] in [chosen[name] for name in _CAUSES if name in chosen]:
            rows[-1][1][header[-1]] = ""
    return _fill(trace, rows, chosen, columns)


def parse_jsonl(path: Path, columns: Columns) -> Trace:
    """Read lines of JSON objects.

    Raises:
        UserError: a line within the file is no JSON object, or as ``parse_csv``.
    """
    check_text(path)
    trace = Trace(path, JSONL)
    whole = path.read_text(encoding="utf-8", errors="replace")
    lines = whole.split("\n")
    rows: list[Row] = []
    for position, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        try:
            cells = json.loads(text, parse_float=str, parse_int=str, parse_constant=str)
            if not isinstance(cells, dict):
                raise ValueError
        except ValueError:
            if position == len(lines):
                trace.notes.append(CUT_OFF)
                continue
            raise UserError(f"{path}:{position}: not a JSON object; the file is damaged, restore it") from None
        if "kind" in cells and "batch_hash" in cells:
            raise UserError(f"{path} belongs to a Lockstep run record; give its run directory, {path.parent}")
        rows.append((f"{path}:{position}", {str(k): "" if v is None else str(v) for k, v in cells.items()}))
    header = list(dict.fromkeys(name for _, cells in rows for name in cells))
    return _fill(trace, rows, choose(str(path), header, columns), columns)


def _fill(trace: Trace, rows: list[Row], chosen: dict[str, str], columns: Columns) -> Trace:
    shift = _shift(trace, rows, chosen["iteration"], columns)
    previous = 0
    for where, cells in rows:
        numbers = {name: _cell(where, column, cells.get(column, "")) for name, column in chosen.items()}
        if numbers["iteration"] is None:
            continue
        iteration = _whole(where, chosen["iteration"], numbers["iteration"]) + shift
        evaluation = numbers.pop("evaluation", None)
        if numbers["lm_loss"] is not None:
            start = previous + 1 if columns.averages and previous < iteration else iteration
            values: dict[str, Any] = {
                name: _whole(where, chosen[name], value) if name in COUNTED and value is not None else value
                for name, value in numbers.items()
            }
            trace.read(Point(**values | {"iteration": iteration, "start": start}))
            previous = iteration
        if evaluation is not None:
            trace.evaluate(iteration, evaluation)
    trace.digits = {
        name: found
        for name, column in chosen.items()
        if name not in (*COUNTED, "iteration") and (found := _digits(rows, column)) != EXACT
    }
    return trace


def _digits(rows: Iterator[Row] | list[Row], column: str) -> Digits:
    return digits_of(cells.get(column, "") for _, cells in rows)


def _shift(trace: Trace, rows: list[Row], column: str, columns: Columns) -> int:
    """Return what to add to the iterations of a file that counts from 0."""
    if columns.counts_from is not None:
        return 1 - columns.counts_from
    if any(cells.get(column, "").strip() in ("0", "0.0") for _, cells in rows):
        trace.notes.append("counts iterations from 0: its 0 is taken as iteration 1 (--columns from=1 leaves them)")
        return 1
    return 0


def _cell(where: str, column: str, text: str) -> float | None:
    if text.strip().lower() in _EMPTY:
        return None
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{where}: {column} is {text!r}, no number; mend the line") from None


def _whole(where: str, column: str, value: float) -> int:
    if not math.isfinite(value) or value != int(value):
        raise UserError(f"{where}: {column} is {value}, no whole number; mend the line")
    return int(value)


def _delimiter(header: str) -> str:
    return max((",", "\t", ";"), key=header.count)
