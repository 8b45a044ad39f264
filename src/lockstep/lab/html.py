"""The report as one HTML file that needs nothing else: no script, no font, no request."""

import base64
from collections.abc import Iterable, Sequence
from html import escape

from lockstep.lab.cells import ROW_HEADINGS, difference_text, number_pair, row_cells, spell, thin
from lockstep.lab.compare import Comparison
from lockstep.lab.numbers import evaluation_name
from lockstep.lab.side import Side

_STYLE = """
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
.numbers td.left { text-align: left }
.inside td { background: #fff8e1 } .outside td, .differs td { background: #fdecea } .unknown td { background: #fff8e1 }
.idle td { color: #66717d } code { font-size: 13px; overflow-wrap: anywhere }
img { max-width: 100%; height: auto; background: #fff; border-radius: 6px; border: 1px solid #dde2e8 }
.scroll:focus-visible { outline: 3px solid #1f5fa8 }
@media screen and (prefers-color-scheme: dark) {
  :root { color-scheme: dark }
  body { color: #dfe5eb; background: #12171d }
  .verdict, .scroll { background: #1b222a } .scroll, img { border-color: #36414c }
  th { background: #26303a } th, td { border-color: #303a45 }
  .pass { border-color: #5cc98f } .pass strong { color: #5cc98f }
  .fail { border-color: #ff8a80 } .fail strong { color: #ff8a80 }
  .inside td, .unknown td { background: #3a3115 } .outside td, .differs td { background: #471f1d }
  .idle td { color: #9aa6b2 } .scroll:focus-visible { outline-color: #7db4f0 }
}
@media print {
  body { color: #000; background: #fff } .scroll { overflow: visible } tr, img { break-inside: avoid }
}
"""


_MARKS = {"equal": "\u2713", "differs": "\u2717", "unknown": "?"}


def as_html(found: Comparison, picture: bytes) -> str:
    """Return the report; ``picture`` is the PNG it shows."""
    a, b = found.findings.a, found.findings.b
    sections = [
        "<h1>Lockstep comparison</h1>",
        _verdict(found),
        "<h2>Sides</h2>",
        _table(("Side", "Path", "Kind", "Status", "Command"), [_side(a), _side(b)]),
        "<h2>Loss curves and their difference</h2>",
        f'<img alt="Loss of A and B, and B minus A" src="data:image/png;base64,{base64.b64encode(picture).decode()}">',
        "<h2>What was compared, in this order</h2>",
        _table(
            ("Compared", "Result", "Finding"),
            [
                (stage.name, f"{_MARKS[stage.state]} {stage.state}", "; ".join([stage.detail, *stage.evidence]))
                for stage in found.stages
            ],
            [stage.state for stage in found.stages],
        ),
        "<h2>Settings that differ</h2>",
        _config(found),
        "<h2>Iterations</h2>",
        _iterations(found),
        "<h2>Evaluations</h2>",
        _evaluations(found),
    ]
    if found.notes:
        sections += ["<h2>Notes</h2>", "<ul>", *(f"<li>{escape(note)}</li>" for note in found.notes), "</ul>"]
    title = escape(f"{found.decision.verdict}: {a.path.name} and {b.path.name}")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}</style></head>\n<body><main>\n"
        + "\n".join(sections)
        + "\n</main></body></html>\n"
    )


def _verdict(found: Comparison) -> str:
    kind = "pass" if found.exit_code == 0 else "fail"
    after = f"<p>Next: {escape(found.decision.next_step)}</p>" if found.decision.next_step else ""
    return (
        f'<div class="verdict {kind}"><strong>{escape(found.decision.verdict)}</strong>'
        f"<p>{escape(found.decision.cause)}</p>{after}</div>"
    )


def _side(side: Side) -> tuple[str, ...]:
    command = side.fact("command") or {}
    spelled = " / ".join(text for text in (command.get("flags"), command.get("overrides")) if text)
    return side.label, str(side.path), side.printer, side.fact("status") or "", spelled


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
    return _table(("Setting", "A", "B", "A from", "B from", "Acts"), rows, kinds)


def _iterations(found: Comparison) -> str:
    rows = found.findings.numbers.rows
    if not rows:
        return "<p>None in common.</p>"
    shown = thin(rows)
    note = "" if len(shown) == len(rows) else f"<p>{len(shown)} of {len(rows)} shown; report.json has all.</p>"
    return note + _table(ROW_HEADINGS, map(row_cells, shown), [row.grade for row in shown], "numbers")


def _evaluations(found: Comparison) -> str:
    evaluations = found.findings.numbers.evaluations
    if not evaluations:
        return "<p>None in common.</p>"
    rows = []
    for row in evaluations:
        apart = None if row.loss_a is None or row.loss_b is None else row.loss_b - row.loss_a
        rows.append((evaluation_name(row.key), *number_pair(row.loss_a, row.loss_b), difference_text(apart)))
    return _table(("Evaluation", "Loss A", "Loss B", "B - A"), rows, [row.grade for row in evaluations], "numbers")


def _table(
    headings: Sequence[str], rows: Iterable[Sequence[str]], kinds: Sequence[str] | None = None, kind: str = "text"
) -> str:
    head = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in headings)
    body = []
    for position, row in enumerate(rows):
        style = f' class="{kinds[position]}"' if kinds else ""
        body.append(f"<tr{style}>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>")
    region = f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(headings[0])}">'
    return f'{region}<table class="{kind}"><tr>{head}</tr>{"".join(body)}</table></div>'
