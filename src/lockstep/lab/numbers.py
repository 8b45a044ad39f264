"""The last step of a comparison: losses, gradient norms and evaluations, number by number."""

import math
from dataclasses import dataclass
from typing import Literal

from lockstep.lab.bands import loss_band, norm_band
from lockstep.lab.calibration.band import Band
from lockstep.lab.digits import EVALUATION, Ruler
from lockstep.lab.point import EvaluationKey, Point
from lockstep.lab.side import Pairs, Side, ruler
from lockstep.lab.stages import both

Grade = Literal["equal", "inside", "outside"]
LOSS, NORM = "lm_loss", "grad_norm"


@dataclass(frozen=True)
class Mismatch:
    """A number that differs. ``band`` is how far rounding may take it, as measured or by a rule.

    ``unmeasured_band`` is the rule for low precision; ``float32`` that the band is what float32 explains, and narrower.
    ``key`` is set for an evaluation.
    """

    iteration: int
    what: str
    a: float | None
    b: float | None
    band: float
    grade: Grade
    key: EvaluationKey | None = None
    measured: bool = False
    unmeasured_band: float = 0.0
    float32: bool = False

    @property
    def size(self) -> float:
        """The distance of the two; infinite where one is missing or not a number."""
        if self.a is None or self.b is None:
            return math.inf
        distance = abs(self.a - self.b)
        return math.inf if math.isnan(distance) else distance

    @property
    def spelled(self) -> str:
        """Name the number and where it stands."""
        if self.key:
            return f"{self.what} of the {evaluation_name(self.key)}"
        return f"{self.what} at iteration {self.iteration}"


@dataclass(frozen=True)
class Row:
    """One line of the table: both sides at one iteration, or over ``start`` to ``iteration``."""

    iteration: int
    start: int
    loss_a: float | None
    loss_b: float | None
    norm_a: float | None
    norm_b: float | None
    lr_a: float | None
    lr_b: float | None
    grade: Grade
    band: float = 0.0

    @property
    def difference(self) -> float | None:
        """Loss of B minus loss of A."""
        return None if self.loss_a is None or self.loss_b is None else self.loss_b - self.loss_a


@dataclass(frozen=True)
class EvaluationRow:
    """One evaluation of both sides."""

    key: EvaluationKey
    loss_a: float | None
    loss_b: float | None
    grade: Grade


@dataclass(frozen=True)
class Numbers:
    """What the numbers say. ``mismatches`` are in the order in which a run meets them.

    ``float32`` tells that both runs compute in float32, which bounds the first iterations where nothing is measured.
    """

    rows: list[Row]
    evaluations: list[EvaluationRow]
    mismatches: list[Mismatch]
    missing_evaluations: dict[str, list[EvaluationKey]]
    float32: bool = False

    @property
    def compared(self) -> int:
        """Numbers of losses that both sides tell, evaluations included."""
        known = [row for row in self.rows if row.loss_a is not None and row.loss_b is not None]
        return len(known) + len(self.evaluations)

    @property
    def loss_rule(self) -> str:
        """What bounds a loss where nothing is measured."""
        coarse = "half a BF16 ulp of the loss"
        return f"what float32 explains, at most {coarse}" if self.float32 else coarse

    @property
    def first_outside(self) -> Mismatch | None:
        """The first number that rounding cannot explain."""
        return next((m for m in self.mismatches if m.grade == "outside"), None)

    def losses(self) -> list[Mismatch]:
        """Return the mismatches of training losses."""
        return [m for m in self.mismatches if m.what == LOSS and m.key is None]


def judge(a: float | None, b: float | None, band: float) -> Grade:
    """Grade two numbers: NaN equals nothing, not even NaN; a number never equals a missing one."""
    if a is None or b is None:
        return "equal" if a is b else "outside"
    if a == b:
        return "equal"
    return "inside" if abs(a - b) <= band else "outside"


def compare_numbers(a: Side, b: Side, pairs: Pairs, measured: Band | None = None) -> Numbers:
    """Compare losses, gradient norms, loss scales, skipped iterations and evaluations, by a measured band if any."""
    bounds = _Bounds(ruler(a, b), measured, computes_in_float32(a) and computes_in_float32(b))
    names = _comparable(pairs)
    rows, mismatches = [], []
    for pair in pairs.pairs:
        found = [m for m in (_compare(name, pair, bounds) for name in names) if m]
        mismatches += found
        rows.append(_row(pair, bounds, found))
    shared = [key for key in a.evaluations if key in b.evaluations]
    evaluations = []
    for key in sorted(shared, key=_run_order):
        row, found = _evaluation(a, b, key, bounds)
        evaluations.append(row)
        mismatches += found
    mismatches.sort(key=lambda m: (m.iteration, m.key is not None))
    told = a.tells_evaluations and b.tells_evaluations
    missing = {
        "A": sorted((key for key in b.evaluations if told and key not in a.evaluations), key=_run_order),
        "B": sorted((key for key in a.evaluations if told and key not in b.evaluations), key=_run_order),
    }
    return Numbers(rows, evaluations, mismatches, missing, bounds.float32)


def _comparable(pairs: Pairs) -> list[str]:
    """Return what both sides tell at all; a number that one side never tells is not a difference."""
    names = (LOSS, NORM, "loss_scale", "skipped")
    return [name for name in names if name == LOSS or any(both(pair, name) for pair in pairs.pairs)]


