"""Reports as one HTML file that needs nothing else: no script, no font, no request; and that of a comparison."""

from collections.abc import Iterable, Sequence
from html import escape

from lockstep.lab import chart
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
from lockstep.lab.numbers import evaluation_name
from lockstep.lab.side import Side

_STYLE = (
    """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2733; background: #f6f7f9; margin: 0 }
main { max-width: 1080px; margin: 0 auto; padding: 24px 20px 60px }
h1 { font-size: 22px; margin: 0 0 12px } h2 { font-size: 17px; margin: 32px 0 8px }
.verdict { border-left: 8px solid; border-radius: 6px; padding: 14px 20px; background: #fff }
.verdict strong { font-size: 22px } .verdict p { margin: 6px 0 0 }
.pass { border-color: #1b7f4b } .pass strong { color: #1b7f4b }
.fail { border-color: #b3261e } .fail strong { color: #b3261e }
.scroll { overflow-x: auto; background: #fff; border-radius: 6px; border: 1px solid #dde2e8 }
table { border-collapse: collapse; width: 100%; font-size: 14px }
th, td { padding: 5px 10px; text-align: left; border-bottom: 1px solid #e8ecf0; vertical-align: top }
th { background: #eef1f4; font-weight: 600 } tr:last-child td { border-bottom: 0 }
.numbers td, .numbers th { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
.numbers td:last-child, .numbers th:last-child { text-align: left }
.numbers td:first-child { white-space: normal }
.text td:last-child, .walk td:last-child { overflow-wrap: anywhere; min-width: 11em }
.walk td:nth-child(-n+3), .stages td:nth-child(2) { white-space: nowrap }
th[scope="row"] { width: 19em; border-bottom: 1px solid #e8ecf0 } tr:last-child th[scope="row"] { border-bottom: 0 }
.inside td { background: #fff8e1 } .outside td, .differs td { background: #fdecea } .unknown td { background: #fff8e1 }
.idle td, .idle th { color: #66717d } code { font-size: 13px; overflow-wrap: anywhere }
details { margin: 10px 0 } summary { cursor: pointer }
.scroll:focus-visible, summary:focus-visible { outline: 3px solid #1f5fa8 }
@media screen and (prefers-color-scheme: dark) {
  :root { color-scheme: dark }
  body { color: #dfe5eb; background: #12171d }
  .verdict, .scroll { background: #1b222a } .scroll { border-color: #36414c }
  th { background: #26303a } th, td, th[scope="row"] { border-color: #303a45 }
  .pass { border-color: #5cc98f } .pass strong { color: #5cc98f }
  .fail { border-color: #ff8a80 } .fail strong { color: #ff8a80 }
  .inside td, .unknown td { background: #3a3115 } .outside td, .differs td { background: #471f1d }
  .idle td, .idle th { color: #9aa6b2 }
  .scroll:focus-visible, summary:focus-visible { outline-color: #7db4f0 }
}
@media screen and (max-width: 600px) {
  main { padding: 16px 12px 40px } .verdict { padding: 12px 14px } table { font-size: 13px }
  th, td { padding: 4px 6px } th[scope="row"] { width: 38% }
  .walk td:nth-child(-n+3) { white-space: normal } .text td:last-child, .walk td:last-child { min-width: 8em }
}
@media print {
  body { color: #000; background: #fff } .scroll { overflow: visible } tr { break-inside: avoid }
}
"""
    + chart.STYLE
)


def as_html(found: Comparison) -> str:
    """Return the report."""
    a, b = found.findings.a, found.findings.b
    sections = [
        "<h1>Lockstep comparison</h1>",
        verdict(found.decision.verdict, found.decision.cause, found.decision.next_step, right=found.exit_code == 0),
        section("Sides", table("Sides", ("Side", "Path", "Kind", "Status"), [_side(a), _side(b)])),
        _commands(a, b),
        section("Loss curves and their difference", chart.figure(found) or "<p>No iteration in common.</p>"),
        _compared(found),
        section("Settings that differ", _config(found)),
        section("Iterations", _iterations(found)),
        section("Evaluations", _evaluations(found)),
        notes(found.notes),
    ]
    return page(f"{found.decision.verdict}: {a.path.name} and {b.path.name}", sections)


