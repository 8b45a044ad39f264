"""One side of a comparison: a run record or a console log, brought to one shape."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from lockstep.errors import UserError
from lockstep.lab.digits import CONSOLE, Digits, Ruler
from lockstep.lab.foreign.detect import Reader, read_foreign
from lockstep.lab.foreign.repeats import Item, settle, settle_evaluations
from lockstep.lab.foreign.trace import Settings, Trace, rhythm
from lockstep.lab.lineage import past_note, with_past
from lockstep.lab.logs import Log, is_train_line, parse_log
from lockstep.lab.point import EvaluationKey, Point
from lockstep.record import Run, load_run
from lockstep.record.schema import RUN_FILE


@dataclass(frozen=True)
class Side:
    """A side of a comparison; ``run`` is None for a log, ``interval`` is the number of iterations between two lines.

    ``past`` says where a resumed run began, ``conflict`` where a log tells one iteration with two numbers. ``digits``
    are those that the side tells of each number, all where none are given. ``engine`` is true where the trainer itself
    is what is compared: Lockstep in its place would be no answer.
    """

    label: str
    path: Path
    printer: str
    interval: int
    points: dict[int, Point]
    evaluations: dict[EvaluationKey, float | None]
    samples: dict[EvaluationKey, int | None]
    run: Run | None = None
    past: str | None = None
    digits: Mapping[str, Digits] = field(default_factory=dict)
    settings: Settings | None = None
    notes: list[str] = field(default_factory=list)
    conflict: str | None = None
    tells_evaluations: bool = True
    engine: bool = False

    @property
    def printed(self) -> bool:
        """Not every digit of the numbers is told."""
        return bool(self.digits)

    @property
    def config(self) -> Mapping[str, Any] | None:
        """The resolved tree by dotted path, the part of it that a log prints, or None where it is not known."""
        if self.run:
            return self.run.config or None
        return self.settings.values if self.settings else None

    @property
    def origins(self) -> Mapping[str, str]:
        """Where each value of ``config`` that is not a default came from."""
        if self.run:
            return self.run.origins
        return dict.fromkeys(self.settings.values, self.settings.source) if self.settings else {}

    def fact(self, name: str) -> Any:
        """Return an entry of the run record, or None."""
        return self.run.facts[name] if self.run else None

    @property
    def first(self) -> int | None:
        """The first iteration this side tells of."""
        return min((point.start for point in self.points.values()), default=None)


def load_side(path: Path | str, label: str, reader: Reader | None = None) -> Side:
    """Read a run directory, a console log or a foreign run; a resumed run comes with the runs it continues.

    Raises:
        UserError: none of these, or damaged.
    """
    place = Path(path)
    reader = reader or Reader()
    if not place.exists() or (place / RUN_FILE).exists():
        if reader.aimed:
            raise UserError(f"{place} is no run of another trainer; drop {reader.aimed}")
        return _from_run(load_run(place), label)
    trace = read_foreign(place, reader, is_train_line)
    return _from_log(parse_log(place), label) if trace is None else _from_trace(trace, label)


def _from_run(record: Run, label: str) -> Side:
    run = with_past(record)
    points = {
        line.iteration: Point(
            iteration=line.iteration,
            start=line.iteration,
            lm_loss=line.lm_loss,
            grad_norm=line.grad_norm,
            lr=line.lr,
            next_lr=line.next_lr,
            weight_decay=line.weight_decay,
            loss_scale=line.loss_scale,
            consumed_samples=line.consumed_samples,
            global_batch_size=line.global_batch_size,
            valid_tokens=line.valid_tokens,
            batch_hash=line.batch_hash,
            skipped=line.skipped,
        )
        for line in run.train
    }
    keyed = {(line.iteration, line.split, line.final): line for line in run.evaluations}
    return Side(
        label=label,
        path=run.path,
        printer="Lockstep run record",
        interval=1,
        points=points,
        evaluations={key: line.lm_loss for key, line in keyed.items()},
        samples={key: line.samples for key, line in keyed.items()},
        run=run,
        past=past_note(record),
    )


def _from_log(log: Log, label: str) -> Side:
    points = {}
    for end, line in sorted(log.lines.items()):
        start = log.window_start(end)
        before = log.lines.get(end - 1)
        points[end] = Point(
            iteration=end,
            start=start,
            lm_loss=line.lm_loss,
            grad_norm=line.grad_norm,
            lr=before.next_lr if before else None,
            next_lr=line.next_lr,
            loss_scale=line.loss_scale,
            consumed_samples=line.consumed_samples,
            global_batch_size=line.global_batch_size,
            skipped=line.skipped > 0 if start == end else line.skipped > end - start or None,
        )
    evaluations: dict[EvaluationKey, float | None] = {key: line.lm_loss for key, line in log.evaluations.items()}
    return Side(
        label=label,
        path=log.path,
        printer=f"console log of {log.printer}",
        interval=log.interval,
        points=points,
        evaluations=evaluations,
        samples=dict.fromkeys(evaluations),
        digits=CONSOLE,
        settings=log.settings,
        notes=[*log.notes, *log.settled.notes],
        conflict=log.settled.conflict,
    )


def _from_trace(trace: Trace, label: str) -> Side:
    where = str(trace.path)
    items = [Item(reading.point.iteration, reading.rank, reading.point) for reading in trace.readings]
    settled = settle(where, items)
    evaluations: dict[EvaluationKey, float | None] = {**settle_evaluations(where, trace.evaluations, settled)}
    if not settled.values and not evaluations:
        raise UserError(f"{where} holds no loss; it was read as {trace.format.title}")
    return Side(
        label=label,
        path=trace.path,
        printer=trace.format.title,
        interval=trace.interval or rhythm(settled.values),
        points=settled.values,
        evaluations=evaluations,
        samples=dict.fromkeys(evaluations),
        digits=trace.digits,
        settings=trace.settings,
        notes=[trace.format.facts, *trace.notes, *settled.notes],
        conflict=settled.conflict,
        tells_evaluations=bool(evaluations),
    )


@dataclass(frozen=True)
class Pairs:
    """Points of two sides over equal windows, and the windows that a side lacks (by last iteration); some lack both."""

    pairs: list[tuple[Point, Point]]
    missing_a: list[int]
    missing_b: list[int]


def align(a: Side, b: Side) -> Pairs:
    """Bring both sides to the coarser of their intervals and pair their points."""
    interval = max(a.interval, b.interval)
    regular_a, regular_b = _regular(a, interval), _regular(b, interval)
    there = sorted(regular_a | regular_b)
    ends = sorted({*there, *gaps(there, interval)})
    found_a = {end: _over(a, end, _start(end, a, b)) for end in there if end in regular_a}
    found_b = {end: _over(b, end, _start(end, a, b)) for end in there if end in regular_b}
    points_a = {end: point for end, point in found_a.items() if point}
    points_b = {end: point for end, point in found_b.items() if point}
    for end in points_a.keys() & points_b.keys():
        if _tell_nothing(points_a[end], points_b[end]):
            del points_a[end], points_b[end]
    return Pairs(
        pairs=[(points_a[end], points_b[end]) for end in ends if end in points_a and end in points_b],
        missing_a=[end for end in ends if end not in points_a],
        missing_b=[end for end in ends if end not in points_b],
    )


def _tell_nothing(a: Point, b: Point) -> bool:
    """Tell whether neither side has the loss of an iteration that both took."""
    return a.lm_loss is b.lm_loss is None and not (a.skipped and b.skipped)


def _regular(side: Side, interval: int) -> set[int]:
    """Return the ends of whole windows; a line outside the rhythm (a process's first) has no partner."""
    return {end for end in side.points if end % interval == 0} if interval > 1 else set(side.points)


def gaps(ends: Sequence[int], interval: int) -> list[int]:
    """Return the windows that are left out between others: those of a curve that goes on in its rhythm behind them.

    Where it goes on in another rhythm, as with lines ever farther apart, none is expected in between.
    """
    steps = [later - earlier for earlier, later in pairwise(ends)]
    if 2 * steps.count(interval) <= len(steps):
        return []
    last = max(number for number, step in enumerate(steps) if step == interval)
    found: list[int] = []
    for number, (earlier, later) in enumerate(pairwise(ends)):
        if number < last or number == last + 1 == len(steps) - 1:
            found += range(earlier + interval, later, interval)
    return found


def _start(end: int, a: Side, b: Side) -> int:
    """Return the first iteration of the wider of the two windows that end here."""
    return min(side.points[end].start for side in (a, b) if end in side.points)


def _over(side: Side, end: int, start: int) -> Point | None:
    """Return the side's point over ``start..end``, averaging finer points; None where one of them is missing."""
    parts = []
    position = end
    while position >= start:
        point = side.points.get(position)
        if point is None or point.start < start:
            return None
        parts.append(point)
        position = point.start - 1
    if len(parts) == 1:
        return parts[0]
    loss = _mean_loss(parts)
    return replace(
        parts[0], start=start, lm_loss=loss, averaged=True, lr=None, batch_hash=None, skipped=None, valid_tokens=None
    )


def _mean_loss(parts: Iterable[Point]) -> float | None:
    """Average as the console line does: over the iterations that made an update."""
    counted = [(p.lm_loss, p.iteration - p.start + 1) for p in parts if p.lm_loss is not None and not p.skipped]
    if not counted:
        return None
    return math.fsum(loss * weight for loss, weight in counted) / sum(weight for _, weight in counted)


def ruler(a: Side, b: Side) -> Ruler:
    """Return what compares numbers of both sides by the digits that both tell."""
    return Ruler(a.digits, b.digits)
