"""The report of a comparison: terminal table, ``report.json``, ``report.html`` and ``report.png``."""

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from lockstep.errors import UserError
from lockstep.lab.cells import ROW_HEADINGS, difference_text, number_pair, row_cells, spell, thin
from lockstep.lab.compare import Comparison
from lockstep.lab.html import as_html
from lockstep.lab.numbers import evaluation_name
from lockstep.record.schema import encode

REPORT_SCHEMA = 1
PIPE_WIDTH = 120
"""Columns when the output is not a terminal."""

_COLOURS = {"equal": "green", "inside": "yellow", "outside": "red", "differs": "red", "unknown": "yellow"}


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
    console = console or Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False)
    for side in (found.findings.a, found.findings.b):
        console.print(Text(f"{side.label}: {side.path} ({side.printer})"), soft_wrap=True)
    console.print(_stages(found))
    if found.findings.differences:
        console.print(_config(found))
    if found.findings.numbers.rows:
        console.print(_rows(found))
    if found.findings.numbers.evaluations:
        console.print(_evaluations(found))
    for note in found.notes:
        console.print(Text(f"Note: {note}."))
    body = Text(found.decision.cause)
    if found.decision.next_step:
        body.append(f"\nNext: {found.decision.next_step}")
    style = "green" if found.exit_code == 0 else "red"
    console.print(Panel(body, title=Text(f"verdict: {found.decision.verdict}"), border_style=style))


def _stages(found: Comparison) -> Table:
    table = Table("Compared", "", "Finding", title="Walk", title_justify="left")
    for stage in found.stages:
        detail = "; ".join([stage.detail, *stage.evidence])
        table.add_row(stage.name, Text(stage.state, style=_COLOURS[stage.state]), Text(detail))
    return table


def _config(found: Comparison) -> Table:
    table = Table(title="Settings that differ", title_justify="left")
    table.add_column("Setting", no_wrap=True)
    for name in ("A", "B", "A from", "B from", "Acts"):
        table.add_column(name, overflow="fold")
    for d in found.findings.differences or []:
        acts = "yes" if d.role == "active" else f"no: {d.reason}"
        table.add_row(d.path, Text(spell(d.a)), Text(spell(d.b)), Text(d.origin_a), Text(d.origin_b), Text(acts))
    return table


def _rows(found: Comparison) -> Table:
    rows = found.findings.numbers.rows
    shown = thin(rows)
    title = "Iterations" if len(shown) == len(rows) else f"Iterations ({len(shown)} of {len(rows)} shown)"
    table = Table(title=title, title_justify="left")
    for name in ROW_HEADINGS:
        table.add_column(name, justify="right")
    for row in shown:
        table.add_row(*row_cells(row), style=None if row.grade == "equal" else _COLOURS[row.grade])
    return table


def _evaluations(found: Comparison) -> Table:
    table = Table(title="Evaluations", title_justify="left")
    for name in ("Evaluation", "Loss A", "Loss B", "B - A"):
        table.add_column(name, justify="left" if name == "Evaluation" else "right")
    for row in found.findings.numbers.evaluations:
        apart = None if row.loss_a is None or row.loss_b is None else row.loss_b - row.loss_a
        style = None if row.grade == "equal" else _COLOURS[row.grade]
        cells = [*number_pair(row.loss_a, row.loss_b), difference_text(apart)]
        table.add_row(evaluation_name(row.key), *cells, style=style)
    return table
