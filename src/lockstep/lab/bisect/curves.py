"""Curves: how far two are apart, how far repeats of one are, and which of two ends a third is nearer to."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

from lockstep.lab.side import Side

Numbers = dict[Hashable, float | None]
Judgement = Literal["good", "bad", "neither"]

QUANTITIES = ("lm loss", "grad norm", "evaluation loss")
"""What makes a curve, in the order in which it is asked for a difference."""

BEYOND = 2.0
"""A number is beyond the noise where it lies more than so many times the spread of the repeats from good's."""


@dataclass(frozen=True)
class Curve:
    """The numbers of one run, by quantity and then by iteration or evaluation."""

    numbers: dict[str, Numbers]

    @classmethod
    def of(cls, side: Side) -> "Curve":
        """Take the curve of a run record or a console log."""
        points = {at: point for at, point in side.points.items() if not point.skipped}
        return cls(
            {
                "lm loss": {at: point.lm_loss for at, point in points.items()},
                "grad norm": {at: point.grad_norm for at, point in points.items()},
                "evaluation loss": dict(side.evaluations),
            }
        )


@dataclass(frozen=True, order=True)
class Distance:
    """How far two curves are apart: first by numbers that only one of them has, finite, then by the sum of the rest."""

    unlike: int
    apart: float


@dataclass(frozen=True)
class Largest:
    """The largest difference of two curves: where, and how much (infinite where only one has a finite number)."""

    quantity: str
    at: Hashable
    first: Hashable
    size: float

    def __str__(self) -> str:
        where = f"iteration {self.at}" if isinstance(self.at, int) else f"iteration {self.at[0]}"  # type: ignore[index]
        since = f"iteration {self.first}" if isinstance(self.first, int) else f"iteration {self.first[0]}"  # type: ignore[index]
        size = f"{self.size:.3g}" if math.isfinite(self.size) else "a number that only one of them has"
        return f"{self.quantity} parts at {since}; the largest difference is {size}, at {where}"


def distance(a: Curve, b: Curve, quantity: str) -> Distance:
    """Return how far two curves are apart in one quantity."""
    unlike, apart = 0, []
    for x, y in _pairs(a, b, quantity).values():
        if _finite(x) and _finite(y):
            apart.append(abs(x - y))  # type: ignore[operator]
        elif _finite(x) or _finite(y):
            unlike += 1
    return Distance(unlike, math.fsum(apart))


def _pairs(a: Curve, b: Curve, quantity: str) -> dict[Hashable, tuple[float | None, float | None]]:
    x, y = a.numbers[quantity], b.numbers[quantity]
    keys = sorted({*x, *y}, key=lambda key: (key,) if isinstance(key, int) else tuple(map(str, key)))  # type: ignore[arg-type]
    return {key: (x.get(key), y.get(key)) for key in keys}


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


@dataclass(frozen=True)
class Noise:
    """What repeats of one run differ by. ``spread`` grows along a run: the widest so far, by iteration."""

    repeats: int
    spread: dict[str, dict[Hashable, float]]
    worst: dict[str, Distance]

    @property
    def none(self) -> bool:
        """The repeats are equal in every digit."""
        return all(found == Distance(0, 0.0) for found in self.worst.values())

    def beyond(self, good: Curve, other: Curve, quantity: str) -> Largest | None:
        """Return the largest difference where any is beyond the noise, else None."""
        outside: list[tuple[Hashable, float]] = []
        for key, (x, y) in _pairs(good, other, quantity).items():
            if _finite(x) and _finite(y):
                size = abs(x - y)  # type: ignore[operator]
                if size > BEYOND * self.spread[quantity].get(key, 0.0):
                    outside.append((key, size))
            elif _finite(x) or _finite(y):
                outside.append((key, math.inf))
        if not outside:
            return None
        at, size = max(outside, key=lambda found: found[1])
        return Largest(quantity, at, outside[0][0], size)


def measure(repeats: Sequence[Curve]) -> Noise:
    """Return the noise of a run from its repeats; without a second one every digit counts."""
    spread: dict[str, dict[Hashable, float]] = {}
    worst: dict[str, Distance] = {}
    for quantity in QUANTITIES:
        widest: dict[Hashable, float] = {}
        pairs = list(combinations(repeats, 2))
        for a, b in pairs:
            for key, (x, y) in _pairs(a, b, quantity).items():
                size = abs(x - y) if _finite(x) and _finite(y) else 0.0  # type: ignore[operator]
                widest[key] = max(widest.get(key, 0.0), size)
        so_far = 0.0
        spread[quantity] = {}
        for key, size in widest.items():
            so_far = max(so_far, size)
            spread[quantity][key] = so_far
        worst[quantity] = max((distance(a, b, quantity) for a, b in pairs), default=Distance(0, 0.0))
    return Noise(len(repeats), spread, worst)


@dataclass(frozen=True)
class Yardstick:
    """The two ends of a history, and the rule that puts every commit between them on one side.

    Attributes:
        quantity: the first quantity in which the ends differ beyond the noise; it alone is looked at.
        any_change: bad is what differs from good at all, instead of what is nearer to bad.
    """

    good: Curve
    bad: Curve
    noise: Noise
    quantity: str
    any_change: bool = False

    @property
    def span(self) -> Distance:
        """The distance of the two ends."""
        return distance(self.good, self.bad, self.quantity)

    def judge(self, curve: Curve) -> Judgement:
        """Put a curve on one side; ``neither`` where it lies between both within the noise, or far from both."""
        if self.any_change:
            return "bad" if self.noise.beyond(self.good, curve, self.quantity) else "good"
        to_good = distance(curve, self.good, self.quantity)
        to_bad = distance(curve, self.bad, self.quantity)
        if min(to_good, to_bad) > self.span:
            return "neither"
        if to_good.unlike == to_bad.unlike and (
            abs(to_good.apart - to_bad.apart) <= self.noise.worst[self.quantity].apart
        ):
            return "neither"
        return "good" if to_good < to_bad else "bad"

    def share(self, before: Curve, after: Curve) -> float | None:
        """Return how much of the way from good to bad one commit went, as a fraction; None where it has no size."""
        span, step = self.span, distance(before, after, self.quantity)
        if span.unlike or step.unlike or not span.apart:
            return None
        return step.apart / span.apart


def yardstick(good: Curve, bad: Curve, noise: Noise, any_change: bool) -> Yardstick | None:
    """Return the rule for a history, or None where its ends differ by no more than the noise."""
    for quantity in QUANTITIES:
        if noise.beyond(good, bad, quantity):
            return Yardstick(good, bad, noise, quantity, any_change)
    return None
