"""What a parser takes out of a foreign run, before repetitions are settled."""

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lockstep.lab.digits import Digits
from lockstep.lab.point import EvaluationKey, Point


@dataclass(frozen=True)
class Format:
    """A format: ``key`` is its name on the command line, ``facts`` say how its numbers are to be read."""

    key: str
    title: str
    facts: str


@dataclass(frozen=True)
class Settings:
    """Settings that a foreign run prints, by dotted path of the config tree.

    ``unmapped`` are those without a counterpart in the tree, as written; ``source`` says where they were printed.
    """

    source: str
    values: Mapping[str, Any]
    unmapped: Mapping[str, str]


@dataclass(frozen=True)
class Reading:
    """A point as one line tells it, with the rank that printed the line where the line says so."""

    point: Point
    rank: str | None = None


@dataclass
class Trace:
    """What a file tells, in its own order.

    ``evaluations`` come with the number of readings before them. ``interval`` is the number of iterations between two
    lines, None where the lines have to tell.
    """

    path: Path
    format: Format
    readings: list[Reading] = field(default_factory=list)
    evaluations: list[tuple[int, EvaluationKey, float]] = field(default_factory=list)
    digits: Mapping[str, Digits] = field(default_factory=dict)
    settings: Settings | None = None
    notes: list[str] = field(default_factory=list)
    interval: int | None = None

    def read(self, point: Point, rank: str | None = None) -> None:
        """Add a line of training."""
        self.readings.append(Reading(point, rank))

    def evaluate(self, iteration: int, loss: float, split: str = "valid", final: bool = False) -> None:
        """Add a line of an evaluation."""
        self.evaluations.append((len(self.readings), (iteration, split, final), loss))


def rhythm(iterations: Iterable[int]) -> int:
    """Return the number of iterations between two lines, as far as the lines tell."""
    ends = sorted(iterations)
    steps = [later - earlier for earlier, later in itertools.pairwise(ends)]
    if steps:
        common = max(sorted(set(steps)), key=steps.count)
        if ends[-1] % common == 0:
            return common
    return math.gcd(*(ends[1:] or ends)) if ends else 1


def number(text: str) -> float:
    """Return a written number; thousands may be set apart by commas.

    Raises:
        ValueError: it is none.
    """
    return float(text.replace(",", ""))
