"""The report of a localisation as one HTML page: the verdict, the walk, and the first tensor with its numbers."""

from lockstep.lab import html
from lockstep.lab.cells import number_pair, spell
from lockstep.lab.localise.localise import Localised
from lockstep.lab.localise.measure import Row
from lockstep.lab.localise.stages import CONFIG, ENVIRONMENT
from lockstep.lab.localise.walk import Pass, StageResult

_MARKS = {
    "equal": "\u2713 equal",
    "rounding": "\u2713 rounding",
    "differs": "\u2717 differs",
    "unknown": "? cannot be compared",
}
_BEHIND = "\u2013 not looked at"
_COLOURS = {"rounding": "equal"}
_AROUND = 3
_COLUMNS = ("Apart", "In float64", "Rounding explains", "Roundings of A", "Roundings of B")


def as_html(found: Localised) -> str:
    """Return the page."""
    walked = found.walked
    sides = [_side(found, side) for side in (walked.a, walked.b)]
    sections = [
        "<h1>Lockstep localisation</h1>",
        html.verdict(found.verdict, found.sentence, found.next_step, right=found.exit_code == 0),
        html.section("Sides", html.table("Sides", ("Side", "What it is", "Commit", "Computes in", "Processes"), sides)),
        _walk(walked.results),
        _first(found),
        _settings(found),
        html.notes(found.notes),
    ]
    return html.page(f"{found.verdict}: {walked.a.title} and {walked.b.title}", sections)


def _side(found: Localised, side: Pass) -> tuple[str, ...]:
    return side.label, side.title, str(side.code), side.dtype, str(found.processes(side.label))


def _walk(results: list[StageResult]) -> str:
    title = "The walk, in the order of execution"
    rows = [
        ("run" if r.iteration is None else str(r.iteration), r.stage, _mark(r), r.detail if r.walked else "")
        for r in results
    ]
    kinds = [_colour(result) for result in results]
    behind = "<p>Stages after the first difference were not looked at: what differs there may follow from it.</p>"
    if all(r.walked for r in results):
        behind = ""
    return html.section(
        title, html.table(title, ("Iteration", "Stage", "Result", "Reason"), rows, kinds, "walk") + behind
    )


def _mark(result: StageResult) -> str:
    if not result.walked:
        return _BEHIND
    return "~ differs" if is_hint(result) else _MARKS[result.state]


def _colour(result: StageResult) -> str:
    if not result.walked:
        return "idle"
    return "inside" if is_hint(result) else _COLOURS.get(result.state, result.state)


def is_hint(result: StageResult) -> bool:
    """Tell whether settings or surroundings differ: the walk goes on, to see whether they change a tensor."""
    return result.stage in (ENVIRONMENT, CONFIG) and result.state == "rounding"


def _first(found: Localised) -> str:
    row = found.walked.first
    if row is not None:
        title = "The first tensor that differs"
        return html.section(title, html.facts(title, _proof(found, row)) + _neighbours(found, row))
    row = found.walked.begins
    if row is None:
        return html.section("The first tensor that differs", "<p>None.</p>")
    title = "Where rounding begins"
    text = "<p>No tensor differs by more than rounding; this is the first that is not equal bit for bit.</p>"
    return html.section(title, text + html.facts(title, _proof(found, row)) + _neighbours(found, row))


def _proof(found: Localised, row: Row) -> list[tuple[str, str]]:
    """Return what the sentence rests on: where it is, both values, and how far rounding could take them."""
    facts = [
        ("Stage", row.stage),
        ("Tensor", row.name),
        ("Iteration", str(row.iteration) if row.iteration else "the whole run"),
        ("Rank", _rank(found, row)),
        *_values(row),
        ("Apart, relative to its size", _number(row.apart)),
        ("Apart in float64", _number(row.apart_in_float64)),
        ("What rounding explains in float64", _number(row.bound)),
        ("Roundings of its own dtype, A and B", " and ".join(map(_number, row.units or ()))),
        ("Reason", row.reason),
    ]
    return [(name, text) for name, text in facts if text]


def _values(row: Row) -> list[tuple[str, str]]:
    where = row.where
    if where is None or where.a == where.b:
        return []
    exact = row.bound is not None and row.apart_in_float64 is not None and row.apart_in_float64 > row.bound
    torn = where.processes is not None and row.bound is not None  # Copies are compared in float64 where there is one.
    of = " in float64" if exact or torn else ""
    a, b = number_pair(where.a, where.b)
    place = [("Where they are farthest apart", str(list(where.index)))] if where.index else []
    one, other = "A", "B"
    if where.processes is not None:
        one, other = (f"Process {rank} of {where.side}" for rank in where.processes)
    far = [("Max difference", f"{abs(where.a - where.b):.9g}")]
    return [*place, (f"{one} there{of}", a), (f"{other} there{of}", b), *far]


def _rank(found: Localised, row: Row) -> str:
    where = row.where
    label = where.side if where else "B"
    if found.processes("A") == found.processes("B") == 1:
        return "0, the only one on both sides"
    if where is None or not where.ranks:
        return "no single one"
    micro = f", micro-batch {where.micro_batches[0]}" if where.micro_batches else ""
    return f"{', '.join(map(str, where.ranks))} of {label}{micro}"


def _neighbours(found: Localised, row: Row) -> str:
    """Return the tensors around a row with their numbers, in the order in which they are computed."""
    result = next(r for r in found.walked.results if row in r.rows)
    place = result.rows.index(row)
    shown = result.rows[max(0, place - _AROUND) : place + _AROUND + 1]
    if len(shown) == 1:
        return ""
    title = f"Around it, in {result.stage}"
    cells = [(r.name, _MARKS[r.state], *map(_number, _numbers(r))) for r in shown]
    kinds = [_COLOURS.get(r.state, r.state) for r in shown]
    return f"<p>{title}:</p>" + html.table(title, ("Tensor", "Result", *_COLUMNS), cells, kinds)


def _numbers(row: Row) -> list[float | None]:
    return [row.apart, row.apart_in_float64, row.bound, *(row.units or (None, None))]


def _number(value: float | None) -> str:
    return "" if value is None else "0" if value == 0 else f"{value:.3g}"


def _settings(found: Localised) -> str:
    title, differences = "Settings that differ", found.walked.differences
    if found.walked.b.foreign:
        return html.section(title, "<p>None: B takes the settings of A.</p>")
    if not differences:
        return html.section(title, "<p>None.</p>")
    rows = [(d.path, spell(d.a), spell(d.b), "yes" if d.role == "active" else f"no: {d.reason}") for d in differences]
    kinds = ["differs" if d.role == "active" else "idle" for d in differences]
    return html.section(title, html.table(title, ("Setting", "A", "B", "Acts"), rows, kinds))