def page(title: str, sections: Iterable[str]) -> str:
    """Return a whole page; ``title`` is plain text, the sections are HTML."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body><main>\n"
        + "\n".join(part for part in sections if part)
        + "\n</main></body></html>\n"
    )


def section(title: str, content: str) -> str:
    """Return HTML under a heading."""
    return f"<h2>{escape(title)}</h2>\n{content}"


def verdict(word: str, cause: str, next_step: str, *, right: bool) -> str:
    """Return the box at the top of a page; ``right`` says whether it is good news."""
    after = f"<p>Next: {escape(next_step)}</p>" if next_step else ""
    return (
        f'<div class="verdict {"pass" if right else "fail"}"><strong>{escape(word)}</strong>'
        f"<p>{escape(cause)}</p>{after}</div>"
    )


def notes(found: Sequence[str]) -> str:
    """Return the notes under their heading; nothing where there are none."""
    items = (f"<li>{escape(note)}</li>" for note in found)
    return section("Notes", "\n".join(["<ul>", *items, "</ul>"])) if found else ""


def table(
    title: str,
    headings: Sequence[str],
    rows: Iterable[Sequence[str]],
    kinds: Sequence[str] | None = None,
    kind: str = "text",
) -> str:
    """Return a table that scrolls by itself, known to screen readers as ``title``; ``kinds`` colour the rows."""
    head = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in headings)
    body = "".join(_tr(kinds[n] if kinds else "", map(_td, row)) for n, row in enumerate(rows))
    return _scroll(title, f'<table class="{kind}"><tr>{head}</tr>{body}</table>')


def facts(title: str, rows: Iterable[tuple[str, str]]) -> str:
    """Return a table of names and what stands behind them."""
    body = "".join(_tr("", (f'<th scope="row">{escape(name)}</th>', _td(value))) for name, value in rows)
    return _scroll(title, f'<table class="text">{body}</table>')


def _td(cell: str) -> str:
    return f"<td>{escape(cell)}</td>"


def _tr(kind: str, cells: Iterable[str]) -> str:
    style = f' class="{kind}"' if kind else ""
    return f"<tr{style}>{''.join(cells)}</tr>"


def _scroll(title: str, content: str) -> str:
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(title)}">{content}</div>'


def _side(side: Side) -> tuple[str, ...]:
    return side.label, str(side.path), side.printer, side.fact("status") or ""


def _commands(*sides: Side) -> str:
    """Return the commands of both sides in both spellings, folded up: they are long."""
    items = []
    for side in sides:
        command = side.fact("command") or {}
        spelled = [text for text in (command.get("flags"), command.get("overrides")) if text]
        items += [f"<p>{side.label}: <code>{escape(text)}</code></p>" for text in spelled]
    return f"<details><summary>Commands</summary>{''.join(items)}</details>" if items else ""


def _compared(found: Comparison) -> str:
    title, headings = "What was compared, in this order", ("Compared", "Result", "Finding")
    rows = [(stage.name, STATES[stage.state], "; ".join([stage.detail, *stage.evidence])) for stage in found.stages]
    return section(title, table(title, headings, rows, [stage.state for stage in found.stages], "text stages"))


def _config(found: Comparison) -> str:
    differences = found.findings.differences
    if differences is None:
        return "<p>Not known: a console log states no config.</p>"
    if not differences:
        return "<p>None.</p>"
    rows = [
        (d.path, spell(d.a), spell(d.b), d.origin_a, d.origin_b, "yes" if d.role == "active" else f"no: {d.reason}")
        for d in differences
    ]
    kinds = ["differs" if d.role == "active" else "idle" for d in differences]
    return table("Settings that differ", ("Setting", "A", "B", "A from", "B from", "Acts"), rows, kinds)


def _iterations(found: Comparison) -> str:
    rows = found.findings.numbers.rows
    if not rows:
        return "<p>None in common.</p>"
    shown = thin(rows)
    text = "" if len(shown) == len(rows) else f"<p>{len(shown)} of {len(rows)} shown; report.json has all.</p>"
    cells = [(*row_cells(row), GRADES[row.grade]) for row in shown]
    return text + table("Iterations", (*ROW_HEADINGS, GRADE_HEADING), cells, [row.grade for row in shown], "numbers")


def _evaluations(found: Comparison) -> str:
    evaluations = found.findings.numbers.evaluations
    if not evaluations:
        return "<p>None in common.</p>"
    rows = []
    for row in evaluations:
        apart = None if row.loss_a is None or row.loss_b is None else row.loss_b - row.loss_a
        losses = number_pair(row.loss_a, row.loss_b)
        rows.append((evaluation_name(row.key), *losses, difference_text(apart), GRADES[row.grade]))
    headings = ("Evaluation", "Loss A", "Loss B", "B - A", "Grade")
    return table("Evaluations", headings, rows, [row.grade for row in evaluations], "numbers")
