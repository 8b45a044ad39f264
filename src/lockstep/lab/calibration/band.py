"""The measured band: how far rounding takes a run's losses and gradient norms, by iteration."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lockstep.errors import UserError
from lockstep.record.schema import encode

BAND_FILE = "band.json"
BAND_SCHEMA = 1

FACTOR = 4.0
"""The band is so many times the spread; docs/calibrate.md has the error rates from which it was chosen."""

_FLOOR = 8 * 2.0**-23
"""Least relative width: a few FP32 ulps, which the order of a sum alone can take."""

QUANTITIES = ("lm_loss", "grad_norm")
Curve = Mapping[int, Mapping[str, float | None]]
"""Loss and gradient norm by iteration."""


@dataclass(frozen=True)
class Band:
    """What was measured of a run.

    Attributes:
        spread: by quantity and iteration, the root mean square distance of the altered runs from the run itself, the
            highest of an iteration and its neighbours.
        factor: the band is so many times the spread.
        made_from: what was run, in words.
        bitwise: whether a repeat gave every digit again.
        precision: by quantity, the largest distance of the same run in a wider precision; empty where none was run.
    """

    spread: dict[str, dict[int, float]]
    factor: float
    made_from: list[str]
    bitwise: bool
    precision: dict[str, float] = field(default_factory=dict)

    def width(self, quantity: str, iteration: int, value: float) -> float | None:
        """Return how far rounding takes a quantity at an iteration, around ``value``; None if not measured."""
        spread = self.spread.get(quantity, {}).get(iteration)
        if spread is None or not math.isfinite(spread):
            return None
        return max(self.factor * spread, _FLOOR * abs(value))

    @property
    def last(self) -> int:
        """The last iteration that was measured."""
        return max(self.spread["lm_loss"], default=0)

    def describe(self) -> str:
        """Say what the band is made of."""
        return f"{self.factor:g} times the spread of {', '.join(self.made_from)}"


def measure(run: Curve, altered: Sequence[Curve]) -> dict[str, dict[int, float]]:
    """Return the spread of altered runs around a run, by quantity and iteration."""
    found: dict[str, dict[int, float]] = {}
    for quantity in QUANTITIES:
        raw: dict[int, float] = {}
        for iteration, values in run.items():
            base = values[quantity]
            others = [curve[iteration][quantity] for curve in altered if iteration in curve]
            if base is None or not others or any(other is None for other in others):
                continue
            raw[iteration] = math.sqrt(sum((other - base) ** 2 for other in others if other is not None) / len(others))
        found[quantity] = {i: max(raw.get(j, 0.0) for j in (i - 1, i, i + 1)) for i in raw}
    return found


def apart(run: Curve, other: Curve) -> dict[str, float]:
    """Return the largest distance of two curves by quantity."""
    sizes: dict[str, float] = {}
    for quantity in QUANTITIES:
        pairs = [(values[quantity], other[i][quantity]) for i, values in run.items() if i in other]
        sizes[quantity] = max((abs(a - b) for a, b in pairs if a is not None and b is not None), default=0.0)
    return sizes


def write_band(band: Band, run_dir: Path) -> Path:
    """Write the band beside a record and return the file."""
    path = run_dir / BAND_FILE
    text = json.dumps({"schema": BAND_SCHEMA, **encode(asdict(band))}, indent=1, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")
    return path


def load_band(run_dir: Path) -> Band | None:
    """Return the band of a record; None where none was measured.

    Raises:
        UserError: it is damaged, or of a schema that this Lockstep does not know.
    """
    path = run_dir / BAND_FILE
    if not path.is_file():
        return None
    remedy = f"run `lockstep calibrate {run_dir}` again, or remove the file"
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        schema = found.pop("schema")
    except (ValueError, KeyError, AttributeError, TypeError):
        raise UserError(f"{path} is cut off or damaged; {remedy}") from None
    if schema != BAND_SCHEMA:
        raise UserError(f"{path} has schema {schema!r}, this Lockstep reads schema {BAND_SCHEMA}; {remedy}")
    try:
        spread = {name: {int(i): float(v) for i, v in values.items()} for name, values in found.pop("spread").items()}
        band = Band(spread=spread, **found)
        if set(spread) != set(QUANTITIES) or not band.factor > 0:
            raise ValueError("spread")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is cut off or damaged; {remedy}") from None
    return band