@dataclass(frozen=True)
class _Width:
    """How far rounding may take a number, how far in low precision where nothing is measured, and how that is known."""

    band: float = 0.0
    coarse: float = 0.0
    measured: bool = False
    float32: bool = False


@dataclass(frozen=True)
class _Bounds:
    """What bounds the numbers of a pair: the digits that both tell, a measured band, the precision of both."""

    rule: Ruler
    measured: Band | None
    float32: bool

    def width(self, name: str, iteration: int, a: float | None, b: float | None, updates: int) -> _Width:
        """Return how far rounding may take a number that comes after so many updates."""
        if name not in (LOSS, NORM) or a is None or b is None or not (math.isfinite(a) and math.isfinite(b)):
            return _Width()
        digit = self.rule.unit(name, min(abs(a), abs(b)))
        coarse = loss_band(a, b) if name == LOSS else norm_band(a, b, digit)
        width = self.measured.width(name, iteration, min(abs(a), abs(b))) if self.measured else None
        if width is not None:
            return _Width(width + 1.5 * digit, coarse, measured=True)
        if not self.float32:
            return _Width(coarse, coarse)
        fine = loss_band(a, b, updates) if name == LOSS else norm_band(a, b, digit, updates)
        return _Width(fine, coarse, float32=fine < coarse)


def computes_in_float32(side: Side) -> bool:
    """Tell whether a run is known to compute in nothing coarser than float32."""
    features, environment = side.fact("features") or {}, side.fact("environment") or {}
    narrow = any(environment.get(name, "0") != "0" for name in _TF32)
    return features.get("precision") == "float32" and features.get("float8", "none") == "none" and not narrow


_TF32 = ("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE")


def _compare(name: str, pair: tuple[Point, Point], bounds: _Bounds) -> Mismatch | None:
    rule = bounds.rule
    a, b = (rule.cut(name, getattr(point, name)) for point in pair)
    if name in (LOSS, NORM) and pair[0].skipped and pair[1].skipped and not (_finite(a) or _finite(b)):
        return None  # Both overflowed and threw the step away: no update used these numbers.
    if rule.same_in(name, pair):
        return None
    at = pair[0].iteration
    width = bounds.width(name, at, a, b, at - 1)
    grade = judge(a, b, width.band)
    return None if grade == "equal" else _mismatch(at, name, a, b, grade, width)


def _mismatch(
    at: int,
    name: str,
    a: float | None,
    b: float | None,
    grade: Grade,
    width: _Width,
    key: EvaluationKey | None = None,
) -> Mismatch:
    return Mismatch(at, name, a, b, width.band, grade, key, width.measured, width.coarse, width.float32)


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _row(pair: tuple[Point, Point], bounds: _Bounds, found: list[Mismatch]) -> Row:
    first, rule = pair[0], bounds.rule
    values: dict[str, float | None] = {}
    # The learning rate of the update itself where both sides tell it, else the following one, as a console prints it.
    lr = "lr" if both(pair, "lr") else "next_lr"
    for name, column in ((LOSS, "loss"), (NORM, "norm"), (lr, "lr")):
        values[f"{column}_a"], values[f"{column}_b"] = (rule.cut(name, getattr(point, name)) for point in pair)
    band = bounds.width(LOSS, first.iteration, values["loss_a"], values["loss_b"], first.iteration - 1).band
    return Row(iteration=first.iteration, start=first.start, grade=worst([m.grade for m in found]), band=band, **values)


def worst(grades: list[Grade]) -> Grade:
    """Return the worst of several grades; ``equal`` for none."""
    return "outside" if "outside" in grades else "inside" if "inside" in grades else "equal"


def _evaluation(a: Side, b: Side, key: EvaluationKey, bounds: _Bounds) -> tuple[EvaluationRow, list[Mismatch]]:
    rule = bounds.rule
    losses = a.evaluations[key], b.evaluations[key]
    loss_a, loss_b = (rule.cut(EVALUATION, loss) for loss in losses)
    # An evaluation is as far off as the training loss beside it.
    width = bounds.width(LOSS, key[0], loss_a, loss_b, key[0])
    found = []
    grade = "equal" if rule.same(EVALUATION, *losses) else judge(loss_a, loss_b, width.band)
    if loss_a is None and loss_b is None:
        grade = "outside"
    if grade != "equal":
        found.append(_mismatch(key[0], LOSS, loss_a, loss_b, grade, width, key))
    samples_a, samples_b = a.samples[key], b.samples[key]
    if samples_a is not None and samples_b is not None and samples_a != samples_b:
        found.append(Mismatch(key[0], "samples", samples_a, samples_b, 0.0, "outside", key))
    return EvaluationRow(key, loss_a, loss_b, worst([m.grade for m in found])), found


def _run_order(key: EvaluationKey) -> tuple[int, bool, bool, str]:
    """Sort evaluations as a run makes them: those during training, then the final ones, validation before test."""
    iteration, split, final = key
    return iteration, final, split == "test", split


def evaluation_name(key: EvaluationKey) -> str:
    """Spell an evaluation: ``valid evaluation at iteration 10`` or ``final test evaluation``."""
    iteration, split, final = key
    return f"{'final ' if final else ''}{split} evaluation at iteration {iteration}"
