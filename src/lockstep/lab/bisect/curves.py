"""Curves: how far two are apart, how far repeats of one are, and which of two ends a third is nearer to."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Literal

from lockstep.lab.calibration.band import Band
from lockstep.lab.side import EvaluationKey, Side

Key = EvaluationKey
"""Where a number stands: an iteration, with the split of an evaluation or an empty one."""
Numbers = dict[Key, float | None]
Judgement = Literal["good", "bad", "neither"]

QUANTITIES = ("lm loss", "grad norm", "evaluation loss")
"""What makes a curve, in the order in which it is asked for a difference."""

_MEASURED = {"lm loss": "lm_loss", "grad norm": "grad_norm", "evaluation loss": "lm_loss"}
"""Which quantity of a measured band is the one of a quantity here: evaluations have that of the training loss."""

BEYOND = 2.0
"""A number is beyond the noise where it lies more than so many times the spread of the repeats from good's."""


@dataclass(frozen=True)
class Curve:
    """The numbers of one run, by quantity and then by iteration or evaluation."""

    numbers: dict[str, Numbers]

    @classmethod
    def of(cls, side: Side) -> "Curve":
        """Take the curve of a run record or a console log."""
        points = {(at, "", False): point for at, point in side.points.items() if not point.skipped}
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
    at: int
    first: int
    size: float

    def __str__(self) -> str:
        size = f"{self.size:.3g}" if math.isfinite(self.size) else "a number that only one of them has"
        return (
            f"{self.quantity} parts at iteration {self.first}; the largest difference is {size}, at iteration {self.at}"
        )


def distance(a: Curve, b: Curve, quantity: str) -> Distance:
    """Return how far two curves are apart in one quantity."""
    sizes = _sizes(a, b, quantity).values()
    return Distance(sum(map(math.isinf, sizes)), math.fsum(size for size in sizes if math.isfinite(size)))


def _sizes(a: Curve, b: Curve, quantity: str) -> dict[Key, float]:
    """Return the differences in the order of the run: infinite where only one side has a finite number."""
    x, y = a.numbers[quantity], b.numbers[quantity]
    return {key: _size(x.get(key), y.get(key)) for key in sorted({*x, *y})}


def _size(x: float | None, y: float | None) -> float:
    known = [value for value in (x, y) if value is not None and math.isfinite(value)]
    return abs(known[0] - known[1]) if len(known) == 2 else math.inf if known else 0.0


@dataclass(frozen=True)
class Noise:
    """What repeats of one run differ by. ``spread`` grows along a run: the widest so far, by iteration.

    With a ``band``, what rounding was measured to do to that run, nothing inside it counts either.
    """

    repeats: int
    spread: dict[str, dict[Key, float]]
    worst: dict[str, Distance]
    band: Band | None = None

    @property
    def none(self) -> bool:
        """The repeats are equal in every digit."""
        return all(found == Distance(0, 0.0) for found in self.worst.values())

    def beyond(self, good: Curve, other: Curve, quantity: str) -> Largest | None:
        """Return the largest difference where any is beyond the noise, else None."""
        sizes = _sizes(good, other, quantity)
        outside = [key for key, size in sizes.items() if size > self._allowed(good, quantity, key)]
        if not outside:
            return None
        at = max(outside, key=lambda key: sizes[key])
        return Largest(quantity, at[0], outside[0][0], sizes[at])

    def with_band(self, band: Band) -> "Noise":
        """Return the noise with a measured band."""
        return replace(self, band=band)

    def _allowed(self, good: Curve, quantity: str, key: Key) -> float:
        """Return how far from good's a number may lie and still tell nothing."""
        noise = BEYOND * self.spread[quantity].get(key, 0.0)
        value = good.numbers[quantity].get(key)
        if self.band is None or value is None or not math.isfinite(value):
            return noise
        return max(noise, self.band.width(_MEASURED[quantity], key[0], value) or 0.0)


def measure(repeats: Sequence[Curve]) -> Noise:
    """Return the noise of a run from its repeats; without a second one every digit counts."""
    spread: dict[str, dict[Key, float]] = {}
    worst: dict[str, Distance] = {}
    for quantity in QUANTITIES:
        widest: dict[Key, float] = {}
        pairs = list(combinations(repeats, 2))
        for a, b in pairs:
            for key, size in _sizes(a, b, quantity).items():
                widest[key] = max(widest.get(key, 0.0), size)
        so_far = 0.0
        spread[quantity] = {}
        for key, size in sorted(widest.items()):
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
        """Put a curve on one side; ``neither`` where it lies between both within the noise, or far from both.

        Where a band was measured, good is what lies inside it, and not what is nearer to good.
        """
        banded = self.noise.band is not None
        if self.any_change or banded:
            outside = self.noise.beyond(self.good, curve, self.quantity) is not None
            if self.any_change or not outside:
                return "bad" if outside else "good"
        to_good = distance(curve, self.good, self.quantity)
        to_bad = distance(curve, self.bad, self.quantity)
        if min(to_good, to_bad) > self.span:
            return "neither"
        if banded:
            return "bad"
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
