"""One side of a comparison: a run record or a console log, brought to one shape."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lockstep.lab.lineage import past_note, with_past
from lockstep.lab.logs import Log, parse_log
from lockstep.record import Run, load_run

EvaluationKey = tuple[int, str, bool]
"""Iteration, split, and whether the evaluation was made after training."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """What a side tells of one iteration, or of the iterations ``start`` to ``iteration`` that one line averages.

    ``lr`` is the learning rate that the iteration's update used, ``next_lr`` that of the following one; the rest
    belongs to the last iteration. None where the side does not tell.
    """

    iteration: int
    start: int
    lm_loss: float | None
    grad_norm: float | None = None
    lr: float | None = None
    next_lr: float | None = None
    weight_decay: float | None = None
    loss_scale: float | None = None
    consumed_samples: int | None = None
    global_batch_size: int | None = None
    valid_tokens: int | None = None
    batch_hash: str | None = None
    skipped: bool | None = None


@dataclass(frozen=True)
class Side:
    """A side of a comparison; ``run`` is None for a log, ``interval`` is the number of iterations a line averages.

    ``past`` says where a resumed run began.
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

    @property
    def printed(self) -> bool:
        """The numbers are those of a console line, cut to its digits."""
        return self.run is None

    @property
    def config(self) -> dict[str, Any] | None:
        """The resolved tree by dotted path, or None where it is not known."""
        return (self.run.config or None) if self.run else None

    def fact(self, name: str) -> Any:
        """Return an entry of the run record, or None."""
        return self.run.facts[name] if self.run else None

    @property
    def first(self) -> int | None:
        """The first iteration this side tells of."""
        return min((point.start for point in self.points.values()), default=None)


def load_side(path: Path | str, label: str) -> Side:
    """Read a run directory or a console log; a resumed run comes with the runs it continues.

    Raises:
        UserError: neither of the two, or damaged.
    """
    place = Path(path)
    return _from_log(parse_log(place), label) if place.is_file() else _from_run(load_run(place), label)


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
            skipped=line.skipped > 0 if start == end else None,
        )
    evaluations: dict[EvaluationKey, float | None] = {key: line.lm_loss for key, line in log.evaluations.items()}
    return Side(label, log.path, f"log of {log.printer}", log.interval, points, evaluations, dict.fromkeys(evaluations))


@dataclass(frozen=True)
class Pairs:
    """Points of two sides over equal windows, and the windows one side lacks (by last iteration)."""

    pairs: list[tuple[Point, Point]]
    missing_a: list[int]
    missing_b: list[int]


def align(a: Side, b: Side) -> Pairs:
    """Bring both sides to the coarser of their intervals and pair their points."""
    interval = max(a.interval, b.interval)
    regular_a, regular_b = _regular(a, interval), _regular(b, interval)
    ends = sorted(regular_a | regular_b)
    found_a = {end: _over(a, end, _start(end, a, b)) for end in ends if end in regular_a}
    found_b = {end: _over(b, end, _start(end, a, b)) for end in ends if end in regular_b}
    points_a = {end: point for end, point in found_a.items() if point}
    points_b = {end: point for end, point in found_b.items() if point}
    return Pairs(
        pairs=[(points_a[end], points_b[end]) for end in ends if end in points_a and end in points_b],
        missing_a=[end for end in ends if end not in points_a],
        missing_b=[end for end in ends if end not in points_b],
    )


def _regular(side: Side, interval: int) -> set[int]:
    """Return the ends of whole windows; a line outside the rhythm (a process's first) has no partner."""
    return {end for end in side.points if end % interval == 0} if interval > 1 else set(side.points)


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
    return replace(parts[0], start=start, lm_loss=_mean_loss(parts), lr=None, batch_hash=None, skipped=None)


def _mean_loss(parts: Iterable[Point]) -> float | None:
    """Average as the console line does: over the iterations that made an update."""
    counted = [(p.lm_loss, p.iteration - p.start + 1) for p in parts if p.lm_loss is not None and not p.skipped]
    if not counted:
        return None
    return math.fsum(loss * weight for loss, weight in counted) / sum(weight for _, weight in counted)


def as_printed(value: float | None, spec: str) -> float | None:
    """Cut a number to the digits of a console line; ``spec`` is its format (``.6E``)."""
    return None if value is None else float(format(value, spec))


PRINTED: dict[str, str] = {"lm_loss": ".6E", "lr": ".6E", "next_lr": ".6E", "grad_norm": ".3f", "loss_scale": ".1f"}
"""The formats of a console line."""


def reader(name: str, printed: bool) -> Callable[[Point], Any]:
    """Return how to read a number of a point: whole, or cut to the digits of a console line."""
    spec = PRINTED.get(name) if printed else None
    return (lambda p: as_printed(getattr(p, name), spec)) if spec else (lambda p: getattr(p, name))
