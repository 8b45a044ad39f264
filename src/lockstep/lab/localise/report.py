"""The report of a localisation: the walk with a mark at each stage, the numbers behind the first cause, files."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lockstep.errors import UserError
from lockstep.lab.config_diff import ConfigDifference
from lockstep.lab.localise.localise import Localised
from lockstep.lab.localise.measure import Row
from lockstep.lab.localise.page import as_html, is_hint
from lockstep.lab.localise.walk import NOT_LOOKED_AT, StageResult
from lockstep.lab.terminal import make_console, make_table, mark, put, put_verdict
from lockstep.record.schema import encode

REPORT_SCHEMA = 1

_MARKS = {"equal": "= equal", "rounding": "~ rounding", "differs": "\u2717 differs", "unknown": "? unknown"}
_HINT = {"rounding": "~ differs"}
_AROUND = 3


def as_json(found: Localised) -> dict[str, Any]:
    """Return the whole outcome as plain JSON values."""
    walked = found.walked
    return encode(
        {
            "schema": REPORT_SCHEMA,
            "verdict": found.verdict,
            "exit_code": found.exit_code,
            "sentence": found.sentence,
            "next_step": found.next_step,
            "iterations": found.iterations,
            "sides": {
                side.label: {"title": side.title, "dtype": side.dtype, "code": vars(side.code)}
                for side in (walked.a, walked.b)
            },
            "first": None if walked.first is None else vars(walked.first),
            "begins": None if walked.begins is None else vars(walked.begins),
            "stages": [vars(result) | {"rows": [vars(row) for row in result.rows]} for result in walked.results],
            "config_differences": [_setting(d) for d in walked.differences],
            "notes": found.notes,
        }
    )


def _setting(difference: ConfigDifference) -> dict[str, Any]:
    """Return a setting that differs; probes do not tell where its values came from."""
    return {name: value for name, value in vars(difference).items() if not name.startswith("origin_")}


def write_report(found: Localised, folder: Path) -> list[Path]:
    """Write ``report.json`` and ``report.html`` into ``folder`` and return them.

    Raises:
        UserError: the folder cannot be written.
    """
    contents = {
        "report.json": json.dumps(as_json(found), indent=1, allow_nan=False) + "\n",
        "report.html": as_html(found),
    }
    try:
        for name, content in contents.items():
            (folder / name).write_text(content, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write the report to {folder}: {error.strerror}") from None
    return [folder / name for name in contents]


def show(found: Localised, console: Console | None = None) -> None:
    """Print the outcome, the verdict last."""
    console = console or make_console()
    for side in (found.walked.a, found.walked.b):
        console.print(Text(f"{side.label}: {side.title} ({side.dtype}), code of commit {side.code}"), soft_wrap=True)
    put(console, "Walk", _walk(found.walked.results))
    if found.walked.first is not None:
        _put_numbers(console, found)
    if found.notes:
        console.print()
    for note in found.notes:
        console.print(Text(f"Note: {note}."))
    put_verdict(console, found.verdict, found.sentence, found.next_step, right=found.exit_code == 0)


def _walk(results: list[StageResult]) -> Table:
    table = make_table("Iteration", "Stage", "Result", "Finding", whole=("Result",))
    walked = [result for result in results if result.walked]
    for result in walked:
        number = "" if result.iteration is None else str(result.iteration)
        table.add_row(
            number, result.stage, mark(result.state, _HINT if is_hint(result) else _MARKS), Text(result.detail)
        )
    left = len(results) - len(walked)
    if left:
        table.add_row("", f"{left} more", "", Text(NOT_LOOKED_AT))
    return table


def _put_numbers(console: Console, found: Localised) -> None:
    """Print the rows around the first that differs."""
    first = found.walked.first
    assert first is not None, "shown where there is one"
    result = next(r for r in found.walked.results if first in r.rows)
    place = result.rows.index(first)
    numbers = ("apart", "in float64", "rounding explains", "roundings A", "roundings B")
    table = make_table("Tensor", "", *numbers, right=numbers)
    signs = {state: text.partition(" ")[0] for state, text in _MARKS.items()}
    for row in result.rows[max(0, place - _AROUND) : place + _AROUND + 1]:
        table.add_row(row.name, mark(row.state, signs), *_cells(row))
    put(console, f"{result.stage}, around the first that differs", table)


def _cells(row: Row) -> list[str]:
    numbers = [row.apart, row.apart_in_float64, row.bound, *(row.units or (None, None))]
    return ["" if number is None else "0" if number == 0 else f"{number:.2g}" for number in numbers]
