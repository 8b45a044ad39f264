"""Alignment by consumed samples or tokens, for runs whose iterations have other sizes."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from lockstep.lab.point import Point
from lockstep.lab.side import Side

Unit = Literal["samples", "tokens"]
_UNITS: tuple[tuple[Unit, str], ...] = (("samples", "consumed_samples"), ("tokens", "consumed_tokens"))


@dataclass(frozen=True)
class Aligned:
    """Both sides, counted in the iterations of ``a``.

    ``sizes`` says how the sizes of their iterations differ and ``unit`` by what they were aligned; empty by iteration.
    """

    a: Side
    b: Side
    unit: str = ""
    sizes: str = ""


def by_size(a: Side, b: Side) -> Aligned:
    """Count B in A's iterations where one iteration takes another number of samples, or tokens, on both sides.

    Iterations of B that end within one of A are joined, those that take several of A's become an average over them.
    What ends nowhere on the other side is missing there. Without these counts on both sides, or with equal ones, the
    sides stay as they are.
    """
    for unit, name in _UNITS:
        if unit == "tokens":
            a, b = _with_tokens(a), _with_tokens(b)
        size_a, size_b = _size(a, name), _size(b, name)
        if size_a is None or size_b is None:
            continue
        if size_a == size_b:
            return Aligned(a, b)
        ends = {getattr(point, name): point.iteration for point in a.points.values()}
        ends |= {getattr(p, name) - size_a * (p.iteration - p.start + 1): p.start - 1 for p in a.points.values()}
        return Aligned(
            a,
            _counted(b, name, size_b, ends),
            unit,
            f"an iteration takes {size_a} {unit} in A and {size_b} in B",
        )
    return Aligned(a, b)


def _with_tokens(side: Side) -> Side:
    """Add consumed tokens where the record tells samples and their length."""
    length = (side.config or {}).get("model.seq_length")
    if not isinstance(length, int) or not side.points:
        return side
    points = {
        end: point
        if point.consumed_samples is None or point.consumed_tokens is not None
        else replace(point, consumed_tokens=point.consumed_samples * length)
        for end, point in side.points.items()
    }
    return replace(side, points=points)


def _size(side: Side, name: str) -> int | None:
    """Return how many samples or tokens an iteration takes; None where that is not told, or changes."""
    told = sorted((p.iteration, getattr(p, name)) for p in side.points.values() if getattr(p, name) is not None)
    if len(told) < len(side.points) or not told:
        return None
    (first, start), (last, end) = told[0], told[-1]
    if first == last:
        size, rest = divmod(end, last)
    else:
        size, rest = divmod(end - start, last - first)
    steady = all(count - start == size * (iteration - first) for iteration, count in told)
    return size if size > 0 and not rest and steady else None


def _counted(b: Side, name: str, size: int, ends: dict[int, int]) -> Side:
    points: dict[int, Point] = {}
    parts: list[Point] = []
    for _, point in sorted(b.points.items()):
        parts.append(point)
        end = getattr(point, name)
        begin = end - size * (point.iteration - parts[0].start + 1)
        if end in ends and begin in ends and begin < end:
            points[ends[end]] = _joined(parts, ends[begin] + 1, ends[end])
            parts = []
        elif end in ends:
            parts = []
    evaluations = {
        (ends[key[0] * size], key[1], key[2]): loss for key, loss in b.evaluations.items() if key[0] * size in ends
    }
    samples = dict.fromkeys(evaluations)
    interval = math.gcd(*points) if points else b.interval
    return replace(b, points=points, evaluations=evaluations, samples=samples, interval=interval)


def _joined(parts: Iterable[Point], start: int, iteration: int) -> Point:
    parts = list(parts)
    last = parts[-1]
    losses = [part.lm_loss for part in parts if part.lm_loss is not None and not part.skipped]
    loss = math.fsum(losses) / len(losses) if losses else None
    return replace(
        last,
        iteration=iteration,
        start=start,
        lm_loss=loss,
        lr=None,
        next_lr=None,
        batch_hash=None,
        skipped=None,
        valid_tokens=None,
        averaged=len(parts) > 1,
    )
