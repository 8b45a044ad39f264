"""Iterations that a log tells more than once: ranks that print alike, a resume, or two runs in one file."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Generic, NamedTuple, TypeVar

from lockstep.errors import UserError
from lockstep.lab.point import EvaluationKey
from lockstep.lab.spans import spans

T = TypeVar("T")


class Item(NamedTuple, Generic[T]):
    """A line of a log: ``rank`` is None where the line does not say who printed it."""

    iteration: int
    rank: str | None
    value: T


@dataclass
class Settled(Generic[T]):
    """One value an iteration. ``begins`` are the first iterations of the processes that printed them.

    ``conflict`` says where a resumed run printed an iteration again with another number.
    """

    values: dict[int, T] = field(default_factory=dict)
    begins: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    conflict: str | None = None
    resumes: list[tuple[int, int]] = field(default_factory=list)
    """Where in the sequence of lines a process resumed, and its first iteration."""

    def begin(self, iteration: int) -> int:
        """Return the first iteration of the process that printed ``iteration``."""
        return max((first for first in self.begins if first <= iteration), default=iteration)


def settle(where: str, items: Sequence[Item[T]]) -> Settled[T]:
    """Keep one value an iteration: after a resume the later one, as training went on from there.

    Values are compared by ``repr``, as NaN differs from itself although both lines print the same text.

    Raises:
        UserError: ranks that print different numbers, or two runs in one file.
    """
    streams = _streams(items)
    settled: Settled[T] = Settled()
    for stream in streams:
        segments = _segments(where, stream)
        if len(streams) == 1:
            for position, segment in segments.items():
                _append(where, settled, position, segment)
            return settled
        for item in (item for segment in segments.values() for item in segment.values()):
            held = settled.values.setdefault(item.iteration, item.value)
            if repr(held) != repr(item.value):
                raise UserError(
                    f"{where}: ranks print different numbers for iteration {item.iteration}; "
                    "give the log of one rank, or one with the average over all ranks"
                )
        settled.begins = [min(settled.values)]
    return settled


def _streams(items: Sequence[Item[T]]) -> list[list[Item[T]]]:
    """Split by rank where ranks print between each other; ranks one after the other are one run that moved."""
    changes = sum(a.rank != b.rank for a, b in pairwise(items))
    ranks = list(dict.fromkeys(item.rank for item in items))
    if changes < max(len(ranks), 2):
        return [list(items)]
    return [[item for item in items if item.rank == rank] for rank in ranks]


def _segments(where: str, items: Iterable[Item[T]]) -> dict[int, dict[int, Item[T]]]:
    """Split where the iterations go back; by the position of the first line."""
    segments: dict[int, dict[int, Item[T]]] = {}
    start = 0
    previous: Item[T] | None = None
    for position, item in enumerate(items):
        if previous is not None and item.iteration == previous.iteration:
            if repr(item.value) != repr(previous.value):
                raise UserError(
                    f"{where} prints iteration {item.iteration} twice with different numbers; "
                    "split it into one file a run, or one a rank"
                )
            continue
        if previous is None or item.iteration < previous.iteration:
            start = position
            segments[start] = {}
        segments[start][item.iteration] = item
        previous = item
    return segments


def _append(where: str, settled: Settled[T], position: int, segment: dict[int, Item[T]]) -> None:
    first = min(segment)
    if not settled.values:
        settled.values = {i: item.value for i, item in segment.items()}
        settled.begins = [first]
        return
    again = [i for i in segment if i in settled.values]
    other = [i for i in again if repr(segment[i].value) != repr(settled.values[i])]
    if first <= min(settled.values):
        if other:
            raise UserError(
                f"{where} prints iteration {other[0]} twice with different numbers and starts again at iteration "
                f"{first}: two runs, or one that was started over; split it into one file a run"
            )
        settled.values |= {i: item.value for i, item in segment.items()}
        settled.begins = sorted({*settled.begins, first})
        return
    settled.resumes.append((position, first))
    _note_resume(settled, first, again, other)
    dropped = [i for i in sorted(settled.values) if i >= first and i not in segment]
    if dropped:
        settled.notes.append(f"{spans(dropped)} left out: the run went back to iteration {first} and did not return")
    settled.values = {i: value for i, value in settled.values.items() if i < first}
    settled.values |= {i: item.value for i, item in segment.items()}
    settled.begins = [i for i in settled.begins if i < first] + [first]


def _note_resume(settled: Settled[T], first: int, again: list[int], other: list[int]) -> None:
    if not again:
        settled.notes.append(f"resumes at iteration {first}, without iterations that are printed twice")
        return
    text = f"resumes at iteration {first}: {spans(again)} printed twice"
    if not other:
        settled.notes.append(f"{text}, with equal numbers")
        return
    settled.notes.append(f"{text}, {len(other)} of them with different numbers; the later ones count")
    settled.conflict = settled.conflict or f"iteration {other[0]} is printed twice with different numbers"


def settle_evaluations(
    where: str, evaluations: Iterable[tuple[int, EvaluationKey, T]], settled: Settled[Any]
) -> dict[EvaluationKey, T]:
    """Keep one value an evaluation; each comes with the number of training lines before it.

    Evaluations of iterations that a resume went back on are dropped.

    Raises:
        UserError: an evaluation has two values, and no resume lies between them.
    """
    kept: dict[EvaluationKey, tuple[int, T]] = {}
    for position, key, value in evaluations:
        if any(position <= at and key[0] >= first for at, first in settled.resumes):
            continue
        if key in kept and repr(kept[key][1]) != repr(value):
            raise UserError(
                f"{where} prints the {key[1]} loss at iteration {key[0]} twice with different numbers; "
                "split it into one file a run"
            )
        kept[key] = (position, value)
    return {key: value for key, (_, value) in kept.items()}
