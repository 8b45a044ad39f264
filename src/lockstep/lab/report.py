"""The report of a comparison: terminal table, ``report.json``, ``report.html`` and ``report.png``."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lockstep.errors import UserError
from lockstep.lab.cells import (
    GRADE_HEADING,
    GRADES,
    ROW_HEADINGS,
    STATES,
    difference_text,
    number_pair,
    row_cells,
    spell,
    thin,
)
from lockstep.lab.compare import Comparison
from lockstep.lab.html import as_html
from lockstep.lab.numbers import Row, evaluation_name
from lockstep.lab.terminal import make_console, make_table, mark, needed, put, put_verdict
from lockstep.record.schema import encode

REPORT_SCHEMA = 1


def as_json(found: Comparison) -> dict[str, Any]:
    """Return the whole comparison as plain JSON values; NaN and infinities are strings."""
    findings = found.findings
    return encode(
        {
            "schema": REPORT_SCHEMA,
            "verdict": found.decision.verdict,
            "exit_code": found.exit_code,
            "cause": found.decision.cause,
            "next_step": found.decision.next_step,
            "to_printed_digits": findings.printed,
            "sides": {
                side.label: {"path": side.path, "kind": side.printer, "status": side.fact("status")}
                | ({"settings": vars(side.settings)} if side.settings else {})
                for side in (findings.a, findings.b)
            },
            "band": None
            if findings.band is None
            else {"side": findings.band_of, "made_of": findings.band.describe(), "spread": findings.band.spread},
            "stages": found.stages,
            "config_differences": findings.differences,
            "rows": [{**vars(row), "difference": row.difference} for row in findings.numbers.rows],
            "evaluations": [
                {"iteration": row.key[0], "split": row.key[1], "final": row.key[2], "a": row.loss_a, "b": row.loss_b}
                | {"grade": row.grade}
                for row in findings.numbers.evaluations
            ],
            "mismatches": findings.numbers.mismatches,
            "missing": {
                "iterations": {"A": findings.pairs.missing_a, "B": findings.pairs.missing_b},
                "evaluations": findings.numbers.missing_evaluations,
            },
            "notes": found.notes,
        }
    )


def write_report(found: Comparison, folder: Path) -> list[Path]:
    """Write ``report.json``, ``report.png`` and ``report.html`` into ``folder`` and return them.

    Raises:
        UserError: the folder cannot be written.
    """
    from lockstep.lab.plot import draw

    contents: dict[str, bytes] = {
        "report.json": (json.dumps(as_json(found), indent=1, allow_nan=False) + "\n").encode(),
        "report.png": draw(found),
        "report.html": as_html(found).encode(),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            (folder / name).write_bytes(content)
    except OSError as error:
        raise UserError(f"cannot write the report to {folder}: {error.strerror}") from None
    return [folder / name for name in contents]


def show(found: Comparison, console: Console | None = None) -> None:
    """Print the comparison: what was compared, the tables, the notes, and the verdict last."""
    console = console or make_console()
    for side in (found.findings.a, found.findings.b):
        console.print(Text(f"{side.label}: {side.path} ({side.printer})"), soft_wrap=True)
    put(console, "Walk", _stages(found))
    if found.findings.differences:
        put(console, "Settings that differ", _config(found))
    if found.findings.numbers.rows:
        _put_rows(console, found)
    if found.findings.numbers.evaluations:
        put(console, "Evaluations", _evaluations(found))
    if found.notes:
        console.print()
    for note in found.notes:
        console.print(Text(f"Note: {note}."))
    decision = found.decision
    put_verdict(console, decision.verdict, decision.cause, decision.next_step, right=found.exit_code == 0)


def _stages(found: Comparison) -> Table:
    table = make_table("Compared", "Result", "Finding", whole=("Result",))
    for stage in found.stages:
        table.add_row(stage.name, mark(stage.state, STATES), Text("; ".join([stage.detail, *stage.evidence])))
    return table


def _config(found: Comparison) -> Table:
    table = make_table("Setting", "A", "B", "A from", "B from", "Acts", whole=("Setting",))
    for d in found.findings.differences or []:
        acts = "yes" if d.role == "active" else f"no: {d.reason}"
        table.add_row(d.path, *map(Text, (spell(d.a), spell(d.b), d.origin_a, d.origin_b, acts)))
    return table


def _put_rows(console: Console, found: Comparison) -> None:
    """Print the iterations: losses in a table of their own where all columns do not fit beside each other."""
    rows = found.findings.numbers.rows
    shown = thin(rows)
    title = "Iterations" if len(shown) == len(rows) else f"Iterations ({len(shown)} of {len(rows)} shown)"
    whole = _rows(shown, ROW_HEADINGS)
    if needed(whole) <= console.width:
        put(console, title, whole)
        return
    put(console, title, _rows(shown, ROW_HEADINGS[:4]))
    others = [_rows(shown, (ROW_HEADINGS[0], *ROW_HEADINGS[4:]))]
    if needed(others[0]) > console.width:
        others = [_rows(shown, (ROW_HEADINGS[0], *pair)) for pair in (ROW_HEADINGS[4:6], ROW_HEADINGS[6:])]
    for table in others:
        put(console, f"{title}, continued", table)


def _rows(shown: list[Row], headings: Sequence[str]) -> Table:
    """Return a table of some columns; the grade stands beside the losses."""
    graded = [GRADE_HEADING] if ROW_HEADINGS[1] in headings else []
    table = make_table(*headings, *graded, right=headings, whole=graded)
    for row in shown:
        cells = dict(zip(ROW_HEADINGS, row_cells(row), strict=True))
        table.add_row(*(cells[name] for name in headings), *(mark(row.grade, GRADES) for _ in graded))
    return table


def _evaluations(found: Comparison) -> Table:
    numbers = ("Loss A", "Loss B", "B - A")
    table = make_table("Evaluation", *numbers, "Grade", right=numbers, whole=("Grade",))
    for row in found.findings.numbers.evaluations:
        apart = None if row.loss_a is None or row.loss_b is None else row.loss_b - row.loss_a
        cells = [*number_pair(row.loss_a, row.loss_b), difference_text(apart)]
        table.add_row(evaluation_name(row.key), *cells, mark(row.grade, GRADES))
    return table
