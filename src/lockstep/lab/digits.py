"""How many digits a side tells of a number, and when two numbers are equal as far as both tell."""

import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lockstep.lab.point import Point

_SURE = 4
"""Significant digits that a number has at the least: a column of one or two digits decides nothing."""


@dataclass(frozen=True)
class Digits:
    """What is left of a number: ``significant`` digits, ``decimals``, float32, or all of it where none is given."""

    significant: int | None = None
    decimals: int | None = None
    single: bool = False

    @property
    def exact(self) -> bool:
        """Every digit of a float64 is told."""
        return self.significant is None and self.decimals is None and not self.single

    def unit(self, value: float) -> float:
        """Return the worth of the last digit that is told of ``value``; 0 if it is told whole."""
        if self.exact or not math.isfinite(value):
            return 0.0
        magnitude = math.floor(math.log10(abs(value))) if value else -45
        units = []
        if self.significant is not None:
            units.append(10.0 ** (magnitude + 1 - self.significant))
        if self.decimals is not None:
            units.append(10.0**-self.decimals)
        if self.single:
            units.append(2.0 ** (math.frexp(value)[1] - 24))
        return max(units)

    def cut(self, value: float) -> float:
        """Return ``value`` with the digits that are told."""
        if self.exact or not math.isfinite(value):
            return value
        if self.single:
            try:
                return float(struct.unpack("f", struct.pack("f", value))[0])
            except OverflowError:
                return math.copysign(math.inf, value)
        texts = [f"{value:.{self.significant - 1}E}"] if self.significant is not None else []
        texts += [f"{value:.{self.decimals}f}"] if self.decimals is not None else []
        return float(texts[0]) if len(texts) == 1 else max((float(t) for t in texts), key=lambda v: abs(v - value))

    def __str__(self) -> str:
        if self.single:
            return "float32"
        parts = [f"{self.significant} digits"] if self.significant is not None else []
        parts += [f"{self.decimals} decimals"] if self.decimals is not None else []
        return " and ".join(parts) or "every digit"


EXACT = Digits()
CONSOLE: dict[str, Digits] = {
    "lm_loss": Digits(significant=7),
    "lr": Digits(significant=7),
    "next_lr": Digits(significant=7),
    "grad_norm": Digits(decimals=3),
    "loss_scale": Digits(decimals=1),
}
"""What a console line of Megatron-LM, Bridge or Lockstep tells."""


def digits_of(texts: Iterable[str]) -> Digits:
    """Return the digits that a column of written numbers has, by its longest members; at least four significant ones.

    Trailing zeros that a printer left off are not missed: another number of the column has them.
    """
    significant = decimals = 0
    for text in texts:
        mantissa, _, exponent = text.strip().lower().lstrip("+-").partition("e")
        whole, _, fraction = mantissa.partition(".")
        if not (whole + fraction).isdigit():
            continue
        significant = max(significant, len((whole + fraction).lstrip("0")))
        decimals = max(decimals, len(fraction) - int(exponent or 0))
    if significant >= 15 or not significant:
        return EXACT
    return Digits(significant=max(significant, _SURE), decimals=max(decimals, 0) if significant > _SURE else None)


EVALUATION = "evaluation"
"""The loss of an evaluation, which has the digits of training losses where a side says nothing else."""


def _told(digits: Mapping[str, Digits], name: str) -> Digits:
    return digits.get(name) or (digits.get("lm_loss", EXACT) if name == EVALUATION else EXACT)


@dataclass(frozen=True)
class Ruler:
    """Compares numbers of two sides by the digits that both tell, by the name of the number."""

    a: Mapping[str, Digits]
    b: Mapping[str, Digits]

    def cut(self, name: str, value: Any) -> Any:
        """Return a number as the side with fewer digits would tell it."""
        if not (self.a or self.b) or not isinstance(value, float):
            return value
        return _told(self.b, name).cut(_told(self.a, name).cut(value))

    def unit(self, name: str, value: float) -> float:
        """Return the worth of the last digit that both tell."""
        return max(_told(self.a, name).unit(value), _told(self.b, name).unit(value))

    def same(self, name: str, a: Any, b: Any, averaged: bool = False) -> bool:
        """Tell whether one number can stand behind both as they are told; NaN stands behind nothing.

        Two numbers with equally many digits are the same only if they are written alike. With other digits, or where
        one was averaged from several, half of the last digit of each is left open.
        """
        if a == b:
            return True
        if not (isinstance(a, float | int) and isinstance(b, float | int) and math.isfinite(a) and math.isfinite(b)):
            return False
        units = _told(self.a, name).unit(a), _told(self.b, name).unit(b)
        if not averaged and math.isclose(*units, rel_tol=1e-6):
            return False
        return abs(a - b) <= sum(units) / 2 * (1 + 1e-6) + 1e-15 * abs(a)

    def same_in(self, name: str, pair: tuple[Point, Point]) -> bool:
        """Tell whether a number of two points is the same."""
        averaged = name == "lm_loss" and (pair[0].averaged or pair[1].averaged)
        return self.same(name, getattr(pair[0], name), getattr(pair[1], name), averaged)
